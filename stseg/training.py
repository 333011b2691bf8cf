"""Durable training stage of any method, with validation of the data."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import nn
from torch.utils.data import Dataset

from stseg.checks import check_choice, check_log
from stseg.data import MixedDataset
from stseg.data.items import Items
from stseg.description import describe
from stseg.distributed import rank, setup_device
from stseg.engine.batches import Draw, Streams
from stseg.engine.checkpoint import RESERVED
from stseg.engine.config import TrainConfig
from stseg.engine.loop import FitResult, run_stage
from stseg.engine.method import Method, view_of
from stseg.engine.trial import check_model
from stseg.engine.watch import Log
from stseg.errors import DataError
from stseg.inference.extra_metrics import Metrics, check_history_metrics
from stseg.inference.fingerprints import dataset_fingerprint
from stseg.inference.preflight import check_labeled, check_network, find_unreadable, refuse_common_ids
from stseg.methods.supervised import Supervised
from stseg.models.state import place
from stseg.storage.files import absolute_folder, remove_leftovers
from stseg.storage.folder_lock import hold_folder


def fit(
    method: Method | nn.Module,
    labeled: Dataset[Any],
    config: TrainConfig,
    *,
    unlabeled: Dataset[Any] | None = None,
    val: Dataset[Any] | None = None,
    snapshots: Sequence[int] = (),
    keep: Literal["final", "best"] = "final",
    workdir: str | Path | None = None,
    log: Log | Sequence[Log] | None = None,
    metrics: Metrics | None = None,
    progress: bool = True,
) -> FitResult:
    """Train a network by a method.

    An interrupted stage with a ``workdir`` resumes to the same weights: apart from arguments and data, the result
    depends only on the seed, the initial weights and the number of processes. All data are validated, and one training
    step is tried on a copy, before training starts.

    Runs on the devices that ``torchrun`` or ``accelerate launch`` set up; in a single process, on the best one
    available. Batch normalization uses the images of each process separately, and the model gets the running statistics
    of the first process, unless ``config.sync_batchnorm`` is set.

    Args:
        method: training method, such as ``stseg.methods.FixMatch(network)``. A bare or wrapped network is trained by
            :class:`stseg.methods.Supervised`. It is trained in place.
        labeled: items ``(image, mask)``, mappings with ``image`` and ``mask``, or ``(image, mask, is_pseudo)`` as in
            :class:`stseg.data.MixedDataset`.
        config: the settings.
        unlabeled: items are images, or tuples or mappings that contain one; all other parts are ignored.
        val: labeled items, evaluated for every row of the history.
        snapshots: after which epochs to keep a copy; after which steps, where the config counts steps.
        keep: ``"final"``, or ``"best"`` for the best weights on ``val``, which is then no longer held out.
        workdir: folder for ``model.safetensors``, ``snapshots/``, ``history.jsonl`` and, during training, ``state/``.
            A finished stage is loaded from there.
        log: called with each row of the history, a dictionary of floats, in the first process: a function such as
            ``print``, one of ``stseg.loggers`` such as :class:`stseg.loggers.TensorBoard`, or a list of them. After a
            killed run resumes, rows since its last save are repeated, with the same numbers. If it raises an
            ``Exception``, there is a ``RuntimeWarning``, and training goes on.
        metrics: more metrics of ``val`` by name, such as :class:`stseg.BoundaryIoU` or those of torchmetrics, or
            functions that make one, for those without ``reset``; see :class:`stseg.types.Metric`. Each is reset before
            every validation; its value is in the history as ``"<name>"``, those of a vector as ``"<name>/0"``, ...
            They do not change the training: a run can be resumed with others.
        progress: whether to show a bar.

    Raises:
        DataError: if an image or a mask is invalid; names the item.
        NetworkError: if the network does not return logits.
        MethodError: if the first training step fails.
        MetricError: if one of ``metrics`` fails; names it. Each is tried with one mask before training starts.
        ValueError: if arguments do not match each other.
        TrainingDivergedError: if loss or gradients are NaN or infinite. Method and saved state are those before
            that step.
        WorkdirMismatchError: if ``workdir`` belongs to a stage of other settings or data or, if it is finished, of
            other initial weights.
        WorkdirInUseError: if another run is using ``workdir``.
        WorkdirMissingError: if it is removed or moved meanwhile.
        DamagedFileError: if a file in it is damaged, or is not the one that was written; says what to delete.

    Example:
        >>> import torch, stseg
        >>> data = [(torch.rand(3, 20, 20), torch.randint(2, (20, 20)).to(torch.uint8)) for _ in range(3)]
        >>> config = TrainConfig(epochs=2, batch_size=2, weak=stseg.WeakAugment(16))
        >>> result = fit(nn.Conv2d(3, 2, 1), data, config, snapshots=[1], progress=False)
        >>> len(result.history), len(result.snapshots)
        (2, 1)
    """
    if not isinstance(config, TrainConfig):
        raise TypeError(f"config is {type(config).__name__}; expected a stseg.TrainConfig")
    if not isinstance(method, nn.Module):
        name = f"the class {method.__name__}" if isinstance(method, type) else type(method).__name__
        raise TypeError(
            f"method is {name}; expected a network, or a method such as stseg.methods.FixMatch(network) "
            "(recipes such as stseg.methods.STPlusPlus() belong to SelfTrainer)"
        )
    check_log(log)
    check_history_metrics(metrics, RESERVED)
    workdir = absolute_folder(workdir)
    method = method if isinstance(method, Method) else Supervised(method, ignore_index=config.ignore_index)
    check_model(method)
    check_choice("keep", keep, "final", "best")
    if keep == "best" and val is None:
        raise ValueError("keep='best' needs a validation set (val) to tell which weights are best")
    if metrics and val is None:
        raise ValueError("metrics need a validation set (val) of which they are computed")
    name = type(method).__name__
    if method.uses_unlabeled and unlabeled is None:
        raise ValueError(f"{name} learns from unlabeled images; expected fit(..., unlabeled=dataset)")
    if unlabeled is not None and not method.uses_unlabeled:
        raise ValueError(
            f"{name} does not learn from unlabeled images; expected fit without unlabeled=, or another method, "
            "such as stseg.methods.FixMatch(network)"
        )
    items, extra, held_out = (None if data is None else Items.of(data) for data in (labeled, unlabeled, val))
    if not items or (extra is not None and not extra):
        raise DataError(f"the {'unlabeled data set' if items else 'data set to train on'} is empty")
    if isinstance(labeled, MixedDataset) and labeled.transform is not None and config.weak is not None:
        raise ValueError(
            "the MixedDataset has a transform, and the config a weak augmentation; expected one of the two: "
            "TrainConfig(..., weak=None) leaves the images as the data set returns them"
        )
    streams = Streams(items, extra, config, view=view_of(method))
    place(method, setup_device())
    image = streams[Draw("labeled", 0, 0)][1][0]
    streams.num_classes = check_network(method.model, image)
    known = workdir is not None and (workdir / "stage.json").exists()
    facts = {"items": streams.description()}
    facts |= _validate_data(items, extra, held_out, streams.num_classes, config, progress=progress, known=known)
    with hold_folder(workdir):
        if workdir is not None and rank() == 0:
            remove_leftovers(workdir)
        return run_stage(
            method,
            streams,
            config,
            facts=facts,
            val=held_out,
            snapshots=snapshots,
            keep=keep,
            workdir=workdir,
            log=log,
            metrics=metrics,
            progress=progress,
        )


def _validate_data(
    labeled: Items,
    unlabeled: Items | None,
    val: Items | None,
    num_classes: int,
    config: TrainConfig,
    *,
    progress: bool,
    known: bool,
) -> dict[str, Any]:
    """Read every item once, unlabeled images only if they are not ``known``; return fingerprints of the data."""
    mixed = labeled.dataset if isinstance(labeled.dataset, MixedDataset) else MixedDataset(labeled)
    refuse_common_ids({"labeled": mixed.labeled, "pseudo-labeled": mixed.pseudo, "validation": val})
    refuse_common_ids({"unlabeled": unlabeled, "validation": val})
    check = partial(
        check_labeled,
        num_classes=num_classes,
        ignore_index=config.ignore_index,
        num_workers=config.num_workers,
        progress=progress,
    )
    facts: dict[str, Any] = {}
    for name, data in {"labeled": mixed.labeled, "validation": val}.items():
        if data is not None:
            facts[name], counts = check(data, name=name)
            facts[f"{name} classes"] = counts.provenance()
    if isinstance(labeled.dataset, MixedDataset):
        facts["transform"] = describe(mixed.transform)
        if mixed.pseudo is not None:
            facts["pseudo-labeled"] = dataset_fingerprint(mixed.pseudo, with_mask=True)
    if unlabeled is not None:
        facts["unlabeled"] = dataset_fingerprint(unlabeled)
        if not known:
            channels = len(mixed.labeled.image(0))
            find_unreadable(unlabeled, channels=channels, num_workers=config.num_workers, progress=progress)
    return facts
