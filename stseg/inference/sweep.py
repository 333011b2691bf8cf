"""Loop over a data set with networks: equal-size batches, shared between processes, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from stseg.data.items import Items
from stseg.data.observations import Observations
from stseg.distributed import all_gather, rank, world_size
from stseg.errors import DataError, NetworkError
from stseg.inference.reading import Skipped, read_items
from stseg.models.precision import autocast, resolve_precision
from stseg.models.state import device_of, evaluating, laid_out
from stseg.progress import progress_bar
from stseg.types import Precision

T = TypeVar("T")


@dataclass
class Sweep:
    """Pass over the items of a data set, shared between processes.

    Args:
        items: the data set.
        title: name on the progress bar.
        batch_size: images of equal size per batch.
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
        yield from self._bar(self._load(indices), len(indices))

    def predict(
        self,
        networks: Sequence[nn.Module],
        function: Callable[[Tensor], tuple[Sequence[T], Tensor]],
        *,
        indices: Sequence[int] | None = None,
        on_item: Callable[..., object] | None = None,
    ) -> Iterator[tuple[int, T]]:
        """Yield index and result of the items of this process, or of some of them, in order.

        Args:
            networks: all networks that ``function`` runs, set to evaluation mode, and laid out for speed, meanwhile.
                Batches are moved to the device of the last one.
            function: ``(B, C, H, W)`` images -> B results, and ``(B,)`` bool, whether the logits are finite.
            indices: which items; None for all.
            on_item: called with index and image of each item as it is read, and its mask if masks are read.

        Raises:
            NetworkError: if the logits of an image are not finite; names it.
        """
        indices = self.share if indices is None else indices

        def images() -> Iterator[tuple[int, Tensor]]:
            for index, value in self._load(indices):
                if on_item is not None:
                    on_item(index, *(value if self.with_mask else (value,)))
                yield index, value[0] if self.with_mask else value

        def run(batch: Tensor) -> list[tuple[T, bool]]:
            with evaluating(*networks), torch.no_grad():
                results, finite = function(batch)
                return list(zip(results, finite.tolist(), strict=True))

        results = batch_by_size(run, images(), batch_size=self.batch_size, device=device_of(networks[-1]))
        with laid_out(*networks):
            for index, (result, finite) in self._bar(results, len(indices)):
                check_finite(finite, name=f"image {self.items.ids[index]!r}")
                yield index, result

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
        return read_items(
            self.items,
            indices,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            with_mask=self.with_mask,
            skip=self._skipped.append if self.skip_unreadable else None,
            observations=self.observations,
        )

    def _bar(self, iterable: Iterable[T], total: int) -> Iterable[T]:
        return progress_bar(iterable, title=self.title, total=total, show=self.progress and rank() == 0)


def batch_by_size(
    function: Callable[[Tensor], Sequence[T]],
    images: Iterable[tuple[int, Tensor]],
    *,
    batch_size: int,
    device: torch.device,
    longest_wait: int | None = None,
) -> Iterator[tuple[int, T]]:
    """Apply a batched function to single images of any sizes, in order.

    Images wait until there are ``batch_size`` of their size. They are never padded, which would change global pooling.
    An image waits for at most ``longest_wait`` others (8 batches) before its incomplete batch is run, so memory is
    bounded for any number of sizes.

    Args:
        function: ``(B, C, H, W)`` batch on the device -> B results.
        images: ``(index, image)`` pairs.
        batch_size: images per batch.
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
    """Make a function from images ``(B, C, H, W)`` to float logits ``(B, K, H, W)`` of ``num_classes`` classes.

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
        if logits.shape[1] != num_classes:
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
