"""Cross pseudo supervision."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from stseg.augment.class_mix import for_classes
from stseg.checks import check_mixing, check_nonnegative
from stseg.engine.method import Batch, Losses, Method
from stseg.functional import consistency_loss, consistency_target, supervised_loss
from stseg.models.segmenter import as_segmenter
from stseg.models.state import check_apart
from stseg.types import BatchMixing, Criterion


class CPS(Method):
    """CPS (Chen et al., CVPR 2021): two networks that learn from each other's hard labels.

    Without CutMix (section 3 of the paper),

    ``L = Ls(1) + Ls(2) + weight * (CE(z1, argmax z2) + CE(z2, argmax z1))``, the last two over labeled and unlabeled
    images together. There is no threshold and no teacher; the labels come from the same forward passes, in training
    mode.

    With CutMix, as in the paper's experiments, each network labels the unlabeled images without gradients, images and
    labels are mixed, and each learns the mixed labels of the other from the mixed images; the last two terms are then
    over the unlabeled images alone. The labeling passes are in training mode too, so that batch normalization sees
    labeled, unlabeled and mixed images separately.

    As in the authors' code each network sees labeled and unlabeled images in separate forward passes, and the first
    network alone is validated and returned. Unlike there, padded pixels of unlabeled images are ignored, and the
    partner of an image in CutMix is the next one of the same batch: the authors draw it from a second loader with the
    same order, so it is another crop of the same image, which they say was not intended.

    Args:
        network: the first network, bare or in a :class:`stseg.Segmenter`.
        other: the second network, with the same architecture and different initial weights.
        weight: weight of the cross pseudo supervision. None for that of Pascal VOC: 1.5, with ``mix`` 1. On Cityscapes
            6, with ``mix`` 5.
        mix: mixing of the unlabeled images: ``BoxMix(area=(0.25, 0.5), boxes=3)`` is the authors' CutMix; None for CPS
            without CutMix.
        loss: supervised loss, ``(logits, masks) -> scalar``; None for cross-entropy.

    Logged: ``supervised`` and ``cross``, each the sum over both networks.

    Raises:
        ValueError: if both networks are the same object, or ``weight`` is negative.

    Example:
        >>> method = CPS(nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1))
        >>> images, masks = torch.rand(2, 3, 8, 8), torch.randint(2, (2, 8, 8))
        >>> batch = Batch(images, masks, torch.zeros(2, dtype=torch.bool), unlabeled=torch.rand(2, 3, 8, 8))
        >>> sorted(method(batch).logged)
        ['cross', 'supervised']
        >>> from stseg.augment import BoxMix
        >>> CPS(nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1), mix=BoxMix(area=(0.25, 0.5), boxes=3)).weight
        1.0
    """

    def __init__(
        self,
        network: nn.Module,
        other: nn.Module,
        *,
        weight: float | None = None,
        mix: BatchMixing | None = None,
        loss: Criterion | None = None,
    ) -> None:
        super().__init__()
        check_apart(network=network, other=other)
        if weight is None:
            weight = 1.5 if mix is None else 1.0
        check_nonnegative("weight", weight)
        check_mixing(mix)
        self.model, self.other = as_segmenter(network), as_segmenter(other)
        self.weight, self.mix, self.loss = weight, mix, loss

    def forward(self, batch: Batch) -> Losses:
        """Compute the losses; see the class."""
        ignore, networks = batch.ignore_index, (self.model, self.other)
        hard_label = partial(consistency_target, threshold=0.0, ignore_index=ignore)
        labeled = [network(batch.images) for network in networks]
        if labeled[0].shape[1] != labeled[1].shape[1]:
            one, two = (logits.shape[1] for logits in labeled)
            raise ValueError(f"network gives {one} classes and other {two}; expected equal numbers")
        first, second = (supervised_loss(z, batch.masks, loss=self.loss, ignore_index=ignore) for z in labeled)
        if self.mix is None:
            unlabeled = [network(batch.unlabeled) for network in networks]
            one, two = (torch.cat(pair) for pair in zip(labeled, unlabeled, strict=True))
            label_one, label_two = (
                torch.cat([hard_label(z), hard_label(u, valid=batch.valid)])
                for z, u in zip(labeled, unlabeled, strict=True)
            )
        else:
            with torch.no_grad():
                unlabeled = [network(batch.unlabeled) for network in networks]
            labels = [hard_label(u, valid=batch.valid) for u in unlabeled]
            images, label_one, label_two = for_classes(self.mix, labeled[0].shape[1])(batch.unlabeled, *labels)
            one, two = (network(images) for network in networks)
        cross = consistency_loss(one, label_two, ignore_index=ignore)
        cross = cross + consistency_loss(two, label_one, ignore_index=ignore)
        supervised = first + second
        logged = {"supervised": supervised.detach(), "cross": cross.detach()}
        return Losses(supervised + self.weight * cross, logged)
