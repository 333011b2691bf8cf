"""Large images by overlapping tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stseg.checks import check_count, check_number
from stseg.models.batching import images_per_pass
from stseg.models.multi_scale import softmax_of_classes
from stseg.models.segmenter import as_segmenter
from stseg.models.state import device_of

_MOST_PIXELS = 1 << 22  # of a forward pass on any device, such as 4 tiles of 1024 x 1024


class Tiled(nn.Module):
    """Wrapper that computes large images by overlapping tiles and averages their probabilities.

    The network never sees more than a few tiles at a time, so that its memory does not grow with the image. The tiles
    of an axis are as few as overlap by ``overlap`` or more, evenly spaced; the first one starts and the last one ends
    at the border, and nothing is padded. An axis that is not longer than a tile is not divided.

    Where tiles overlap, the result is their weighted mean. The weights are those of nnU-Net (Isensee et al., Nature
    Methods 2021): a Gaussian around the center of the tile with a standard deviation of an eighth of its side along
    each axis. The least one, in a corner, is ``exp(-16)`` of the largest one: none is 0, and no floor is needed. Where
    a single tile covers a pixel, its weight is 1.

    What a network computes from the image as a whole (global pooling, attention) it computes from a tile. Near the
    border of a tile it sees less context; the weights leave such pixels to the tile beside it.

    Args:
        model: a network or a wrapped one; a bare network is wrapped in :class:`stseg.Segmenter`. With
            ``MultiScaleFlip(network)`` each tile is augmented; ``MultiScaleFlip(Tiled(network))`` tiles each view.
        size: height and width of a tile, or one number for both.
        overlap: least share of a tile that overlaps with the next one, in [0, 1).

    Shape:
        ``(B, C, H, W)`` uint8 or float in [0, 1] -> ``(B, K, H, W)`` log of the mean probability; its softmax is the
        mean probability again, so this can replace the model. The result of an image within one tile is the log-softmax
        of the model's logits.

    Raises:
        TypeError: if ``size`` does not consist of integers, or ``overlap`` is not a number.
        ValueError: if ``size`` is not positive or below the stride of an encoder that states it, or ``overlap`` is not
            in [0, 1).

    Example:
        >>> model = Tiled(nn.Conv2d(3, 4, 1), size=32, overlap=0.5)
        >>> model(torch.rand(2, 3, 50, 90)).exp().sum(1).allclose(torch.ones(2, 50, 90))
        True
    """

    takes_images = True

    def __init__(self, model: nn.Module, size: int | tuple[int, int] = 1024, overlap: float = 0.25) -> None:
        super().__init__()
        self.model = as_segmenter(model)
        self.size = check_size(size, self.model)
        self.overlap = check_overlap(overlap)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the log of the mean probability ``(B, K, H, W)`` of images ``(B, C, H, W)``."""
        if not isinstance(images, Tensor) or images.ndim != 4 or not images.shape[-2] or not images.shape[-1]:
            came = f"shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"expected a batch of images (B, C, H, W), got {came}")
        rows, columns = (
            Axis.cover(length, size, self.overlap) for length, size in zip(images.shape[-2:], self.size, strict=True)
        )
        if len(rows.starts) == len(columns.starts) == 1:
            logits: Tensor = self.model(images)
            return logits.log_softmax(1)
        found: Tensor | None = None
        parts = predict_blocks(self.model, rows, columns, lambda r, c: images[..., r, c], count=len(images))
        for r, c, block in parts:
            assert block is not None
            if found is None:
                found = block.new_empty(*block.shape[:2], rows.length, columns.length)
            found[..., r, c] = block.clamp(min=torch.finfo(block.dtype).tiny).log()
        assert found is not None
        return found

    def extra_repr(self) -> str:
        """Return the settings for ``repr``."""
        return f"size={self.size}, overlap={self.overlap}"


