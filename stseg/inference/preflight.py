"""Data sets and networks looked at before time is spent on them."""

from __future__ import annotations

import zlib
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from stseg.data.convert import check_mask_values
from stseg.data.items import has_ids, ids_of, repeated
from stseg.distributed import all_gather
from stseg.errors import DataError, NetworkError, StsegError
from stseg.inference.fingerprints import checksum, image_checksums
from stseg.inference.sweep import Skipped, load, local_share, progress_bar
from stseg.models.state import device_of, evaluating
from stseg.types import BatchAugmentation


def check_labeled(
    dataset: Dataset[Any],
    *,
    num_classes: int,
    ignore_index: int = 255,
    name: str = "labeled",
    channels: int | None = None,
    num_workers: int = 0,
    progress: bool = True,
) -> str:
    """Read every image and mask once. Images must have so many channels, or as many as the first one.

    Returns:
        A fingerprint of ids, images and masks.

    Raises:
        DataError: if there is no item, an image cannot be read, or a mask is missing, of another size than its image or
            holds a value that is neither a class nor the ignore index; names the item. Also if no mask holds a class.
        TypeError: if a mask holds floats; names the item.
    """
    ids = ids_of(dataset)
    if not ids:
        raise DataError(f"the {name} data set is empty")
    mine = local_share(len(ids))
    prints = []
    any_class = False
    items = load(dataset, mine, batch_size=8, num_workers=num_workers, with_mask=True)
    for index, (image, mask) in progress_bar(items, total=len(mine), title=f"check {name}", show=progress):
        check_mask_values(mask, num_classes, ignore_index, name=ids[index])
        channels = _same_channels(image, channels, ids[index])
        prints.append((index, checksum(image), checksum(mask)))
        any_class = any_class or bool((mask != ignore_index).any())
    if not any(all_gather(any_class)):
        raise DataError(f"the masks of the {name} data set hold nothing but the ignore index {ignore_index}")
    return _joined(ids, [row for part in all_gather(prints) for row in part])


def find_unreadable(
    dataset: Dataset[Any],
    *,
    channels: int | None = None,
    skip: bool = False,
    num_workers: int = 0,
    progress: bool = True,
) -> list[Skipped]:
    """Read every image once. They must have so many channels, or as many as the first one.

    Returns:
        What could not be read, where ``skip`` is true.

    Raises:
        UnreadableImageError: if one cannot be read and ``skip`` is false.
        DataError: if one has other channels.
    """
    ids = ids_of(dataset)
    mine = local_share(len(ids))
    skipped: list[Skipped] = []
    items = load(dataset, mine, batch_size=8, num_workers=num_workers, skip=skipped.append if skip else None)
    for index, image in progress_bar(items, total=len(mine), title="check unlabeled", show=progress):
        channels = _same_channels(image, channels, ids[index])
    return sorted((s for part in all_gather(skipped) for s in part), key=lambda s: s.index)


def dataset_fingerprint(dataset: Dataset[Any], *, most: int = 256) -> str:
    """Number, ids and the pixels of at most so many images of a data set, evenly spread."""
    return _joined(ids_of(dataset), list(image_checksums(dataset, most=most).items()))


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
    with evaluating(model), torch.no_grad():
        try:
            logits = model(image[None].to(device_of(model)))
        except StsegError:
            raise
        except Exception as error:  # each library has its own kinds
            raise NetworkError(f"the network cannot take an image of shape {tuple(image.shape)}: {error}") from error
    classes = int(logits.shape[1])
    if num_classes is not None and classes != num_classes:
        hint = " (one logit counts as two classes)" if classes == 2 else ""
        raise NetworkError(f"the network gives {classes} classes; num_classes is {num_classes}{hint}")
    if not logits.isfinite().all():
        raise NetworkError("the network returned NaN or infinite logits for the first image")
    if (logits >= 0).all() and torch.allclose(logits.sum(1), torch.ones((), device=logits.device), atol=1e-4):
        raise NetworkError(
            "the network returns probabilities, which sum to 1 at every pixel; expected logits "
            "(leave out the softmax at its end)"
        )
    return classes


def check_pace(inference_batch_size: int, save_every: float) -> None:
    """Raise a ``ValueError`` unless the two are a positive integer and a number of seconds."""
    if not isinstance(inference_batch_size, int) or isinstance(inference_batch_size, bool) or inference_batch_size < 1:
        raise ValueError(f"inference_batch_size is {inference_batch_size!r}; expected a positive integer")
    if not isinstance(save_every, (int, float)) or not save_every >= 0:  # which NaN is not
        raise ValueError(f"save_every is {save_every!r}; expected seconds, 0 or more")


def check_strong(strong: BatchAugmentation | None, ignore_index: int) -> None:
    """Raise an error if it cannot be called, or its cutout writes another value than the ignore index."""
    if strong is not None and not callable(strong):
        raise TypeError(f"strong is {strong!r}; expected a StrongAugment, another function of batches, or None")
    cut = getattr(getattr(strong, "cutout", None), "ignore_index", ignore_index)
    if cut != ignore_index:
        raise ValueError(
            f"the cutout of strong writes {cut} into masks, but ignore_index is {ignore_index}; "
            f"expected strong=StrongAugment(cutout=Cutout(ignore_index={ignore_index}))"
        )


def _same_channels(image: Tensor, channels: int | None, name: str) -> int:
    if channels is not None and len(image) != channels:
        raise DataError(f"image {name!r} has {len(image)} channels; expected {channels}, as the first image has")
    return len(image)


def _joined(ids: list[str], prints: list[Any]) -> str:
    return f"{len(ids)} items, {zlib.crc32(repr((ids, sorted(prints))).encode()):08x}"
