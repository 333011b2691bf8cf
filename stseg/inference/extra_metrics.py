"""Metrics of the caller, such as those of torchmetrics, over the predictions of an evaluation."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from stseg.distributed import world_size
from stseg.errors import MetricError, StsegError
from stseg.types import Metric

Metrics: TypeAlias = Mapping[str, Metric | Callable[[], Metric]]
"""Metrics, or functions that make one, by name."""


class ExtraMetrics:
    """Metrics of the caller, which are updated with one image after the other.

    Args:
        metrics: objects, or functions that make one, by name.

    Raises:
        TypeError: if one lacks ``update`` or ``compute``; names it.
        MetricError: if making or resetting one fails.
        ValueError: if there are several processes and one does not know how to merge them.
    """

    def __init__(self, metrics: Metrics | None) -> None:
        self.metrics = {name: _made(name, metric) for name, metric in (metrics or {}).items()}
        for name, metric in self.metrics.items():
            _refuse_unmerged(name, metric)
        self.reset()

    def reset(self) -> None:
        """Reset the metrics that can be."""
        for name, metric in self.metrics.items():
            if callable(reset := getattr(metric, "reset", None)):
                with _named(name, metric, "reset"):
                    reset()

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add an image.

        Args:
            prediction: ``(H, W)`` integer class map.
            target: ``(H, W)`` true one, with the ignore index where there is no label.
        """
        for name, metric in self.metrics.items():
            device = _device(metric)
            # Copies: a metric may write into them.
            maps = (map.to(device, torch.int64, copy=True)[None] for map in (prediction, target))
            with _named(name, metric, "update"):
                metric.update(*maps)

    def merge_processes(self) -> None:
        """Merge the processes, in metrics that do not do so in ``compute``."""
        for name, metric in self.metrics.items():
            if world_size() > 1 and callable(merge := getattr(metric, "merge_processes", None)):
                with _named(name, metric, "merge_processes"):
                    merge()

    def compute(self) -> dict[str, float]:
        """Return the values: a number as ``"<name>"``, a vector as ``"<name>/0"``, a mapping as ``"<name>/<key>"``.

        Raises:
            MetricError: if a metric fails or computes something else.
        """
        values: dict[str, float] = {}
        for name, metric in self.metrics.items():
            with _named(name, metric, "compute"):
                value = metric.compute()
            values.update(_numbers(name, value))
        return values


def try_metrics(metrics: Metrics | None, mask: Tensor, ignore_index: int) -> list[str]:
    """Update metrics with one mask as if it had been predicted, and reset them.

    Args:
        metrics: objects, or functions that make one, by name.
        mask: ``(H, W)`` true class map.
        ignore_index: its value where there is no label.

    Returns:
        Their names, and those of the values that they computed.

    Raises:
        MetricError: if a metric cannot be updated, or computes something else than numbers.
        ValueError: if there are several processes and one does not know how to merge them.
    """
    extra = ExtraMetrics(metrics)
    extra.update(mask.masked_fill(mask == ignore_index, 0), mask)
    extra.merge_processes()
    names = list(extra.metrics)
    for name, metric in extra.metrics.items():
        try:
            value = metric.compute()
        except Exception:  # of any type: a single image may lack what it needs
            continue
        names += _numbers(name, value)
    extra.reset()
    return names


def check_metrics(metrics: object) -> None:
    """Raise a ``TypeError`` unless it is None or a mapping of names to metrics or functions that make one."""
    if metrics is not None and not isinstance(metrics, Mapping):
        raise TypeError(f"metrics is {_kind(metrics)}; expected a dictionary of metrics by name")
    for name, metric in (metrics or {}).items():
        if not isinstance(name, str) or not name:
            raise TypeError(f"metrics has the name {name!r}; expected a string")
        if not is_metric(metric) and not (callable(metric) and not isinstance(metric, nn.Module)):
            raise TypeError(
                f"metric {name!r} is {_kind(metric)}; expected an object with update(prediction, target) and "
                "compute(), such as stseg.BoundaryIoU(7) or one of torchmetrics"
            )


