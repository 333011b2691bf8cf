"""Augmentations of other libraries: torchvision and albumentations for one sample, kornia for a batch on its device."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from kornia.augmentation import AugmentationSequential
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from stseg.augment._settings import check_batch
from stseg.data.convert import pair_of
from stseg.types import BatchAugmentation, ImageLike, MaskLike, PairTransform


def from_torchvision(transform: nn.Module, *, ignore_index: int = 255) -> PairTransform:
    """Turn a transform of ``torchvision.transforms.v2`` into one of images and their masks.

    Geometric transforms apply to both, with nearest-neighbor sampling for masks; color transforms apply to the image
    alone. Mask pixels filled with 0, such as padding or the corners of a rotated image, become ``ignore_index``; any
    other ``fill`` is kept.

    Args:
        transform: a transform, a ``v2.Compose`` or an ``nn.Sequential`` of them.
        ignore_index: mask value of pixels from outside the image.

    Returns:
        ``(image, mask) -> (image, mask)``, tensors ``(C, H, W)`` and ``(H, W)``; the random numbers are torch's.

    Raises:
        TypeError: if ``transform`` is anything else, such as a transform of the older ``torchvision.transforms``.

    Example:
        >>> pad = from_torchvision(v2.Pad([1, 0, 0, 0]))
        >>> pad(torch.zeros(3, 1, 2), torch.tensor([[0, 1]], dtype=torch.uint8))[1]
        tensor([[255,   0,   1]], dtype=torch.uint8)
    """
    if not _is_torchvision(transform):
        raise TypeError(f"the transform is {_described(transform)}; expected one of torchvision.transforms.v2")
    return _FromTorchvision(transform, ignore_index)


def from_albumentations(pipeline: Callable[..., Any]) -> PairTransform:
    """Turn an albumentations pipeline into a transform of images and their masks.

    It is called as ``pipeline(image=..., mask=...)``, with an array ``(H, W, C)``, uint8 or float32 as the image came,
    and an array ``(H, W)``. It should not normalize: :class:`stseg.Segmenter` does. Mask pixels from
    outside the image are 0 by default, which is a class; set the fill value, as in ``A.Rotate(fill_mask=255)``.

    If the pipeline has ``set_random_seed`` (albumentations 2), it is seeded at each call from torch's global CPU
    generator; otherwise it draws from numpy and ``random``, which training seeds as well.

    Args:
        pipeline: an albumentations pipeline, such as ``A.Compose([...])``.

    Returns:
        ``(image, mask) -> (image, mask)``, tensors ``(C, H, W)`` and ``(H, W)``.

    Raises:
        TypeError: if ``pipeline`` is not callable; when called, if it does not return ``image`` and ``mask``.

    Example:
        >>> def mirrored(image, mask):  # what A.Compose([A.HorizontalFlip(p=1)]) does
        ...     return {"image": image[:, ::-1], "mask": mask[:, ::-1]}
        >>> flip = from_albumentations(mirrored)
        >>> flip(torch.zeros(3, 1, 2), torch.tensor([[0, 1]], dtype=torch.uint8))[1]
        tensor([[1, 0]], dtype=torch.uint8)
    """
    if not callable(pipeline) or isinstance(pipeline, type):
        raise TypeError(f"the pipeline is {_described(pipeline)}; expected an albumentations pipeline")
    return _FromAlbumentations(pipeline)


def from_kornia(augmentation: nn.Module, *, ignore_index: int = 255) -> BatchAugmentation:
    """Turn a kornia augmentation into one of a batch of images and their masks.

    Geometric transforms apply to both, with nearest-neighbor sampling for masks. Mask pixels that kornia fills, such as
    the corners of a rotated image or a rectangle of ``RandomErasing``, become ``ignore_index``. Computes in float32
    (float64 for float64 images) regardless of autocast; no gradients flow through it. The random numbers are torch's.

    Args:
        augmentation: an ``AugmentationSequential``, whose ``data_keys`` are ignored, or a single augmentation.
        ignore_index: mask value of pixels from outside the image.

    Returns:
        ``(images, masks, where=None) -> (images, masks)``, as :class:`stseg.StrongAugment`: rows where ``where`` is
        False are returned unchanged.

    Raises:
        TypeError: if ``augmentation`` is anything else.
        ValueError: when called, if the size of the images changes, or ``ignore_index`` does not fit into the dtype of
            the masks.

    Example:
        >>> import kornia.augmentation as K
        >>> strong = from_kornia(K.RandomHorizontalFlip(p=1.0))
        >>> images, masks = strong(torch.zeros(1, 3, 1, 2), torch.tensor([[[0, 1]]]))
        >>> masks
        tensor([[[1, 0]]])
    """
    if not _is_kornia(augmentation):
        raise TypeError(f"the augmentation is {_described(augmentation)}; expected one of kornia.augmentation")
    return _FromKornia(augmentation, ignore_index)


def as_pair_transform(transform: Any, *, ignore_index: int = 255) -> PairTransform | None:
    """Convert the ``weak`` argument to an augmentation of single samples.

    Args:
        transform: None; a function ``(image, mask) -> (image, mask)``, such as :class:`stseg.WeakAugment`; or a
            transform of ``torchvision.transforms.v2``, which is adapted.
        ignore_index: mask value of ignored pixels in the data.

    Returns:
        None or a function.

    Raises:
        TypeError: if ``transform`` is anything else; names the line to write.

    Example:
        >>> as_pair_transform(v2.RandomHorizontalFlip())
        from_torchvision(RandomHorizontalFlip(p=0.5), ignore_index=255)
    """
    if transform is None:
        return None
    if _is_torchvision(transform):
        return from_torchvision(transform, ignore_index=ignore_index)
    _refuse_albumentations(transform)
    if _is_kornia(transform):
        raise TypeError(
            f"weak is {_described(transform)}, which augments batches: expected strong={_name(transform)}(...)"
        )
    if _comes_from(transform, "torchvision.transforms"):
        raise TypeError(
            f"weak is {_described(transform)}, which transforms the image without its mask; expected the one "
            "of that name in torchvision.transforms.v2"
        )
    function: PairTransform = _function("weak", transform, "WeakAugment")
    return function


def as_batch_augmentation(augmentation: Any, *, ignore_index: int | None = None) -> BatchAugmentation | None:
    """Convert the ``strong`` argument to an augmentation of batches.

    Args:
        augmentation: None; a function ``(images, masks, where) -> (images, masks)``, such as
            :class:`stseg.StrongAugment`; or a kornia augmentation, which is adapted.
        ignore_index: mask value of ignored pixels in the data; None if it is not known yet: that of the augmentation.

    Returns:
        None or a function.

    Raises:
        TypeError: if ``augmentation`` is anything else; names the line to write.
        ValueError: if it writes a different ignore index into masks.

    Example:
        >>> import kornia.augmentation as K
        >>> as_batch_augmentation(K.RandomErasing(), ignore_index=-100).ignore_index
        -100
    """
    if augmentation is None:
        return None
    if _is_kornia(augmentation):
        return from_kornia(augmentation, ignore_index=255 if ignore_index is None else ignore_index)
    _refuse_albumentations(augmentation)
    if _is_torchvision(augmentation) or _comes_from(augmentation, "torchvision.transforms"):
        raise TypeError(
            f"strong is {_described(augmentation)}, which augments one sample: expected weak={_name(augmentation)}(...)"
        )
    function: BatchAugmentation = _function("strong", augmentation, "StrongAugment")
    if ignore_index is None:
        return function
    name = "from_kornia" if isinstance(augmentation, _FromKornia) else _name(augmentation)
    cutout = getattr(augmentation, "cutout", None)
    for what, owner, expected in (
        ("strong", augmentation, f"{name}(..., ignore_index={ignore_index})"),
        ("the cutout of strong", cutout, f"{name}(cutout={_name(cutout)}(ignore_index={ignore_index}))"),
    ):
        written = getattr(owner, "ignore_index", ignore_index)
        if written != ignore_index:
            raise ValueError(
                f"{what} writes {written} into masks, but ignore_index is {ignore_index}; expected strong={expected}"
            )
    return function


class _FromTorchvision:
    def __init__(self, transform: nn.Module, ignore_index: int) -> None:
        self.transform, self.ignore_index = transform, ignore_index

    def __call__(self, image: ImageLike, mask: MaskLike) -> tuple[Tensor, Tensor]:
        pixels, classes = pair_of((image, mask), name="sample")
        if not 0 <= self.ignore_index <= 255:
            classes = classes.to(torch.int32)
        # One argument, a tuple: nn.Sequential takes no more. The second mask is 0 where the first was filled with 0.
        inside = tv_tensors.Mask(torch.ones_like(classes))
        new, moved, inside = self.transform(
            (tv_tensors.Image(pixels.clone()), tv_tensors.Mask(classes.clone()), inside)
        )
        new, moved, inside = (x.as_subclass(Tensor) for x in (new, moved, inside))
        return new, moved.masked_fill(inside == 0, self.ignore_index)

    def __repr__(self) -> str:
        return f"from_torchvision({_stable(self.transform)}, ignore_index={self.ignore_index})"


class _FromAlbumentations:
    def __init__(self, pipeline: Callable[..., Any]) -> None:
        self.pipeline = pipeline

    def __call__(self, image: ImageLike, mask: MaskLike) -> tuple[Tensor, Tensor]:
        pixels, classes = pair_of((image, mask), name="sample")
        if hasattr(self.pipeline, "set_random_seed"):
            self.pipeline.set_random_seed(int(torch.randint(2**31 - 1, (), device="cpu")))
        # OpenCV does not warp 32-bit integers.
        indices = classes if classes.dtype == torch.uint8 else classes.float()
        result = self.pipeline(image=pixels.permute(1, 2, 0).numpy().copy(), mask=indices.numpy().copy())
        if not isinstance(result, dict) or not {"image", "mask"} <= result.keys():
            came = list(result) if isinstance(result, dict) else type(result).__name__
            raise TypeError(f"the pipeline {_stable(self.pipeline)} returned {came}; expected 'image' and 'mask'")
        new, moved = result["image"], torch.as_tensor(_own(result["mask"]))
        if not isinstance(new, Tensor):  # ToTensorV2 returns tensors
            new = torch.from_numpy(_own(new[..., None] if new.ndim == 2 else new).transpose(2, 0, 1).copy())
        return new, moved.round().to(classes.dtype) if moved.is_floating_point() else moved

    def __repr__(self) -> str:
        return f"from_albumentations({_stable(self.pipeline)})"


class _FromKornia:
    def __init__(self, augmentation: nn.Module, ignore_index: int) -> None:
        self.augmentation, self.ignore_index = augmentation, ignore_index
        # Also wraps sequences: only the wrapper resamples masks by nearest neighbor.
        self._pairs = AugmentationSequential(augmentation, data_keys=["input", "mask"])

    @torch.no_grad()
    def __call__(self, images: Tensor, masks: Tensor, where: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_batch(images, masks, where)
        limits = torch.iinfo(masks.dtype)
        if not limits.min <= self.ignore_index <= limits.max:
            raise ValueError(f"ignore_index {self.ignore_index} does not fit into masks of {masks.dtype}")
        with torch.autocast(images.device.type, enabled=False):
            x = images.to(torch.promote_types(images.dtype, torch.float32))
            # Kornia fills masks with 0, so classes are shifted by 1 meanwhile.
            new, moved = self._pairs(x, masks[:, None].to(x.dtype) + 1)
        new, moved = new.to(images.dtype), moved[:, 0]
        if new.shape != images.shape or moved.shape != masks.shape:
            raise ValueError(
                f"{_name(self.augmentation)} made images of shape {tuple(new.shape)} from {tuple(images.shape)}; "
                "expected an augmentation that keeps the size"
            )
        classes = torch.where(moved == 0, self.ignore_index, moved - 1).to(masks.dtype)
        if where is None:
            return new, classes
        return torch.where(where[:, None, None, None], new, images), torch.where(where[:, None, None], classes, masks)

    def __repr__(self) -> str:
        return f"from_kornia({_stable(self.augmentation)}, ignore_index={self.ignore_index})"


def _is_torchvision(thing: object) -> bool:
    if type(thing) is nn.Sequential and len(thing):
        return all(_is_torchvision(part) for part in thing)
    return isinstance(thing, v2.Transform)


def _is_kornia(thing: object) -> bool:
    return isinstance(thing, nn.Module) and _comes_from(thing, "kornia.augmentation")


def _comes_from(thing: object, package: str) -> bool:
    return any(f"{cls.__module__}.".startswith(f"{package}.") for cls in type(thing).__mro__)


def _refuse_albumentations(thing: object) -> None:
    if _comes_from(thing, "albumentations"):
        raise TypeError(
            f"got {_described(thing)}; expected weak=stseg.augment.from_albumentations(pipeline): albumentations "
            "augments one sample at a time, before strong augmentation"
        )


def _function(name: str, thing: Any, example: str) -> Any:
    if isinstance(thing, type):
        raise TypeError(f"{name} is the class {thing.__name__}; expected an object: {name}={thing.__name__}(...)")
    if not callable(thing):
        raise TypeError(f"{name} is {thing!r}; expected a {example}, another function, or None")
    return thing


def _own(array: Any) -> Any:
    return array if isinstance(array, Tensor) else np.ascontiguousarray(array)


def _name(thing: object) -> str:
    return type(thing).__name__


def _described(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def _stable(thing: object) -> str:
    """Return the ``repr`` without memory addresses, which differ between runs."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(thing))
