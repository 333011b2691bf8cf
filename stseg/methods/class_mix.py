"""ClassMix."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from stseg.augment import ClassMix as Mixer
from stseg.augment import as_batch_augmentation, strong_view
from stseg.augment.class_mix import for_classes
from stseg.checks import check_choice, check_nonnegative, check_probability
from stseg.engine.method import Batch, Losses, Method
from stseg.functional import confident_share, consistency_loss, consistency_target, supervised_loss
from stseg.models.segmenter import as_segmenter
from stseg.modules import EMA
from stseg.types import BatchAugmentation, Criterion


class ClassMix(Method):
    """ClassMix (Olsson et al., WACV 2021, section 3): images mixed along the borders of predicted classes.

    The teacher, the average of the student's past weights, labels the unlabeled images. Half of the classes of each
    label map are cut out and pasted into the next image and its labels, from which the student learns:

    ``L = Ls + weight * q * Lu``, where Lu is the mean cross-entropy over all valid pixels of the mixed images, and q is
    the share of their pixels for which the teacher's confidence is at least ``threshold``: one number for the whole
    batch. No pixel is left out for its confidence, and there is no ramp-up.

    As in the authors' code, the teacher runs in training mode with its own batch statistics and only its weights are
    averaged; the student sees labeled and mixed images in separate forward passes; and it is the student that is
    validated and returned. Unlike there, padded pixels are neither pasted nor learned from, and means are over all
    processes. The mixing alone is :class:`stseg.ClassMix`, for other methods too:
    ``FixMatch(network, mix=stseg.ClassMix(num_classes=21))``.

    Args:
        network: the student, bare or in a :class:`stseg.Segmenter`; the teacher is a copy.
        threshold: confidence from which a pixel counts as confident.
        weight: weight of the consistency.
        decay: decay of the average, from 0 to 1: ``min(1 - 1 / (t + 1), decay)`` after step t.
        mix: choice of the classes; None for no mixing.
        strong: augmentation of the mixed images, which must not move pixels; None for none, as on Pascal VOC. On
            Cityscapes: ``StrongAugment(jitter=(0.25,) * 4, gray_p=0, blur_sigma=(0.15, 1.15), cutout=None)``.
        deploy: which of the two is validated and returned: ``"student"`` or ``"teacher"``.
        loss: supervised loss, ``(logits, masks) -> scalar``; None for cross-entropy.

    Logged: ``supervised``, ``consistency`` (Lu), and ``sure`` (q).

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
        threshold: float = 0.968,
        weight: float = 1.0,
        decay: float = 0.99,
        mix: Mixer | None = Mixer(),  # noqa: B008  frozen
        strong: BatchAugmentation | None = None,
        deploy: Literal["teacher", "student"] = "student",
        loss: Criterion | None = None,
    ) -> None:
        super().__init__()
        check_probability("threshold", threshold)
        if not (mix is None or isinstance(mix, Mixer)):
            raise TypeError(f"mix is {mix!r}; expected stseg.ClassMix() or None (other mixing: CutMixSeg, FixMatch)")
        check_nonnegative("weight", weight)
        check_choice("deploy", deploy, "teacher", "student")
        self.student = as_segmenter(network)
        self.teacher = EMA(self.student, decay, warmup=True, buffers="own")
        self.threshold, self.weight, self.mix = threshold, weight, mix
        self.strong = as_batch_augmentation(strong)
        self.deploy, self.loss = deploy, loss

    @property
    def model(self) -> nn.Module:  # type: ignore[override]  # an alias, not another submodule
        """Student or teacher, according to ``deploy``."""
        return self.teacher.model if self.deploy == "teacher" else self.student

    def forward(self, batch: Batch) -> Losses:
        """Compute the losses; see the class."""
        ignore = batch.ignore_index
        supervised = supervised_loss(self.student(batch.images), batch.masks, loss=self.loss, ignore_index=ignore)

        with torch.no_grad():
            teacher = self.teacher(batch.unlabeled)
        images, confidence = batch.unlabeled, teacher.softmax(1).amax(1)
        target = consistency_target(teacher, threshold=0.0, valid=batch.valid, ignore_index=ignore)
        if self.mix is not None:
            where = for_classes(self.mix, teacher.shape[1]).draw(
                target, num_classes=teacher.shape[1], ignore_index=ignore
            )
            images, target, confidence = self.mix.transform(where, images, target, confidence)
        images, target = strong_view(images, target, self.strong)

        consistency = consistency_loss(self.student(images), target, ignore_index=ignore)
        confident = confident_share(confidence, threshold=self.threshold, where=target != ignore)
        logged = {"supervised": supervised.detach(), "consistency": consistency.detach(), "sure": confident}
        return Losses(supervised + self.weight * confident * consistency, logged)

    def after_step(self, batch: Batch) -> None:
        """Move the teacher towards the student."""
        self.teacher.update(self.student, batch.step)