def check_history_metrics(metrics: Metrics | None, reserved: Collection[str]) -> None:
    """Check metrics of every validation of a training.

    Args:
        metrics: what the caller gave.
        reserved: names of other values of a history, beside those of the classes, ``"iou/..."``.

    Raises:
        TypeError: as for :func:`check_metrics`, or if an object cannot be reset.
        ValueError: if a name is that of another value, or of a part of one.
    """
    check_metrics(metrics)
    reserved = (*reserved, "iou")
    for name, metric in (metrics or {}).items():
        whose = next((other for other in (*reserved, *(metrics or ())) if name.startswith(f"{other}/")), None)
        if name in reserved or whose is not None:
            what = "a name of the history itself" if whose is None else f"as a part of {whose!r} is called"
            raise ValueError(f"metrics has the name {name!r}, {what}; expected another name")
        if is_metric(metric) and not callable(getattr(metric, "reset", None)):
            kind = type(metric).__name__
            raise TypeError(
                f"metric {name!r} is {_kind(metric)} without reset(), with which each validation begins; expected a "
                f"function that makes a new one: metrics={{{name!r}: lambda: {kind}(...)}}"
            )


def _made(name: str, metric: Any) -> Metric:
    """Return a metric, made where it is a function that makes one."""
    if is_metric(metric):
        return metric  # type: ignore[no-any-return]
    with _named(name, metric, "call"):
        made = metric()
    if not is_metric(made):
        raise TypeError(f"metric {name!r} made {_kind(made)}; expected an object with update and compute")
    return made  # type: ignore[no-any-return]


def is_metric(metric: object) -> bool:
    """Return whether an object can be updated and compute a value."""
    return not isinstance(metric, type) and all(callable(getattr(metric, name, None)) for name in ("update", "compute"))


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"


@contextmanager
def _named(name: str, metric: object, what: str) -> Iterator[None]:
    """Name the metric in an error of any type: it is the caller's code."""
    try:
        yield
    except StsegError:
        raise
    except Exception as error:
        kind = type(metric).__name__
        hint = ""
        if what == "update":
            hint = "; it gets int64 class maps (1, H, W), the target with the ignore index where there is no label"
        raise MetricError(
            f"{what} of the metric {name!r} ({kind}) fails: {type(error).__name__}: {error}{hint}"
        ) from error


def _refuse_unmerged(name: str, metric: object) -> None:
    """Raise a ``ValueError`` if a metric would tell of the images of this process alone."""
    if world_size() == 1 or callable(getattr(metric, "merge_processes", None)) or _synchronizes(metric):
        return
    raise ValueError(
        f"metric {name!r} ({type(metric).__name__}) would see the images of one of the {world_size()} processes alone; "
        "expected a method merge_processes() that makes its state that of all of them, or a torchmetrics.Metric with "
        "sync_on_compute=True"
    )


def _synchronizes(metric: object) -> bool:
    """Whether it is a metric of torchmetrics that merges the processes in ``compute``."""
    torchmetrics = sys.modules.get("torchmetrics")
    if torchmetrics is None:
        return False
    if isinstance(metric, torchmetrics.MetricCollection):
        return all(map(_synchronizes, metric.values()))
    return isinstance(metric, torchmetrics.Metric) and bool(metric.sync_on_compute)


def _device(metric: object) -> torch.device:
    """Return where a metric keeps its state, as those of torchmetrics tell; else the CPU."""
    holders = metric.modules() if isinstance(metric, nn.Module) else (metric,)
    devices = (getattr(holder, "device", None) for holder in holders)
    return next((device for device in devices if isinstance(device, torch.device)), torch.device("cpu"))


def _numbers(name: str, value: Any) -> dict[str, float]:
    """Return the numbers of what a metric computed, by name.

    Raises:
        MetricError: if there are others than numbers.
    """
    if isinstance(value, Mapping):
        parts = [_numbers(f"{name}/{key}", each) for key, each in value.items()]
        return {key: number for part in parts for key, number in part.items()}
    if isinstance(value, Real):
        return {name: float(value)}
    if isinstance(value, Tensor):
        value = value.detach().cpu().double() if not value.is_complex() else value
    try:
        array = np.asarray(value)
        if array.ndim > 1 or array.dtype.kind not in "biuf":
            raise TypeError
    except (TypeError, ValueError):
        shape = getattr(value, "shape", None)
        kind = _kind(value) + ("" if shape is None else f" of shape {tuple(shape)}")
        raise MetricError(
            f"metric {name!r} computed {kind}; expected a number, a vector, or a mapping of names to them"
        ) from None
    if array.ndim == 0:
        return {name: float(array)}
    return {f"{name}/{index}": float(number) for index, number in enumerate(array)}
