"""Bars never stop the work, and loops never end before their time."""

from __future__ import annotations

import io
import sys

import pytest
import torch
from torch import nn

import stseg
from stseg import DataError

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = [torch.rand(3, 20, 20, generator=GENERATOR) for _ in range(8)]
LABELED = [(image, (image[0] > 0.5).byte()) for image in IMAGES[:3]]
CONFIG = stseg.TrainConfig(steps=3, batch_size=2, weak=stseg.WeakAugment(16))


class Broken(io.StringIO):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error

    def flush(self):
        raise self.error


STREAMS = {
    "none": None,
    "pipe": Broken(BrokenPipeError(32, "Broken pipe")),
    "full": Broken(OSError(28, "No space left on device")),
    "closed": Broken(ValueError("I/O operation on closed file")),
}


@pytest.mark.parametrize("kind", STREAMS)
def test_a_run_needs_no_standard_error(monkeypatch, kind):
    monkeypatch.setattr(sys, "stderr", STREAMS[kind])
    trainer = stseg.SelfTrainer(lambda: nn.Conv2d(3, 2, 1), num_classes=2, config=CONFIG, progress=True)
    result = trainer.fit(LABELED, IMAGES[3:], val=[(image + 0, mask) for image, mask in LABELED])
    monkeypatch.undo()
    assert list(result.seconds)[-1] == "student-2"


class Ends(list):
    """Raises an error out of one item, such as that of a bare ``next()``."""

    def __init__(self, items, error, after=0):
        super().__init__(items)
        self.error, self.after, self.reads = error, after, 0

    def __getitem__(self, index):
        self.reads += 1
        if index == 2 and self.reads > self.after:
            raise self.error
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("error", [StopIteration(), KeyError("x"), RuntimeError("broken")], ids=repr)
def test_an_error_of_a_data_set_names_the_item(error, workers):
    network = nn.Conv2d(3, 2, 1)
    labeler = stseg.PseudoLabeler(network, num_classes=2, num_workers=workers, progress=False)
    options = {"num_classes": 2, "num_workers": workers, "progress": False}
    config = stseg.TrainConfig(steps=40, batch_size=2, weak=stseg.WeakAugment(16), num_workers=workers)
    for use in (
        lambda after: labeler.label(Ends(IMAGES, error, after)),
        lambda after: stseg.evaluate(network, Ends(LABELED, error, after), **options),
        lambda after: stseg.ConfidenceRanker(network, **options).rank(Ends(IMAGES, error, after)),
        lambda after: stseg.fit(network, Ends(LABELED, error, after), config, progress=False),
        lambda after: stseg.fit(
            stseg.methods.FixMatch(network), LABELED, config, unlabeled=Ends(IMAGES, error, after), progress=False
        ),
    ):
        with pytest.raises(DataError, match=rf"item '2' cannot be read: {type(error).__name__}"):
            use(0)


def test_training_names_the_item_of_an_error_that_comes_late():
    config = stseg.TrainConfig(steps=400, batch_size=2, weak=stseg.WeakAugment(16))
    with pytest.raises(DataError, match="item '2' cannot be read: StopIteration"):
        stseg.fit(nn.Conv2d(3, 2, 1), Ends(LABELED, StopIteration(), after=200), config, progress=False)