class Axis(NamedTuple):
    """Tiles along one axis of an image."""

    length: int
    """Pixels of the image."""
    size: int
    """Pixels of a tile."""
    starts: tuple[int, ...]
    """First pixel of each tile."""

    @classmethod
    def cover(cls, length: int, size: int, overlap: float) -> Axis:
        """Cover an axis by evenly spaced tiles, as few as overlap by a share of their size or more.

        Example:
            >>> Axis.cover(100, 40, 0.25)
            Axis(length=100, size=40, starts=(0, 30, 60))
        """
        size = min(size, length)
        most = max(1, int(size * (1 - overlap) + 1e-6))  # from a tile to the next; 10 * (1 - 0.9) is below 1
        spaces = -(-(length - size) // most)
        return cls(length, size, tuple(place * (length - size) // max(1, spaces) for place in range(spaces + 1)))

    @property
    def ends(self) -> tuple[int, ...]:
        """Pixel from which on the later tiles of each tile change the result."""
        return (*self.starts[1:], self.length)

    @property
    def most_shared(self) -> int:
        """Most pixels that a tile shares with later ones."""
        return max(start + self.size - end for start, end in zip(self.starts, self.ends, strict=True))

    def slices(self) -> list[slice]:
        """Return the pixels of each tile."""
        return [slice(start, start + self.size) for start in self.starts]

    def weights(self) -> Tensor:
        """Return the ``(tiles, size)`` float64 weights, those of a pixel add up to 1."""
        places = torch.arange(self.size, dtype=torch.float64)
        gaussian = torch.exp(-0.5 * ((places - (self.size - 1) / 2) / (self.size / 8)) ** 2)
        total = torch.zeros(self.length, dtype=torch.float64)
        for tile in self.slices():
            total[tile] += gaussian
        return torch.stack([gaussian / total[tile] for tile in self.slices()])


def predict_blocks(
    model: nn.Module,
    rows: Axis,
    columns: Axis,
    read: Callable[[slice, slice], Tensor | None],
    *,
    count: int = 1,
) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """Compute images by tiles, and yield each part of the result as soon as no later tile changes it.

    Of the probabilities, it keeps the rows that the next row of tiles shares,
    ``B * K * rows.most_shared * width * 4`` bytes, beside one pass of the network.

    Args:
        model: a wrapped network.
        rows: tiles along the height.
        columns: tiles along the width.
        read: rows and columns of a tile -> images ``(B, C, h, w)``; None for a tile that is not to be computed.
        count: number of images B.

    Yields:
        rows and columns of a part, and ``(B, K, h, w)`` its mean probability; None for parts before the first tile that
        was computed. A part is the beginning of a tile, in the order of the tiles. Pixels in tiles that were left out
        mean nothing.
    """
    return _blend(rows, columns, _predict_tiles(model, rows, columns, read, count))


def _predict_tiles(
    model: nn.Module, rows: Axis, columns: Axis, read: Callable[[slice, slice], Tensor | None], count: int
) -> Iterator[Tensor | None]:
    """Yield the probabilities ``(B, K, h, w)`` of each tile, row by row; several tiles make a forward pass."""
    tiles = [(r, c) for r in rows.slices() for c in columns.slices()]
    most = max(1, _MOST_PIXELS // (rows.size * columns.size))
    per_pass = images_per_pass(device_of(model), rows.size, columns.size, most)
    together = max(1, per_pass // max(1, count))
    for first in range(0, len(tiles), together):
        group = [read(*tile) for tile in tiles[first : first + together]]
        images = [each for each in group if each is not None]
        found: Iterator[Tensor] = iter(())
        if images:
            parts = [softmax_of_classes(model(part)) for part in torch.split(torch.cat(images), per_pass)]
            probability = parts[0] if len(parts) == 1 else torch.cat(parts)
            found = iter(probability.reshape(len(images), count, *probability.shape[1:]))
        for each in group:
            yield None if each is None else next(found)


def _blend(rows: Axis, columns: Axis, tiles: Iterable[Tensor | None]) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """Average the probabilities of tiles; see ``predict_blocks``.

    What a tile shares with the tile to its right is added to that one. What it shares with those below is kept in a
    strip as wide as the image until their turn comes.
    """
    of_rows, of_columns = rows.weights(), columns.weights()
    ordered = iter(tiles)
    strip: Tensor | None = None
    for i, (top, bottom) in enumerate(zip(rows.starts, rows.ends, strict=True)):
        right: Tensor | None = None
        for j, (left, end) in enumerate(zip(columns.starts, columns.ends, strict=True)):
            tile = next(ordered)
            block = slice(top, bottom), slice(left, end)
            if tile is None:
                if strip is None:
                    yield *block, None
                    continue
                tile = strip.new_zeros(*strip.shape[:2], rows.size, columns.size)
            else:
                weight = (of_rows[i, :, None] * of_columns[j]).to(tile)
                tile = tile * weight
            if strip is None:
                strip = tile.new_zeros(*tile.shape[:2], rows.most_shared, columns.length)
            if right is not None:
                tile[..., : right.shape[-1]] += right
            right = tile[..., end - left :]
            done = tile[..., : end - left]
            done[:, :, : strip.shape[2]] += strip[..., left:end]
            yield *block, done[:, :, : bottom - top]
            shared = top + rows.size - bottom
            strip[:, :, :shared, left:end] = done[:, :, bottom - top :]
            strip[:, :, shared:, left:end] = 0


def check_size(size: int | tuple[int, int], model: nn.Module | None = None) -> tuple[int, int]:
    """Return height and width of a tile.

    Raises:
        TypeError: if it is not an integer or two.
        ValueError: if a side is not positive, or below the stride of an encoder that states it.

    Example:
        >>> check_size(512), check_size((512, 1024))
        ((512, 512), (512, 1024))
    """
    sides = (size, size) if isinstance(size, int) else size
    if not isinstance(sides, (tuple, list)) or len(sides) != 2:
        raise TypeError(f"the size of a tile is {size!r}; expected an integer, or (height, width)")
    for side in sides:
        check_count("the size of a tile", side)
    strides = [getattr(module, "output_stride", None) for module in (model.modules() if model is not None else ())]
    stride = max((stride for stride in strides if isinstance(stride, int)), default=1)
    if min(sides) < stride:
        raise ValueError(
            f"the size of a tile is {size!r}; expected at least {stride}, the stride of the network's encoder, and "
            "rather no less than the crops of its training"
        )
    return int(sides[0]), int(sides[1])


def check_overlap(overlap: float) -> float:
    """Return the share that tiles overlap by.

    Raises:
        TypeError: if it is not a number.
        ValueError: if it is not in [0, 1).
    """
    check_number("overlap", overlap)
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap is {overlap}; expected a share of a tile in [0, 1)")
    return float(overlap)
