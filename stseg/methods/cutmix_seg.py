"""CutMix-Seg."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from stseg.augment import BoxMix, as_batch_augmentation, strong_view
from stseg.augment.class_mix import for_classes
from stseg.checks import check_choice, check_mixing, check_nonnegative, check_probability
from stseg.engine.method import Batch, Losses, Method
from stseg.functional import confident_share, squared_difference, supervised_loss
from stseg.models.segmenter import as_segmenter
from stseg.models.state import evaluating
from stseg.modules import EMA
from stseg.types import BatchAugmentation, BatchMixing, Criterion


class CutMixSeg(Method):
    """CutMix-Seg (French et al., BMVC 2020, section 3): Mean Teacher on mixed images.

    The teacher, the average of the student's past weights, predicts the unmixed images; its predictions are mixed as
    the images are, and the student learns to predict them from the mixed image:

    ``L = Ls + weight * c * Lu``, where Lu is the squared difference of the probabilities of student and teacher, summed
    over classes and averaged over all valid pixels, and c is the share of the pixels of the batch for which the
    teacher's confidence is at least ``threshold``: one number for the whole batch. There is no ramp-up.

    The teacher starts as a copy of the student; its weights and running statistics are averages, and it predicts in
    evaluation mode. The student sees labeled and mixed images in separate forward passes, in training mode; the authors
    froze its batch normalization, as setting those layers to evaluation mode before the training does here.

    Unlike in the authors' code, the partner of an image is the next one of the same batch, not one of a second batch:
    a step takes as many unlabeled images as there are mixed ones. Padded pixels do not count, neither in Lu nor in c;
    in the authors' code the mean is over all pixels and padding adds 0. Both are means over all processes.

    Args:
        network: the student, bare or in a :class:`stseg.Segmenter`; the teacher is a copy.
        threshold: confidence from which a pixel counts as confident.
        weight: weight of the consistency.
        decay: decay of the average, from 0 to 1.
        mix: mixing of the images; None for none.
        strong: augmentation of the student's unlabeled images before they are mixed, which must not move pixels; None
            for none, as in the paper.
        deploy: which of the two is validated and returned: ``"teacher"`` or ``"student"``.
        loss: supervised loss, ``(logits, masks) -> scalar``; None for cross-entropy.

    Logged: ``supervised``, ``consistency`` (Lu), and ``sure`` (c).

    Raises:
        ValueError: if a setting is out of its range.

    Example:
        >>> method = CutMixSeg(nn.Conv2d(3, 2, 1))
        >>> images, masks = torch.rand(2, 3, 8, 8), torch.randint(2, (2, 8, 8))
        >>> batch = Batch(images, masks, torch.zeros(2, dtype=torch.bool), unlabeled=torch.rand(2, 3, 8, 8))
        >>> sorted(method(batch).logged)
        ['consistency', 'supervised', 'sure']
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        threshold: float = 0.97,
        weight: float = 1.0,
        decay: float = 0.99,
        mix: BatchMixing | None = BoxMix(),  # noqa: B008  frozen
        strong: BatchAugmentation | None = None,
        deploy: Literal["teacher", "student"] = "teacher",
        loss: Criterion | None = None,
    ) -> None:
        super().__init__()
        check_probability("threshold", threshold)
        check_mixing(mix)
        check_nonnegative("weight", weight)
        check_choice("deploy", deploy, "teacher", "student")
        self.student = as_segmenter(network)
        self.teacher = EMA(self.student, decay, warmup=False, buffers="average")
        self.threshold, self.weight, self.mix = threshold, weight, mix
        self.strong = as_batch_augmentation(strong)
        self.deploy, self.loss = deploy, loss

    @property
    def model(self) -> nn.Module:  # type: ignore[override]  # an alias, not another submodule
        """Teacher or student, according to ``deploy``."""
        return self.teacher.model if self.deploy == "teacher" else self.student

    def forward(self, batch: Batch) -> Losses:
        """Compute the losses; see the class."""
        ignore = batch.ignore_index
        supervised = supervised_loss(self.student(batch.images), batch.masks, loss=self.loss, ignore_index=ignore)

        with torch.no_grad(), evaluating(self.teacher):
            target = self.teacher(batch.unlabeled).softmax(1)
        valid = torch.ones_like(target[:, 0], dtype=torch.bool) if batch.valid is None else batch.valid
        # The map of valid pixels goes through the augmentation as a mask: 1, or 0 or the ignore index.
        images, visible = strong_view(batch.unlabeled, valid.long(), self.strong)
        if self.mix is not None:
            labels = torch.where(visible == 1, target.argmax(1), ignore)  # for ClassMix
            images, _, visible, target = for_classes(self.mix, target.shape[1])(images, labels, visible, target)
        where = visible == 1

        prediction = self.student(images).softmax(1)
        consistency = squared_difference(prediction, target, where=where) * target.shape[1]
        confident = confident_share(target.amax(1), threshold=self.threshold, where=where)
        logged = {"supervised": supervised.detach(), "consistency": consistency.detach(), "sure": confident}
        return Losses(supervised + self.weight * confident * consistency, logged)

    def after_step(self, batch: Batch) -> None:
        """Move the teacher towards the student."""
        self.teacher.update(self.student, batch.step)
