"""Predictions to hand on: a plain PNG mask for each image of a folder, or the mask of one image."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, Subset

from stseg import models
from stseg.data._reading import ItemReader
from stseg.data.convert import as_image
from stseg.data.folder import SegmentationFolder
from stseg.data.items import Items
from stseg.description import describe
from stseg.distributed import rank
from stseg.errors import DataError, NetworkError
from stseg.inference.fingerprints import check_repeatable, checksum
from stseg.inference.mask_files import Pixels
from stseg.inference.mask_folder import MaskFolder, classes_of
from stseg.inference.reading import Skipped
from stseg.inference.sweep import Sweep, check_batch_size, check_finite, finite_images, predictor
from stseg.inference.writing import writing_behind
from stseg.models.precision import resolve_precision
from stseg.models.segmenter import as_segmenter, takes_images
from stseg.models.state import device_of, evaluating, fingerprint, move
from stseg.storage.files import absolute_folder, remove_leftovers
from stseg.types import Precision

_HIGHEST = 65535  # of a 16-bit PNG
_WAITING = 16  # masks that wait to be written; large ones take memory


@dataclass(frozen=True, repr=False)
class Predictions:
    """Masks that :func:`stseg.predict` wrote; ``predictions[i]`` reads the classes of one.

    Indexing returns ``(H, W)`` class indices, uint8 (int32 where there are more than 256 classes), whatever numbers
    ``values`` wrote for them. It refuses a file that was changed since.

    Attributes:
        folder: folder of the masks.
        ids: ids of the images, in their order; the mask of ``a/b`` is ``a/b.png`` in the folder.
        skipped: images that could not be read, if ``skip_unreadable`` was set; they are not among the ids.
        values: the number that stands for each class in the files; None where it is the index of the class.

    Example:
        >>> import tempfile
        >>> masks = predict(nn.Conv2d(3, 2, 1), [torch.rand(3, 4, 6)], tempfile.mkdtemp(), progress=False)
        >>> masks.ids, masks[0].shape, masks[0].dtype
        (('0',), torch.Size([4, 6]), torch.uint8)
    """

    folder: Path
    ids: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    values: tuple[int, ...] | None
    _masks: MaskFolder = field(compare=False)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, position: int) -> Tensor:
        return classes_of(self._masks.get(self.ids[operator.index(position)]), self.values)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[position] for position in range(len(self)))

    def __repr__(self) -> str:
        return f"Predictions({str(self.folder)!r}: {len(self)} masks)"


def predict(
    model: nn.Module,
    images: str | os.PathLike[str] | Dataset[Any],
    out: str | os.PathLike[str],
    *,
    values: Sequence[int] | None = None,
    tta: Callable[[nn.Module], nn.Module] | None = None,
    tile: int | tuple[int, int] | None = None,
    overlap: float = 0.25,
    confidence: bool = False,
    batch_size: int = 8,
    num_workers: int = 0,
    precision: Precision = "auto",
    device: torch.device | str | None = None,
    skip_unreadable: bool = False,
    progress: bool = True,
) -> Predictions:
    """Write the predicted mask of each image into a folder, as plain gray PNG files of the images' names and sizes.

    Nothing but the masks is written there. Each holds, as text that other programs ignore, what it was made from: a run
    that was killed goes on where it was, and a finished one has nothing to do. Files of the same weights and settings
    are kept if their image is the same; those that are cut off, and those whose image has changed, are made again. Any
    other PNG file in the folder is refused before a network runs.

    Images of equal size are batched on the fly; memory does not grow with the number of images. Under
    ``torch.distributed`` the processes share the images, and the folder must be visible to all of them.

    Args:
        model: a network or a wrapped one, such as ``result.model`` and what :func:`stseg.load` returns; its training
            mode is restored.
        images: a folder, read as ``stseg.data.SegmentationFolder(images)`` does, in RGB; or a data set, whose items are
            images or tuples that begin with one. Masks are named by its ``ids``, without the ending of an image file,
            else by number.
        out: folder of the masks, apart from that of the images. Sub-folders are those of the images.
        values: the number to write for each class, 0 to 65535, such as ``(0, 255)``; None writes the index of the
            class. Files have 8 bits if all numbers are below 256, else 16.
        tta: wraps the network in test-time augmentation, such as :class:`stseg.MultiScaleFlip`; None predicts at one
            scale.
        tile: side, or height and width, in pixels of the tiles in which images are predicted, by
            :class:`stseg.models.Tiled`; None predicts each image as a whole. With ``tta`` each tile is augmented, so
            that memory stays that of a tile.
        overlap: share of a tile that the next one covers, too.
        confidence: whether to write the confidence of each mask, the probability of the written class, into a folder
            beside ``out`` whose name has ``-confidence`` behind it: 8-bit gray, 255 times the probability, rounded.
        batch_size: most images of a batch; does not change the masks.
        num_workers: processes that read images.
        precision: ``"fp32"``, ``"bf16"`` for speed, or ``"auto"`` for bfloat16 where the device computes it natively.
        device: device to move the model to; None leaves it where it is.
        skip_unreadable: whether to skip images that cannot be read and list them in ``.skipped``.
        progress: whether to show a bar.

    Returns:
        The masks, in the order of the images.

    Raises:
        DataError: before a network runs, if there is no image, ``out`` is, contains or is in the folder of the images,
            an id cannot name a file, two images would have the same mask, or an image changes from one reading to the
            next.
        WorkdirMismatchError: before a network runs, if a PNG file in ``out`` was made by another network, with other
            settings or by something else; names it.
        DamagedFileError: before a network runs, if a mask was changed after it was written; names it.
        NetworkError: if ``values`` has not as many numbers as the network has classes, before any mask is written; if
            logits of an image are not finite.
        UnreadableImageError: if an image cannot be read and ``skip_unreadable`` is false; the masks made so far stay.
        TypeError, ValueError: if an argument is of another type or out of its range; names it.

    Example:
        >>> import tempfile, stseg
        >>> from PIL import Image
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "images/a").mkdir(parents=True)
        >>> Image.new("RGB", (6, 4)).save(folder / "images/a/1.jpg")
        >>> model = nn.Conv2d(3, 2, 1)
        >>> masks = stseg.predict(model, folder / "images", folder / "masks", values=(0, 255), progress=False)
        >>> masks.ids, masks[0].shape, Image.open(folder / "masks/a/1.png").mode
        (('a/1',), torch.Size([4, 6]), 'L')
    """
    check_batch_size(batch_size)
    values = _checked_values(values)
    folder = _checked_folder(out)
    model = move(as_segmenter(model), device)
    wrapped = _wrapped(model, tta, tile, overlap)
    settings = {
        "model": fingerprint(model),
        "values": values,
        "tta": describe(tta),
        "tile": [tile, tile] if isinstance(tile, int) else tile,
        "overlap": None if tile is None else overlap,
        "precision": resolve_precision(precision, device_of(model)),
    }
    items = Items.of(SegmentationFolder(os.fspath(images)) if isinstance(images, (str, os.PathLike)) else images)
    masks = MaskFolder(folder, settings, items.ids, _beside(folder) if confidence else None)
    for each in masks.folders:
        _refuse_overlap(each, items.dataset)
    sweep = Sweep(items, "predict", batch_size, num_workers, progress, skip_unreadable)
    todo = _find_todo(sweep, masks)
    if todo:
        _prepare(masks)
        _write(sweep, todo, masks, wrapped, values, settings["precision"], confidence)
    skipped = sweep.skipped()
    left_out = {each.index for each in skipped}
    ids = tuple(id for index, id in enumerate(items.ids) if index not in left_out)
    return Predictions(folder, ids, skipped, values, masks)


def predict_mask(model: nn.Module, image: Any, *, precision: Precision = "auto") -> Tensor:
    """Return the predicted mask of one image.

    Args:
        model: a network or a wrapped one, on any device; its training mode is restored. ``stseg.MultiScaleFlip(model)``
            and ``stseg.models.Tiled(model)`` are wrapped ones, too.
        image: the path of an image file, read in RGB; a PIL image, gray with one channel; an array ``(H, W, C)``, or
            ``(H, W)`` with one channel; a tensor ``(C, H, W)``. Arrays and tensors are uint8, or float in [0, 1], with
            the channels in the order of the training: OpenCV reads BGR, not RGB.
        precision: ``"fp32"``, ``"bf16"``, or ``"auto"`` for bfloat16 where the device computes it natively.

    Returns:
        ``(H, W)`` class indices on the CPU, uint8 (int32 where there are more than 256 classes).

    Raises:
        TypeError: if the image is something else, or its numbers are.
        DataError: if its shape or its numbers are others.
        UnreadableImageError: if its file is broken.
        NetworkError: if its logits are not finite.

    Example:
        >>> predict_mask(nn.Conv2d(3, 2, 1), np.zeros((4, 6, 3), dtype=np.uint8)).shape
        torch.Size([4, 6])
    """
    model = as_segmenter(model)
    pixels = _image(image)
    with evaluating(model), torch.no_grad():
        logits = predictor(model, None, precision)(pixels[None])
        highest, classes = logits.max(1)
    check_finite(bool(highest.isfinite().all()), name="the image")
    return classes[0].to("cpu", _index_dtype(logits.shape[1]))


class _Source(NamedTuple):
    folder: Path
    what: str


def _find_todo(sweep: Sweep, masks: MaskFolder) -> Sequence[int]:
    """Return which images of this process have no mask, or one of other pixels."""
    if not sweep.items.concurrent:
        check_repeatable(sweep.items, name="image")
    if rank() == 0:
        for folder in masks.folders:
            remove_leftovers(folder)
    made = masks.made(sweep.share, show=sweep.progress and rank() == 0)
    if not made:
        return sweep.share
    compared = replace(sweep, title="compare images").read(list(made))
    changed = {index for index, image in compared if checksum(image) != made[index]}
    return [index for index in sweep.share if index not in made or index in changed]


def _prepare(masks: MaskFolder) -> None:
    """Make the folders; refuse those that cannot be written before time is spent."""
    for folder in masks.folders:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} cannot be written; expected a folder for the masks")


def _write(
    sweep: Sweep,
    todo: Sequence[int],
    masks: MaskFolder,
    model: nn.Module,
    values: tuple[int, ...] | None,
    precision: Precision,
    confidence: bool,
) -> None:
    predict = predictor(model, None, precision)
    device = device_of(model)

    def classes(batch: Tensor) -> tuple[Tensor, ...]:
        logits = predict(batch)
        numbers = _numbers(values, logits.shape[1])
        highest, mask = logits.max(1)
        written = numbers.to(device)[mask]
        if not confidence:
            return written, finite_images(highest)
        # The softmax at its highest value; along the memory, which is faster on a CPU.
        probability = logits.float().contiguous().softmax(1).amax(1)
        return written, probability, finite_images(highest)

    of: dict[int, int] = {}  # checksums of the images that were read
    with (
        writing_behind(most=_WAITING) as write,
        sweep.predict(
            [model], classes, indices=todo, on_item=lambda index, image: of.update({index: checksum(image)})
        ) as predicted,
    ):
        for index, (mask, *kept) in predicted:
            probability = kept[0].numpy() if kept else None
            write(masks.put, sweep.items.ids[index], _pixels(mask), probability, image=of.pop(index))


def _numbers(values: tuple[int, ...] | None, num_classes: int) -> Tensor:
    """Return the number to write for each class, ``(K,)`` uint8 or int32.

    Raises:
        NetworkError: if there are not as many as classes.
    """
    if values is None:
        return torch.arange(num_classes, dtype=_index_dtype(num_classes))
    if len(values) != num_classes:
        raise NetworkError(
            f"the network gives {num_classes} classes, but values has {len(values)} numbers, {values}; expected a "
            "number for each class"
        )
    return torch.tensor(values, dtype=_index_dtype(max(values) + 1))


def _index_dtype(count: int) -> torch.dtype:
    return torch.uint8 if count <= 256 else torch.int32


def _pixels(mask: Tensor) -> Pixels:
    pixels: Pixels = mask.numpy()
    return pixels if mask.dtype == torch.uint8 else pixels.astype(np.uint16)


def _checked_values(values: Sequence[int] | None) -> tuple[int, ...] | None:
    if values is None:
        return None
    line = "expected one integer for each class, such as (0, 255), or None for the index of the class"
    if isinstance(values, (str, bytes)) or not isinstance(values, (Sequence, np.ndarray)):
        raise TypeError(f"values is {values!r}; {line}")
    for value in values:
        if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__index__"):
            raise TypeError(f"values holds {value!r}; {line}")
        if not 0 <= value <= _HIGHEST:
            raise ValueError(f"values holds {value}; expected 0..{_HIGHEST}, what a gray PNG can hold")
    numbers = tuple(operator.index(value) for value in values)
    if len(numbers) < 2:
        raise ValueError(f"values is {numbers}; {line}")
    if len(set(numbers)) < len(numbers):
        twice = next(value for value in numbers if numbers.count(value) > 1)
        raise ValueError(f"values is {numbers}; expected a number for each class, but {twice} is there more than once")
    return numbers


def _checked_folder(out: str | os.PathLike[str]) -> Path:
    if not isinstance(out, (str, os.PathLike)) or not os.fspath(out):
        raise TypeError(f"out is {out!r}; expected a folder for the masks")
    folder = absolute_folder(os.path.abspath(os.fspath(out)), "out")
    assert folder is not None
    return folder


def _beside(folder: Path) -> Path:
    beside = absolute_folder(folder.with_name(f"{folder.name}-confidence"), "out")
    assert beside is not None
    return beside


def _wrapped(
    model: nn.Module,
    tta: Callable[[nn.Module], nn.Module] | None,
    tile: int | tuple[int, int] | None,
    overlap: float,
) -> nn.Module:
    if tta is not None:
        if not callable(tta) or isinstance(tta, nn.Module):
            came = type(tta).__name__ if isinstance(tta, nn.Module) else repr(tta)
            raise TypeError(f"tta is {came}; expected a function that wraps a network, such as stseg.MultiScaleFlip")
        model = tta(model)
        if not isinstance(model, nn.Module) or not takes_images(model):
            raise TypeError(
                f"tta returned {type(model).__name__}; expected a module that takes images as they are, which its "
                "attribute takes_images = True says, such as stseg.MultiScaleFlip"
            )
    if tile is None:
        if overlap != 0.25:
            raise ValueError(f"overlap is {overlap} without a tile; expected both")
        return model
    tiled: nn.Module = models.Tiled(model, tile, overlap)
    return tiled


def _refuse_overlap(folder: Path, dataset: object) -> None:
    """Raise an error if a folder to write is, contains or is in one that the data set is read from."""
    there = folder.resolve()
    for source in _sources(dataset):
        other = source.folder.resolve()
        if there == other or there in other.parents or other in there.parents:
            how = "is" if there == other else "contains" if there in other.parents else "is in"
            raise DataError(
                f"out is {folder}, which {how} the folder of {source.what}, {other}; expected a folder of its own, "
                f"such as {other.with_name(f'{other.name}-predicted')}"
            )


def _sources(dataset: object) -> Iterator[_Source]:
    """Yield the folders that a data set is read from, as far as it is one of this package."""
    if isinstance(dataset, SegmentationFolder):
        yield _Source(dataset.images, "images")
        if dataset.masks is not None:
            yield _Source(dataset.masks, "masks")
    elif isinstance(dataset, ConcatDataset):
        for part in dataset.datasets:
            yield from _sources(part)
    elif isinstance(dataset, (Subset, Items)):
        yield from _sources(dataset.dataset)


def _image(image: Any) -> Tensor:
    """Return one image as a tensor ``(C, H, W)``; see :func:`predict_mask`."""
    if isinstance(image, (str, os.PathLike)):
        path = Path(image)
        read: Tensor = ItemReader("RGB")(path, None, name=str(path))
        return read
    if isinstance(image, np.ndarray):
        if image.ndim not in (2, 3) or image.dtype.kind not in "uf":
            raise TypeError(
                f"image is an array {image.dtype} of shape {image.shape}; expected (H, W, C) or (H, W), uint8 or float "
                "in [0, 1]"
            )
        if image.ndim == 3 and image.shape[2] > 4 >= image.shape[0]:
            raise DataError(
                f"image is an array of shape {image.shape}; expected (H, W, C): torch.from_numpy(image) is an image "
                "(C, H, W)"
            )
        pixels = image[..., None] if image.ndim == 2 else image
        return as_image(torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))))
    return as_image(image)
