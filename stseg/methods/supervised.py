"""Supervised training on masks, annotated or predicted: the baseline, and every stage of ST."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from stseg.augment import as_batch_augmentation
from stseg.checks import check_nonnegative
from stseg.engine.method import Batch, Losses, Method
from stseg.functional import cross_entropy, supervised_loss
from stseg.models.segmenter import as_segmenter
from stseg.types import BatchAugmentation, Criterion


class Supervised(Method):
    r"""Supervised training (Yang et al., CVPR 2022, section 3.1).

    The loss is the mean cross-entropy over the pixels of the batch, in all processes, that are not ignored. Rows with
    a pseudo-mask are augmented strongly and weighted:

    ``L = (sum over annotated pixels + pseudo_weight * sum over pseudo-labeled pixels) / number of pixels``,

    which is the mean over the mixed batch for a weight of 1, as in the paper. For 0 only annotated masks count.

    Args:
        network: a network, bare or in a :class:`stseg.Segmenter`. It is trained in place.
        strong: augmentation of the rows with a pseudo-mask, on the device, such as :class:`stseg.StrongAugment` or a
            kornia ``AugmentationSequential``; None for none.
        pseudo_weight: lambda of the paper.
        loss: ``(logits, masks) -> scalar`` in place of cross-entropy, such as
            ``smp.losses.DiceLoss("multiclass", ignore_index=255)``; ``masks`` hold the ignore index where there is no
            label. Each process computes it on its part of the batch. If ``pseudo_weight`` is not 1, it is computed
            separately on annotated and pseudo-labeled rows, each weighted by its share of the pixels.
        ignore_index: mask value of pixels without a label, as in the config.

    Raises:
        ValueError: if ``pseudo_weight`` is negative, or the cutout of ``strong`` writes a different ignore index.

    Example:
        >>> method = Supervised(nn.Conv2d(3, 2, 1))
        >>> masks = torch.tensor([[[0, 1], [1, 255]]])
        >>> losses = method(Batch(torch.rand(1, 3, 2, 2), masks, is_pseudo=torch.tensor([False])))
        >>> losses.total.shape
        torch.Size([])
    """

    uses_unlabeled: ClassVar[bool] = False

    def __init__(
        self,
        network: nn.Module,
        *,
        strong: BatchAugmentation | None = None,
        pseudo_weight: float = 1.0,
        loss: Criterion | None = None,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        check_nonnegative("pseudo_weight", pseudo_weight)
        self.model = as_segmenter(network)
        self.strong = as_batch_augmentation(strong, ignore_index=ignore_index)
        self.pseudo_weight = pseudo_weight
        self.loss = loss

    def forward(self, batch: Batch) -> Losses:
        """Compute the loss of the labeled stream."""
        images, masks = batch.images, batch.masks
        if self.strong is not None:
            images, masks = self.strong(images, masks, batch.is_pseudo)
        logits = self.model(images)
        if self.pseudo_weight == 1:
            return Losses(supervised_loss(logits, masks, loss=self.loss, ignore_index=batch.ignore_index))
        if self.loss is None:
            weight = torch.where(batch.is_pseudo, self.pseudo_weight, 1.0)[:, None, None]
            return Losses(cross_entropy(logits, masks, weight=weight, ignore_index=batch.ignore_index))
        counted = masks != batch.ignore_index
        losses = [logits.sum() * 0]
        for rows, factor in ((~batch.is_pseudo, 1.0), (batch.is_pseudo, self.pseudo_weight)):
            if factor and counted[rows].any():
                share = counted[rows].sum() / counted.sum()
                loss = supervised_loss(logits[rows], masks[rows], loss=self.loss, ignore_index=batch.ignore_index)
                losses.append(factor * share * loss)
        return Losses(torch.stack(losses).sum())
