"""Strong views of a batch and its targets."""

from __future__ import annotations

import torch
from torch import Tensor

from stseg.augment.class_mix import for_classes
from stseg.types import BatchAugmentation, BatchMixing


@torch.no_grad()
def strong_view(
    images: Tensor,
    target: Tensor,
    strong: BatchAugmentation | None = None,
    mix: BatchMixing | None = None,
    *,
    num_classes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Augment a batch strongly, then mix it, treating the target as a mask.

    Args:
        images: ``(B, C, H, W)`` float in [0, 1].
        target: ``(B, H, W)`` int64, such as :func:`stseg.functional.consistency_target` returns.
        strong: augmentation of the batch; None for none.
        mix: mixing of the images of the batch, such as :class:`stseg.CutMix`; None for none.
        num_classes: number of classes; other values of the target are none that :class:`stseg.ClassMix` may choose.

    Returns:
        New images and targets of the same shapes.

    Example:
        >>> from stseg import CutMix
        >>> images, target = strong_view(torch.rand(2, 3, 8, 8), torch.zeros(2, 8, 8, dtype=torch.long), mix=CutMix())
        >>> images.shape, target.shape
        (torch.Size([2, 3, 8, 8]), torch.Size([2, 8, 8]))
    """
    if strong is None and mix is None:
        return images.clone(), target.clone()
    if strong is not None:
        images, target = strong(images, target, None)
    if mix is not None:
        images, target = (mix if num_classes is None else for_classes(mix, num_classes))(images, target)
    return images, target
