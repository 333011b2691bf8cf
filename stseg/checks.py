"""Data sets and networks looked at before time is spent on them."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from stseg.distributed import gathered
from stseg.errors import DataError, NetworkError, StsegError
from stseg.inference import Skipped, bar, load, share_of
from stseg.models.state import device_of, frozen
from stseg.samples import check_mask_values, ids_of


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
            holds a value that is neither a class nor the ignore index; names the item.
        TypeError: if a mask holds floats; names the item.
    """
    ids = _ids(dataset, name)
    mine = share_of(len(ids))
    prints = []
    items = load(dataset, mine, batch_size=8, num_workers=num_workers, with_mask=True)
    for index, (image, mask) in bar(items, total=len(mine), title=f"check {name}", show=progress):
        check_mask_values(mask, num_classes, ignore_index, name=ids[index])
        prints.append((index, _crc(image), _crc(mask)))
    return _joined(ids, prints)


def check_unlabelled(
    dataset: Dataset[Any], *, skip_unreadable: bool = False, num_workers: int = 0, progress: bool = True
) -> tuple[str, list[Skipped]]:
    """Read every image once.

    Returns:
        A fingerprint of ids and images, and what could not be read where ``skip_unreadable`` is true.

    Raises:
        DataError: if there is no image.
        UnreadableImageError: if one cannot be read and ``skip_unreadable`` is false.
    """
    ids = _ids(dataset, "unlabelled")
    mine = share_of(len(ids))
    skipped: list[Skipped] = []
    prints = []
    items = load(
        dataset, mine, batch_size=8, num_workers=num_workers, skip=skipped.append if skip_unreadable else None
    )
    for index, image in bar(items, total=len(mine), title="check unlabelled", show=progress):
        prints.append((index, _crc(image)))
    return _joined(ids, prints), sorted((s for part in gathered(skipped) for s in part), key=lambda s: s.index)


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
    if num_classes is not None and classes != num_classes:
        raise NetworkError(f"the network gives {classes} classes; num_classes is {num_classes}")
    if classes < 2:
        raise NetworkError("the network gives 1 class; expected 2 or more (foreground against background is 2)")
    if not logits.isfinite().all():
        raise NetworkError("the network returned NaN or infinite logits for the first image")
    if (logits >= 0).all() and torch.allclose(logits.sum(1), torch.ones((), device=logits.device), atol=1e-4):
        raise NetworkError(
            "the network returns probabilities, which sum to 1 at every pixel; expected logits "
            "(leave out the softmax at its end)"
        )
    return classes


def _ids(dataset: Dataset[Any], name: str) -> list[str]:
    ids = ids_of(dataset)
    if not ids:
        raise DataError(f"the {name} data set is empty")
    return ids


def _crc(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().numpy().tobytes(), zlib.crc32(str(tuple(tensor.shape)).encode()))


def _joined(ids: list[str], prints: list[Any]) -> str:
    everyone = sorted(row for part in gathered(prints) for row in part)
    return f"{len(ids)} items, {zlib.crc32(repr((ids, everyone)).encode()):08x}"
