"""DCC: directional context-aware consistency."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stseg.augment import CropPair, StrongAugment, as_batch_augmentation, strong_view
from stseg.checks import check_count, check_nonnegative, check_positive, check_probability
from stseg.distributed import all_gather_batch
from stseg.engine.method import Batch, Losses, Method
from stseg.errors import NetworkError
from stseg.functional import directional_contrast, mean_over_processes, supervised_loss
from stseg.models.segmenter import as_segmenter
from stseg.modules import Ring, logits_and_features
from stseg.types import BatchAugmentation, Criterion, PairTransform


class DCC(Method):
    """DCC (Lai et al., CVPR 2021, section 3): features that do not depend on what surrounds them.

    From each unlabeled image two overlapping crops are cut and augmented separately. A place in their overlap has two
    feature vectors of length 1, a and b, projections of the decoder's output in either crop, whose surroundings differ.
    Each is drawn to the other and away from the features n of other classes,

    ``l(a, b) = -log(exp(a.b / t) / (exp(a.b / t) + sum_n [class of n is not that of a] exp(a.n / t)))``,

    where gradients flow to a alone, and only from the less confident to the more confident one: l(a, b) is the mean
    over the places where b has a confidence above ``threshold`` and a a lower confidence than b. Then

    ``L = Ls + weight * (l(a, b) + l(b, a))``,

    the second term after the share ``start`` of the training. The features n are those of all places of both crops, of
    this step and, from a memory, of the last steps. Classes and confidences are the network's own predictions.

    Labeled images and each of the two crops go through the network separately, as in the authors' code (from memory,
    not checked). Unlike there:

    - classes and confidences come from the mean of the logits in each cell of ``stride`` pixels, not from the
      classifier on pooled features: for a classifier that is a 1x1 convolution, as theirs, that is the same but for
      the interpolation of the logits;
    - ``1e-8`` in the denominator is left out, as a sum of logarithms needs none;
    - the sigmas of the blur are those of :class:`stseg.StrongAugment`, not those of a kernel of 5 pixels;
    - places whose cell is not wholly inside the image do not count, nor do they enter the memory;
    - with several processes the mean is over the places of all of them.

    Args:
        network: a network, bare or in a :class:`stseg.Segmenter`.
        channels: channels of the features.
        features: dotted name of the submodule of the network that returns the features, maps of a stride that divides
            that of the crops; None uses ``decoder`` or ``fuse``.
        width: length of the projected features.
        pairs: what cuts the two crops of an unlabeled image, in place of the config's ``weak``; ``CropPair(720,
            base_size=2048)`` for Cityscapes.
        strong: augmentation of each crop, which must not move pixels; None for none.
        weight: weight of the contrast, 0 or more.
        threshold: confidence of the partner above which a place learns, in [0, 1].
        temperature: t, above 0.
        start: share of the training after which the contrast counts: 5 of 80 epochs in the paper.
        memory: number of features of earlier steps to keep. A step has two times the unlabeled images of all
            processes times the cells of a crop: 25,600 are one step of 8 images and crops of 320. The paper keeps one
            step on ResNet-50, two on ResNet-101, none on Cityscapes.
        loss: supervised loss, ``(logits, masks) -> scalar``; None for cross-entropy.

    Logged: ``supervised``, ``contrast`` (unweighted, both directions), and ``directed``, the share of the places in
    the overlap where one side learns.

    Raises:
        ValueError: if a setting is out of its range.
        NetworkError: when called, if the features are not found, or do not fit ``channels`` or the crops.

    Example:
        >>> from collections import OrderedDict
        >>> layers = OrderedDict(decoder=nn.Conv2d(3, 4, 1), head=nn.Conv2d(4, 2, 1))
        >>> method = DCC(nn.Sequential(layers), channels=4, pairs=CropPair(16, base_size=24), memory=0)
        >>> crops = [method.view(torch.rand(3, 24, 20), None)[0] for _ in range(2)]
        >>> unlabeled = {name: torch.stack([each[name] for each in crops]) for name in crops[0]}
        >>> images, masks = torch.rand(2, 3, 16, 16), torch.randint(2, (2, 16, 16))
        >>> batch = Batch(images, masks, torch.zeros(2, dtype=torch.bool), unlabeled=unlabeled)
        >>> sorted(method(batch).logged)
        ['contrast', 'directed', 'supervised']
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        channels: int = 256,
        features: str | None = None,
        width: int = 128,
        pairs: CropPair = CropPair(320, base_size=400),  # noqa: B008  frozen
        strong: BatchAugmentation | None = StrongAugment(jitter=(0.4, 0.4, 0.4, 0.1), cutout=None),  # noqa: B008
        weight: float = 0.1,
        threshold: float = 0.75,
        temperature: float = 0.1,
        start: float = 1 / 16,
        memory: int = 25_600,
        loss: Criterion | None = None,
    ) -> None:
        super().__init__()
        check_nonnegative("weight", weight)
        check_probability("threshold", threshold)
        check_probability("start", start)
        check_positive("temperature", temperature)
        for name, count, least in (("channels", channels, 1), ("width", width, 1), ("memory", memory, 0)):
            check_count(name, count, least=least)
        if not callable(pairs):
            raise TypeError(f"pairs is {pairs!r}; expected stseg.augment.CropPair(...)")
        self.model = as_segmenter(network)
        self.projector = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.ReLU(), nn.Conv2d(channels, width, 1))
        self.memory = Ring(memory, width)
        self.channels, self.features, self.pairs = channels, features, pairs
        self.strong = as_batch_augmentation(strong)
        self.weight, self.threshold, self.temperature, self.start = weight, threshold, temperature, start
        self.loss = loss

    def view(self, image: Tensor, weak: PairTransform) -> tuple[dict[str, Tensor], None]:
        """Cut two overlapping crops."""
        return self.pairs(image), None

    def forward(self, batch: Batch) -> Losses:
        """Compute the losses; see the class."""
        supervised = supervised_loss(
            self.model(batch.images), batch.masks, loss=self.loss, ignore_index=batch.ignore_index
        )
        first, second = (self._cells(batch.unlabeled, index, batch.ignore_index) for index in range(2))
        # By image, so that a part of them in the memory is the same for any number of processes.
        present = all_gather_batch(torch.stack([first.features, second.features], 1)).flatten(0, 3)
        known = [torch.where(cells.valid, cells.classes, -1) for cells in (first, second)]
        classes = all_gather_batch(torch.stack(known, 1)).flatten()
        negatives = torch.cat([present, self.memory.vectors])
        negative_labels = torch.cat([classes, self.memory.labels])
        self.memory.add(present, classes)

        partner, inside = overlapping(batch.unlabeled["offset"] // self.pairs.stride, first.valid.shape[1:])
        a = Cells(*(rows.flatten(0, 2) for rows in first))
        b = Cells(*(rows.flatten(0, 2)[partner] for rows in second))
        both = inside & a.valid & b.valid

        def contrast(one: Cells, other: Cells) -> tuple[Tensor, Tensor]:
            learns = both & (other.confidence > self.threshold) & (one.confidence < other.confidence)
            loss = directional_contrast(
                one.features,
                other.features,
                negatives,
                labels=one.classes,
                negative_labels=negative_labels,
                where=learns,
                temperature=self.temperature,
            )
            return loss, learns.sum()

        (forth, learning), (back, teaching) = contrast(a, b), contrast(b, a)
        weight = self.weight if batch.step >= self.start * batch.steps else 0.0
        directed = mean_over_processes((learning + teaching).float(), both.sum())
        logged = {"supervised": supervised.detach(), "contrast": (forth + back).detach(), "directed": directed}
        return Losses(supervised + weight * (forth + back), logged)

    def _cells(self, crops: dict[str, Tensor], index: int, ignore: int) -> Cells:
        """Run the network on one of the two crops, and undo its flip."""
        images, valid, flipped = (crops[name][:, index] for name in ("images", "valid", "flipped"))
        visible = torch.where(valid, int(ignore == 0), ignore)  # any other value
        images, visible = strong_view(images, visible, self.strong)
        logits, features = logits_and_features(self.model, images, channels=self.channels, features=self.features)
        stride = self.pairs.stride
        projected = F.normalize(self.projector(self._pooled(features, images)).float(), dim=1)
        confidence, classes = F.avg_pool2d(logits.detach(), stride).softmax(1).max(1)
        whole = F.max_pool2d((visible == ignore).float(), stride) == 0
        cells = Cells(projected.movedim(1, -1), classes, confidence, whole)
        return Cells(*(_flipped_back(rows, flipped) for rows in cells))

    def _pooled(self, features: Tensor, images: Tensor) -> Tensor:
        """Average the features within each cell of the crops."""
        (height, width), (rows, columns), stride = images.shape[-2:], features.shape[-2:], self.pairs.stride
        own = height // rows
        if (rows * own, columns * own) != (height, width) or stride % own:
            raise NetworkError(
                f"the features of the network ({type(self.model.network).__name__}) are {rows} x {columns} for crops "
                f"of {height} x {width}; expected a stride that divides that of the crops, {stride}"
            )
        return F.avg_pool2d(features, stride // own)


class Cells(NamedTuple):
    """What the network sees in each cell of the crops, ``(B, h, w)``."""

    features: Tensor
    """``(B, h, w, D)``, of length 1."""
    classes: Tensor
    confidence: Tensor
    valid: Tensor
    """Whether the cell lies inside the image."""


def overlapping(offset: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Find the cell of the second crop that shows the same place as each cell of the first.

    Args:
        offset: ``(B, 2)`` int64, the cells that the second crop lies below and to the right of the first.
        shape: rows and columns of cells of a crop.

    Returns:
        For each cell of the first crops, ``(B * h * w,)``: the index of its partner among those of the second crops
        (any, where there is none), and whether there is one.
    """
    rows, columns = shape
    batch = torch.arange(len(offset), device=offset.device)[:, None, None]
    down, right = offset[:, :, None, None].unbind(1)
    row = torch.arange(rows, device=offset.device)[:, None] - down
    column = torch.arange(columns, device=offset.device) - right
    inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    place = (batch * rows + row.clamp(0, rows - 1)) * columns + column.clamp(0, columns - 1)
    return place.flatten(), inside.flatten()


def _flipped_back(rows: Tensor, flipped: Tensor) -> Tensor:
    """Mirror ``(B, h, w, ...)`` where ``flipped``, ``(B,)``."""
    return torch.where(flipped.view(-1, *[1] * (rows.ndim - 1)), rows.flip(2), rows)
