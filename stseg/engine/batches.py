"""Which samples make which batch, with which random numbers.

Everything here is a function of the seed and of the number of the step or of the draw. So a run that was killed goes
on as if nothing had happened, and neither the number of workers nor that of processes changes what is drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from stseg.data.convert import check_mask_values, pair_of
from stseg.distributed import rank, world_size
from stseg.engine.config import TrainConfig
from stseg.errors import DataError
from stseg.seeds import derive_seed, fixed_seed
from stseg.types import PairTransform

Draw = tuple[int, int]
"""The number of a draw, counted over the whole training, and the index of the sample that is drawn."""


class BatchSampler(Sampler[list[Draw]]):
    """The draws of each batch of this process, from one step of a training to its end.

    Each epoch is a permutation of its own; its last incomplete batch is dropped. A data set smaller than a batch
    is repeated to fill one.

    Args:
        samples: size of the data set.
        batch_size: size of a batch, over all processes.
        steps: which steps, counted from 0.
        seed: what the permutations come from.

    Raises:
        ValueError: if the processes cannot share a batch equally.

    Example:
        >>> [len(batch) for batch in BatchSampler(10, 4, range(5), seed=0)]
        [4, 4, 4, 4, 4]
    """

    def __init__(self, samples: int, batch_size: int, steps: range, *, seed: int) -> None:
        if batch_size % world_size():
            raise ValueError(
                f"batch_size is {batch_size} over all processes; expected a multiple of their number, {world_size()}"
            )
        self.samples, self.batch_size, self.steps, self.seed = samples, batch_size, steps, seed

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[Draw]]:
        per_epoch = steps_per_epoch(self.samples, self.batch_size)
        epoch, order = -1, torch.empty(0, dtype=torch.int64)
        for step in self.steps:
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = self._order(epoch)
            start = step % per_epoch * self.batch_size
            batch = order[start : start + self.batch_size].tolist()
            draws = [(step * self.batch_size + place, index) for place, index in enumerate(batch)]
            yield draws[rank() :: world_size()]

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
        rounds = -(-self.batch_size // self.samples)  # more than one where the data set does not fill a batch
        return torch.cat([torch.randperm(self.samples, generator=generator) for _ in range(rounds)])


def steps_per_epoch(samples: int, batch_size: int) -> int:
    """Complete batches of an epoch; one where there are fewer samples than that.

    Example:
        >>> steps_per_epoch(366, 16), steps_per_epoch(3, 16)
        (22, 1)
    """
    return max(1, samples // batch_size)


class AugmentedSamples(Dataset[tuple[Tensor, Tensor, bool]]):
    """Augmented samples by draw: image, mask, and whether the mask is a pseudo-mask.

    Args:
        dataset: items ``(image, mask)`` or ``(image, mask, is_pseudo)``.
        names: what messages call them.
        transform: ``(image, mask) -> (image, mask)``, or None.
        seed: with the number of the draw, what all random numbers of a sample come from.
    """

    def __init__(
        self, dataset: Dataset[Any], names: Sequence[str], transform: PairTransform | None, *, seed: int
    ) -> None:
        self.dataset, self.names, self.transform, self.seed = dataset, names, transform, seed
        self._values: tuple[int, int] | None = None

    def check_masks(self, num_classes: int, ignore_index: int) -> None:
        """From now on, refuse masks with other values."""
        self._values = num_classes, ignore_index

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, draw: Draw) -> tuple[Tensor, Tensor, bool]:
        number, index = draw
        name = self.names[index]
        with fixed_seed(derive_seed(self.seed, "sample", number)):
            item = self.dataset[index]
            image, mask = pair_of(item, name=name)
            if self._values is not None:
                check_mask_values(mask, *self._values, name=name)
            if self.transform is not None:
                image, mask = pair_of(self.transform(image, mask), name=name)
        return image.cpu(), mask.cpu(), len(item) > 2 and _is_true(item[2])


def _is_true(value: Any) -> bool:
    """Whether it is a bool, of Python, numpy or torch, and true; what else may stand in third place is nothing."""
    is_bool = isinstance(value, (bool, np.bool_)) or (isinstance(value, Tensor) and value.dtype == torch.bool)
    return is_bool and bool(value)


def collate(samples: Sequence[tuple[Tensor, Tensor, bool]]) -> tuple[Tensor, Tensor, Tensor]:
    """Images ``(B, C, H, W)``, masks ``(B, H, W)`` and ``(B,)`` bool.

    Raises:
        DataError: if the images of a batch differ in shape.
    """
    images, masks, is_pseudo = zip(*samples, strict=True)
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        raise DataError(f"a batch holds images of the shapes {sorted(shapes)}; expected one (C, H, W)")
    if len({image.dtype for image in images}) > 1:
        images = tuple(image / 255 if image.dtype == torch.uint8 else image for image in images)
    if len({mask.dtype for mask in masks}) > 1:
        masks = tuple(mask.to(torch.int32) for mask in masks)
    return torch.stack(images), torch.stack(masks), torch.tensor(is_pseudo)


def build_loader(samples: AugmentedSamples, config: TrainConfig, steps: range, *, pin_memory: bool) -> DataLoader[Any]:
    """The batches of some steps of a training, read ahead by workers."""
    return DataLoader(
        samples,
        batch_sampler=BatchSampler(len(samples), config.batch_size, steps, seed=config.seed),
        num_workers=config.num_workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # of its own, or it would advance the caller's
    )
