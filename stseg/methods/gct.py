"""Guided collaborative training."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from stseg.checks import check_nonnegative, check_probability
from stseg.engine.config import TrainConfig
from stseg.engine.method import Batch, Losses, Method
from stseg.engine.optimizers import build_optimizer
from stseg.functional import (
    clean_flaws,
    mean_over_processes,
    sigmoid_rampup,
    squared_difference,
    supervised_loss,
    true_flaws,
)
from stseg.models.segmenter import as_segmenter
from stseg.modules import FlawDetector, frozen
from stseg.types import Criterion


class GCT(Method):
    """GCT (Ke et al., ECCV 2020, section 3): two networks, each of which follows the other where that one is better.

    A flaw detector D sees an image and a prediction, and says where the prediction is wrong. For each network, with p
    its probabilities and p' the other's,

    ``L = Ls + correction * mean([both bad] * D(x, p)^2) + consistency * r(t) * mean((p - t)^2)``

    over labeled and unlabeled images. The target t of dynamic consistency is p' where the other's flaws are smaller,
    else p itself; where both are above ``threshold``, "both bad", the second term pulls the flaws down. r(t) rises from
    near 0 to 1 in the first ``rampup`` of the training. The detector learns, on labeled images, the blurred difference
    of prediction and mask, ``10 * mean((D(x, p) - flaws)^2)``, averaged over both networks. All are updated at the
    same time; gradients pass through the detector with fixed parameters.

    As in the authors' code (PixelSSL) labeled and unlabeled images share a forward pass, and the first network alone is
    validated and returned. Unlike there, the targets come from the same forward pass, not from one before with other
    dropout, and ignored and padded pixels count nowhere (there, ignored pixels are half flaws).

    Args:
        network: the first network, bare or in a :class:`stseg.Segmenter`.
        other: the second network, with the same architecture and different initial weights.
        num_classes: number of classes, 2 for networks with one logit.
        image_channels: channels of the images.
        correction: weight of flaw correction.
        consistency: final weight of dynamic consistency.
        rampup: share of the training until that weight is reached; 0 for no ramp-up. The authors ramp over 5 of 45
            epochs.
        threshold: value of a flaw map, scaled to [0, 1], above which a pixel is bad.
        detector_width: channels of the detector's first convolution, of which the others are multiples.
        detector_lr: learning rate of the detector's Adam, whose betas are 0.9 and 0.99.
        loss: supervised loss, ``(logits, masks) -> scalar``; None for cross-entropy.

    Logged: ``supervised``, ``correction`` and ``consistency`` (unweighted), each the sum over both networks;
    ``detector``; ``bad``, the share of pixels where both are.

    Raises:
        ValueError: if both networks share parameters, or a setting is out of its range.

    Example:
        >>> method = GCT(nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1), num_classes=2)
        >>> images, masks = torch.rand(2, 3, 16, 16), torch.randint(2, (2, 16, 16))
        >>> batch = Batch(images, masks, torch.zeros(2, dtype=torch.bool), unlabeled=torch.rand(2, 3, 16, 16))
        >>> sorted(method(batch).logged)
        ['bad', 'consistency', 'correction', 'detector', 'supervised']
    """

    def __init__(
        self,
        network: nn.Module,
        other: nn.Module,
        *,
        num_classes: int,
        image_channels: int = 3,
        correction: float = 1.0,
        consistency: float = 100.0,
        rampup: float = 1 / 9,
        threshold: float = 0.6,
        detector_width: int = 64,
        detector_lr: float = 1e-4,
        loss: Criterion | None = None,
    ) -> None:
        super().__init__()
        if {id(p) for p in network.parameters()} & {id(p) for p in other.parameters()}:
            raise ValueError("network and other share parameters; expected two networks with weights of their own")
        for name, value in {"correction": correction, "consistency": consistency, "rampup": rampup}.items():
            check_nonnegative(name, value)
        check_probability("threshold", threshold)
        self.model, self.other = as_segmenter(network), as_segmenter(other)
        self.detector = FlawDetector(image_channels + num_classes, detector_width)
        self.num_classes, self.correction, self.consistency = num_classes, correction, consistency
        self.rampup, self.threshold, self.detector_lr, self.loss = rampup, threshold, detector_lr, loss

    def optimizers(self, config: TrainConfig) -> list[torch.optim.Optimizer]:
        """Build the optimizer of both networks and the detector's."""
        networks = nn.ModuleList([self.model, self.other])
        detector = torch.optim.Adam(self.detector.parameters(), lr=self.detector_lr, betas=(0.9, 0.99))
        return [build_optimizer(networks, config), detector]

    def forward(self, batch: Batch) -> Losses:
        """Compute the losses; see the class."""
        ignore, labeled = batch.ignore_index, len(batch.images)
        images = torch.cat([batch.images, batch.unlabeled])
        logits = [network(images).float() for network in (self.model, self.other)]
        if logits[0].shape[1] != self.num_classes:
            raise ValueError(f"num_classes is {self.num_classes}, but the network gives {logits[0].shape[1]} classes")
        probabilities = [z.softmax(1) for z in logits]
        known = batch.masks != ignore
        valid = torch.ones_like(images[labeled:, 0], dtype=torch.bool) if batch.valid is None else batch.valid
        where = torch.cat([torch.ones_like(known), valid])
        supervised = sum_of(
            supervised_loss(z[:labeled], batch.masks, loss=self.loss, ignore_index=ignore) for z in logits
        )

        judge = frozen(self.detector)
        flaws = [judge(torch.cat([images, p], 1)) for p in probabilities]
        cleaned = [clean_flaws(each, threshold=self.threshold) for each in flaws]
        bad = (cleaned[0] > self.threshold) & (cleaned[1] > self.threshold) & where
        correction = sum_of(mean_over_processes((each.square() * bad).sum(), where.sum()) for each in flaws)
        one, two = (p.detach() for p in probabilities)
        targets = [
            torch.where((cleaned[1] >= cleaned[0])[:, None], one, two),
            torch.where((cleaned[0] >= cleaned[1])[:, None], two, one),
        ]
        consistency = sum_of(
            squared_difference(p, target, where=where) for p, target in zip(probabilities, targets, strict=True)
        )

        detector = sum_of(self._detector_loss(batch, p[:labeled].detach(), known) / 2 for p in probabilities)
        weight = self.consistency * sigmoid_rampup(batch.step, self.rampup * batch.steps)
        total = supervised + self.correction * correction + weight * consistency + detector
        parts = {"supervised": supervised, "correction": correction, "consistency": consistency, "detector": detector}
        parts["bad"] = mean_over_processes(bad.sum().float(), where.sum())
        return Losses(total, {name: part.detach() for name, part in parts.items()})

    def _detector_loss(self, batch: Batch, probabilities: Tensor, known: Tensor) -> Tensor:
        """Compute ten times the mean square of the detector's errors on labeled images."""
        flaws = self.detector(torch.cat([batch.images, probabilities], 1)).float()
        truth = true_flaws(probabilities, batch.masks, ignore_index=batch.ignore_index)
        return 10 * squared_difference(flaws[:, None], truth[:, None], where=known)


def sum_of(terms: Iterable[Tensor]) -> Tensor:
    """Add scalars."""
    return torch.stack(list(terms)).sum()
