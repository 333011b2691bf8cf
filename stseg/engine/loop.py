"""The training loop of a stage: resumable, distributed, validated."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from stseg.data.items import Items
from stseg.distributed import broadcast_buffers, rank, world_size
from stseg.engine.batches import Streams
from stseg.engine.checkpoint import Row, StageCheckpoint, StageState
from stseg.engine.config import TrainConfig
from stseg.engine.method import Method, provenance_of
from stseg.engine.optimizers import keep_initial_rates, learning_rate_factor, set_learning_rates
from stseg.engine.plan import Plan
from stseg.engine.step import TrainingSteps
from stseg.engine.trial import preserved_random_state, try_step
from stseg.engine.watch import Log, Watch
from stseg.errors import DataError, NetworkError, NetworkWarning, TrainingDivergedError
from stseg.inference.evaluate import evaluate
from stseg.inference.extra_metrics import ExtraMetrics, Metrics, try_metrics
from stseg.models.state import device_of, train_unfrozen
from stseg.progress import progress_bar
from stseg.seeds import derive_seed, seed_step


@dataclass(frozen=True)
class FitResult:
    """Result of a training stage.

    Attributes:
        model: the trained network, wrapped, in evaluation mode, on the device it was trained on.
        snapshots: copies of it on the CPU, in the order of training.
        history: rows of ``epoch``, ``step``, ``lr``, ``loss``, the values that the method logged, with validation
            ``miou``, the IoU of each class as ``iou/0``, ``iou/1``, ..., NaN where it is neither true nor predicted,
            and the values of ``metrics``, and ``seconds``.
        seconds: duration, summed over all runs if interrupted.
        val_seconds: how much of it was spent in validation.
        warnings: early signs of a collapse that were seen, each once: what, what it usually means, what to try.
    """

    model: nn.Module = field(repr=False)
    snapshots: tuple[nn.Module, ...] = field(repr=False)
    history: tuple[Row, ...] = field(repr=False)
    seconds: float
    val_seconds: float = 0.0
    warnings: tuple[str, ...] = ()


def run_stage(
    method: Method,
    streams: Streams,
    config: TrainConfig,
    *,
    facts: dict[str, Any],
    val: Items | None = None,
    snapshots: Sequence[int] = (),
    keep: Literal["final", "best"] = "final",
    workdir: str | Path | None = None,
    log: Log | Sequence[Log] | None = None,
    metrics: Metrics | None = None,
    progress: bool = True,
    title: str = "train",
    prefix: str = "",
) -> FitResult:
    """Train a method on validated data; arguments as for :func:`stseg.fit`.

    Args:
        method: the method, on its device.
        streams: the labeled and the unlabeled stream, which know the number of classes.
        config: the settings.
        facts: fingerprints of the data, by name.
        val: labeled items.
        snapshots: after which epochs or steps to keep a copy.
        keep: which weights to return.
        workdir: folder of the stage.
        log: what is called with each row.
        metrics: more metrics of the validation.
        progress: whether to show a bar.
        title: name on the bar and in messages.
        prefix: what the names in the rows for ``log`` begin with.
    """
    config = config.on(device_of(method))
    plan = Plan.of(config, streams.steps_per_epoch, snapshots)
    record = {
        **provenance_of(method),
        "config": config.provenance(),
        "data": facts,
        "snapshots": list(plan.snapshots),
        "keep": keep,
    }
    checkpoint = StageCheckpoint(workdir, record, method)
    watch = Watch(title, plan, log=log, prefix=prefix, progress=progress)
    if finished := checkpoint.finished(method.model):
        watch.reused(finished, workdir)
        kept = tuple(checkpoint.snapshot(method.model, at) for at in plan.snapshots)
        return _result(method, kept, finished)

    names = try_metrics(metrics, val.pair(0)[1], config.ignore_index) if metrics and val is not None else ()
    unused = try_step(method, streams, config, metrics=names)
    if unused and rank() == 0:
        _warn_of_unused(unused, type(method).__name__)
    device = device_of(method)
    optimizers = list(method.optimizers(config))
    keep_initial_rates(optimizers)
    state = checkpoint.resume(method, optimizers)
    copies = [checkpoint.snapshot(method.model, at) for at in plan.snapshots if at * plan.unit <= state.step]
    train_unfrozen(method)
    network = _distribute(method, device, find_unused_parameters=bool(unused))
    validate = partial(_validate, method, val, streams.num_classes, config, metrics)
    watch.started(state)
    began = saved = time.monotonic()
    before = state.seconds

    def save() -> None:
        state.seconds = before + time.monotonic() - began
        checkpoint.save(method, optimizers, state)

    bar = progress_bar(title=title, total=plan.steps, initial=state.step, show=progress and rank() == 0)
    steps = range(state.step, plan.steps)
    run = TrainingSteps(network, method, optimizers, config)
    with bar, preserved_random_state(device):
        for batch in streams.batches(steps, plan.steps, device, num_workers=config.num_workers):
            seed_step(derive_seed(config.seed, "step", batch.step, rank()), device)
            factor = set_learning_rates(optimizers, config, batch.step, plan.steps)
            snapshot, is_row = plan.snapshot_at(batch.step + 1), batch.step + 1 in plan.rows
            is_due = time.monotonic() - saved >= config.save_every
            try:
                for numbers in run(batch, settle=is_row or snapshot is not None or is_due):
                    state.record(numbers)
                    bar.set_postfix(state.shown(numbers), refresh=False)
                    bar.update()
            except FloatingPointError as error:
                save()
                factor = learning_rate_factor(config, state.step, plan.steps)
                raise TrainingDivergedError(
                    f"{title}: {error} at step {state.step + 1} of {plan.steps} (learning rate "
                    f"{config.lr * factor:.3g}); the weights are those of the step before",
                    step=state.step + 1,
                ) from None
            if is_row or snapshot is not None:
                broadcast_buffers(method)
            if is_row:
                with watch.validation(state):
                    validation = validate()
                miou = validation.get("miou")
                if keep == "best" and miou is not None and miou > (-math.inf if state.best is None else state.best):
                    state.best = miou
                    checkpoint.keep_best(method.model, state)
                seconds = before + time.monotonic() - began
                epoch = state.step / plan.steps_per_epoch
                state.add_row(epoch=epoch, lr=config.lr * factor, validation=validation, seconds=seconds)
                checkpoint.write_history(state)
                watch.row(state)
            if snapshot is not None:
                copies.append(checkpoint.add_snapshot(method.model, snapshot))
            if is_due:
                save()
                saved = time.monotonic()
    state.seconds = before + time.monotonic() - began
    if keep == "best":
        if state.best is None:
            raise DataError("keep='best': no mIoU of the validation set is a number")
        checkpoint.load_best(method.model, state)
    checkpoint.finish(method.model, state, plan.snapshots)
    watch.finished(state)
    return _result(method, tuple(copies), state)


def _result(method: Method, snapshots: tuple[nn.Module, ...], state: StageState) -> FitResult:
    return FitResult(
        method.model.eval(),
        snapshots,
        tuple(state.history),
        state.seconds,
        state.val_seconds,
        tuple(state.warnings.values()),
    )


def _warn_of_unused(names: Sequence[str], method: str) -> None:
    shown = ", ".join(repr(name) for name in names[:3]) + (", ..." if len(names) > 3 else "")
    warnings.warn(
        f"{len(names)} trainable parameters of {method} get no gradient and keep their values: {shown}. If the "
        "prediction depends on them, what trains is not what predicts: stseg.Segmenter(network, select=...) picks the "
        "output; else parameter.requires_grad_(False) says that they do not learn",
        NetworkWarning,
        stacklevel=3,
    )


def _distribute(method: Method, device: torch.device, *, find_unused_parameters: bool) -> nn.Module:
    if world_size() == 1:
        return method
    return DistributedDataParallel(
        method,
        device_ids=[device.index] if device.type == "cuda" else None,
        find_unused_parameters=find_unused_parameters,
    )


def _validate(
    method: Method, val: Items | None, num_classes: int | None, config: TrainConfig, metrics: Metrics | None
) -> Row:
    """Return the numbers of a validation: none without data, and NaN, which the next step reports, of other logits."""
    if val is None or num_classes is None:
        return {}
    ious = [math.nan] * num_classes
    miou, values = math.nan, {}
    with suppress(NetworkError):
        extra = ExtraMetrics(metrics)
        metric = evaluate(
            method.model,
            val,
            num_classes=num_classes,
            ignore_index=config.ignore_index,
            batch_size=config.eval_batch_size,
            num_workers=config.num_workers,
            precision=config.precision,
            metrics=extra.metrics,
            progress=False,
        )
        miou, ious, values = metric.compute(), metric.iou().tolist(), extra.compute()
    return {"miou": miou, **{f"iou/{index}": value for index, value in enumerate(ious)}, **values}
