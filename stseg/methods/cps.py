"""Cross pseudo supervision."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from stseg.augment import BoxMix
from stseg.checks import check_nonnegative
from stseg.engine.method import Batch, Losses, Method
from stseg.functional import consistency_loss, consistency_target, supervised_loss
from stseg.models.segmenter import as_segmenter
from stseg.types import Criterion


class CPS(Method):
    """CPS (Chen et al., CVPR 2021): two networks that learn from each other's hard labels.

    ``L = Ls(1) + Ls(2) + weight * (CE(z1, argmax z2) + CE(z2, argmax z1))``, the last two over labeled and unlabeled
    images together (section 3). There is no threshold and no teacher; the labels come from the same forward passes, in
    training mode.

    With ``mix``, "CPS with CutMix" (section 4.3), they are over unlabeled images alone, which are mixed: both networks
    label them before, without gradients, the labels are mixed in the same way, and each network learns those of the
    other on the mixed images. Three boxes an image, as the authors draw them, are
    ``mix=BoxMix(area=(0.25, 0.5), boxes=3)``.

    As in the authors' code each network sees labeled and unlabeled images in separate forward passes, so that batch
    normalization sees them separately, and the first network alone is validated and returned. Unlike there, padded
    pixels of unlabeled images are ignored, and the two images of a mixed pair are different ones, of the same batch (in
    the authors' code they turned out to be two crops of one image).

    Args:
        network: the first network, bare or in a :class:`stseg.Segmenter`.
        other: the second network, with the same architecture and different initial weights.
        weight: weight of the cross pseudo supervision: 1.5 for Pascal VOC and 6 for Cityscapes, with ``mix`` 1 and 5.
        mix: how unlabeled images are mixed; None for not at all.
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
        mix: BoxMix | None = None,
        loss: Criterion | None = None,
    ) -> None:
        super().__init__()
        if {id(p) for p in network.parameters()} & {id(p) for p in other.parameters()}:
            raise ValueError("network and other share parameters; expected two networks with weights of their own")
        check_nonnegative("weight", weight)
        self.model, self.other = as_segmenter(network), as_segmenter(other)
        self.weight, self.mix, self.loss = weight, mix, loss

    def forward(self, batch: Batch) -> Losses:
        """Compute the losses; see the class."""
        ignore = batch.ignore_index
        labeled = [network(batch.images) for network in (self.model, self.other)]
        first, second = (supervised_loss(z, batch.masks, loss=self.loss, ignore_index=ignore) for z in labeled)
        (one, label_one), (two, label_two) = self._on_all(batch, labeled) if self.mix is None else self._on_mixed(batch)
        cross = consistency_loss(one, label_two, ignore_index=ignore)
        cross = cross + consistency_loss(two, label_one, ignore_index=ignore)
        supervised = first + second
        logged = {"supervised": supervised.detach(), "cross": cross.detach()}
        return Losses(supervised + self.weight * cross, logged)

    def _on_all(self, batch: Batch, labeled: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield logits and labels of each network on labeled and unlabeled images."""
        for network, known in zip((self.model, self.other), labeled, strict=True):
            unlabeled = network(batch.unlabeled)
            label = hard_label(unlabeled, valid=batch.valid, ignore_index=batch.ignore_index)
            yield torch.cat([known, unlabeled]), torch.cat([hard_label(known), label])

    def _on_mixed(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield logits of each network on mixed unlabeled images, and its labels of them, made before and mixed."""
        assert self.mix is not None
        networks = (self.model, self.other)
        with torch.no_grad():
            labels = [
                hard_label(network(batch.unlabeled), valid=batch.valid, ignore_index=batch.ignore_index)
                for network in networks
            ]
        images, *mixed = self.mix(batch.unlabeled, *labels)
        for network, label in zip(networks, mixed, strict=True):
            yield network(images), label


hard_label = partial(consistency_target, threshold=0.0)
"""The most probable class of every pixel that is valid."""
