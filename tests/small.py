"""Small networks, methods and data sets that several tests use."""

from __future__ import annotations

import torch
from torch import nn

from stseg import Batch, Losses, Method, Segmenter, TrainConfig
from stseg.engine.step import TrainingSteps
from stseg.functional import cross_entropy, entropy
from stseg.methods import Supervised
from stseg.models.state import cpu_state

SIZES = [(9, 12), (12, 9), (7, 7)]


class Pooled(nn.Module):
    """A small network with a branch that sees the whole image, so that padding would change its logits."""

    def __init__(self, classes=4, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.near, self.far = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
            self.norm, self.drop, self.head = nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Conv2d(8, classes, 1)
        self.seen = []

    def forward(self, x):
        self.seen.append(tuple(x.shape))
        x = self.near(x) + 4 * self.far(x.mean((2, 3), keepdim=True))
        return 8 * self.head(self.drop(self.norm(x)).relu())

    def images_seen(self):
        """How many images of the data sets here it was called for (not the trials of the wrapper)."""
        return sum(shape[0] for shape in self.seen if shape[2:] in set(SIZES))


class Named(list):
    """A data set: items with ids."""

    def __init__(self, items, ids=None):
        super().__init__(items)
        self.ids = [f"city/img_{i:02}" for i in range(len(self))] if ids is None else ids


def pairs(count, *, size=16, seed=0):
    """Images whose class is where the red is."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, size, size, generator=generator)
    return [(image, (image[0] > 0.5).byte()) for image in images]


def network(seed=0, classes=2):
    """A small network with batch normalization."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first, last = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Conv2d(4, classes, 1)
        return nn.Sequential(first, nn.BatchNorm2d(4), nn.ReLU(), last)


def same(one, other):
    """Whether two modules hold the same values under the same names."""
    a, b = cpu_state(one), cpu_state(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Stopped(Supervised):
    """Supervised training in which Ctrl+C is pressed in the step after ``after`` (1 or more) are done."""

    def __init__(self, network, *, after=None, **options):
        super().__init__(network, **options)
        self._after = after

    def after_step(self, batch):
        if batch.step == self._after:
            raise KeyboardInterrupt


class Entropic(Method):
    """A method of a user: cross-entropy, and the entropy of the unlabeled stream."""

    def __init__(self, network, *, weight=0.1):
        super().__init__()
        self.model = Segmenter(network)
        self.weight = weight

    def forward(self, batch):
        supervised = cross_entropy(self.model(batch.images), batch.masks, ignore_index=batch.ignore_index)
        uncertainty = entropy(self.model(batch.unlabeled), where=batch.valid)
        return Losses(supervised + self.weight * uncertainty, {"entropy": uncertainty.detach()})


def training_step(method: Method, optimizers, batch: Batch, config: TrainConfig) -> dict[str, float]:
    """The numbers of one step, after which the weights are those after it."""
    (numbers,) = TrainingSteps(method, method, optimizers, config)(batch)
    return numbers
