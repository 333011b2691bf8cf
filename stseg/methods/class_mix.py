"""ClassMix."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from stseg.augment import ClassMix as Mixer
from stseg.augment import as_batch_augmentation, strong_view
from stseg.checks import check_choice, check_nonnegative, check_probability
from stseg.engine.method import Batch, Losses, Method
from stseg.functional import confident_share, consistency_loss, supervised_loss
from stseg.models.segmenter import as_segmenter
from stseg.modules import EMA
from stseg.types import BatchAugmentation, Criterion


class ClassMix(Method):
    """ClassMix (Olsson et al., WACV 2021, section 3): images mixed along the boundaries of predicted classes.

    ``L = Ls + weight * q * Lu``. The teacher, the average of the student's past weights, labels each unlabeled image;
    the pixels of half of its classes are pasted into the next image of the batch, and the labels with them. Lu is the
    cross-entropy with the mixed labels, averaged over all pixels: none is left out. q, one number for the whole batch,
    is the share of pixels whose confidence is at least ``threshold``.

    As in the authors' code the teacher predicts in training mode with batch statistics of its own, only its weights are
    averaged, and the student is what is validated and returned. Unlike there, padded pixels are ignored. For
    Cityscapes the authors augment the mixed images by color jitter and blur: ``strong=StrongAugment(cutout=None)``;
    theirs is weaker.

    Args:
        network: the student, bare or in a :class:`stseg.Segmenter`; the teacher is a copy.
        decay: decay of the average after its warm-up, ``min(1 - 1 / (t + 1), decay)``.
        weight: weight of the consistency.
        threshold: confidence from which a pixel counts for q.
        mix: how images are mixed; None for not at all.
        strong: augmentation of the mixed images, which must not move pixels; None, as for Pascal VOC, for none.
        deploy: which of the two is validated and returned: ``"student"`` or ``"teacher"``.
        loss: supervised loss, ``(logits, masks) -> scalar``; None for cross-entropy.

    Logged: ``supervised``, ``consistency`` (q Lu), ``sure`` (q).

    Raises:
        ValueError: if a setting is out of its range.

    Example:
        >>> method = ClassMix(nn.Conv2d(3, 2, 1))
        >>> images, masks = torch.rand(2, 3, 8, 8), torch.randint(2, (2, 8, 8))
        >>> batch = Batch(images, masks, torch.zeros(2, dtype=torch.bool), unlabeled=torch.rand(2, 3, 8, 8))
        >>> sorted(method(batch).logged)
        ['consistency', 'supervised', 'sure']
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        decay: float = 0.99,
        weight: float = 1.0,
        threshold: float = 0.968,
        mix: Mixer | None = Mixer(),  # noqa: B008  frozen
        strong: BatchAugmentation | None = None,
        deploy: Literal["student", "teacher"] = "student",
        loss: Criterion | None = None,
    ) -> None:
        super().__init__()
        check_choice("deploy", deploy, "student", "teacher")
        check_nonnegative("weight", weight)
        check_probability("threshold", threshold)
        self.student = as_segmenter(network)
        self.teacher = EMA(self.student, decay, warmup=True, buffers="own")
        self.weight, self.threshold, self.mix = weight, threshold, mix
        self.strong = as_batch_augmentation(strong)
        self.deploy, self.loss = deploy, loss

    @property
    def model(self) -> nn.Module:  # type: ignore[override]  # an alias, not another submodule
        """Student or teacher, according to ``deploy``."""
        return self.student if self.deploy == "student" else self.teacher.model

    def forward(self, batch: Batch) -> Losses:
        """Compute the losses; see the class."""
        ignore = batch.ignore_index
        labeled = self.student(batch.images)
        supervised = supervised_loss(labeled, batch.masks, loss=self.loss, ignore_index=ignore)

        with torch.no_grad():
            logits = self.teacher(batch.unlabeled).float()
        labels, probabilities = logits.argmax(1), logits.softmax(1)
        if batch.valid is not None:
            labels = torch.where(batch.valid, labels, ignore)
        images, target = batch.unlabeled, labels
        if self.mix is not None:
            mixed = self.mix(labels, images, target, probabilities, ignore_index=ignore)
            images, target, probabilities = mixed
        sure = confident_share(probabilities, self.threshold, where=target != ignore)
        images, target = strong_view(images, target, self.strong)
        consistency = sure * consistency_loss(self.student(images), target, ignore_index=ignore)

        logged = {"supervised": supervised.detach(), "consistency": consistency.detach(), "sure": sure}
        return Losses(supervised + self.weight * consistency, logged)

    def after_step(self, batch: Batch) -> None:
        """Move the teacher towards the student."""
        self.teacher.update(self.student, batch.step)
