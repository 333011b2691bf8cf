"""One training stage: cross-entropy on true and pseudo-masks alike."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from stseg.data import MixedDataset
from stseg.data.items import names_of
from stseg.distributed import broadcast_buffers, rank, setup_device, world_size
from stseg.engine.batches import AugmentedSamples, build_loader, steps_per_epoch
from stseg.engine.checkpoint import Row, StageCheckpoint
from stseg.engine.config import TrainConfig
from stseg.engine.optimizers import build_optimizer, polynomial_decay
from stseg.engine.step import training_step
from stseg.errors import DataError, NetworkError, TrainingDivergedError
from stseg.inference.evaluate import evaluate
from stseg.inference.preflight import check_labeled, check_network, check_pace, check_strong, refuse_common_ids
from stseg.models.segmenter import as_segmenter
from stseg.models.state import fingerprint
from stseg.seeds import derive_seed
from stseg.storage.records import describe
from stseg.types import BatchAugmentation


@dataclass(frozen=True)
class FitResult:
    """What a training stage leaves behind.

    Attributes:
        model: the trained network, wrapped, in evaluation mode, on the device it was trained on.
        snapshots: copies of it on the CPU, in the order of training.
        history: a row for each epoch; about twenty rows where the length is given in steps.
        seconds: how long it took, over all runs if it was interrupted.
    """

    model: nn.Module
    snapshots: tuple[nn.Module, ...]
    history: tuple[Row, ...]
    seconds: float


def fit(
    model: nn.Module,
    dataset: Dataset[Any],
    config: TrainConfig,
    *,
    strong: BatchAugmentation | None = None,
    val: Dataset[Any] | None = None,
    snapshots: Sequence[int] = (),
    keep: Literal["final", "best"] = "final",
    ignore_index: int = 255,
    inference_batch_size: int = 8,
    workdir: str | Path | None = None,
    save_every: float = 60.0,
    check: bool = True,
    progress: bool = True,
    title: str = "train",
) -> FitResult:
    """Train a network on a labeled or a mixed data set.

    The loss is the mean cross-entropy over the pixels of the batch that are not ignored, true and pseudo-masks alike
    (Yang et al., CVPR 2022, section 3.1 with lambda = 1), unless ``config.pseudo_weight`` weighs the latter. The result
    depends on the seed, the initial weights and the number of processes alone: an interrupted stage that has a
    ``workdir`` goes on to the same weights.

    It runs on the devices that ``torchrun`` or ``accelerate launch`` set up; in a single process, on the best one
    there is. Batch normalization sees the images of each process apart, and the model has the running statistics of
    the first one, unless ``config.sync_batchnorm`` has it see those of all processes together.

    Args:
        model: a network or a wrapped one. It is itself trained, not a copy.
        dataset: items ``(image, mask)``, or ``(image, mask, is_pseudo)`` as of :class:`stseg.data.MixedDataset`, whose
            ``transform``, if it has one, takes the place of the weak augmentation.
        config: the settings.
        strong: augmentation of the pseudo-labeled images, on the device, such as :class:`stseg.StrongAugment`.
        val: labeled data set, evaluated for every row of the history.
        snapshots: after which epochs to keep a copy; after which steps, where the config counts steps.
        keep: ``"best"`` returns the weights that were best on ``val``, which then is no longer held out.
        ignore_index: mask value of pixels that do not count.
        inference_batch_size: how many images of equal size of ``val`` are evaluated at once.
        workdir: folder for ``model.safetensors``, ``snapshots/``, ``history.jsonl`` and, while under way,
            ``state/``. A stage that is done is read from there, not trained again.
        save_every: seconds between saves of the state.
        check: whether to read all labeled samples first, to find bad ones before time is spent.
        progress: whether to show a bar.
        title: name on the bar.

    Raises:
        DataError: if an image or a mask is not what it has to be; names the item.
        NetworkError: if the network does not return logits.
        ValueError: if arguments make no sense together.
        TrainingDivergedError: if loss or gradients are NaN or infinite. Model and saved state are then as they were
            before that step.
        WorkdirMismatchError: if ``workdir`` belongs to a stage of other settings or data.

    Example:
        >>> data = [(torch.rand(3, 20, 20), torch.randint(2, (20, 20)).to(torch.uint8)) for _ in range(3)]
        >>> config = TrainConfig(epochs=2, batch_size=2, crop_size=16)
        >>> result = fit(nn.Conv2d(3, 2, 1), data, config, snapshots=[1], progress=False)
        >>> len(result.history), len(result.snapshots)
        (2, 1)
    """
    check_pace(inference_batch_size, save_every)
    device = setup_device()
    names = names_of(dataset)
    if not names:
        raise DataError("the data set to train on is empty")
    per_epoch = steps_per_epoch(len(names), config.batch_size)
    unit = per_epoch if config.epochs else 1
    total = unit * (config.epochs or config.steps or 0)
    snapshots = sorted(set(snapshots))
    _check_arguments(total // unit, snapshots, keep, val, strong, ignore_index)

    model = as_segmenter(model).to(device)
    has_own = isinstance(dataset, MixedDataset) and dataset.transform is not None
    weak = None if has_own else config.weak_augment(ignore_index)
    samples = AugmentedSamples(dataset, names, weak, seed=config.seed)
    classes = check_network(model, samples[0, 0][0])
    samples.check_masks(classes, ignore_index)
    facts = f"{len(names)} samples, {zlib.crc32(repr(names).encode()):08x}"
    if check:
        facts += _validate_data(dataset, val, classes, ignore_index, config, progress)
    record = {
        "network": fingerprint(model, weights=False),
        "config": config.record(),
        "strong": describe(strong),
        "data": facts,
        "ignore_index": ignore_index,
        "snapshots": snapshots,
        "keep": keep,
    }
    folder = StageCheckpoint(workdir, record)
    if done := folder.finished(model):
        kept = tuple(folder.snapshot(model, at) for at in snapshots)
        return FitResult(model.eval(), kept, tuple(done.history), done.seconds)

    optimizer = build_optimizer(model, config)
    so_far = folder.resume(model, optimizer)
    copies = [folder.snapshot(model, at) for at in snapshots if at * unit <= so_far.step]
    rows = range(per_epoch, total + 1, per_epoch) if config.epochs else _spread(total, 20)
    began = saved = time.monotonic()
    before = so_far.seconds

    def save() -> None:
        so_far.seconds = before + time.monotonic() - began
        folder.save(model, optimizer, so_far)

    bar = tqdm(
        total=total,
        initial=so_far.step,
        desc=title,
        disable=not progress or rank() > 0,
        dynamic_ncols=True,
    )
    network = _distributed(model.train(), device)
    batches = build_loader(samples, config, range(so_far.step, total), pin_memory=device.type == "cuda")
    with bar, _random_state_kept(device):
        for step, batch in enumerate(batches, start=so_far.step):
            torch.manual_seed(derive_seed(config.seed, "step", step, rank()))
            factor = polynomial_decay(step, total, config.power)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            images, masks, is_pseudo = _on_device(batch, device, strong)
            try:
                loss = training_step(network, optimizer, images, masks, config, ignore_index, is_pseudo)
            except FloatingPointError as error:
                save()
                raise TrainingDivergedError(
                    f"{title}: {error} at step {step + 1} of {total} (learning rate {config.lr * factor:.3g}); "
                    "the weights are those of the step before",
                    step=step + 1,
                ) from None
            so_far.losses.append(loss)
            so_far.step = step + 1
            wanted = so_far.step % unit == 0 and so_far.step // unit in snapshots
            if so_far.step in rows or wanted:
                broadcast_buffers(model)
            if so_far.step in rows:
                miou = None if val is None else _miou(model, val, classes, ignore_index, config, inference_batch_size)
                if keep == "best" and miou is not None and miou > so_far.best:
                    so_far.best = miou
                    folder.keep_best(model)
                seconds = before + time.monotonic() - began
                so_far.add_row(epoch=so_far.step / per_epoch, lr=config.lr * factor, miou=miou, seconds=seconds)
                folder.log(so_far)
            bar.set_postfix(so_far.shown(loss), refresh=False)
            bar.update()
            if wanted:
                copies.append(folder.add_snapshot(model, so_far.step // unit))
            if time.monotonic() - saved >= save_every:
                save()
                saved = time.monotonic()
    so_far.seconds = before + time.monotonic() - began
    if keep == "best":
        if so_far.best == -math.inf:
            raise DataError("keep='best': no mIoU of the validation set is a number")
        folder.load_best(model)
    folder.finish(model, so_far)
    return FitResult(model.eval(), tuple(copies), tuple(so_far.history), so_far.seconds)


def _validate_data(
    dataset: Dataset[Any],
    val: Dataset[Any] | None,
    classes: int,
    ignore_index: int,
    config: TrainConfig,
    progress: bool,
) -> str:
    """Fingerprints of the labeled and the validation images, once they have been found to be as they have to be."""
    mixed = dataset if isinstance(dataset, MixedDataset) else MixedDataset(dataset)
    refuse_common_ids({"labeled": mixed.labeled, "pseudo-labeled": mixed.pseudo, "validation": val})
    look = partial(
        check_labeled,
        num_classes=classes,
        ignore_index=ignore_index,
        num_workers=config.num_workers,
        progress=progress,
    )
    found = f"; labeled: {look(mixed.labeled)}"
    return found if val is None else f"{found}; validation: {look(val, name='validation')}"


def _on_device(
    batch: tuple[Tensor, Tensor, Tensor], device: torch.device, strong: BatchAugmentation | None
) -> tuple[Tensor, Tensor, Tensor]:
    """A batch as the network takes it: float images, strongly augmented where pseudo-labeled, and int64 masks."""
    images, masks, is_pseudo = (x.to(device, non_blocking=True) for x in batch)
    images = images.float() / 255 if images.dtype == torch.uint8 else images
    if strong is not None:
        with torch.no_grad():
            images, masks = strong(images, masks, is_pseudo)
    return images, masks.long(), is_pseudo


def _distributed(model: nn.Module, device: torch.device) -> nn.Module:
    if world_size() == 1:
        return model
    # Networks may have parts that the logits do not need, such as torchvision's auxiliary classifier.
    return DistributedDataParallel(
        model, device_ids=[device.index] if device.type == "cuda" else None, find_unused_parameters=True
    )


def _miou(
    model: nn.Module, val: Dataset[Any], classes: int, ignore_index: int, config: TrainConfig, batch_size: int
) -> float:
    """NaN where the logits are not finite: the next step of the training will say so."""
    with suppress(NetworkError):
        metric = evaluate(
            model,
            val,
            num_classes=classes,
            ignore_index=ignore_index,
            batch_size=batch_size,
            num_workers=config.num_workers,
            precision=config.precision,
            progress=False,
        )
        return metric.compute()
    return math.nan


def _spread(total: int, rows: int) -> set[int]:
    """About so many steps, equally far apart, the last one among them."""
    return {total * row // min(rows, total) for row in range(1, min(rows, total) + 1)}


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def _check_arguments(
    length: int,
    snapshots: Sequence[int],
    keep: str,
    val: Dataset[Any] | None,
    strong: BatchAugmentation | None,
    ignore_index: int,
) -> None:
    if snapshots and not 1 <= snapshots[0] <= snapshots[-1] <= length:
        raise ValueError(f"snapshots are {list(snapshots)}; expected values in 1..{length}")
    if keep not in ("final", "best"):
        raise ValueError(f"keep is {keep!r}; expected 'final' or 'best'")
    if keep == "best" and val is None:
        raise ValueError("keep='best' needs a validation set (val) to tell which weights are best")
    check_strong(strong, ignore_index)
