"""Predictions over a whole data set: batches of equal size, shared between processes, at bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from stseg.data.convert import image_of, pair_of
from stseg.data.items import ids_of
from stseg.distributed import rank, world_size
from stseg.errors import NetworkError, UnreadableImageError
from stseg.models.precision import _check_precision, autocast
from stseg.models.state import device_of
from stseg.seeds import derive_seed, fixed_seed
from stseg.types import Precision

T = TypeVar("T")


@dataclass(frozen=True)
class Skipped:
    """An item that could not be read and was left out on request."""

    index: int
    id: str
    reason: str


@dataclass(frozen=True)
class _Unreadable:
    error: Exception


class _Images(Dataset[Any]):
    """Position and image (with the true mask, where asked for) of some items of a data set."""

    def __init__(self, dataset: Dataset[Any], indices: Sequence[int], ids: Sequence[str], with_mask: bool) -> None:
        self.dataset, self.indices, self.ids, self.with_mask = dataset, indices, ids, with_mask

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[int, Any]:
        index = self.indices[position]
        name = self.ids[index]
        try:
            with fixed_seed(derive_seed(0, "read", index)):  # a data set that augments gives the same every time
                item = self.dataset[index]  # a PIL image is perhaps decoded only by what follows
                parts = pair_of(item, name=name) if self.with_mask else (image_of(item, name=name),)
        except OSError as error:  # handed over as a value: a worker would wrap it in its own traceback
            text = str(error) if isinstance(error, UnreadableImageError) else f"item {name!r}: {error}"
            return index, _Unreadable(UnreadableImageError(text))
        # A tensor from a worker holds a file descriptor as long as it lives, an array does not.
        return index, tuple(part.cpu().numpy() for part in parts)


def load(
    dataset: Dataset[Any],
    indices: Sequence[int],
    *,
    batch_size: int,
    num_workers: int,
    with_mask: bool = False,
    skip: Callable[[Skipped], object] | None = None,
) -> Iterator[tuple[int, Any]]:
    """Items of a data set in order, read ahead by workers.

    Args:
        dataset: map-style data set.
        indices: which of its items.
        batch_size: how many a worker hands over at once.
        num_workers: processes that read; 0 reads in this one.
        with_mask: whether to yield ``(image, mask)``, both checked, instead of the image.
        skip: called with what cannot be read; without it that is an error.

    Raises:
        UnreadableImageError: if an item cannot be read and ``skip`` is None.
    """
    ids = ids_of(dataset)
    loader = DataLoader(
        _Images(dataset, indices, ids, with_mask),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=list,
        generator=torch.Generator(),  # of its own, or it would advance the caller's
    )
    for items in loader:
        for index, value in items:
            if not isinstance(value, _Unreadable):
                parts = tuple(torch.from_numpy(part) for part in value)
                yield index, parts if with_mask else parts[0]
            elif skip is None:
                raise value.error
            else:
                skip(Skipped(index, ids[index], str(value.error)))


def batch_by_size(
    function: Callable[[Tensor], Sequence[T]],
    images: Iterable[tuple[int, Tensor]],
    *,
    batch_size: int,
    device: torch.device,
    longest_wait: int | None = None,
) -> Iterator[tuple[int, T]]:
    """Apply a batched function to single images of any sizes, in order.

    Images wait until there are ``batch_size`` of their size, never padded: that would change what global pooling sees.
    An image waits for at most ``longest_wait`` others (8 batches) before its batch goes incomplete, so memory is
    bounded however many sizes there are.

    Args:
        function: ``(B, C, H, W)`` batch on the device -> B results.
        images: ``(index, image)`` pairs.
        batch_size: how many images at once.
        device: where the batches go.
        longest_wait: how many images may come before a waiting one goes.

    Yields:
        ``(index, result)``, in the order in which the images came.
    """
    longest_wait = 8 * batch_size if longest_wait is None else longest_wait
    waiting: dict[Any, list[tuple[int, int, Tensor]]] = {}  # by size, each with position, index and image
    done: dict[int, tuple[int, T]] = {}
    oldest = 0  # position of the first image whose result has not been yielded

    def run(key: Any) -> None:
        group = waiting.pop(key)
        batch = torch.stack([image for _, _, image in group]).to(device, non_blocking=True)
        for (position, index, _), result in zip(group, function(batch), strict=True):
            done[position] = (index, result)

    for position, (index, image) in enumerate(images):
        key = (image.shape, image.dtype)
        waiting.setdefault(key, []).append((position, index, image))
        if len(waiting[key]) == batch_size:
            run(key)
        if position - oldest >= longest_wait and oldest not in done:
            run(next(key for key, group in waiting.items() if group[0][0] == oldest))
        while oldest in done:
            yield done.pop(oldest)
            oldest += 1
    for key in list(waiting):
        run(key)
    while oldest in done:
        yield done.pop(oldest)
        oldest += 1


def predictor(model: nn.Module, num_classes: int, precision: Precision) -> Callable[[Tensor], Tensor]:
    """``(B, C, H, W)`` images -> ``(B, K, H, W)`` float logits, checked to be of ``num_classes`` classes.

    Gradients and training mode are the caller's matter (see ``frozen``).

    Raises:
        ValueError: if there is no such precision.
        NetworkError: when called, if the network has another number of classes.
    """
    _check_precision(precision)

    def predict(images: Tensor) -> Tensor:
        device = device_of(model)
        with autocast(device, precision):
            logits: Tensor = model(images.to(device))
        if logits.shape[1] != num_classes:
            raise NetworkError(f"the network gives {logits.shape[1]} classes; num_classes is {num_classes}")
        return logits

    return predict


def check_finite(finite: bool, *, name: str) -> None:
    """Raise a ``NetworkError`` unless all logits of an image were finite: the arg max would make a class of NaN."""
    if not finite:
        raise NetworkError(f"the network returned NaN or infinite logits for {name}")


def local_share(count: int) -> range:
    """The positions, out of ``count``, that this process works on."""
    return range(rank(), count, world_size())


def progress_bar(iterable: Iterable[T], *, total: int, title: str, show: bool) -> Iterable[T]:
    """A progress bar around an iterable, in the first process only."""
    return tqdm(iterable, total=total, desc=title, disable=not (show and rank() == 0), dynamic_ncols=True)
