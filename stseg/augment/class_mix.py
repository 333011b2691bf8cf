"""ClassMix: the pixels of half of the classes of another image of the batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Generator, Tensor

from stseg.augment._settings import check_images
from stseg.checks import check_count
from stseg.functional.mixing import class_mask, paste
from stseg.types import BatchMixing

Mixing = TypeVar("Mixing", bound=BatchMixing)


@dataclass(frozen=True)
class ClassMix:
    """ClassMix: paste half of the predicted classes of each image into another one (Olsson et al., WACV 2021).

    Of the n classes in the label map of image i, ``n // 2`` are chosen at random. Their pixels are pasted into image
    i + 1 (those of the last image into the first), which becomes row i of the result. A map with a single class thus
    gives all of image i + 1.

    Args:
        num_classes: number of classes; labels from it on, such as the unsure pixels of
            :func:`stseg.functional.consistency_target`, are not chosen. None finds the largest label in each batch,
            which synchronizes with the device; methods give their own number then.
        ignore_index: label that is not a class. Nor are negative ones.

    Shape:
        Images ``(B, C, H, W)``, label maps ``(B, H, W)`` of integers, and any number of tensors ``(B, C, H, W)`` or
        ``(B, H, W)`` -> as many tensors of the same shapes and dtypes. The input is not modified.

    Raises:
        ValueError: if ``num_classes`` is below 1; when called, if the shapes do not match.
        TypeError: if ``num_classes`` is not an integer; when called, if the label maps are not.

    Example:
        >>> images, labels = torch.rand(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.int64)
        >>> labels[:, :2] = 1
        >>> new_images, new_labels = ClassMix()(images, labels)
        >>> bool((new_labels == labels).all()), bool((new_images == images).all())
        (True, False)
    """

    num_classes: int | None = None
    ignore_index: int = 255

    def __post_init__(self) -> None:
        if self.num_classes is not None:
            check_count("num_classes", self.num_classes)

    def __call__(
        self, images: Tensor, labels: Tensor, *tensors: Tensor, generator: Generator | None = None
    ) -> tuple[Tensor, ...]:
        """Choose classes by the label maps and mix all tensors in the same way."""
        check_images((images, labels))
        return self.transform(self.draw(labels, generator), images, labels, *tensors)

    def draw(
        self,
        labels: Tensor,
        generator: Generator | None = None,
        *,
        num_classes: int | None = None,
        ignore_index: int | None = None,
    ) -> Tensor:
        """Choose classes of label maps ``(B, H, W)``, from ``generator`` or the default one of the device.

        Args:
            labels: the maps.
            generator: source of random numbers.
            num_classes: in place of the setting.
            ignore_index: in place of the setting.

        Returns:
            ``(B, H, W)`` bool: the pixels of the chosen classes.
        """
        num_classes = self.num_classes if num_classes is None else num_classes
        ignore_index = self.ignore_index if ignore_index is None else ignore_index
        if num_classes is None:
            num_classes = max(1, int(labels.max()) + 1) if labels.numel() else 1
        place: dict[str, Any] = {"generator": generator, "device": labels.device}
        order = torch.rand(len(labels), num_classes, **place)
        return class_mask(labels, order, ignore_index=ignore_index)

    def transform(self, where: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Paste pixels into the next image; deterministic."""
        return tuple(paste(where, tensor.roll(-1, 0), tensor) for tensor in tensors)


def for_classes(mix: Mixing, num_classes: int) -> Mixing:
    """Return the mixing for targets of so many classes: only classes are chosen by ``ClassMix``, not unsure pixels.

    Raises:
        ValueError: if it is a ``ClassMix`` for another number of classes.
    """
    if not isinstance(mix, ClassMix):
        return mix
    if mix.num_classes not in (None, num_classes):
        raise ValueError(
            f"mix is for {mix.num_classes} classes, but the network gives {num_classes}; expected ClassMix()"
        )
    return cast("Mixing", replace(mix, num_classes=num_classes))
