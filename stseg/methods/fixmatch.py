"""FixMatch for segmentation."""

from __future__ import annotations

import torch
from torch import nn

from stseg.augment import CutMix, StrongAugment, as_batch_augmentation, strong_view
from stseg.checks import check_mixing, check_probability
from stseg.engine.method import Batch, Losses, Method
from stseg.functional import consistency_loss, consistency_target, supervised_loss, sure_share
from stseg.models.segmenter import as_segmenter
from stseg.types import BatchAugmentation, BatchMixing, Criterion


class FixMatch(Method):
    """FixMatch (Sohn et al., NeurIPS 2020), for segmentation as in UniMatch (Yang et al., CVPR 2023, section 3.1).

    Confident predictions on weakly augmented images are the targets of their strongly augmented views, in which CutMix
    pastes a box of another image of the batch:

    ``L = (Ls + Lu) / 2``, where Lu sums the cross-entropy over the pixels whose confidence is at least ``threshold``
    and divides by the number of all valid pixels.

    The targets come from the forward pass of labeled and unlabeled images together, in training mode, as in the
    authors' code; so batch normalization sees both. Unlike there, the box comes from another image of the same batch:
    the authors draw the partner from a second loader with the same order, so it is a crop of the same image, which they
    say was not intended.

    Args:
        network: a network, bare or in a :class:`stseg.Segmenter`.
        threshold: least confidence of a target pixel; 0.95 for Pascal VOC, 0 for Cityscapes.
        strong: augmentation of the unlabeled images; None for none.
        mix: mixing of the images, such as :class:`stseg.CutMix`; None for none.
        loss: supervised loss, ``(logits, masks) -> scalar``; None for cross-entropy.

    Logged: ``supervised``, ``consistency``, and ``sure``, the share of valid pixels that are targets.

    Example:
        >>> method = FixMatch(nn.Conv2d(3, 2, 1), threshold=0.5)
        >>> images, masks = torch.rand(2, 3, 8, 8), torch.randint(2, (2, 8, 8))
        >>> batch = Batch(images, masks, torch.zeros(2, dtype=torch.bool), unlabeled=torch.rand(2, 3, 8, 8))
        >>> sorted(method(batch).logged)
        ['consistency', 'supervised', 'sure']
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        threshold: float = 0.95,
        strong: BatchAugmentation | None = StrongAugment(cutout=None),  # noqa: B008  it has no state
        mix: BatchMixing | None = CutMix(),  # noqa: B008  frozen
        loss: Criterion | None = None,
    ) -> None:
        super().__init__()
        self.model = as_segmenter(network)
        check_probability("threshold", threshold)
        check_mixing(mix)
        self.threshold = threshold
        self.strong = as_batch_augmentation(strong)
        self.mix = mix
        self.loss = loss

    def forward(self, batch: Batch) -> Losses:
        """Compute the losses; see the class."""
        ignore = batch.ignore_index
        labeled, weak = self.model(torch.cat([batch.images, batch.unlabeled])).split(
            [len(batch.images), len(batch.unlabeled)]
        )
        target = consistency_target(weak, threshold=self.threshold, valid=batch.valid, ignore_index=ignore)
        images, target = strong_view(batch.unlabeled, target, self.strong, self.mix, num_classes=weak.shape[1])
        prediction = self.model(images)
        supervised = supervised_loss(labeled, batch.masks, loss=self.loss, ignore_index=ignore)
        consistency = consistency_loss(prediction, target, ignore_index=ignore)
        sure = sure_share(target, prediction.shape[1], ignore_index=ignore)
        logged = {"supervised": supervised.detach(), "consistency": consistency.detach(), "sure": sure}
        return Losses((supervised + consistency) / 2, logged)
