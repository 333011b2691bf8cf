"""Guided collaborative training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stseg.checks import check_count, check_nonnegative, check_probability
from stseg.engine.config import TrainConfig
from stseg.engine.method import Batch, Losses, Method
from stseg.engine.optimizers import build_critic_optimizer, build_optimizer
from stseg.functional import (
    flaw_target,
    less_flawed_target,
    mean_over_processes,
    refine_flaws,
    sigmoid_rampup,
    squared_difference,
    supervised_loss,
)
from stseg.models.segmenter import as_segmenter
from stseg.models.state import check_apart
from stseg.modules import FlawDetector, frozen
from stseg.types import Criterion


class GCT(Method):
    """GCT (Ke et al., ECCV 2020, section 3): two networks, each of which follows the other where that one is better.

    A flaw detector D learns from labeled images where a prediction differs from its mask. With p the probabilities of
    one network, on labeled and unlabeled images, the loss of that network is

    ``L = Ls + correction * mean(bad * D(x, p)^2) + consistency * r(t) * mean((p - target)^2)``, where

    - dynamic consistency: the target of a pixel is the prediction, of the two, with the smaller flaw, so
      that the worse one learns from the better one; ``r(t) = exp(-5 (1 - t / rampup)^2)`` rises from near 0 to 1
      in the first ``rampup`` of the training;
    - flaw correction: where both are bad, with flaws above ``threshold``, a network learns a prediction
      in which the detector finds no flaw.

    The detector's loss is ``detection * mean((D(x, p) - flaws of p)^2)``, over labeled images and both networks. All
    are updated at the same time: the networks' losses pass through the detector with fixed parameters, and its own
    uses detached predictions.

    As in the authors' code each network, and the detector, sees labeled and unlabeled images together, both terms cover
    both, and the first network alone is validated and returned. What differs:

    - The supervised loss is the mean over the labeled pixels of the batch. In PixelSSL it is the sum over them divided
      by all pixels of the crop, averaged over the images, which weighs images with few labeled pixels less.
    - Pixels without a label are neither flaws nor targets of the detector; the authors take them as half a flaw.
    - Padding of unlabeled images is hidden from the detector, and does not count.
    - An image without any flaw is 0 everywhere, where the authors subtract its minimum (from memory, not checked).
    - Targets come from the forward pass that learns from them, not from one before; so dropout is the same in both.
    - Flaws that differ by less than 0.001 in an image are not stretched to the whole range, which would be noise.
    - The detector sees images in [0, 1], on the scale of the probabilities; the authors' are normalized. Crops of less
      than 128 pixels are enlarged for it.

    Args:
        network: the first network, bare or in a :class:`stseg.Segmenter`.
        other: the second network, with different initial weights.
        num_classes: number of classes, 2 for networks with one logit.
        detector: D, images and probabilities to flaws ``(B, 1, H, W)``; None for that of the paper,
            ``stseg.modules.FlawDetector(3 + num_classes)``, for images with 3 channels.
        correction: weight of the flaw correction.
        consistency: final weight of the dynamic consistency.
        rampup: share of the training until that weight is reached; 0 for no ramp-up. The authors ramp over 5 of 45
            epochs.
        threshold: flaw, from 0 to 1, above which a prediction is bad.
        detection: weight of the detector's loss.
        detector_lr: learning rate of the detector's Adam, whose betas are 0.9 and 0.99.
        loss: supervised loss, ``(logits, masks) -> scalar``; None for cross-entropy.

    Logged: ``supervised``, ``correction``, ``consistency``, each the sum over both networks, and ``detector``, their
    mean, all unweighted; ``bad``, the share of pixels where both are.

    Raises:
        ValueError: if both networks share parameters, or a setting is out of its range; when called, if
            ``num_classes``, or the channels of the detector, do not match.

    Example:
        >>> method = GCT(nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1), num_classes=2)
        >>> images, masks = torch.rand(2, 3, 32, 32), torch.randint(2, (2, 32, 32))
        >>> batch = Batch(images, masks, torch.zeros(2, dtype=torch.bool), unlabeled=torch.rand(2, 3, 32, 32))
        >>> sorted(method(batch).logged)
        ['bad', 'consistency', 'correction', 'detector', 'supervised']
    """

    def __init__(
        self,
        network: nn.Module,
        other: nn.Module,
        *,
        num_classes: int,
        detector: nn.Module | None = None,
        correction: float = 1.0,
        consistency: float = 100.0,
        rampup: float = 1 / 9,
        threshold: float = 0.6,
        detection: float = 10.0,
        detector_lr: float = 1e-4,
        loss: Criterion | None = None,
    ) -> None:
        super().__init__()
        check_apart(network=network, other=other)
        for name, value in (
            ("correction", correction),
            ("consistency", consistency),
            ("rampup", rampup),
            ("detection", detection),
            ("detector_lr", detector_lr),
        ):
            check_nonnegative(name, value)
        check_probability("threshold", threshold)
        check_count("num_classes", num_classes, least=2)
        self.model, self.other = as_segmenter(network), as_segmenter(other)
        self.detector = FlawDetector(3 + num_classes) if detector is None else detector
        self.num_classes, self.threshold = num_classes, threshold
        self.correction, self.consistency, self.detection = correction, consistency, detection
        self.rampup, self.detector_lr, self.loss = rampup, detector_lr, loss

    def optimizers(self, config: TrainConfig) -> list[torch.optim.Optimizer]:
        """Build the networks' optimizer and the detector's."""
        detector = build_critic_optimizer(self.detector, self.detector_lr)
        return [build_optimizer(nn.ModuleList([self.model, self.other]), config), detector]

    def forward(self, batch: Batch) -> Losses:
        """Compute the losses; see the class."""
        count, ignore = len(batch.images), batch.ignore_index
        images = torch.cat([batch.images, batch.unlabeled])
        visible = torch.ones_like(images[:, 0], dtype=torch.bool)
        if batch.valid is not None:
            visible[count:] = batch.valid
        both = self.model(images), self.other(images)
        if any(logits.shape[1] != self.num_classes for logits in both):
            came = " and ".join(str(logits.shape[1]) for logits in both)
            raise ValueError(f"num_classes is {self.num_classes}, but the networks give {came} classes")
        one, two = predictions = [logits.softmax(1) * visible[:, None] for logits in both]
        images = images * visible[:, None]

        found = [self.detector(images, p.detach()) for p in predictions]
        flaws_of_one, flaws_of_two = (refine_flaws(flaws[:, 0], where=visible) for flaws in found)
        target_of_one, bad = less_flawed_target(one, two, flaws_of_one, flaws_of_two, threshold=self.threshold)
        target_of_two, _ = less_flawed_target(two, one, flaws_of_two, flaws_of_one, threshold=self.threshold)

        judge, nothing = frozen(self.detector), torch.zeros_like(found[0])
        parts: dict[str, list[Tensor]] = {"supervised": [], "correction": [], "consistency": [], "detector": []}
        for logits, p, flaws, target in zip(both, predictions, found, (target_of_one, target_of_two), strict=True):
            parts["supervised"].append(
                supervised_loss(logits[:count], batch.masks, loss=self.loss, ignore_index=ignore)
            )
            parts["correction"].append(squared_difference(judge(images, p) * bad[:, None], nothing, where=visible))
            parts["consistency"].append(squared_difference(p, target, where=visible))
            wanted = flaw_target(p[:count], batch.masks, ignore_index=ignore)[:, None]
            parts["detector"].append(squared_difference(flaws[:count], wanted, where=batch.masks != ignore) / 2)

        losses = {name: torch.stack(values).sum() for name, values in parts.items()}
        ramp = sigmoid_rampup(batch.step, self.rampup * batch.steps)
        total = (
            losses["supervised"]
            + self.correction * losses["correction"]
            + self.consistency * ramp * losses["consistency"]
            + self.detection * losses["detector"]
        )
        losses["bad"] = mean_over_processes((bad & visible).sum().float(), visible.sum())
        return Losses(total, {name: loss.detach() for name, loss in losses.items()})
