"""What an item of a data set is: an image, perhaps a mask, and an id.

Data sets come from everywhere, so this is the one place where their items are brought into the form the
package works with: images as ``(C, H, W)`` tensors, masks as integer ``(H, W)`` tensors, ids as strings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from stseg.errors import DataError


def ids_of(dataset: Dataset[Any]) -> list[str]:
    """The ids of a data set's items, in order.

    ``dataset.ids`` where there is one; a ``Subset`` or ``ConcatDataset`` asks the data sets it is made of;
    everything else is numbered ``"0"``, ``"1"``, ...

    Raises:
        DataError: if ``ids`` and the data set differ in length, or an id occurs twice.

    Example:
        >>> ids_of(torch.utils.data.TensorDataset(torch.zeros(2, 3, 8, 8)))
        ['0', '1']
    """
    ids = _find_ids(dataset)
    length = len_of(dataset)
    if ids is None:
        return [str(index) for index in range(length)]
    if len(ids) != length:
        raise DataError(f"the data set has {length} items but {len(ids)} ids")
    if len(set(ids)) != len(ids):
        seen: set[str] = set()
        twice = next(i for i in ids if i in seen or seen.add(i))  # type: ignore[func-returns-value]
        raise DataError(f"the id {twice!r} occurs more than once in the data set; ids must be unique")
    return ids


def has_ids(dataset: Dataset[Any]) -> bool:
    """Whether the data set names its items (otherwise they are numbered)."""
    return _find_ids(dataset) is not None


def _find_ids(dataset: Any) -> list[str] | None:
    own = getattr(dataset, "ids", None)
    if own is not None and not callable(own):
        return [str(i) for i in own]
    if isinstance(dataset, Subset):
        inner = _find_ids(dataset.dataset)
        return None if inner is None else [inner[i] for i in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts = [_find_ids(part) for part in dataset.datasets]
        return None if any(p is None for p in parts) else [i for part in parts for i in part or ()]
    return None


def len_of(dataset: Dataset[Any]) -> int:
    """Length of a map-style data set.

    Raises:
        TypeError: if it has no length (an ``IterableDataset``, or not a data set at all).
    """
    try:
        return len(dataset)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        raise TypeError(
            f"expected a map-style data set with a length, got {type(dataset).__name__}"
        ) from None


def image_of(item: Any, *, name: str) -> Tensor:
    """The image of a data set's item; whatever stands behind it is ignored."""
    if isinstance(item, (tuple, list)):
        if not item:
            raise DataError(f"item {name!r} is empty; expected an image, or a tuple that begins with one")
        item = item[0]
    return as_image(item, name=name)


def pair_of(item: Any, *, name: str) -> tuple[Tensor, Tensor]:
    """Image and mask of a labelled data set's item, checked to be of one size.

    Raises:
        DataError: if there is no mask, or its size is not the image's.
    """
    if not isinstance(item, (tuple, list)) or len(item) < 2:
        raise DataError(f"item {name!r} has no mask; expected (image, mask), got {type(item).__name__}")
    image = as_image(item[0], name=name)
    mask = as_mask(item[1], name=name)
    if image.shape[-2:] != mask.shape:
        (h, w), (mh, mw) = image.shape[-2:], mask.shape
        raise DataError(
            f"image and mask of {name!r} differ in size: image {h} x {w}, mask {mh} x {mw} (height x width)"
        )
    return image, mask


def as_image(image: Any, *, name: str = "image") -> Tensor:
    """An image as a ``(C, H, W)`` tensor: uint8, or float32 in [0, 1].

    Args:
        image: uint8 or float ``(C, H, W)`` tensor, or a PIL image of any mode (palette becomes RGB, 16-bit grey
            is scaled to 8 bits, transparency is kept as a fourth channel).
        name: how error messages call it.

    Raises:
        TypeError: if it is something else.
        DataError: if the shape is wrong, it has no pixels, or float values are not in [0, 1].

    Example:
        >>> as_image(Image.new("L", (6, 4))).shape
        torch.Size([1, 4, 6])
    """
    if isinstance(image, Image.Image):
        return _from_pil(image, name)
    if not isinstance(image, Tensor):
        raise TypeError(
            f"image {name!r} is {type(image).__name__}; expected a PIL image or a (C, H, W) tensor, "
            "uint8 or float in [0, 1]"
        )
    if image.ndim != 3:
        raise DataError(f"image {name!r} has shape {tuple(image.shape)}; expected (C, H, W)")
    if image.numel() == 0:
        raise DataError(f"image {name!r} has no pixels: shape {tuple(image.shape)}")
    if image.dtype == torch.uint8:
        return image.as_subclass(Tensor)
    if not image.is_floating_point():
        raise TypeError(f"image {name!r} is {image.dtype}; expected uint8, or float in [0, 1]")
    low, high = (float(v) for v in torch.aminmax(image))
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # also catches NaN
        raise DataError(
            f"image {name!r} holds values from {low:g} to {high:g}; expected floats in [0, 1] "
            "(not normalised: stseg.Segmenter does that)"
        )
    return image.as_subclass(Tensor).float()


