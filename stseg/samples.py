"""What an item of a data set is: an image, perhaps a mask, and an id.

Data sets come from everywhere, so this is the one place where their items are brought into the form the
package works with: images as ``(C, H, W)`` tensors, masks as integer ``(H, W)`` tensors, ids as strings.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from stseg.errors import DataError, UnreadableImageError


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
    ids = _named(dataset, "ids")
    twice = duplicate(ids)
    if twice is not None:
        raise DataError(f"the id {twice!r} occurs more than once in the data set; ids must be unique")
    return ids


def names_of(dataset: Dataset[Any]) -> list[str]:
    """What error messages call the items: like the ids, but several may be called the same.

    ``dataset.item_names`` where there is one (a data set that repeats items has no unique ids), else as in
    ``ids_of``.

    Raises:
        DataError: if the names and the data set differ in length.
    """
    return _named(dataset, "item_names", "ids")


def has_ids(dataset: Dataset[Any]) -> bool:
    """Whether the items have names of their own.

    Otherwise they are numbered, and so are those of a data set made from them (which it holds as
    ``.dataset``): equal ids do not mean equal images then.
    """
    if isinstance(dataset, ConcatDataset):
        return all(has_ids(part) for part in dataset.datasets)
    ids, source = _find(dataset, "ids"), getattr(dataset, "dataset", None)
    if ids is None or source is None or has_ids(source):
        return ids is not None
    return not all(id.isdecimal() for id in ids)


def _named(dataset: Dataset[Any], *attributes: str) -> list[str]:
    length = len_of(dataset)
    names = _find(dataset, *attributes)
    if names is None:
        return [str(index) for index in range(length)]
    if len(names) != length:
        raise DataError(f"the data set has {length} items but {len(names)} ids")
    return names


def _find(dataset: Any, *attributes: str) -> list[str] | None:
    for attribute in attributes:
        own = getattr(dataset, attribute, None)
        if own is not None and not callable(own):
            return [str(name) for name in own]
    if isinstance(dataset, Subset):
        inner = _find(dataset.dataset, *attributes)
        return None if inner is None else [inner[i] for i in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        names: list[str] = []
        for part in dataset.datasets:
            found = _find(part, *attributes)
            if found is None:
                return None
            names += found
        return names
    return None


def len_of(dataset: Dataset[Any]) -> int:
    """Length of a map-style data set.

    Raises:
        TypeError: if it has no length (an ``IterableDataset``, or not a data set at all).
    """
    try:
        return len(dataset)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        raise TypeError(f"expected a map-style data set with a length, got {type(dataset).__name__}") from None


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
        turned = "; is the image (H, W, C)? Expected (C, H, W)" if image.shape[:2] == mask.shape else ""
        raise DataError(
            f"image and mask of {name!r} differ in size: image {h} x {w}, mask {mh} x {mw} (height x width){turned}"
        )
    return image, mask


def as_image(image: Any, *, name: str = "image") -> Tensor:
    """An image as a ``(C, H, W)`` tensor: uint8, or float32 in [0, 1].

    Args:
        image: uint8 or float ``(C, H, W)`` tensor, or a PIL image: grey gives one channel, palette and other
            colour spaces become RGB, 16-bit grey is scaled to 8 bits, transparency is kept as a last channel.
        name: how error messages call it.

    Raises:
        TypeError: if it is something else.
        DataError: if the shape is wrong, it has no pixels, or float values are not in [0, 1].
        UnreadableImageError: if it is a PIL image whose file turns out to be broken.

    Example:
        >>> as_image(Image.new("L", (6, 4))).shape
        torch.Size([1, 4, 6])
    """
    if isinstance(image, Image.Image):
        array = np.array(eight_bits(image, name=name))
        image = torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())
    if not isinstance(image, Tensor):
        hint = (
            ": torch.from_numpy(array).permute(2, 0, 1) makes one of (H, W, C)" if isinstance(image, np.ndarray) else ""
        )
        raise TypeError(
            f"image {name!r} is {type(image).__name__}; expected a PIL image or a (C, H, W) tensor, "
            f"uint8 or float in [0, 1]{hint}"
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
            "(not normalised: stseg.Segmenter does that)"
        )
    return pixels.float()


def eight_bits(image: Image.Image, *, name: str = "image") -> Image.Image:
    """A PIL image of any mode as one of mode L, LA, RGB or RGBA; 16-bit grey is divided by 257.

    Raises:
        DataError: if it has no pixels, or values that are not integers of 16 bits.
        UnreadableImageError: if its file turns out to be broken.
    """
    _load(image, f"image {name!r}")
    if image.width == 0 or image.height == 0:
        raise DataError(f"image {name!r} has no pixels: {image.width} x {image.height}")
    mode = image.mode
    if mode in ("L", "LA", "RGB", "RGBA"):
        return image
    if mode == "F":
        raise DataError(f"image {name!r} is of PIL mode F; expected 8- or 16-bit integers")
    if mode.startswith("I"):
        grey = np.array(image).astype(np.int32)
        if grey.min() < 0 or grey.max() > 65535:
            raise DataError(
                f"image {name!r} holds values from {grey.min()} to {grey.max()}; expected 16 bits, 0..65535"
            )
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    if mode in ("1", "La"):
        return image.convert("L" if mode == "1" else "LA")
    return image.convert("RGBA" if mode in ("PA", "RGBa") or "transparency" in image.info else "RGB")


def as_mask(mask: Any, *, name: str = "mask") -> Tensor:
    """A mask as an integer ``(H, W)`` tensor: uint8 if it comes as bool or uint8, else int32.

    Args:
        mask: ``(H, W)`` or ``(1, H, W)`` integer tensor or array, or a PIL image: 8-bit grey, palette (whose
            indices are the classes), 16-bit grey, or black and white.
        name: how error messages call it.

    Raises:
        TypeError: if it is no tensor, array or PIL image, or holds floats.
        DataError: if the shape is wrong, it has no pixels, holds values beyond 32 bits, or is a colour image.
        UnreadableImageError: if it is a PIL image whose file turns out to be broken.

    Example:
        >>> as_mask(np.array([[0, 1], [2, 255]])).dtype
        torch.int32
    """
    if isinstance(mask, Image.Image):
        _load(mask, f"mask of {name!r}")
        if mask.mode not in ("1", "L", "P") and not mask.mode.startswith("I"):
            raise DataError(
                f"mask of {name!r} is an image of mode {mask.mode}; expected class indices "
                "(8-bit grey, palette or 16-bit grey)"
            )
        mask = np.array(mask)
    if isinstance(mask, np.ndarray) and mask.dtype.kind in "biuf":
        mask = torch.from_numpy(mask.astype(mask.dtype.newbyteorder("="), order="C"))  # a copy, always
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask of {name!r} is {type(mask).__name__}; expected an integer (H, W) tensor, array or image")
    classes: Tensor = mask.as_subclass(Tensor)
    shape = tuple(classes.shape)
    if classes.is_floating_point() or classes.is_complex():
        raise TypeError(f"mask of {name!r} is {classes.dtype}; expected integer class indices")
    if not (len(shape) == 2 or (len(shape) == 3 and shape[0] == 1)):
        raise DataError(f"mask of {name!r} has shape {shape}; expected (H, W)")
    if 0 in shape:
        raise DataError(f"mask of {name!r} has no pixels: shape {shape}")
    classes = classes.reshape(shape[-2:])
    if classes.dtype in (torch.bool, torch.uint8):
        return classes.to(torch.uint8)
    if classes.dtype.itemsize > 2 and classes.dtype != torch.int32:
        # aminmax knows no unsigned integers of more than 8 bits
        extremes = torch.aminmax(classes if classes.dtype.is_signed else classes.double())
        low, high = (int(value) for value in extremes)
        if low < -(2**31) or high >= 2**31:
            raise DataError(f"mask of {name!r} holds values from {low} to {high}; expected class indices")
    return classes.to(torch.int32)


def check_mask_values(mask: Tensor, num_classes: int, ignore_index: int, *, name: str) -> None:
    """Raise a ``DataError`` unless every value is a class or the ignore index.

    Example:
        >>> check_mask_values(torch.tensor([[0, 34]]), 21, 255, name="img_0042")
        Traceback (most recent call last):
        stseg.errors.DataError: mask of 'img_0042' holds the value 34; expected 0..20 or 255
    """
    if mask.dtype == torch.uint8:  # torch wraps a scalar that does not fit: 300 would be 44
        mask = mask.to(torch.int32)
    wrong = ((mask < 0) | (mask >= num_classes)) & (mask != ignore_index)
    if wrong.any():
        value = int(mask[wrong][0])
        raise DataError(f"mask of {name!r} holds the value {value}; expected 0..{num_classes - 1} or {ignore_index}")


def check_classes(num_classes: int, ignore_index: int) -> None:
    """Raise an error unless both are integers and make sense together."""
    for name, value in (("num_classes", num_classes), ("ignore_index", ignore_index)):
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}; expected an integer")
    if num_classes < 2:
        raise ValueError(
            f"num_classes is {num_classes}; expected 2 or more (foreground against background is 2 classes)"
        )
    if 0 <= ignore_index < num_classes:
        raise ValueError(f"ignore_index {ignore_index} is one of the {num_classes} classes; expected another value")


def index_dtype(num_classes: int, ignore_index: int) -> torch.dtype:
    """The dtype of predicted masks: uint8 where classes and ignore index fit in it, else int32."""
    return torch.uint8 if num_classes <= 256 and 0 <= ignore_index <= 255 else torch.int32


def duplicate(ids: Sequence[str]) -> str | None:
    """The first of ``ids`` that has occurred before."""
    seen: set[str] = set()
    for id in ids:
        if id in seen:
            return id
        seen.add(id)
    return None


def repeated(ids: Sequence[str], others: Sequence[str]) -> str | None:
    """The first of ``ids`` that also stands in ``others``."""
    known = set(others)
    return next((i for i in ids if i in known), None)


def _load(image: Image.Image, what: str) -> None:
    try:
        image.load()
    except Exception as error:  # PIL raises many kinds for a broken file
        raise UnreadableImageError(f"{what} cannot be read: {error}") from error
