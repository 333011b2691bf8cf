"""Predictions over a whole data set: batches of equal size, shared between processes, at bounded memory."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from stseg.distributed import rank, world_size
from stseg.errors import DataError, NetworkError, UnreadableImageError
from stseg.metrics import MeanIoU
from stseg.models.segmenter import as_segmenter
from stseg.models.state import device_of, frozen
from stseg.samples import check_classes, check_mask_values, ids_of, image_of, pair_of
from stseg.seeds import seed_of, seeded
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
            with seeded(seed_of(0, "read", index)):  # a data set that augments gives the same every time
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


def in_equal_batches(
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


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """bfloat16 autocast where ``precision`` is ``"bf16"``; for ``"fp32"`` none, even inside somebody else's."""
    _check_precision(precision)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


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


def image_prints(dataset: Dataset[Any], *, most: int = 8) -> dict[str, int]:
    """Check sums of at most so many images, evenly spread, by id: equal ids need not mean equal images."""
    ids = ids_of(dataset)
    chosen = sorted({len(ids) * k // most for k in range(most)}) if ids else []
    unreadable: list[Skipped] = []
    images = load(dataset, chosen, batch_size=8, num_workers=0, skip=unreadable.append)
    return {ids[index]: crc(image) for index, image in images}


def crc(tensor: Tensor) -> int:
    """A check sum of shape and values."""
    return zlib.crc32(tensor.cpu().contiguous().numpy().tobytes(), zlib.crc32(str(tuple(tensor.shape)).encode()))


def share_of(count: int) -> range:
    """The positions, out of ``count``, that this process works on."""
    return range(rank(), count, world_size())


def bar(iterable: Iterable[T], *, total: int, title: str, show: bool) -> Iterable[T]:
    """A progress bar around an iterable, in the first process only."""
    return tqdm(iterable, total=total, desc=title, disable=not (show and rank() == 0), dynamic_ncols=True)


def evaluate(
    model: nn.Module,
    dataset: Dataset[Any],
    *,
    num_classes: int,
    ignore_index: int = 255,
    batch_size: int = 8,
    num_workers: int = 0,
    precision: Precision = "fp32",
    progress: bool = True,
) -> MeanIoU:
    """Compare a model with the true masks, each image at its full size, at one scale.

    The evaluation of the paper (Yang et al., CVPR 2022): one confusion matrix over the whole set.

    Args:
        model: a network or a wrapped one; its mode is what it was afterwards.
        dataset: items ``(image, mask)``.
        num_classes: number of classes.
        ignore_index: value of mask pixels that do not count.
        batch_size: how many images of equal size at once; does not change the result.
        num_workers: processes that read the data.
        precision: ``"fp32"`` or ``"bf16"``.
        progress: whether to show a bar.

    Returns:
        The metric: ``.compute()`` is the mIoU, ``.iou()`` that of each class. Under ``torch.distributed``
        the processes share the work and each gets the whole result.

    Raises:
        DataError: if there is no item, or a mask is missing, of another size than its image, or holds a value that
            is no class.
        NetworkError: if the network has another number of classes, or returns NaN or infinite logits.

    Example:
        >>> data = [(torch.zeros(3, 8, 8), torch.zeros(8, 8, dtype=torch.uint8))] * 3
        >>> 0 <= evaluate(nn.Conv2d(3, 2, 1), data, num_classes=2, progress=False).compute() <= 1
        True
    """
    check_classes(num_classes, ignore_index)
    model = as_segmenter(model)
    predict = predictor(model, num_classes, precision)
    ids = ids_of(dataset)
    if not ids:
        raise DataError("the data set to evaluate on is empty")
    metric = MeanIoU(num_classes, ignore_index)
    mine = share_of(len(ids))
    truth: dict[int, Tensor] = {}

    def images() -> Iterator[tuple[int, Tensor]]:
        for index, (image, mask) in load(dataset, mine, batch_size=batch_size, num_workers=num_workers, with_mask=True):
            check_mask_values(mask, num_classes, ignore_index, name=ids[index])
            truth[index] = mask
            yield index, image

    def classes(batch: Tensor) -> list[tuple[Tensor, bool]]:
        logits = predict(batch)
        return list(zip(logits.argmax(1).cpu(), logits.isfinite().flatten(1).all(1).tolist(), strict=True))

    with frozen(model), torch.no_grad():
        results = in_equal_batches(classes, images(), batch_size=batch_size, device=device_of(model))
        for index, (prediction, finite) in bar(results, total=len(mine), title="evaluate", show=progress):
            check_finite(finite, name=f"image {ids[index]!r}")
            metric.update(prediction, truth.pop(index))
    metric.merge_processes()
    return metric


def _check_precision(precision: str) -> None:
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision is {precision!r}; expected 'fp32' or 'bf16'")
