"""UniMatch."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from stseg.augment import CutMix, StrongAugment, as_batch_augmentation, strong_view
from stseg.checks import check_mixing, check_probability
from stseg.engine.method import Batch, Losses, Method
from stseg.functional import (
    consistency_loss,
    consistency_target,
    supervised_loss,
    sure_share,
)
from stseg.models.segmenter import as_segmenter
from stseg.modules import channel_dropout, perturbed_features
from stseg.types import BatchAugmentation, BatchMixing, Criterion


class UniMatch(Method):
    """UniMatch (Yang et al., CVPR 2023, section 3): two strong views, and the weak view with perturbed features.

    Confident predictions on weakly augmented images are the targets of three streams:

    ``L = (Ls + (L1 + L2) / 4 + Lf / 2) / 2``, where L1 and L2 are FixMatch's loss on two strong views with
    independent augmentations and CutMix boxes, and Lf is the same on features with dropped channels. Each sums the
    cross-entropy over the pixels whose confidence is at least ``threshold`` and divides by the number of valid pixels.

    As in the authors' code, the encoder runs once on labeled and unlabeled images together; the decoder then sees their
    features and a copy of them with dropped channels in one batch, so that batch normalization sees all of them, and
    the perturbed labeled rows are not used. Unlike there, channels are dropped in every feature that the encoder
    returns, not only in the first and last level, since networks differ in what they return; and the CutMix box comes
    from another image of the same batch, since the authors' partner turned out to be a crop of the same image.

    Args:
        network: a network, bare or in a :class:`stseg.Segmenter`, with a backbone.
        threshold: least confidence of a target pixel; 0.95 for Pascal VOC, 0 for Cityscapes.
        dropout: probability that a channel is dropped.
        strong: augmentation of the two strong views; None for none.
        mix: mixing of the images, such as :class:`stseg.CutMix`; None for none.
        backbone: name of the submodule of the network whose output is perturbed; None uses ``encoder``, ``backbone``
            or the one that ``base_model_prefix`` names.
        loss: supervised loss, ``(logits, masks) -> scalar``; None for cross-entropy.

    Logged: ``supervised``, ``strong`` (mean of L1 and L2), ``features``, and ``sure``, the share of valid pixels that
    are targets.

    Raises:
        NetworkError: when called, if the network has no backbone whose features can be perturbed; names it.

    Example:
        >>> import segmentation_models_pytorch as smp
        >>> method = UniMatch(smp.FPN("tu-test_resnet", encoder_weights=None, classes=2))
        >>> images, masks = torch.rand(2, 3, 32, 32), torch.randint(2, (2, 32, 32))
        >>> batch = Batch(images, masks, torch.zeros(2, dtype=torch.bool), unlabeled=torch.rand(2, 3, 32, 32))
        >>> sorted(method(batch).logged)
        ['features', 'strong', 'supervised', 'sure']
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        threshold: float = 0.95,
        dropout: float = 0.5,
        strong: BatchAugmentation | None = StrongAugment(cutout=None),  # noqa: B008  it has no state
        mix: BatchMixing | None = CutMix(),  # noqa: B008  frozen
        backbone: str | None = None,
        loss: Criterion | None = None,
    ) -> None:
        super().__init__()
        check_probability("threshold", threshold)
        check_probability("dropout", dropout)
        check_mixing(mix)
        self.model = as_segmenter(network)
        self.threshold, self.dropout, self.backbone = threshold, dropout, backbone
        self.strong = as_batch_augmentation(strong)
        self.mix = mix
        self.loss = loss

    def forward(self, batch: Batch) -> Losses:
        """Compute the losses; see the class."""
        ignore = batch.ignore_index
        rows = [len(batch.images), len(batch.unlabeled)]
        with perturbed_features(self.model, partial(channel_dropout, p=self.dropout), backbone=self.backbone):
            clean, dropped = self.model(torch.cat([batch.images, batch.unlabeled])).chunk(2)
        (labeled, weak), (_, perturbed) = clean.split(rows), dropped.split(rows)
        target = consistency_target(weak, threshold=self.threshold, valid=batch.valid, ignore_index=ignore)
        (one, first), (two, second) = (
            strong_view(batch.unlabeled, target, self.strong, self.mix, num_classes=weak.shape[1]) for _ in range(2)
        )
        prediction, other = self.model(torch.cat([one, two])).chunk(2)

        supervised = supervised_loss(labeled, batch.masks, loss=self.loss, ignore_index=ignore)
        strong = (
            consistency_loss(prediction, first, ignore_index=ignore)
            + consistency_loss(other, second, ignore_index=ignore)
        ) / 2
        features = consistency_loss(perturbed, target, ignore_index=ignore)
        total = (supervised + strong / 2 + features / 2) / 2
        parts = {"supervised": supervised, "strong": strong, "features": features}
        sure = sure_share(target, labeled.shape[1], ignore_index=ignore)
        return Losses(total, {**{name: part.detach() for name, part in parts.items()}, "sure": sure})
