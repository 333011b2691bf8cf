"""S4L: self-supervised semi-supervised learning by rotations."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stseg.checks import check_nonnegative
from stseg.engine.config import TrainConfig
from stseg.engine.method import Batch, Losses, Method
from stseg.engine.optimizers import build_optimizer
from stseg.functional import mean_over_processes, supervised_loss, turn
from stseg.models.segmenter import as_segmenter
from stseg.types import Criterion


class S4L(Method):
    """S4L with rotations (Zhai et al., ICCV 2019, section 4), as PixelSSL applies it to segmentation.

    ``L = Ls + turned * CE(turned labeled images, turned masks) + rotation * Lr``. Every labeled and unlabeled image
    gets a copy that is turned by 90, 180 or 270 degrees at random; Lr is the cross-entropy of a head that tells the
    four rotations apart, averaged over images and copies. Half of its targets are thus "not turned". Images and copies
    share one forward pass.

    The paper is about classification, and turns each image in all four ways. Segmentation, with the head on the logits,
    follows PixelSSL. The crops must be square. The head learns at the base rate.

    Args:
        network: a network, bare or in a :class:`stseg.Segmenter`.
        num_classes: number of classes, 2 for a network with one logit.
        turned: weight of the supervised loss on turned labeled images.
        rotation: weight of the loss of the head.
        loss: supervised loss, ``(logits, masks) -> scalar``; None for cross-entropy.

    Logged: ``supervised``, ``turned`` and ``rotation`` (both unweighted).

    Raises:
        ValueError: if a weight is negative; when called, if the crops are not square.

    Example:
        >>> method = S4L(nn.Conv2d(3, 2, 1), num_classes=2)
        >>> images, masks = torch.rand(2, 3, 8, 8), torch.randint(2, (2, 8, 8))
        >>> batch = Batch(images, masks, torch.zeros(2, dtype=torch.bool), unlabeled=torch.rand(2, 3, 8, 8))
        >>> sorted(method(batch).logged)
        ['rotation', 'supervised', 'turned']
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        num_classes: int,
        turned: float = 0.1,
        rotation: float = 0.1,
        loss: Criterion | None = None,
    ) -> None:
        super().__init__()
        check_nonnegative("turned", turned)
        check_nonnegative("rotation", rotation)
        self.model = as_segmenter(network)
        self.head = RotationHead(num_classes)
        self.num_classes, self.turned, self.rotation, self.loss = num_classes, turned, rotation, loss

    def optimizers(self, config: TrainConfig) -> list[torch.optim.Optimizer]:
        """Build the network's optimizer and one of the same kind for the head, at the base rate."""
        return [build_optimizer(self.model, config), build_optimizer(self.head, replace(config, head_lr_factor=1.0))]

    def forward(self, batch: Batch) -> Losses:
        """Compute the losses; see the class."""
        ignore, labeled = batch.ignore_index, len(batch.images)
        unlabeled = batch.unlabeled if batch.valid is None else batch.unlabeled * batch.valid[:, None]
        images = torch.cat([batch.images, unlabeled])
        quarters = torch.randint(1, 4, (len(images),), device=images.device)
        logits = self.model(torch.cat([images, turn(images, quarters)]))
        if logits.shape[1] != self.num_classes:
            raise ValueError(f"num_classes is {self.num_classes}, but the network gives {logits.shape[1]} classes")
        plain, copies = logits.chunk(2)

        supervised = supervised_loss(plain[:labeled], batch.masks, loss=self.loss, ignore_index=ignore)
        masks = turn(batch.masks, quarters[:labeled])
        turned = supervised_loss(copies[:labeled], masks, loss=self.loss, ignore_index=ignore)
        targets = torch.cat([torch.zeros_like(quarters), quarters])
        errors = F.cross_entropy(self.head(logits).float(), targets, reduction="sum")
        rotation = mean_over_processes(errors, torch.full((), len(targets), device=images.device))

        parts = {"supervised": supervised, "turned": turned, "rotation": rotation}
        total = supervised + self.turned * turned + self.rotation * rotation
        return Losses(total, {name: part.detach() for name, part in parts.items()})


class RotationHead(nn.Module):
    """Classifier of the four rotations from a network's logits: two 4x4 convolutions of stride 2, pooling, a layer.

    Args:
        num_classes: number of channels K of the logits.

    Shape:
        ``(B, K, H, W)`` -> ``(B, 4)``; H and W of 4 or more.

    Example:
        >>> sum(p.numel() for p in RotationHead(21).parameters())
        21529
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(num_classes, num_classes, 4, stride=2, padding=1),
            nn.BatchNorm2d(num_classes),
            nn.LeakyReLU(0.2),
            nn.Conv2d(num_classes, 2 * num_classes, 4, stride=2, padding=1),
            nn.BatchNorm2d(2 * num_classes),
            nn.LeakyReLU(0.2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2 * num_classes, 4),
        )

    def forward(self, logits: Tensor) -> Tensor:
        """Compute the logits of 0, 90, 180 and 270 degrees."""
        scores: Tensor = self.layers(logits)
        return scores
