"""Labels of one huge image, tile by tile, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from stseg.data.samples import check_value_range, scale_samples
from stseg.errors import NetworkError
from stseg.inference.sweep import check_finite, finite_images
from stseg.models.precision import autocast, casting_once, resolve_precision
from stseg.models.segmenter import as_segmenter
from stseg.models.state import device_of, evaluating, laid_out, move
from stseg.models.tiled import Axis, check_overlap, check_size, predict_blocks
from stseg.progress import progress_bar
from stseg.types import Precision

T = TypeVar("T")
Range: TypeAlias = tuple[float, float]


class Block(NamedTuple):
    """Part of the labels of an image."""

    rows: slice
    columns: slice
    mask: np.ndarray[Any, Any]
    """``(h, w)`` integers."""
    confidence: np.ndarray[Any, Any]
    """``(h, w)`` float32 probability of the class."""
    num_classes: int


class TileLabeler:
    """A network that labels huge images by tiles; see :func:`stseg.predict_array`.

    Args:
        model: a network or a wrapped one.
        tile: height and width of a tile, or one number for both.
        overlap: least share of a tile that overlaps with the next one.
        precision: ``"fp32"``, ``"bf16"`` or ``"auto"``.
        device: device to move the model to; None leaves it where it is.
        progress: whether to show a bar.
    """

    def __init__(
        self,
        model: nn.Module,
        tile: int | tuple[int, int],
        overlap: float,
        precision: Precision,
        device: torch.device | str | None,
        progress: bool,
    ) -> None:
        model = as_segmenter(model)
        self.size, self.overlap, self.progress = check_size(tile, model), check_overlap(overlap), progress
        self.model = move(model, device)
        self.precision = resolve_precision(precision, device_of(self.model))

    def label(
        self,
        height: int,
        width: int,
        read: Callable[[slice, slice], Tensor | None],
        write: Callable[[Block], object],
        *,
        name: str,
        way_out: str = "",
    ) -> None:
        """Label an image of any size.

        Args:
            height: rows of the image.
            width: columns of the image.
            read: rows and columns of a tile -> ``(C, h, w)`` uint8 or float in [0, 1]; None where there is nothing to
                label.
            write: called with each part of the labels once. Parts before the first tile that ``read`` gives are left
                out; those of later tiles without an image mean nothing.
            name: name of the image for error messages.
            way_out: added to the message if the network does not take the image.

        Raises:
            NetworkError: if the network does not take a tile, or returns NaN or infinite logits.
        """
        rows, columns = (
            Axis.cover(length, size, self.overlap) for length, size in zip((height, width), self.size, strict=True)
        )
        device = device_of(self.model)
        bar = progress_bar(
            title="predict", total=len(rows.starts) * len(columns.starts), show=self.progress, unit="tile"
        )

        def batch_of(r: slice, c: slice) -> Tensor | None:
            tile = read(r, c)
            return None if tile is None else tile[None].to(device)

        with (
            bar,
            evaluating(self.model),
            torch.no_grad(),
            laid_out(self.model),
            casting_once(device, self.model),
            autocast(device, self.precision),
        ):
            for r, c, block in _explained(predict_blocks(self.model, rows, columns, batch_of), way_out):
                if block is not None:
                    highest, mask = block[0].max(0)
                    place = f"rows {r.start} to {r.stop} and columns {c.start} to {c.stop}"
                    check_finite(bool(finite_images(highest[None])), name=f"{place} of {name}")
                    write(Block(r, c, mask.cpu().numpy(), highest.float().cpu().numpy(), block.shape[1]))
                bar.update()


class ValueScale:
    """Conversion of the values of an image that is read by windows to what networks take.

    The rule is that of files in folders (``scale_samples``), over the whole image: uint8 stays; the range of others is
    ``value_range``, else what the file states, else 0..65535 for uint16 whose highest bit is used, else [0, 1] for
    floats.

    Args:
        dtype: of the values.
        value_range: the values of black and white, from the user.
        stated: those from the file.
        windows: the values of the whole image, part by part; looked at only where the range depends on them, and no
            further than needed.
        name: name of the image for error messages.

    Raises:
        DataError: if the values do not tell the range.
        ValueError: if ``value_range`` is malformed, or given for uint8.
    """

    def __init__(
        self,
        dtype: np.dtype[Any],
        value_range: Range | None,
        *,
        stated: Range | None = None,
        windows: Iterable[np.ndarray[Any, Any]],
        name: str,
    ) -> None:
        self.is_bytes = dtype == np.uint8
        self.name, self.value_range, self.stated = name, check_value_range(value_range), stated
        if self.is_bytes and value_range is not None:
            raise ValueError(f"value_range is {value_range}, but {name} holds uint8, which are 0 to 255; expected None")
        if dtype.kind in "iu" and not self.is_bytes and self.value_range is None and stated is None:
            extremes = _extremes(dtype, windows)
            scale_samples(extremes, name=name)
            self.stated = (0.0, 65535.0)  # the only range that integers imply

    @property
    def black(self) -> float:
        """The value that becomes 0."""
        bounds = self.value_range or self.stated
        return 0.0 if bounds is None else bounds[0]

    def __call__(self, values: np.ndarray[Any, Any], rows: slice, columns: slice) -> Tensor:
        """Convert ``(C, h, w)`` values of a window to uint8, or float32 in [0, 1].

        Raises:
            DataError: if a value lies outside of the range.
        """
        if not self.is_bytes:
            name = f"{self.name}, rows {rows.start} to {rows.stop}, columns {columns.start} to {columns.stop}"
            values = scale_samples(values, name=name, value_range=self.value_range, stated=self.stated)
        return torch.from_numpy(np.array(values, order="C"))


def _explained(blocks: Iterator[T], way_out: str) -> Iterator[T]:
    try:
        yield from blocks
    except NetworkError as error:
        raise NetworkError(f"{error}{way_out}") from error


def _extremes(dtype: np.dtype[Any], windows: Iterable[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """Return the lowest and the highest value; for uint16, no more than what uses the highest bit is looked for."""
    low: Any = None
    high: Any = None
    for values in windows:
        if values.size:
            low = values.min() if low is None else min(low, values.min())
            high = values.max() if high is None else max(high, values.max())
        if high is not None and dtype == np.uint16 and high > 32767:
            break
    return np.array([0, 0] if low is None else [low, high], dtype)
