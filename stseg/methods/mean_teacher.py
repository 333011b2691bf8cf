"""Mean Teacher."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from stseg.augment import StrongAugment, as_batch_augmentation, strong_view
from stseg.checks import check_choice, check_nonnegative
from stseg.engine.method import Batch, Losses, Method
from stseg.functional import sigmoid_rampup, squared_difference, supervised_loss
from stseg.models.segmenter import as_segmenter
from stseg.modules import EMA
from stseg.types import BatchAugmentation, Criterion


class MeanTeacher(Method):
    """Mean Teacher (Tarvainen and Valpola, NeurIPS 2017): a student consistent with the average of its past weights.

    ``L = Ls + weight * r(t) * Lu``, where Lu is the mean, over classes and valid pixels, of the squared difference of
    the student's probabilities on the strong view and the teacher's on the weak one, and
    ``r(t) = exp(-5 (1 - t / rampup)^2)`` rises from near 0 to 1 in the first ``rampup`` of the training.

    The paper is about classification. The settings of two reproductions for segmentation are:

    - the authors of CPS: ``weight=100, rampup=0, strong=None, include_labeled=True, warmup=False,
      deploy="student"``;
    - the authors of GCT: ``space="logits", weight=1, rampup=1/9, strong=None``.

    As in both, the teacher runs in training mode with its own batch statistics, and only its weights are averaged.
    Unlike in the first, it is updated after the step. Unlike in both, padded pixels are ignored.

    Args:
        network: the student, bare or in a :class:`stseg.Segmenter`; the teacher is a copy.
        decay: decay of the average; with ``warmup``, ``min(1 - 1 / (t + 1), decay)``.
        warmup: whether the average follows the student closely in the first steps.
        weight: final weight of the consistency.
        rampup: share of the training until the final weight is reached; 0 for no ramp-up.
        strong: augmentation of the student's images, which must not move pixels; None for none.
        space: outputs to compare: ``"softmax"`` or ``"logits"``.
        include_labeled: whether the consistency covers the labeled images too.
        deploy: which of the two is validated and returned: ``"teacher"`` or ``"student"``.
        loss: supervised loss, ``(logits, masks) -> scalar``; None for cross-entropy.

    Logged: ``supervised``, ``consistency`` (unweighted).

    Example:
        >>> method = MeanTeacher(nn.Conv2d(3, 2, 1))
        >>> images, masks = torch.rand(2, 3, 8, 8), torch.randint(2, (2, 8, 8))
        >>> batch = Batch(images, masks, torch.zeros(2, dtype=torch.bool), unlabeled=torch.rand(2, 3, 8, 8))
        >>> sorted(method(batch).logged)
        ['consistency', 'supervised']
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        decay: float = 0.99,
        warmup: bool = True,
        weight: float = 10.0,
        rampup: float = 0.1,
        strong: BatchAugmentation | None = StrongAugment(cutout=None),  # noqa: B008  it has no state
        space: Literal["softmax", "logits"] = "softmax",
        include_labeled: bool = False,
        deploy: Literal["teacher", "student"] = "teacher",
        loss: Criterion | None = None,
    ) -> None:
        super().__init__()
        check_choice("space", space, "softmax", "logits")
        check_choice("deploy", deploy, "teacher", "student")
        check_nonnegative("weight", weight)
        check_nonnegative("rampup", rampup)
        self.student = as_segmenter(network)
        self.teacher = EMA(self.student, decay, warmup=warmup, buffers="own")
        self.weight, self.rampup, self.space = weight, rampup, space
        self.strong = as_batch_augmentation(strong)
        self.include_labeled, self.deploy, self.loss = include_labeled, deploy, loss

    @property
    def model(self) -> nn.Module:  # type: ignore[override]  # an alias, not another submodule
        """Teacher or student, according to ``deploy``."""
        return self.teacher.model if self.deploy == "teacher" else self.student

    def forward(self, batch: Batch) -> Losses:
        """Compute the losses; see the class."""
        labeled = self.student(batch.images)
        supervised = supervised_loss(labeled, batch.masks, loss=self.loss, ignore_index=batch.ignore_index)

        visible = torch.zeros(batch.unlabeled[:, 0].shape, dtype=torch.int64, device=batch.unlabeled.device)
        if batch.valid is not None:
            visible = visible.masked_fill(~batch.valid, batch.ignore_index)
        images, visible = strong_view(batch.unlabeled, visible, self.strong)
        student, where = self.student(images), visible != batch.ignore_index
        with torch.no_grad():
            teacher = self.teacher(batch.unlabeled)
            if self.include_labeled:
                teacher = torch.cat([self.teacher(batch.images), teacher])
        if self.include_labeled:
            student = torch.cat([labeled, student])
            where = torch.cat([torch.ones_like(batch.masks, dtype=torch.bool), where])
        if self.space == "softmax":
            student, teacher = student.softmax(1), teacher.softmax(1)
        consistency = squared_difference(student, teacher, where=where)

        weight = self.weight * sigmoid_rampup(batch.step, self.rampup * batch.steps)
        logged = {"supervised": supervised.detach(), "consistency": consistency.detach()}
        return Losses(supervised + weight * consistency, logged)

    def after_step(self, batch: Batch) -> None:
        """Move the teacher towards the student."""
        self.teacher.update(self.student, batch.step)
