"""CutMix-Seg."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from stseg.augment import BoxMix, as_batch_augmentation, strong_view
from stseg.checks import check_choice, check_nonnegative, check_probability
from stseg.engine.method import Batch, Losses, Method
from stseg.functional import confident_share, squared_difference, supervised_loss
from stseg.models.segmenter import as_segmenter
from stseg.models.state import evaluating
from stseg.modules import EMA
from stseg.types import BatchAugmentation, Criterion


class CutMixSeg(Method):
    """CutMix-Seg (French et al., BMVC 2020, section 3.3): a student that agrees with its average on mixed images.

    ``L = Ls + weight * c * Lu``. A box of half the area of each unlabeled image is replaced by that of another one.
    The teacher, the average of the student's past weights, predicts the images before they are mixed; its predictions
    are mixed in the same way. Lu is the squared difference of the probabilities, summed over classes and averaged over
    pixels; c, one number for the whole batch, is the share of pixels whose confidence is at least ``threshold``.

    As in the authors' code the average has no warm-up and covers the running statistics, and the teacher is what is
    returned. Unlike there, the second image of a pair is another one of the same batch, not of a second loader; the
    teacher predicts in evaluation mode, where the authors freeze the statistics of both networks (do so by
    ``network.eval()`` on pretrained layers); and padded pixels are ignored. The color augmentation that later papers
    add to it is ``strong=StrongAugment(cutout=None)``.

    Args:
        network: the student, bare or in a :class:`stseg.Segmenter`; the teacher is a copy.
        decay: decay of the average.
        weight: weight of the consistency.
        threshold: confidence from which a pixel counts for c.
        mix: how images are mixed; None for not at all.
        strong: augmentation of the student's images, which must not move pixels; None, as in the paper, for none.
        deploy: which of the two is validated and returned: ``"teacher"`` or ``"student"``.
        loss: supervised loss, ``(logits, masks) -> scalar``; None for cross-entropy.

    Logged: ``supervised``, ``consistency`` (c Lu), ``sure`` (c).

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
        decay: float = 0.99,
        weight: float = 1.0,
        threshold: float = 0.97,
        mix: BoxMix | None = BoxMix(),  # noqa: B008  frozen
        strong: BatchAugmentation | None = None,
        deploy: Literal["teacher", "student"] = "teacher",
        loss: Criterion | None = None,
    ) -> None:
        super().__init__()
        check_choice("deploy", deploy, "teacher", "student")
        check_nonnegative("weight", weight)
        check_probability("threshold", threshold)
        self.student = as_segmenter(network)
        self.teacher = EMA(self.student, decay, warmup=False, buffers="average")
        self.weight, self.threshold, self.mix = weight, threshold, mix
        self.strong = as_batch_augmentation(strong)
        self.deploy, self.loss = deploy, loss

    @property
    def model(self) -> nn.Module:  # type: ignore[override]  # an alias, not another submodule
        """Teacher or student, according to ``deploy``."""
        return self.teacher.model if self.deploy == "teacher" else self.student

    def forward(self, batch: Batch) -> Losses:
        """Compute the losses; see the class."""
        labeled = self.student(batch.images)
        supervised = supervised_loss(labeled, batch.masks, loss=self.loss, ignore_index=batch.ignore_index)

        with torch.no_grad(), evaluating(self.teacher):
            target = self.teacher(batch.unlabeled).float().softmax(1)
        valid = torch.ones_like(target[:, 0], dtype=torch.bool) if batch.valid is None else batch.valid
        sure = confident_share(target, self.threshold, where=valid)
        images = batch.unlabeled
        if self.mix is not None:
            images, target, valid = self.mix(images, target, valid)
        images, _ = strong_view(images, torch.zeros_like(valid, dtype=torch.int64), self.strong)
        prediction = self.student(images).softmax(1)
        difference = target.shape[1] * squared_difference(prediction, target, where=valid)  # summed over classes

        consistency = sure * difference
        logged = {"supervised": supervised.detach(), "consistency": consistency.detach(), "sure": sure}
        return Losses(supervised + self.weight * consistency, logged)

    def after_step(self, batch: Batch) -> None:
        """Move the teacher towards the student."""
        self.teacher.update(self.student, batch.step)
