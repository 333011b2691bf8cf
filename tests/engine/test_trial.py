"""What a method gets wrong is found in one step on a copy, before time is spent."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from small import Entropic, network, pairs, same
from torch import nn

import stseg
from stseg import Batch, Losses, Method, MethodError, Segmenter, TrainConfig, fit
from stseg.data.items import Items
from stseg.engine.batches import Streams
from stseg.engine.trial import try_step
from stseg.methods import Supervised

CONFIG = TrainConfig(steps=3, batch_size=2, weak=None)
IMAGES = [image for image, _ in pairs(4, seed=2)]


class Simple(Method):
    """Supervised, by a user; what a test gives it takes the place of a part."""

    uses_unlabeled = False

    def __init__(self, *, losses=None, after=None, make=None) -> None:
        super().__init__()
        self.model = Segmenter(network())
        self._losses, self._after, self._make = losses, after, make

    def forward(self, batch: Batch) -> Losses:
        loss = self.model(batch.images).square().mean()
        return Losses(loss) if self._losses is None else self._losses(loss)

    def after_step(self, batch: Batch) -> None:
        if self._after is not None:
            self._after()

    def optimizers(self, config):
        return super().optimizers(config) if self._make is None else self._make(self)


def fails() -> None:
    raise ZeroDivisionError("mine")


def half(method: nn.Module) -> list[nn.Parameter]:
    return list(method.parameters())[1:]


def sgd(parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"losses": lambda loss: fails()},
            r"first training step of Simple fails on a batch of images \(2, 3, 16, 16\): ZeroDivisionError: mine",
        ),
        ({"losses": lambda loss: loss}, r"Simple returned Tensor; expected stseg\.Losses\(total, logged\)"),
        ({"losses": lambda loss: (loss, {})}, r"Simple returned tuple; expected stseg\.Losses"),
        ({"losses": lambda loss: None}, r"Simple returned NoneType; expected stseg\.Losses"),
        (
            {"losses": lambda loss: Losses(loss.detach())},
            r"total loss of Simple is a tensor of shape \(\) without a grad",
        ),
        ({"losses": lambda loss: Losses(loss[None])}, r"is a tensor of shape \(1,\); expected a scalar to diff"),
        ({"losses": lambda loss: Losses(loss.item())}, "total loss of Simple is float; expected a scalar"),
        *(
            (
                {"losses": lambda loss, name=name: Losses(loss, {name: loss.detach()})},
                f"Simple logs '{name}', a name of",
            )
            for name in ("epoch", "step", "lr", "loss", "miou", "seconds")
        ),
        (
            {"losses": lambda loss: Losses(loss, {"map": torch.ones(2)})},
            "Simple logs 'map' as Tensor; expected a scalar",
        ),
        ({"losses": lambda loss: Losses(loss, {"text": "a"})}, "Simple logs 'text' as str; expected a scalar tensor"),
        ({"losses": lambda loss: Losses(loss, None)}, "Simple logs NoneType; expected a dictionary of scalars by name"),
        ({"after": fails}, "first training step of Simple fails .* ZeroDivisionError: mine"),
        ({"make": lambda method: fails()}, "first training step of Simple fails .* ZeroDivisionError: mine"),
        (
            {"make": lambda method: [sgd(half(method))]},
            r"parameter 'model\.network\.0\.weight' of Simple is in no optimizer; expected Simple\.optimizers",
        ),
        (
            {"make": lambda method: [sgd(method.parameters()), sgd(half(method))]},
            r"parameter 'model\.network\.1\.weight' of Simple is in more than one optimizer",
        ),
        ({"make": lambda method: []}, "of Simple is in no optimizer"),
    ],
)
def test_a_step_that_does_not_keep_to_the_interface_is_named(options, message):
    method = Simple(**options)
    with pytest.raises(MethodError, match=message):
        fit(method, pairs(4), CONFIG, progress=False)
    assert same(method, Simple())


def test_a_method_without_a_forward_is_named():
    class Empty(Method):
        uses_unlabeled = False

        def __init__(self) -> None:
            super().__init__()
            self.model = Segmenter(network())

    with pytest.raises(MethodError, match=r"Empty must implement forward\(batch\) -> Losses"):
        fit(Empty(), pairs(4), CONFIG, progress=False)


@pytest.mark.parametrize("model", [None, "a network", lambda x: x])
def test_a_method_without_a_network_is_named(model):
    method = Simple()
    del method.model
    if model is not None:
        method.model = model
    with pytest.raises(MethodError, match=r"Simple has no attribute model; expected a network, such as self\.model = "):
        fit(method, pairs(4), CONFIG, progress=False)


def test_a_bare_network_as_model_is_named():
    method = Simple()
    method.model = network()
    with pytest.raises(
        MethodError, match=r"Simple\.model is a bare Sequential, .*; expected self\.model = stseg\.Segm"
    ):
        fit(method, pairs(4), CONFIG, progress=False)


def test_a_class_in_place_of_a_method_is_refused():
    with pytest.raises(TypeError, match=r"method is the class Supervised; expected a network"):
        fit(Supervised, pairs(4), CONFIG, progress=False)


def test_a_network_that_cannot_be_copied_is_named():
    class Alone(nn.Conv2d):
        def __deepcopy__(self, memo):
            raise RuntimeError("one is enough")

    with pytest.raises(
        MethodError, match=r"Supervised cannot be copied \(copy.deepcopy\), as snapshots .*: one is eno"
    ):
        fit(Alone(3, 2, 1), pairs(4), CONFIG, progress=False)


@pytest.mark.parametrize(
    "view",
    [lambda image, weak: fails(), lambda image, weak: image, lambda image, weak: None],
    ids=["fails", "one", "no"],
)
def test_a_view_that_fails_is_named(view):
    method = Entropic(network())
    method.__class__ = type("Viewing", (Entropic,), {"view": lambda self, image, weak: view(image, weak)})
    with pytest.raises(MethodError, match="the first batch of Viewing cannot be made: "):
        fit(method, pairs(4), CONFIG, unlabeled=IMAGES, progress=False)


def test_what_fails_names_the_unlabeled_images_too():
    class Failing(Entropic):
        def forward(self, batch):
            raise KeyError("weight")

    with pytest.raises(MethodError, match=r"images \(2, 3, 16, 16\), unlabeled \(3, 3, 16, 16\): KeyError: 'weight'"):
        fit(
            Failing(network()),
            pairs(4),
            TrainConfig(steps=3, batch_size=2, unlabeled_batch_size=3, weak=None),
            unlabeled=IMAGES,
            progress=False,
        )


def streams(method: Method, unlabeled=None) -> Streams:
    return Streams(Items.of(pairs(4)), None if unlabeled is None else Items.of(unlabeled), CONFIG)


def test_unused_parameters_are_named():
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.frozen = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1)
            self.frozen.requires_grad_(False)

        def forward(self, x):
            return self.used(x)

    method = Supervised(Auxiliary())
    assert try_step(method, streams(method), CONFIG) == ["model.network.unused.weight", "model.network.unused.bias"]
    assert try_step(Simple(), streams(method), CONFIG) == []


def test_leaves_method_data_and_random_states_as_they_were():
    class Random(Entropic):
        """Draws from every generator, changes its state, and writes into the batch."""

        def __init__(self, network) -> None:
            super().__init__(network)
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, batch):
            torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002
            batch.images.mul_(0.5)
            batch.unlabeled.mul_(0.5)
            batch.masks.fill_(0)
            return super().forward(batch)

        def after_step(self, batch):
            torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002
            self.steps += 1

    method = Random(nn.Sequential(network(), nn.Dropout(0.5))).eval()
    labeled, unlabeled = pairs(4), [image.clone() for image in IMAGES]
    before = copy.deepcopy((method, labeled, unlabeled))
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    random.seed(3)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    made = Streams(Items.of(labeled), Items.of(unlabeled), CONFIG)
    try_step(method, made, CONFIG)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
    assert random.getstate() == states[2]
    assert same(method, before[0])
    assert not method.training
    assert all(parameter.grad is None for parameter in method.parameters())
    after, earlier = ([*sum(pairs, ()), *images] for pairs, images in ((labeled, unlabeled), before[1:]))
    assert all(torch.equal(a, b) for a, b in zip(after, earlier, strict=True))


def test_is_what_the_first_step_of_the_training_does():
    """So what fails there fails in the trial, and what does not, does not."""
    seen = []

    class Watched(Entropic):
        def forward(self, batch):
            losses = super().forward(batch)
            seen.append((batch, losses.total.detach()))
            return losses

    fit(Watched(nn.Sequential(network(), nn.Dropout(0.5))), pairs(4), CONFIG, unlabeled=IMAGES, progress=False)
    (trial, loss), (first, first_loss), *_ = seen
    assert torch.equal(loss, first_loss)
    assert torch.equal(trial.images, first.images)
    assert torch.equal(trial.unlabeled, first.unlabeled)
    assert (trial.step, trial.steps) == (first.step, first.steps)


def test_in_epochs_knows_the_length_as_well():
    seen = []

    class Watched(Simple):
        def forward(self, batch):
            seen.append((batch.step, batch.steps))
            return super().forward(batch)

    fit(Watched(), pairs(4), TrainConfig(epochs=3, batch_size=2, weak=None), progress=False)
    assert seen == [(0, 6), *((step, 6) for step in range(6))]


def test_errors_of_the_package_come_as_they_are():
    class Failing(Simple):
        def forward(self, batch):
            raise stseg.DataError("of the data")

    with pytest.raises(stseg.DataError, match=r"^of the data$"):
        fit(Failing(), pairs(4), CONFIG, progress=False)
