"""UniMatch V2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from stseg.augment import CutMix, StrongAugment, as_batch_augmentation, strong_view
from stseg.checks import check_choice, check_probability
from stseg.engine.method import Batch, Losses, Method
from stseg.functional import consistency_loss, consistency_target, supervised_loss, sure_share
from stseg.models.segmenter import as_segmenter
from stseg.models.state import evaluating
from stseg.modules import EMA, changed_features, complementary_dropout, complementary_factor
from stseg.types import BatchAugmentation, Criterion


class UniMatchV2(Method):
    """UniMatch V2 (Yang et al., TPAMI 2025, section 3): two strong views with complementary channels, and an average.

    ``L = (Ls + (L1 + L2) / 2) / 2``. Confident predictions of the teacher, the average of the student's past weights,
    on weakly augmented images are the targets of two strong views, as in FixMatch. Complementary dropout makes one of
    image-level and feature-level augmentation: each channel of the encoder's features is doubled in one of the two
    views and zero in the other, at random; half of the images are left as they are in both.

    As in the authors' code the average covers buffers too, and the teacher predicts in evaluation mode; labeled images
    have a forward pass of their own; features of equal width share the channels. The CutMix box comes from another
    image of the batch, the batch in reverse order. The paper's networks are DPTs on DINOv2 encoders, trained as by
    ``TrainConfig.unimatch_v2()``: ``smp.DPT("tu-vit_small_patch14_dinov2", patch_size=16, dynamic_img_size=True)``, as
    the levels of smp's DPT fit together for patches of 16 only. That the paper's tables show the average is not said in
    its code; ``deploy="student"`` returns the other one.

    Args:
        network: the student, bare or in a :class:`stseg.Segmenter`, with a backbone; the teacher is a copy.
        threshold: least confidence of a target pixel.
        decay: decay of the average after its warm-up, ``min(1 - 1 / (t + 1), decay)``.
        untouched: share of the images whose features are left as they are.
        strong: augmentation of the two strong views; None for none.
        mix: mixing of boxes; None for none.
        backbone: name of the submodule of the network whose output is changed; None uses ``encoder``, ``backbone`` or
            the one that ``base_model_prefix`` names.
        deploy: which of the two is validated and returned: ``"teacher"`` or ``"student"``.
        loss: supervised loss, ``(logits, masks) -> scalar``; None for cross-entropy.

    Logged: ``supervised``, ``strong`` (mean of L1 and L2), and ``sure``, the share of valid pixels that are targets.

    Raises:
        ValueError: if a setting is out of its range.
        NetworkError: when called, if the network has no backbone whose features can be changed; names it.

    Example:
        >>> import segmentation_models_pytorch as smp
        >>> method = UniMatchV2(smp.FPN("tu-test_resnet", encoder_weights=None, classes=2))
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
        decay: float = 0.996,
        untouched: float = 0.5,
        strong: BatchAugmentation | None = StrongAugment(cutout=None),  # noqa: B008  it has no state
        mix: CutMix | None = CutMix(),  # noqa: B008  frozen
        backbone: str | None = None,
        deploy: Literal["teacher", "student"] = "teacher",
        loss: Criterion | None = None,
    ) -> None:
        super().__init__()
        check_probability("threshold", threshold)
        check_probability("untouched", untouched)
        check_choice("deploy", deploy, "teacher", "student")
        self.student = as_segmenter(network)
        self.teacher = EMA(self.student, decay, warmup=True, buffers="average")
        self.threshold, self.untouched, self.backbone = threshold, untouched, backbone
        self.strong = as_batch_augmentation(strong)
        self.mix = mix
        self.deploy, self.loss = deploy, loss

    @property
    def model(self) -> nn.Module:  # type: ignore[override]  # an alias, not another submodule
        """Teacher or student, according to ``deploy``."""
        return self.teacher.model if self.deploy == "teacher" else self.student

    def forward(self, batch: Batch) -> Losses:
        """Compute the losses; see the class."""
        ignore = batch.ignore_index
        with torch.no_grad(), evaluating(self.teacher):
            weak = self.teacher(batch.unlabeled)
        target = consistency_target(weak, threshold=self.threshold, valid=batch.valid, ignore_index=ignore)
        (one, first), (two, second) = (strong_view(batch.unlabeled, target, self.strong, self.mix) for _ in range(2))

        labeled = self.student(batch.images)
        supervised = supervised_loss(labeled, batch.masks, loss=self.loss, ignore_index=ignore)
        with changed_features(self.student, self._dropout(len(one), one.device), backbone=self.backbone):
            prediction, other = self.student(torch.cat([one, two])).chunk(2)
        strong = (
            consistency_loss(prediction, first, ignore_index=ignore)
            + consistency_loss(other, second, ignore_index=ignore)
        ) / 2

        logged = {"supervised": supervised.detach(), "strong": strong.detach()}
        sure = sure_share(target, labeled.shape[1], ignore_index=ignore)
        return Losses((supervised + strong) / 2, {**logged, "sure": sure})

    def after_step(self, batch: Batch) -> None:
        """Move the teacher towards the student."""
        self.teacher.update(self.student, batch.step)

    def _dropout(self, images: int, device: torch.device) -> Callable[[Tensor], Tensor]:
        """Draw complementary dropout for two views of a batch: features of equal width share the channels."""
        left = torch.randperm(images, device=device)[: int(images * self.untouched)]
        factors: dict[int, Tensor] = {}

        def drop(features: Tensor) -> Tensor:
            channels = features.shape[2] if features.ndim == 3 else features.shape[1]
            if channels not in factors:
                factors[channels] = complementary_factor(images, channels, left, device=device)
            return complementary_dropout(features, factors[channels])

        return drop
