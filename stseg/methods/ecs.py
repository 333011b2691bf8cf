"""Error-correcting supervision."""

from __future__ import annotations

import torch
from torch import nn

from stseg.checks import check_nonnegative
from stseg.engine.config import TrainConfig
from stseg.engine.method import Batch, Losses, Method
from stseg.engine.optimizers import build_optimizer
from stseg.functional import cross_entropy, sigmoid_rampup, supervised_loss
from stseg.models.segmenter import Segmenter, as_segmenter
from stseg.modules import frozen
from stseg.types import Criterion

_NOTHING = -100  # where the corrector has nothing to learn; no class


class ECS(Method):
    """ECS (Mendel et al., ECCV 2020): a second network that judges predictions and corrects them. **A reconstruction.**

    There is no public code, and the details below were not checked with the paper. That a *corrector* learns on labeled
    images to tell right predictions and to amend wrong ones, that it also guides the network on labeled images, that on
    unlabeled images its output combined with the prediction makes the target, and that pixels are weighted by its
    certainty: that is the paper's. Its form, the losses and their weights are this file's.

    The corrector maps an image and class probabilities to K + 1 classes: k means "should be class k", K means "is
    right". With p the probabilities of labeled (l) and unlabeled (u) images and C the corrector,

    ``L = Ls + approval * CE(C(x_l, p_l), K) + correction * r(t) * sum(w * CE(p_u, t)) / number of valid pixels``,

    where the target t is the class that C names, or the predicted one where C names K; w is the probability of what C
    names; and r(t) rises from near 0 to 1 in the first ``rampup`` of the training. The corrector learns
    ``CE(C(x_l, p_l), c)`` with c = K where the prediction is right and the annotated class elsewhere. Both are updated
    at the same time; gradients of the second term pass through the corrector with fixed parameters.

    Args:
        network: a network, bare or in a :class:`stseg.Segmenter`.
        corrector: a network of ``(B, C + K, H, W)`` images and probabilities to ``(B, K + 1, H, W)`` logits, such as
            ``smp.Unet(in_channels=3 + K, classes=K + 1, encoder_weights=None)``.
        approval: weight of the corrector's approval on labeled images.
        correction: final weight of the corrected targets on unlabeled images.
        rampup: share of the training until that weight is reached; 0 for no ramp-up.
        corrector_lr: learning rate of the corrector's Adam, whose betas are 0.9 and 0.99.
        loss: supervised loss, ``(logits, masks) -> scalar``; None for cross-entropy.

    Logged: ``supervised``, ``approval`` and ``correction`` (both unweighted), ``corrector``.

    Raises:
        ValueError: if a weight is negative; when called, if the corrector does not return K + 1 channels.

    Example:
        >>> method = ECS(nn.Conv2d(3, 2, 1), nn.Conv2d(5, 3, 1))
        >>> images, masks = torch.rand(2, 3, 8, 8), torch.randint(2, (2, 8, 8))
        >>> batch = Batch(images, masks, torch.zeros(2, dtype=torch.bool), unlabeled=torch.rand(2, 3, 8, 8))
        >>> sorted(method(batch).logged)
        ['approval', 'correction', 'corrector', 'supervised']
    """

    def __init__(
        self,
        network: nn.Module,
        corrector: nn.Module,
        *,
        approval: float = 0.1,
        correction: float = 1.0,
        rampup: float = 0.1,
        corrector_lr: float = 1e-4,
        loss: Criterion | None = None,
    ) -> None:
        super().__init__()
        for name, value in {"approval": approval, "correction": correction, "rampup": rampup}.items():
            check_nonnegative(name, value)
        self.model = as_segmenter(network)
        # It sees probabilities beside the image: nothing to normalize.
        self.corrector = corrector if isinstance(corrector, Segmenter) else Segmenter(corrector, mean=None, std=None)
        self.approval, self.correction, self.rampup = approval, correction, rampup
        self.corrector_lr, self.loss = corrector_lr, loss

    def optimizers(self, config: TrainConfig) -> list[torch.optim.Optimizer]:
        """Build the network's optimizer and the corrector's."""
        corrector = torch.optim.Adam(self.corrector.parameters(), lr=self.corrector_lr, betas=(0.9, 0.99))
        return [build_optimizer(self.model, config), corrector]

    def forward(self, batch: Batch) -> Losses:
        """Compute the losses; see the class."""
        ignore = batch.ignore_index
        labeled, unlabeled = self.model(batch.images), self.model(batch.unlabeled)
        classes, known = labeled.shape[1], batch.masks != ignore
        supervised = supervised_loss(labeled, batch.masks, loss=self.loss, ignore_index=ignore)
        seen = [
            torch.cat([images, logits.float().softmax(1)], 1)
            for images, logits in ((batch.images, labeled), (batch.unlabeled, unlabeled))
        ]

        judged = self.corrector(seen[0].detach())
        if judged.shape[1] != classes + 1:
            raise ValueError(
                f"the corrector gives {judged.shape[1]} channels; expected {classes + 1}: the classes, and 'is right'"
            )
        right = labeled.argmax(1) == batch.masks
        wanted = torch.where(right, classes, batch.masks).masked_fill(~known, _NOTHING)
        corrector = cross_entropy(judged, wanted, ignore_index=_NOTHING)

        approved = torch.full_like(batch.masks, classes).masked_fill(~known, _NOTHING)
        approval = cross_entropy(frozen(self.corrector)(seen[0]), approved, ignore_index=_NOTHING)

        with torch.no_grad():
            weight, named = self.corrector(seen[1].detach()).float().softmax(1).max(1)
            target = torch.where(named == classes, unlabeled.argmax(1), named)
            if batch.valid is not None:
                target = torch.where(batch.valid, target, ignore)
        correction = cross_entropy(unlabeled, target, weight=weight, ignore_index=ignore)

        ramp = sigmoid_rampup(batch.step, self.rampup * batch.steps)
        total = supervised + self.approval * approval + self.correction * ramp * correction + corrector
        parts = {"supervised": supervised, "approval": approval, "correction": correction, "corrector": corrector}
        return Losses(total, {name: part.detach() for name, part in parts.items()})
