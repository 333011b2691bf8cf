"""Loop over a data set with networks: equal-size batches, shared between processes, in bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from stseg.data.items import Items
from stseg.data.observations import Observations
from stseg.distributed import all_gather, rank, world_size
from stseg.errors import DataError, NetworkError
from stseg.inference.reading import Skipped, read_ahead, read_items
from stseg.models.batching import images_per_pass
from stseg.models.precision import autocast, casting_once, resolve_precision
from stseg.models.state import device_of, evaluating, laid_out
from stseg.progress import Progress, progress_bar
from stseg.types import Precision

T = TypeVar("T")


@dataclass
class Sweep:
    """Pass over the items of a data set, shared between processes.

    Args:
        items: the data set.
        title: name on the progress bar.
        batch_size: most images of a batch, which have equal sizes.
        num_workers: worker processes that read.
        progress: whether to show a bar, in the first process.
        skip_unreadable: whether to skip images that cannot be read.
        with_mask: whether to read ``(image, mask)``.
    """

    items: Items
    title: str
    batch_size: int = 8
    num_workers: int = 0
    progress: bool = True
    skip_unreadable: bool = False
    with_mask: bool = False
    observations: Observations = field(default_factory=Observations)
    """What reading the items showed, in this process."""
    _skipped: list[Skipped] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not len(self.items):
            raise DataError(f"the data set to {self.title} is empty")

    @property
    def share(self) -> range:
        """Indices of the items of this process."""
        return range(rank(), len(self.items), world_size())

    def read(self, indices: Sequence[int] | None = None) -> Iterator[tuple[int, Any]]:
        """Yield index and image, or ``(image, mask)``, of the items of this process, or of some of them."""
        indices = self.share if indices is None else indices
        with self._bar(len(indices)) as bar:
            for item in self._load(indices):
                yield item
                bar.update()
            bar.update(len(indices) - int(bar.n))  # those that were skipped

    def predict(
        self,
        networks: Sequence[nn.Module],
        function: Callable[[Tensor], tuple[Tensor, ...]],
        *,
        indices: Sequence[int] | None = None,
        on_item: Callable[..., object] | None = None,
    ) -> closing[Generator[tuple[int, tuple[Tensor, ...]], None, None]]:
        """Return a context of index and results of the items of this process, or of some of them, in order.

        On leaving it, also by an error, the networks are as they were.

        Args:
            networks: all networks that ``function`` runs, set to evaluation mode, and laid out for speed, meanwhile.
                Batches are moved to the device of the last one.
            function: ``(B, C, H, W)`` images -> results, each a tensor of B rows; the last one is ``(B,)`` bool,
                whether the logits are finite, and is not yielded. It need not wait for the device.
            indices: which items; None for all.
            on_item: called with index and image of each item as it is read, and its mask if masks are read.

        Raises:
            NetworkError: if the logits of an image are not finite; names it.
        """
        return closing(self._predict(networks, function, self.share if indices is None else indices, on_item))

    def _predict(
        self,
        networks: Sequence[nn.Module],
        function: Callable[[Tensor], tuple[Tensor, ...]],
        indices: Sequence[int],
        on_item: Callable[..., object] | None,
    ) -> Generator[tuple[int, tuple[Tensor, ...]], None, None]:
        def images() -> Iterator[tuple[int, Tensor]]:
            for index, value in self._load(indices):
                if on_item is not None:
                    on_item(index, *(value if self.with_mask else (value,)))
                yield index, value[0] if self.with_mask else value

        device = device_of(networks[-1])

        def run(batch: Tensor) -> list[tuple[_OnHost, int]]:
            with evaluating(*networks), torch.no_grad():
                rows = _OnHost(function(batch), len(batch))
            # Here and not where they are yielded, which is in order: results come in bursts there.
            bar.update(len(batch))
            return [(rows, row) for row in range(len(batch))]

        # What a GPU computes is waited for when the next batch is on its way.
        ahead = self.batch_size if device.type == "cuda" else 0
        with laid_out(*networks), casting_once(device, *networks), self._bar(len(indices)) as bar:
            results = batch_by_size(run, images(), batch_size=self.batch_size, device=device)
            for index, (rows, row) in _delayed(results, ahead):
                *found, finite = rows.get(row)
                check_finite(bool(finite), name=f"image {self.items.ids[index]!r}")
                yield index, tuple(found)
            bar.update(len(indices) - int(bar.n))  # those that were skipped

    def skipped(self) -> tuple[Skipped, ...]:
        """Return the items that could not be read by any process, in order.

        Raises:
            DataError: if no item could be read.
        """
        skipped = sorted((s for part in all_gather(self._skipped) for s in part), key=lambda s: s.index)
        if len(skipped) == len(self.items):
            raise DataError(f"none of the {len(skipped)} images could be read; the first: {skipped[0].reason}")
        return tuple(skipped)

    def _load(self, indices: Sequence[int]) -> Iterator[tuple[int, Any]]:
        items = read_items(
            self.items,
            indices,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            with_mask=self.with_mask,
            skip=self._skipped.append if self.skip_unreadable else None,
            observations=self.observations,
        )
        # Workers read ahead anyway.
        return read_ahead(items, self.batch_size) if self.items.concurrent and self.num_workers == 0 else items

    def _bar(self, total: int) -> Progress:
        return progress_bar(
            title=self.title,
            total=total,
            show=self.progress and rank() == 0,
            unit="image",
            warm_up=2 * self.batch_size,  # the first batch also waits until it is read
        )


class _OnHost:
    """Rows of tensors on their way from the device to the memory of the host."""

    def __init__(self, tensors: tuple[Tensor, ...], rows: int) -> None:
        self._tensors = [tensor.to("cpu", non_blocking=tensor.is_cuda) for tensor in tensors]
        if any(len(tensor) != rows for tensor in tensors):
            raise ValueError(f"got {[len(tensor) for tensor in tensors]} rows for {rows} images")
        devices = {tensor.device for tensor in tensors if tensor.is_cuda}
        self._events = [torch.cuda.current_stream(device).record_event() for device in devices]

    def get(self, row: int) -> list[Tensor]:
        """Return a row of each, which shares no memory with the others."""
        while self._events:
            self._events.pop().synchronize()
        return [tensor[row].clone() if len(tensor) > 1 else tensor[row] for tensor in self._tensors]


def _delayed(values: Iterable[T], count: int) -> Iterator[T]:
    """Yield values when ``count`` more are known, or there are no more."""
    waiting: deque[T] = deque()
    for value in values:
        waiting.append(value)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting


def batch_by_size(
    function: Callable[[Tensor], Sequence[T]],
    images: Iterable[tuple[int, Tensor]],
    *,
    batch_size: int,
    device: torch.device,
    longest_wait: int | None = None,
) -> Iterator[tuple[int, T]]:
    """Apply a batched function to single images of any sizes, in order.

    Images wait until there are ``batch_size`` of their size, or as many as a CPU computes best. They are never padded,
    which would change global pooling.
    An image waits for at most ``longest_wait`` others (8 batches) before its incomplete batch is run, so memory is
    bounded for any number of sizes.

    Args:
        function: ``(B, C, H, W)`` batch on the device -> B results.
        images: ``(index, image)`` pairs.
        batch_size: most images of a batch.
        device: device of the batches.
        longest_wait: how many later images an image may wait for.

    Yields:
        ``(index, result)``, in the order of the images.
    """
    longest_wait = 8 * batch_size if longest_wait is None else longest_wait
    waiting: dict[Any, list[tuple[int, int, Tensor]]] = {}  # by size, each with position, index and image
    done: dict[int, tuple[int, T]] = {}
    oldest = 0  # position of the first image whose result has not been yielded

    def run(key: Any) -> None:
        group = waiting.pop(key)
        batch = torch.stack([image for _, _, image in group])
        if device.type == "cuda":
            batch = batch.pin_memory()
        batch = batch.to(device, non_blocking=True)
        for (position, index, _), result in zip(group, function(batch), strict=True):
            done[position] = (index, result)

    for position, (index, image) in enumerate(images):
        key = (image.shape, image.dtype)
        waiting.setdefault(key, []).append((position, index, image))
        if len(waiting[key]) == images_per_pass(device, *_sides(image), batch_size):
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


def _sides(image: Tensor) -> tuple[int, int]:
    return image.shape[-2], image.shape[-1]


def predictor(model: nn.Module, num_classes: int | None, precision: Precision) -> Callable[[Tensor], Tensor]:
    """Make a function from images ``(B, C, H, W)`` to float logits ``(B, K, H, W)`` of ``num_classes`` classes.

    None is any number of them.

    Gradients and training mode are left to the caller (see ``evaluating``).

    Raises:
        ValueError: if ``precision`` is not one of the three.
        NetworkError: when called, if the network has a different number of classes.
    """
    resolve_precision(precision)

    def predict(images: Tensor) -> Tensor:
        device = device_of(model)
        with autocast(device, precision):
            logits: Tensor = model(images.to(device))
        if num_classes is not None and logits.shape[1] != num_classes:
            raise NetworkError(f"the network gives {logits.shape[1]} classes; num_classes is {num_classes}")
        return logits

    return predict


def finite_images(values: Tensor) -> Tensor:
    """Return ``(B,)`` bool: whether all values of an image are finite.

    For logits, their maximum over the classes suffices, as it propagates NaN.
    """
    return values.isfinite().flatten(1).all(1)


def check_finite(finite: bool, *, name: str) -> None:
    """Raise a ``NetworkError`` unless all logits of an image were finite: arg max would turn NaN into a class."""
    if not finite:
        raise NetworkError(f"the network returned NaN or infinite logits for {name}")


def check_batch_size(batch_size: int) -> None:
    """Raise a ``ValueError`` unless the batch size is positive."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected 1 or more")
