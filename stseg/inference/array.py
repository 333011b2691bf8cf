"""Labels of one huge image in an array, such as a memory-mapped file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stseg.errors import DataError
from stseg.inference.tiles import Block, TileLabeler, ValueScale
from stseg.types import Precision

_ROWS = 256  # read at once where all values are looked at


def predict_array(
    model: nn.Module,
    image: Any,
    out: np.ndarray[Any, Any] | None = None,
    *,
    confidence: np.ndarray[Any, Any] | None = None,
    value_range: tuple[float, float] | None = None,
    tile: int | tuple[int, int] = 1024,
    overlap: float = 0.25,
    precision: Precision = "auto",
    device: torch.device | str | None = None,
    progress: bool = True,
) -> np.ndarray[Any, Any]:
    """Label one image of any size in bounded memory.

    The classes are those of ``stseg.Tiled(model, tile, overlap)(image).argmax(1)``, but neither the image nor the
    probabilities are ever held as a whole. Beside the network, a pass of tiles and ``out``, memory holds the
    probabilities of the rows that the next row of tiles shares: classes x shared rows x image width x 4 bytes. The
    shared rows are ``overlap`` x tile height, or a few more, in images of many tiles: 430 MB for 21 classes, tiles of
    1024 that overlap by a quarter, and a width of 20,000. They are almost the tile height in an image little
    higher than that.

    Each part of ``out`` is written as soon as it is known; a run that is stopped leaves the rest as it was.

    Args:
        model: a network or a wrapped one, such as ``stseg.MultiScaleFlip(network)``, which augments each tile. Its
            training mode is restored.
        image: ``(C, H, W)``: an array, a memory-mapped one, a tensor, or what gives arrays when it is sliced, as data
            sets of h5py and zarr do. Of ``(H, W, C)``, ``image.transpose(2, 0, 1)`` makes one without a copy. uint8,
            float in [0, 1], or any numbers with ``value_range``.
        out: ``(H, W)`` integers to write the classes to, such as a ``numpy.memmap`` of uint8; None makes an array.
        confidence: ``(H, W)`` floats to write the probability of each pixel's class to; None for none.
        value_range: the values of black and white, such as ``(0, 4095)``. None for uint8, for floats in [0, 1], and for
            16 bits of which the highest is used, which are 0 to 65535; to know that, up to all values are read first.
        tile: height and width of a tile, or one number for both.
        overlap: least share of a tile that overlaps with the next one, in [0, 1).
        precision: ``"fp32"``, ``"bf16"``, or ``"auto"`` for bfloat16 where the device computes it natively.
        device: device to move the model to; None leaves it where it is.
        progress: whether to show a bar.

    Returns:
        ``out``, or a new array ``(H, W)``: uint8, or int32 for more than 256 classes.

    Raises:
        DataError: if the image has another shape, such as ``(H, W, C)``, or no pixels, its values do not tell their
            range or lie outside of it, or ``out`` or ``confidence`` has another size or dtype or is read-only.
        NetworkError: if the network does not take a tile, or returns NaN or infinite logits.
        TypeError: if ``image`` is not an array.
        ValueError: if ``tile``, ``overlap`` or ``value_range`` is out of its range.

    Example:
        >>> image = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
        >>> network = nn.Conv2d(3, 4, kernel_size=3, padding=1)
        >>> mask = predict_array(network, image.transpose(2, 0, 1), tile=128, progress=False)
        >>> mask.shape, mask.dtype
        ((300, 400), dtype('uint8'))
    """
    labeler = TileLabeler(model, tile, overlap, precision, device, progress)
    image = image.detach().cpu().numpy() if isinstance(image, Tensor) else image
    channels, height, width = _check_image(image)
    _check_layout(labeler.model, channels, width)
    scale = ValueScale(np.dtype(image.dtype), value_range, windows=_rows_of(image), name="the image")
    _check_target(out, "out", "iu", "integers", (height, width))
    _check_target(confidence, "confidence", "f", "floats", (height, width))
    mask = out

    def read(rows: slice, columns: slice) -> Tensor:
        return scale(np.asarray(image[:, rows, columns]), rows, columns)

    def write(block: Block) -> None:
        nonlocal mask
        if mask is None:
            mask = np.empty((height, width), np.uint8 if block.num_classes <= 256 else np.int32)
        if block.num_classes - 1 > np.iinfo(mask.dtype).max:
            raise DataError(f"out is {mask.dtype}, which cannot hold {block.num_classes} classes; expected int32")
        mask[block.rows, block.columns] = block.mask
        if confidence is not None:
            confidence[block.rows, block.columns] = block.confidence

    labeler.label(height, width, read, write, name="the image")
    assert mask is not None
    return mask


def _check_image(image: Any) -> tuple[int, int, int]:
    if not all(hasattr(image, name) for name in ("shape", "dtype", "__getitem__")):
        raise TypeError(
            f"image is {type(image).__name__}; expected an array (C, H, W), such as "
            "numpy.asarray(image).transpose(2, 0, 1) of a PIL image in color"
        )
    shape = tuple(int(side) for side in image.shape)
    if len(shape) != 3:
        raise DataError(f"image has shape {shape}; expected (C, H, W)" + (": image[None]" if len(shape) == 2 else ""))
    if 0 in shape:
        raise DataError(f"image has no pixels: shape {shape}")
    if np.dtype(image.dtype).kind not in "iuf":
        raise DataError(
            f"image is {image.dtype}; expected uint8, or floats in [0, 1], or other numbers and value_range"
        )
    return shape


def _check_layout(model: nn.Module, channels: int, width: int) -> None:
    """Refuse ``(H, W, C)``: of thousands of channels, the network would make feature maps before it fails."""
    first = next((each for each in model.modules() if isinstance(each, nn.Conv2d)), None)
    if first is not None and first.in_channels == width < channels:
        raise DataError(
            f"image has {channels} channels and is {width} wide as (C, H, W), and the network takes {width} channels; "
            "expected image.transpose(2, 0, 1), which makes (C, H, W) of (H, W, C) without a copy"
        )


def _check_target(target: Any, name: str, kinds: str, expected: str, shape: tuple[int, int]) -> None:
    if target is None:
        return
    if not isinstance(target, np.ndarray):
        raise TypeError(f"{name} is {type(target).__name__}; expected a numpy array {shape}, or None")
    if target.shape != shape or target.dtype.kind not in kinds:
        raise DataError(
            f"{name} is {target.dtype} of shape {target.shape}; expected {expected} of shape {shape}, that of the image"
        )
    if not target.flags.writeable:
        raise DataError(
            f"{name} is read-only; expected an array that can be written to, such as numpy.memmap(mode='r+')"
        )


def _rows_of(image: Any) -> Iterator[np.ndarray[Any, Any]]:
    for top in range(0, image.shape[1], _ROWS):
        yield np.asarray(image[:, top : top + _ROWS])
