"""S4L: self-supervised semi-supervised learning by rotations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stseg.checks import check_count, check_nonnegative
from stseg.engine.config import TrainConfig
from stseg.engine.method import Batch, Losses, Method
from stseg.engine.optimizers import build_optimizer
from stseg.functional import cross_entropy, mean_over_processes, supervised_loss, turn
from stseg.models.segmenter import as_segmenter
from stseg.modules import RotationHead
from stseg.types import Criterion

_NOT_COUNTED = -1


class S4L(Method):
    """S4L (Zhai et al., ICCV 2019, section 4), rotations: the network also tells how its images are turned.

    The paper is about classification, and turns each image in all four ways; this is the version for segmentation of
    the authors of GCT (PixelSSL). Every image, labeled or not, has a copy that is turned by 90, 180 or 270 degrees,
    drawn for each. A head on the network's logits tells which of the four angles it sees:

    ``L = Ls + turned * Ls(turned images, turned masks) + rotation * CE(head(logits), angle)``,

    where the last term is the mean over all images and copies, so that half of them are not turned.

    As there, originals and copies of both streams pass through the network as one batch, and so batch normalization
    sees all of them, and the head learns at the base rate of the network. Unlike there, the padding of unlabeled
    images, whose place would tell the angle, is hidden: network and head see the pixels that are valid however the
    image is turned, and an image without any does not count. Labeled images are seen whole, for the sake of their
    masks, so that crops without padding teach more. The supervised losses are means over the labeled pixels of the
    batch, not over all pixels of each image. Crops must be square.

    Args:
        network: a network, bare or in a :class:`stseg.Segmenter`.
        num_classes: number of classes, 2 for a network with one logit.
        turned: weight of the supervised loss of the turned images.
        rotation: weight of the classification of the angles.
        loss: supervised loss, ``(logits, masks) -> scalar``; None for cross-entropy.

    Logged: ``supervised``, ``turned``, ``rotation`` (unweighted), and ``accuracy``, the share of images whose angle
    is recognized.

    Raises:
        ValueError: if a weight is negative; when called, if images are not square, or ``num_classes`` does not match.

    Example:
        >>> method = S4L(nn.Conv2d(3, 2, 1), num_classes=2)
        >>> images, masks = torch.rand(2, 3, 8, 8), torch.randint(2, (2, 8, 8))
        >>> batch = Batch(images, masks, torch.zeros(2, dtype=torch.bool), unlabeled=torch.rand(2, 3, 8, 8))
        >>> sorted(method(batch).logged)
        ['accuracy', 'rotation', 'supervised', 'turned']
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
        check_count("num_classes", num_classes, least=2)
        check_nonnegative("turned", turned)
        check_nonnegative("rotation", rotation)
        self.model = as_segmenter(network)
        self.head = RotationHead(num_classes)
        self.num_classes, self.turned, self.rotation, self.loss = num_classes, turned, rotation, loss

    def optimizers(self, config: TrainConfig) -> list[torch.optim.Optimizer]:
        """Build the network's optimizer, in which the head has the base learning rate."""
        optimizer = build_optimizer(self.model, config)
        optimizer.add_param_group({"params": list(self.head.parameters()), "lr": config.lr})
        return [optimizer]

    def draw(self, images: Tensor) -> Tensor:
        """Draw the quarter turns of the copies, ``(B,)`` int64 from 1 to 3."""
        return torch.randint(1, 4, (len(images),), device=images.device)

    def forward(self, batch: Batch) -> Losses:
        """Compute the losses; see the class."""
        count, ignore = len(batch.images), batch.ignore_index
        images = torch.cat([batch.images, batch.unlabeled])
        height, width = images.shape[-2:]
        if height != width:
            raise ValueError(f"crops measure {height} x {width}; expected square ones: WeakAugment({height})")
        visible = torch.ones_like(images[:, 0], dtype=torch.bool)
        if batch.valid is not None:
            visible[count:] = valid_in_every_turn(batch.valid)
        images = images * visible[:, None]

        quarters = self.draw(images)
        logits = self.model(torch.cat([images, turn(images, quarters)]))
        if logits.shape[1] != self.num_classes:
            raise ValueError(f"num_classes is {self.num_classes}, but the network gives {logits.shape[1]} classes")
        originals, copies = (rows[:count] for rows in logits.chunk(2))
        supervised = supervised_loss(originals, batch.masks, loss=self.loss, ignore_index=ignore)
        masks = turn(batch.masks, quarters[:count])
        turned = supervised_loss(copies, masks, loss=self.loss, ignore_index=ignore)

        visible = torch.cat([visible, visible])  # turned or not
        counted = visible.any((1, 2))
        scores = self.head(logits * visible[:, None])
        angles = torch.cat([torch.zeros_like(quarters), quarters])
        angles = torch.where(counted, angles, _NOT_COUNTED)
        rotation = cross_entropy(scores[..., None, None], angles[:, None, None], ignore_index=_NOT_COUNTED)

        accuracy = mean_over_processes((scores.argmax(1) == angles).sum().float(), counted.sum())

        parts = {"supervised": supervised, "turned": turned, "rotation": rotation, "accuracy": accuracy}
        total = supervised + self.turned * turned + self.rotation * rotation
        return Losses(total, {name: part.detach() for name, part in parts.items()})


def valid_in_every_turn(valid: Tensor) -> Tensor:
    """Return which pixels of square images ``(B, S, S)`` are valid however the image is turned.

    Example:
        >>> valid_in_every_turn(torch.tensor([[[1, 1, 0], [1, 1, 1], [1, 1, 1]]]).bool()).int()
        tensor([[[0, 1, 0],
                 [1, 1, 1],
                 [0, 1, 0]]], dtype=torch.int32)
    """
    return torch.stack([torch.rot90(valid, k, (1, 2)) for k in range(4)]).all(0)
