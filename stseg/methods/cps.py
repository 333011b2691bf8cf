"""Cross pseudo supervision."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from stseg.checks import check_nonnegative
from stseg.engine.method import Batch, Losses, Method
from stseg.functional import consistency_loss, consistency_target, supervised_loss
from stseg.models.segmenter import as_segmenter
from stseg.types import Criterion


class CPS(Method):
    """CPS (Chen et al., CVPR 2021): two networks that learn from each other's hard labels.

    ``L = Ls(1) + Ls(2) + weight * (CE(z1, argmax z2) + CE(z2, argmax z1))``, the last two over labeled and unlabeled
    images together: without CutMix, as in section 3. There is no threshold and no teacher; the labels come from the
    same forward passes, in training mode.

    As in the authors' code each network sees labeled and unlabeled images in separate forward passes, so that batch
    normalization sees them separately, and the first network alone is validated and returned. Unlike there, padded
    pixels of unlabeled images are ignored.

    Args:
        network: the first network, bare or in a :class:`stseg.Segmenter`.
        other: the second network, with the same architecture and different initial weights.
        weight: weight of the cross pseudo supervision: 1.5 for Pascal VOC, 6 for Cityscapes.
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
    """

    def __init__(
        self,
        network: nn.Module,
        other: nn.Module,
        *,
        weight: float = 1.5,
        loss: Criterion | None = None,
    ) -> None:
        super().__init__()
        if {id(p) for p in network.parameters()} & {id(p) for p in other.parameters()}:
            raise ValueError("network and other share parameters; expected two networks with weights of their own")
        check_nonnegative("weight", weight)
        self.model, self.other = as_segmenter(network), as_segmenter(other)
        self.weight, self.loss = weight, loss

    def forward(self, batch: Batch) -> Losses:
        """Compute the losses; see the class."""
        ignore = batch.ignore_index
        labeled = [network(batch.images) for network in (self.model, self.other)]
        unlabeled = [network(batch.unlabeled) for network in (self.model, self.other)]
        first, second = (supervised_loss(z, batch.masks, loss=self.loss, ignore_index=ignore) for z in labeled)
        one, two = (torch.cat(pair) for pair in zip(labeled, unlabeled, strict=True))
        label_one, label_two = (
            torch.cat([hard_label(z), hard_label(u, valid=batch.valid, ignore_index=ignore)])
            for z, u in zip(labeled, unlabeled, strict=True)
        )
        cross = consistency_loss(one, label_two, ignore_index=ignore)
        cross = cross + consistency_loss(two, label_one, ignore_index=ignore)
        supervised = first + second
        logged = {"supervised": supervised.detach(), "cross": cross.detach()}
        return Losses(supervised + self.weight * cross, logged)


hard_label = partial(consistency_target, threshold=0.0)
"""The most probable class of every pixel that is valid."""