def as_mask(mask: Any, *, name: str = "mask") -> Tensor:
    """A mask as an integer ``(H, W)`` tensor, uint8 where the values fit, else int32.

    Raises:
        TypeError: if it is no tensor, array or PIL image, or holds floats.
        DataError: if the shape is wrong or it is a colour image.

    Example:
        >>> as_mask(np.array([[0, 1], [2, 255]])).dtype
        torch.int32
    """
    if isinstance(mask, Image.Image):
        if mask.mode not in ("1", "L", "P") and not mask.mode.startswith("I"):
            raise DataError(
                f"mask of {name!r} is an image of mode {mask.mode}; expected class indices "
                "(8-bit grey, palette or 16-bit grey)"
            )
        mask = np.array(mask)  # a palette image gives its indices
    if isinstance(mask, np.ndarray):
        if mask.dtype.kind not in "bui":
            raise TypeError(f"mask of {name!r} is an array of {mask.dtype}; expected integer class indices")
        mask = torch.from_numpy(mask.astype(np.uint8 if mask.dtype.itemsize == 1 and mask.dtype.kind != "i" else np.int32))
    if not isinstance(mask, Tensor):
        raise TypeError(
            f"mask of {name!r} is {type(mask).__name__}; expected an integer (H, W) tensor, array or PIL image"
        )
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(f"mask of {name!r} is {mask.dtype}; expected integer class indices")
    if mask.ndim == 3 and mask.shape[0] == 1:
        mask = mask[0]
    if mask.ndim != 2:
        raise DataError(f"mask of {name!r} has shape {tuple(mask.shape)}; expected (H, W)")
    mask = mask.as_subclass(Tensor)
    return mask.to(torch.uint8) if mask.dtype in (torch.bool, torch.uint8) else mask.to(torch.int32)


def check_mask_values(mask: Tensor, num_classes: int, ignore_index: int, *, name: str) -> None:
    """Raise a ``DataError`` unless every value is a class or the ignore index.

    Example:
        >>> check_mask_values(torch.tensor([[0, 34]]), 21, 255, name="img_0042")
        Traceback (most recent call last):
        stseg.errors.DataError: mask of 'img_0042' holds the value 34; expected 0..20 or 255
    """
    wrong = ((mask < 0) | (mask >= num_classes)) & (mask != ignore_index)
    if wrong.any():
        value = int(mask[wrong][0])
        raise DataError(
            f"mask of {name!r} holds the value {value}; expected 0..{num_classes - 1} or {ignore_index}"
        )


def check_classes(num_classes: int, ignore_index: int) -> None:
    """Raise a ``ValueError`` unless the two make sense together."""
    if num_classes < 2:
        raise ValueError(
            f"num_classes is {num_classes}; expected 2 or more (foreground against background is 2 classes)"
        )
    if 0 <= ignore_index < num_classes:
        raise ValueError(f"ignore_index {ignore_index} is one of the {num_classes} classes; expected another value")


def index_dtype(num_classes: int, ignore_index: int) -> torch.dtype:
    """The dtype of predicted masks: uint8 where classes and ignore index fit in it, else int32."""
    return torch.uint8 if num_classes <= 256 and 0 <= ignore_index <= 255 else torch.int32


def repeated(ids: Sequence[str], others: Sequence[str]) -> str | None:
    """The first of ``ids`` that also stands in ``others``."""
    known = set(others)
    return next((i for i in ids if i in known), None)


def _from_pil(image: Image.Image, name: str) -> Tensor:
    if image.width == 0 or image.height == 0:
        raise DataError(f"image {name!r} has no pixels: {image.width} x {image.height}")
    if image.mode in ("P", "PA", "CMYK", "YCbCr", "LAB", "HSV", "RGBX", "RGBa"):
        transparent = image.mode in ("PA", "RGBa") or "transparency" in image.info
        image = image.convert("RGBA" if transparent else "RGB")
    elif image.mode == "1":
        image = image.convert("L")
    array = np.array(image)
    if image.mode.startswith("I"):
        if array.min() < 0 or array.max() > 65535:
            raise DataError(f"image {name!r} holds integers outside 0..65535; expected 8 or 16 bits")
        array = ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if array.dtype != np.uint8:
        raise DataError(f"image {name!r} is of PIL mode {image.mode}; expected 8- or 16-bit integers")
    tensor = torch.from_numpy(array)
    return tensor[None] if tensor.ndim == 2 else tensor.permute(2, 0, 1).contiguous()
