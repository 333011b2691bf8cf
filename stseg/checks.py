"""Data sets and networks looked at before time is spent on them."""

from __future__ import annotations

import zlib
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from stseg.distributed import gathered
from stseg.errors import DataError, NetworkError, StsegError
from stseg.inference import Skipped, bar, load, share_of
from stseg.models.state import device_of, frozen
from stseg.samples import check_mask_values, has_ids, ids_of, len_of, repeated


def check_labelled(
    dataset: Dataset[Any],
    *,
    num_classes: int,
    ignore_index: int = 255,
    name: str = "labelled",
    num_workers: int = 0,
    progress: bool = True,
) -> str:
    """Read every image and mask once.

    Returns:
        A fingerprint of ids, images and masks.

    Raises:
        DataError: if there is no item, an image cannot be read, or a mask is missing, of another size than its image or
            holds a value that is neither a class nor the ignore index; names the item. If no mask holds a class.
        TypeError: if a mask holds floats; names the item.
    """
    ids = ids_of(dataset)
    if not ids:
        raise DataError(f"the {name} data set is empty")
    mine = share_of(len(ids))
    prints = []
    any_class = False
    items = load(dataset, mine, batch_size=8, num_workers=num_workers, with_mask=True)
    for index, (image, mask) in bar(items, total=len(mine), title=f"check {name}", show=progress):
        check_mask_values(mask, num_classes, ignore_index, name=ids[index])
        prints.append((index, _crc(image), _crc(mask)))
        any_class = any_class or bool((mask != ignore_index).any())
    if not any(gathered(any_class)):
        raise DataError(f"the masks of the {name} data set hold nothing but the ignore index {ignore_index}")
    return _joined(ids, [row for part in gathered(prints) for row in part])


def find_unreadable(
    dataset: Dataset[Any], *, skip: bool = False, num_workers: int = 0, progress: bool = True
) -> list[Skipped]:
    """Read every image once.

    Returns:
        What could not be read, where ``skip`` is true.

    Raises:
        UnreadableImageError: if one cannot be read and ``skip`` is false.
    """
    mine = share_of(len_of(dataset))
    skipped: list[Skipped] = []
    items = load(dataset, mine, batch_size=8, num_workers=num_workers, skip=skipped.append if skip else None)
    for _ in bar(items, total=len(mine), title="check unlabelled", show=progress):
        pass
    return sorted((s for part in gathered(skipped) for s in part), key=lambda s: s.index)


def fingerprint(dataset: Dataset[Any], *, most: int = 256) -> str:
    """Number, ids and the pixels of at most so many images of a data set, evenly spread."""
    ids = ids_of(dataset)
    chosen = sorted({len(ids) * k // most for k in range(most)}) if ids else []
    unreadable: list[Skipped] = []
    items = load(dataset, chosen, batch_size=8, num_workers=0, skip=unreadable.append)
    return _joined(ids, [(index, _crc(image)) for index, image in items])


def refuse_common_ids(datasets: dict[str, Dataset[Any] | None]) -> None:
    """Raise a ``DataError`` if an id is in two of the data sets, given by name; unnamed items are left alone."""
    named = [(name, ids_of(data)) for name, data in datasets.items() if data is not None and has_ids(data)]
    for (name, ids), (other, others) in combinations(named, 2):
        if (both := repeated(ids, others)) is not None:
            raise DataError(
                f"the id {both!r} is in both the {name} and the {other} data set; expected each image in one of them"
            )


def check_network(model: nn.Module, image: Tensor, num_classes: int | None = None) -> int:
    """Have a wrapped network look at one image ``(C, H, W)``.

    Returns:
        How many classes it tells apart.

    Raises:
        NetworkError: if it cannot take the image, does not return logits, or not of ``num_classes`` classes.
    """
    with frozen(model), torch.no_grad():
        try:
            logits = model(image[None].to(device_of(model)))
        except StsegError:
            raise
        except RuntimeError as error:
            raise NetworkError(f"the network cannot take an image of shape {tuple(image.shape)}: {error}") from error
    classes = int(logits.shape[1])
    if classes < 2:
        raise NetworkError("the network gives 1 class; expected 2 or more (foreground against background is 2)")
    if num_classes is not None and classes != num_classes:
        raise NetworkError(f"the network gives {classes} classes; num_classes is {num_classes}")
    if not logits.isfinite().all():
        raise NetworkError("the network returned NaN or infinite logits for the first image")
    if (logits >= 0).all() and torch.allclose(logits.sum(1), torch.ones((), device=logits.device), atol=1e-4):
        raise NetworkError(
            "the network returns probabilities, which sum to 1 at every pixel; expected logits "
            "(leave out the softmax at its end)"
        )
    return classes


def _crc(tensor: Tensor) -> int:
    return zlib.crc32(tensor.cpu().contiguous().numpy().tobytes(), zlib.crc32(str(tuple(tensor.shape)).encode()))


def _joined(ids: list[str], prints: list[Any]) -> str:
    return f"{len(ids)} items, {zlib.crc32(repr((ids, sorted(prints))).encode()):08x}"
