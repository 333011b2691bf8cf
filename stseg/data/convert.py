"""Images and masks of any kind as tensors: ``(C, H, W)`` images, integer ``(H, W)`` masks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stseg.data.samples import scale_samples, sixteen_bits
from stseg.errors import DataError, UnreadableImageError


def image_of(item: Any, *, name: str) -> Tensor:
    """Return the image of an item: the item itself, its first element, or the ``image`` of a mapping."""
    if isinstance(item, Mapping):
        item = _value(item, "image", name)
    elif isinstance(item, (tuple, list)):
        if not item:
            raise DataError(f"item {name!r} is empty; expected an image, or a tuple that begins with one")
        item = item[0]
    return as_image(item, name=name)


def pair_of(item: Any, *, name: str) -> tuple[Tensor, Tensor]:
    """Return image and mask of a labeled item: its first two elements, or ``image`` and ``mask`` of a mapping.

    Raises:
        DataError: if there is no mask, or its size is not the image's.
    """
    if isinstance(item, Mapping):
        item = _value(item, "image", name), _value(item, "mask", name)
    if not isinstance(item, (tuple, list)) or len(item) < 2:
        raise DataError(f"item {name!r} has no mask; expected (image, mask), got {type(item).__name__}")
    image = as_image(item[0], name=name)
    mask = as_mask(item[1], name=name)
    if image.shape[-2:] != mask.shape:
        (h, w), (mh, mw) = image.shape[-2:], mask.shape
        turned = "; is the image (H, W, C)? Expected (C, H, W)" if image.shape[:2] == mask.shape else ""
        raise DataError(
            f"image and mask of {name!r} differ in size: image {h} x {w}, mask {mh} x {mw} (height x width){turned}"
        )
    return image, mask


def _value(item: Mapping[Any, Any], key: str, name: str) -> Any:
    if key not in item:
        raise DataError(
            f"item {name!r} is a mapping with the keys {sorted(map(str, item))}; expected 'image' and, in labeled "
            "data, 'mask': return {'image': item[...], 'mask': item[...]} from the data set "
            "(in Hugging Face data sets, rename_column does it)"
        )
    return item[key]


def as_image(image: Any, *, name: str = "image") -> Tensor:
    """Convert an image to a ``(C, H, W)`` tensor: uint8, or float32 in [0, 1].

    Args:
        image: uint8 or float ``(C, H, W)`` tensor, or a PIL image: gray gives one channel, palette and other
            color spaces become RGB, 16-bit gray becomes float, transparency is kept as a last channel.
        name: name for error messages.

    Raises:
        TypeError: if ``image`` is anything else.
        DataError: if the shape is invalid, there are no pixels, float values are outside [0, 1], or a 16-bit image does
            not use its highest bit, as 12-bit data do not.
        UnreadableImageError: if it is a PIL image whose file is broken.

    Example:
        >>> as_image(Image.new("L", (6, 4))).shape
        torch.Size([1, 4, 6])
    """
    if isinstance(image, Image.Image):
        image = _from_pil(image, name)
    if not isinstance(image, Tensor):
        raise TypeError(
            f"image {name!r} is {type(image).__name__}; expected a PIL image or a (C, H, W) tensor, "
            f"uint8 or float in [0, 1]{_hint(image)}"
        )
    if image.ndim != 3:
        raise DataError(f"image {name!r} has shape {tuple(image.shape)}; expected (C, H, W)")
    if image.numel() == 0:
        raise DataError(f"image {name!r} has no pixels: shape {tuple(image.shape)}")
    pixels: Tensor = image.detach().as_subclass(Tensor)
    if pixels.dtype == torch.uint8:
        return pixels
    if not pixels.is_floating_point():
        raise TypeError(f"image {name!r} is {pixels.dtype}; expected uint8, or float in [0, 1]")
    low, high = (float(v) for v in torch.aminmax(pixels))
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # also catches NaN
        raise DataError(
            f"image {name!r} holds values from {low:g} to {high:g}; expected floats in [0, 1] "
            "(not normalized: stseg.Segmenter does that)"
        )
    return pixels.float()


def eight_bits(image: Image.Image, *, name: str = "image") -> Image.Image:
    """Convert a PIL image of 8 bits or less, of any mode, to L, LA, RGB or RGBA.

    Raises:
        DataError: if there are no pixels.
        UnreadableImageError: if its file is broken.
    """
    _load(image, f"image {name!r}")
    if image.width == 0 or image.height == 0:
        raise DataError(f"image {name!r} has no pixels: {image.width} x {image.height}")
    if image.mode in ("L", "LA", "RGB", "RGBA"):
        return image
    if image.mode in ("1", "La"):
        return image.convert("L" if image.mode == "1" else "LA")
    return image.convert("RGBA" if image.mode in ("PA", "RGBa") or "transparency" in image.info else "RGB")


def _from_pil(image: Image.Image, name: str) -> Tensor:
    _load(image, f"image {name!r}")
    if image.mode.startswith("I") or image.mode == "F":
        values = np.array(image)
        if values.size == 0:
            raise DataError(f"image {name!r} has no pixels: {image.width} x {image.height}")
        line = (
            "floats in [0, 1] from the data set, such as "
            "torch.from_numpy((numpy.asarray(image) - {low}) / ({high} - {low})).float()[None]"
        )
        return torch.from_numpy(scale_samples(sixteen_bits(values), name=name, way_out=line)[None])
    array = np.array(eight_bits(image, name=name))
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())


def _hint(image: object) -> str:
    if isinstance(image, np.ndarray) and image.ndim == 3 and image.shape[-1] <= 4:
        return ": torch.from_numpy(array).permute(2, 0, 1) makes one of (H, W, C)"
    if isinstance(image, np.ndarray):
        return f": torch.from_numpy(array){'[None] makes one of (H, W)' if image.ndim == 2 else ''}"
    if isinstance(image, (str, os.PathLike)):
        return (
            "; stseg.data.SegmentationFolder(images, masks) reads folders of files, "
            "stseg.data.ListedFiles(root, pairs) a list of them"
        )
    return ""


def as_mask(mask: Any, *, name: str = "mask") -> Tensor:
    """Convert a mask to an integer ``(H, W)`` tensor: uint8 for bool or uint8 input, else int32.

    Args:
        mask: ``(H, W)`` or ``(1, H, W)`` integer tensor or array, or a PIL image: 8-bit gray, palette (whose
            indices are the classes), 16-bit gray, black and white (0 and 1), or gray in equal channels.
        name: name for error messages.

    Raises:
        TypeError: if ``mask`` is not a tensor, array or PIL image, or is floating-point.
        DataError: if the shape is invalid, there are no pixels, a value exceeds 32 bits, or it is a color image.
        UnreadableImageError: if it is a PIL image whose file is broken.

    Example:
        >>> as_mask(np.array([[0, 1], [2, 255]])).dtype
        torch.int32
    """
    if isinstance(mask, Image.Image):
        _load(mask, f"mask of {name!r}")
        if mask.mode in ("RGB", "RGBA", "LA"):
            mask = gray_of(np.array(mask), name=name)
        elif mask.mode not in ("1", "L", "P") and not mask.mode.startswith("I"):
            raise DataError(
                f"mask of {name!r} is an image of mode {mask.mode}; expected class indices "
                "(8-bit gray, palette or 16-bit gray)"
            )
        mask = np.array(mask)
    if isinstance(mask, np.ndarray) and mask.dtype.kind in "biuf":
        mask = torch.from_numpy(mask.astype(f"{mask.dtype.kind}{mask.dtype.itemsize}", order="C"))  # a copy, always
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask of {name!r} is {type(mask).__name__}; expected an integer (H, W) tensor, array or image")
    classes: Tensor = mask.as_subclass(Tensor)
    shape = tuple(classes.shape)
    if classes.is_floating_point() or classes.is_complex():
        raise TypeError(
            f"mask of {name!r} is {classes.dtype}; expected integer class indices: mask.long() of whole numbers "
            "(torchvision's ToTensor divides values by 255, PILToTensor keeps them)"
        )
    if not (len(shape) == 2 or (len(shape) == 3 and shape[0] == 1)):
        last = len(shape) == 3 and shape[-1] == 1
        hint = ": mask[..., 0]" if last else "; of one-hot masks (K, H, W), mask.argmax(0)" if len(shape) == 3 else ""
        raise DataError(f"mask of {name!r} has shape {shape}; expected (H, W){hint}")
    if 0 in shape:
        raise DataError(f"mask of {name!r} has no pixels: shape {shape}")
    classes = classes.reshape(shape[-2:])
    if classes.dtype in (torch.bool, torch.uint8):
        return classes.to(torch.uint8)
    if classes.dtype.itemsize > 2 and classes.dtype != torch.int32:
        # aminmax does not support unsigned integers of more than 8 bits
        extremes = torch.aminmax(classes if classes.dtype.is_signed else classes.double())
        low, high = (int(value) for value in extremes)
        if low < -(2**31) or high >= 2**31:
            raise DataError(f"mask of {name!r} holds values from {low} to {high}; expected class indices")
    return classes.to(torch.int32)


def gray_of(pixels: np.ndarray[Any, Any], *, name: str) -> np.ndarray[Any, Any]:
    """Return the single channel ``(H, W)`` of a mask ``(H, W, C)`` whose colors are all gray and opaque.

    Raises:
        DataError: if it has other colors or transparent pixels; names ``class_map``.
    """
    if pixels.shape[2] in (2, 4):
        if (pixels[..., -1] != np.iinfo(pixels.dtype).max).any():
            raise DataError(
                f"mask of {name!r} has transparent pixels; expected class indices "
                "(PIL's image.convert('RGB') leaves the transparency out)"
            )
        pixels = pixels[..., :-1]
    if (pixels == pixels[..., :1]).all():
        return pixels[..., 0]
    colors = [tuple(color) for color in np.unique(pixels[::4, ::4].reshape(-1, pixels.shape[2]), axis=0)[:3].tolist()]
    line = ", ".join(f"{color}: {index}" for index, color in enumerate(colors))
    raise DataError(
        f"mask of {name!r} is in color; expected class indices, or the class of each color: class_map={{{line}, ...}} "
        "(of SegmentationFolder and ListedFiles; stseg.data.ClassMap in other data sets)"
    )


def check_mask_values(mask: Tensor, num_classes: int, ignore_index: int, *, name: str) -> None:
    """Raise a ``DataError`` unless every value is a class or the ignore index.

    Example:
        >>> check_mask_values(torch.tensor([[0, 34]]), 21, 255, name="img_0042")
        Traceback (most recent call last):
        stseg.errors.DataError: mask of 'img_0042' holds the value 34; expected 0..20 or 255 ...
    """
    if mask.dtype == torch.uint8:
        if ignore_index == 255 and int((mask + 1).amax()) <= num_classes:  # 255 becomes 0: two fast passes
            return
        mask = mask.to(torch.int32)  # torch wraps a scalar that does not fit: 300 would be 44
    wrong = ((mask < 0) | (mask >= num_classes)) & (mask != ignore_index)
    if wrong.any():
        value = int(mask[wrong][0])
        raise DataError(
            f"mask of {name!r} holds the value {value}; expected 0..{num_classes - 1} or {ignore_index} "
            f"({_more_classes(value, num_classes)}{_class_map_line(mask, num_classes, ignore_index)} gives "
            "values their classes, stseg.data.ClassMap in a data set of your own)"
        )


def _more_classes(value: int, num_classes: int) -> str:
    return f"num_classes={value + 1} if it is a class; " if num_classes <= value <= 2 * num_classes else ""


def _class_map_line(mask: Tensor, num_classes: int, ignore_index: int) -> str:
    """Return the ``class_map`` that a mask with unknown values suggests."""
    found = [value for value in torch.unique(mask).tolist() if value != ignore_index or value == 255]
    if found[-1] == num_classes and (not found[0] or found[0] == 1):
        return f"class_map={{i: i - 1 for i in range(1, {num_classes + 1})}}"  # counted from 1; 0 is ignored
    known = [value for value in found if value >= 0]  # what class_map lacks is ignored
    pairs = [f"{value}: {index}" for index, value in enumerate(known[:8])] + ["..."] * (len(known) > 8)
    return f"class_map={{{', '.join(pairs)}}}"


def _load(image: Image.Image, what: str) -> None:
    try:
        image.load()
    except Exception as error:  # PIL raises many types for a broken file
        raise UnreadableImageError(f"{what} cannot be read: {error}") from error
