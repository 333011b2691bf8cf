"""Labeled and unlabeled streams: the samples of each batch and their random numbers.

Everything is a function of the seed, the stream and the number of the step or draw. A killed run therefore resumes
exactly, and the number of workers or processes does not change what is drawn.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from stseg.data.convert import check_mask_values, pair_of
from stseg.data.items import Items
from stseg.distributed import rank, world_size
from stseg.engine.config import TrainConfig
from stseg.engine.method import Batch, weak_crop
from stseg.errors import DataError, StsegError
from stseg.seeds import derive_seed, preserved_random_states, seed_all
from stseg.types import PairTransform

StreamName = Literal["labeled", "unlabeled"]


class Draw(NamedTuple):
    """A sample of a stream: ``number`` counts the draws over the whole training."""

    stream: StreamName
    number: int
    item: int


class BatchSampler(Sampler[list[Draw]]):
    """Sampler of the draws of this process for each step.

    Each pass over a stream is a new permutation whose last incomplete batch is dropped; a stream smaller than its
    batch is repeated to fill one. The shorter of two streams is repeated more often.

    Args:
        sizes: number of items and batch size over all processes of each stream.
        steps: the steps, counted from 0.
        seed: seed of the permutations.

    Raises:
        ValueError: if the processes cannot share a batch equally.

    Example:
        >>> sampler = BatchSampler({"labeled": (3, 2), "unlabeled": (10, 4)}, range(5), seed=0)
        >>> [len(batch) for batch in sampler]
        [6, 6, 6, 6, 6]
    """

    def __init__(self, sizes: Mapping[StreamName, tuple[int, int]], steps: range, *, seed: int) -> None:
        for stream, (_, batch_size) in sizes.items():
            if batch_size % world_size():
                name = "batch_size" if stream == "labeled" else "unlabeled_batch_size"
                raise ValueError(
                    f"{name} is {batch_size} over all processes; expected a multiple of their number, {world_size()}"
                )
        self.sizes, self.steps, self.seed = dict(sizes), steps, seed

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[Draw]]:
        orders: dict[StreamName, tuple[int, Tensor]] = {}
        for step in self.steps:
            draws: list[Draw] = []
            for stream, (items, batch_size) in self.sizes.items():
                number, place = divmod(step, steps_per_pass(items, batch_size))
                if stream not in orders or orders[stream][0] != number:
                    orders[stream] = number, self._order(stream, number)
                start = place * batch_size
                indices = orders[stream][1][start : start + batch_size].tolist()
                batch = [Draw(stream, step * batch_size + row, index) for row, index in enumerate(indices)]
                draws += batch[rank() :: world_size()]
            yield draws

    def _order(self, stream: StreamName, number: int) -> Tensor:
        items, batch_size = self.sizes[stream]
        generator = torch.Generator().manual_seed(derive_seed(self.seed, *_key("order", stream), number))
        rounds = -(-batch_size // items)  # more than one where the items do not fill a batch
        return torch.cat([torch.randperm(items, generator=generator) for _ in range(rounds)])


def _key(name: str, stream: StreamName) -> tuple[str, ...]:
    return (name,) if stream == "labeled" else (name, stream)


def steps_per_pass(items: int, batch_size: int) -> int:
    """Return the number of complete batches of ``items`` items, at least 1.

    Example:
        >>> steps_per_pass(366, 16), steps_per_pass(3, 16)
        (22, 1)
    """
    return max(1, items // batch_size)


class Streams(Dataset[tuple[StreamName, Any]]):
    """Augmented samples of both streams, by draw, and the batches made of them.

    Args:
        labeled: items ``(image, mask)`` or ``(image, mask, is_pseudo)``.
        unlabeled: items are images; None for none.
        config: the settings.
        view: makes the view of an unlabeled image; see :meth:`stseg.Method.view`.
    """

    def __init__(
        self,
        labeled: Items,
        unlabeled: Items | None,
        config: TrainConfig,
        view: Callable[[Tensor, PairTransform], tuple[Any, Tensor | None]] = weak_crop,
    ) -> None:
        self.items: dict[StreamName, Items] = {"labeled": labeled}
        self.sizes: dict[StreamName, tuple[int, int]] = {"labeled": (len(labeled), config.batch_size)}
        if unlabeled is not None:
            self.items["unlabeled"] = unlabeled
            self.sizes["unlabeled"] = len(unlabeled), config.unlabeled_batch_size or config.batch_size
        self.config, self.view = config, view
        self.num_classes: int | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps of a pass over the longer stream."""
        return max(steps_per_pass(*size) for size in self.sizes.values())

    def description(self) -> str:
        """Describe the labeled items by number and names."""
        names = list(self.items["labeled"].names)
        return f"{len(names)} samples, {zlib.crc32(repr(names).encode()):08x}"

    def __len__(self) -> int:
        return sum(len(items) for items in self.items.values())

    def __getitem__(self, draw: Draw) -> tuple[StreamName, Any]:
        return self.__getitems__([draw])[0]

    def __getitems__(self, draws: Sequence[Draw]) -> list[tuple[StreamName, Any]]:
        """Return several samples; a loader asks for a batch at once."""
        with preserved_random_states():
            return [self._sample(draw) for draw in draws]

    def _sample(self, draw: Draw) -> tuple[StreamName, Any]:
        items, name = self.items[draw.stream], self.items[draw.stream].names[draw.item]
        seed_all(derive_seed(self.config.seed, *_key("sample", draw.stream), draw.number))
        if draw.stream == "unlabeled":
            try:
                view, valid = self.view(items.image(draw.item), self._augment(name))
            except StopIteration as error:  # which would end the loop over the batches
                raise DataError(f"the view of item {name!r} fails: StopIteration") from error
            return draw.stream, (_map(view, Tensor.cpu), None if valid is None else valid.cpu())
        item = items[draw.item]
        image, mask = pair_of(item, name=name)
        if self.num_classes is not None:
            check_mask_values(mask, self.num_classes, self.config.ignore_index, name=name)
        image, mask = self._augment(name)(image, mask)
        return draw.stream, (image.cpu(), mask.cpu(), _is_pseudo(item))

    def _augment(self, name: str) -> PairTransform:
        """Return the weak augmentation, with checks that its results are an image and a mask."""
        weak = self.config.weak

        def augment(image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            if weak is None:
                return image, mask
            try:
                # Copies: a function may write into them, and the data set may keep its tensors.
                return pair_of(weak(image.clone(), mask.clone()), name=name)
            except StsegError:
                raise
            except Exception as error:  # libraries raise different types
                raise DataError(f"the weak augmentation {weak!r} fails for {name!r}: {error}") from error

        return augment

    def loader(self, steps: range, *, num_workers: int = 0, pin_memory: bool = False) -> DataLoader[Any]:
        """Return a loader of the collated batches of some steps, prefetched by workers."""
        return DataLoader(
            self,
            batch_sampler=BatchSampler(self.sizes, steps, seed=self.config.seed),
            num_workers=num_workers,
            collate_fn=collate,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # its own, so as not to advance the caller's
        )

    def batches(self, steps: range, total: int, device: torch.device, *, num_workers: int) -> Iterator[Batch]:
        """Yield the batches of some steps out of ``total``, on a device, images as floats in [0, 1]."""
        loader = self.loader(steps, num_workers=num_workers, pin_memory=device.type == "cuda")
        for step, collated in zip(steps, loader, strict=True):
            (images, masks, is_pseudo), (unlabeled, valid) = collated

            def move(tensor: Tensor) -> Tensor:
                tensor = tensor.to(device, non_blocking=True)
                return tensor.float().div_(255) if tensor.dtype == torch.uint8 else tensor

            yield Batch(
                images=move(images),
                masks=masks.to(device, non_blocking=True).long(),
                is_pseudo=is_pseudo.to(device, non_blocking=True),
                unlabeled=_map(unlabeled, move),
                valid=None if valid is None else valid.to(device, non_blocking=True),
                step=step,
                steps=total,
                ignore_index=self.config.ignore_index,
            )


def collate(samples: Sequence[tuple[StreamName, Any]]) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Any, Any]]:
    """Stack the samples of each stream.

    Returns:
        Images ``(B, C, H, W)``, masks ``(B, H, W)`` and ``(B,)`` bool of the labeled stream; views and validity of the
        unlabeled one, None without it.

    Raises:
        DataError: if the samples of a batch differ in shape or in structure.
    """
    labeled = [sample for stream, sample in samples if stream == "labeled"]
    images, masks, is_pseudo = zip(*labeled, strict=True)
    if len({mask.dtype for mask in masks}) > 1:
        masks = tuple(mask.to(torch.int32) for mask in masks)
    batch = _stack(images), torch.stack(masks), torch.tensor(is_pseudo)
    unlabeled = [sample for stream, sample in samples if stream == "unlabeled"]
    return batch, tuple(_stack(column) for column in zip(*unlabeled, strict=True)) if unlabeled else (None, None)


def _stack(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, Mapping):
        return {key: _stack([value[key] for value in values]) for key in first}
    if isinstance(first, (tuple, list)):
        return [_stack(column) for column in zip(*values, strict=True)]
    if not isinstance(first, Tensor):
        return torch.tensor(values) if isinstance(first, (bool, int, float)) else first
    if len(shapes := {tuple(value.shape) for value in values}) > 1:
        raise DataError(
            f"a batch holds images of the shapes {sorted(shapes)}; expected one (C, H, W) "
            "(a weak augmentation that crops, such as weak=stseg.WeakAugment(321), makes them equal)"
        )
    if len({value.dtype for value in values}) > 1:
        values = [value / 255 if value.dtype == torch.uint8 else value for value in values]
    return torch.stack(list(values))


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to every tensor of nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: _map(each, function) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return [_map(each, function) for each in value]
    return value


def _is_pseudo(item: Any) -> bool:
    """Return whether the third element of an item is True; anything but a bool of Python, numpy or torch is ignored."""
    if isinstance(item, Mapping) or len(item) < 3:
        return False
    value = item[2]
    is_bool = isinstance(value, (bool, np.bool_)) or (isinstance(value, Tensor) and value.dtype == torch.bool)
    return is_bool and bool(value)
