"""UniMatch V2."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import nn

from stseg.augment import CutMix, StrongAugment, as_batch_augmentation, strong_view
from stseg.checks import check_choice, check_mixing, check_probability
from stseg.engine.method import Batch, Losses, Method
from stseg.functional import consistency_loss, consistency_target, supervised_loss, sure_share
from stseg.models.segmenter import as_segmenter
from stseg.models.state import evaluating
from stseg.modules import EMA, changed_features, complementary_dropout
from stseg.types import BatchAugmentation, BatchMixing, Criterion


class UniMatchV2(Method):
    """UniMatch V2 (Yang et al., TPAMI 2025): a teacher, and two strong views that share the channels of their features.

    The teacher, the average of the student's past weights, labels the weak view. Its confident predictions are the
    targets of two strong views with independent augmentations and CutMix boxes:

    ``L = (Ls + (L1 + L2) / 2) / 2``, where each of L1 and L2 sums the cross-entropy over the pixels whose confidence is
    at least ``threshold`` and divides by the number of valid pixels.

    In half of the images each channel of the features is given to one of the two views and doubled, and is 0 in the
    other (:func:`stseg.modules.complementary_dropout`): UniMatch's third stream is gone. The split is the same for all
    features of as many channels, tokens and levels, and independent for others, such as those of a convolutional
    pyramid.

    As in the authors' code, the teacher predicts in evaluation mode, and its weights and buffers are averages; the
    student sees labeled images in one forward pass and both strong views together in another. Unlike there, extra
    tokens of a ViT, such as the class token, are split too where the backbone returns them; and padding up to the size
    that a network takes is that of :class:`stseg.Segmenter`, where the authors resize the image for evaluation. The
    authors' code measures student and teacher, and chooses its best epoch by the student.

    Args:
        network: the student, bare or in a :class:`stseg.Segmenter`, with a backbone; the teacher is a copy.
        threshold: least confidence of a target pixel.
        dropout: share of the images whose features are split, rounded up to whole images; 0 for none.
        decay: decay of the average, from 0 to 1: ``min(1 - 1 / (t + 1), decay)`` after step t.
        strong: augmentation of the two strong views; None for none.
        mix: mixing of the images, such as :class:`stseg.CutMix`; None for none.
        backbone: name of the submodule of the network whose output is split; None uses ``encoder``, ``backbone`` or the
            one that ``base_model_prefix`` names.
        deploy: which of the two is validated and returned: ``"teacher"`` or ``"student"``.
        loss: supervised loss, ``(logits, masks) -> scalar``; None for cross-entropy.

    Logged: ``supervised``, ``strong`` (mean of L1 and L2), and ``sure``, the share of valid pixels that are targets.

    Raises:
        ValueError: if a setting is out of its range.
        NetworkError: when called, if the network has no backbone whose features can be changed; names it.

    Example:
        >>> import segmentation_models_pytorch as smp
        >>> network = smp.DPT("tu-test_vit", encoder_weights=None, classes=2, dynamic_img_size=True)
        >>> method = UniMatchV2(network)
        >>> images, masks = torch.rand(2, 3, 32, 32), torch.randint(2, (2, 32, 32))
        >>> batch = Batch(images, masks, torch.zeros(2, dtype=torch.bool), unlabeled=torch.rand(2, 3, 32, 32))
        >>> sorted(method(batch).logged)
        ['strong', 'supervised', 'sure']
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        threshold: float = 0.95,
        dropout: float = 0.5,
        decay: float = 0.996,
        strong: BatchAugmentation | None = StrongAugment(cutout=None),  # noqa: B008  it has no state
        mix: BatchMixing | None = CutMix(),  # noqa: B008  frozen
        backbone: str | None = None,
        deploy: Literal["teacher", "student"] = "teacher",
        loss: Criterion | None = None,
    ) -> None:
        super().__init__()
        check_probability("threshold", threshold)
        check_probability("dropout", dropout)
        check_mixing(mix)
        check_choice("deploy", deploy, "teacher", "student")
        self.student = as_segmenter(network)
        self.teacher = EMA(self.student, decay, warmup=True, buffers="average")
        self.threshold, self.dropout, self.backbone = threshold, dropout, backbone
        self.strong = as_batch_augmentation(strong)
        self.mix, self.deploy, self.loss = mix, deploy, loss

    @property
    def model(self) -> nn.Module:  # type: ignore[override]  # an alias, not another submodule
        """Teacher or student, according to ``deploy``."""
        return self.teacher.model if self.deploy == "teacher" else self.student

    def forward(self, batch: Batch) -> Losses:
        """Compute the losses; see the class."""
        ignore = batch.ignore_index
        labeled = self.student(batch.images)
        with torch.no_grad(), evaluating(self.teacher):
            weak = self.teacher(batch.unlabeled)
        target = consistency_target(weak, threshold=self.threshold, valid=batch.valid, ignore_index=ignore)
        (one, first), (two, second) = (
            strong_view(batch.unlabeled, target, self.strong, self.mix, num_classes=weak.shape[1]) for _ in range(2)
        )
        with changed_features(self.student, partial(complementary_dropout, share=self.dropout), backbone=self.backbone):
            prediction, other = self.student(torch.cat([one, two])).chunk(2)

        supervised = supervised_loss(labeled, batch.masks, loss=self.loss, ignore_index=ignore)
        strong = (
            consistency_loss(prediction, first, ignore_index=ignore)
            + consistency_loss(other, second, ignore_index=ignore)
        ) / 2
        sure = sure_share(target, labeled.shape[1], ignore_index=ignore)
        logged = {"supervised": supervised.detach(), "strong": strong.detach(), "sure": sure}
        return Losses((supervised + strong) / 2, logged)

    def after_step(self, batch: Batch) -> None:
        """Move the teacher towards the student."""
        self.teacher.update(self.student, batch.step)
