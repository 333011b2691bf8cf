"""Trackers for ``log=`` of :func:`stseg.fit` and :class:`stseg.SelfTrainer`."""

from __future__ import annotations

import importlib
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

__all__ = ["MLflow", "TensorBoard", "WandB"]

Self = TypeVar("Self", bound="_Tracker")


class _Tracker(ABC):
    """Base class: takes rows of a history until it is closed."""

    def __init__(self) -> None:
        self._closed = False

    def __call__(self, row: Mapping[str, float]) -> None:
        """Write a row of a history.

        Args:
            row: numbers by name, one of which is ``"step"`` or ``"<training>/step"``.

        Raises:
            ValueError: if there is no step.
            RuntimeError: if the tracker is closed.
        """
        if self._closed:
            raise RuntimeError(
                f"this {type(self).__name__} is closed; expected a new one, or close() after the training"
            )
        name = next((name for name in row if name == "step" or name.endswith("/step")), None)
        if name is None:
            raise ValueError(f"the row holds {', '.join(row) or 'nothing'}; expected a row of a history, with its step")
        prefix = name[: -len("step")]
        values = {key.removeprefix(prefix): float(value) for key, value in row.items() if key != name}
        self._write(prefix.rstrip("/"), int(row[name]), values)

    def close(self) -> None:
        """Write what is left and close what this tracker opened. Called at the end of a ``with`` block."""
        self._end(failed=False)

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(failed=kind is not None)

    def _end(self, *, failed: bool) -> None:
        if not self._closed:
            self._closed = True
            self._finish(failed=failed)

    @abstractmethod
    def _write(self, training: str, step: int, values: dict[str, float]) -> None:
        """Write the values of a step of a training, which has no name in :func:`stseg.fit`."""

    @abstractmethod
    def _finish(self, *, failed: bool) -> None:
        """Close what was opened."""


class TensorBoard(_Tracker):
    """Writer of event files for TensorBoard, ``tensorboard --logdir folder``.

    Each training of :class:`stseg.SelfTrainer` is a run of its own, in a subfolder with its name, so that one chart
    shows the loss of all of them over their steps. Every row is on disk when it has been written. A training that
    resumes in the same folder, also in another process, goes on with its curves: the points of steps that it repeats
    are replaced. Give each run a folder of its own.

    Needs tensorboard (``pip install stseg[tensorboard]``).

    Args:
        folder: folder of the event files, created with the first row.

    Raises:
        ImportError: if tensorboard is not installed.

    Example:
        >>> import tempfile, torch, stseg
        >>> data = [(torch.rand(3, 20, 20), torch.randint(2, (20, 20))) for _ in range(3)]
        >>> config = stseg.TrainConfig(steps=2, batch_size=2, weak=stseg.WeakAugment(16))
        >>> folder = tempfile.mkdtemp()
        >>> with TensorBoard(folder) as log:
        ...     result = stseg.fit(torch.nn.Conv2d(3, 2, 1), data, config, log=log, progress=False)
        >>> [path.name.split(".")[0] for path in Path(folder).iterdir()]
        ['events']
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        _require("tensorboard", "tensorboard")
        self.folder = Path(folder)
        self._writers: dict[str, tuple[Any, int]] = {}  # by training, with its last step

    def _write(self, training: str, step: int, values: dict[str, float]) -> None:
        writer, last = self._writers.get(training, (None, -1))
        if writer is None:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(self.folder / training), purge_step=step)
        elif step <= last:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog

            # As SummaryWriter does for purge_step; another file of the same second might be read before this one.
            writer.file_writer.add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()
        self._writers[training] = writer, step

    def _finish(self, *, failed: bool) -> None:
        for writer, _ in self._writers.values():
            writer.close()


class WandB(_Tracker):
    """Logger to a run at Weights & Biases.

    Names are those of the rows. The steps of each training are the horizontal axis of its charts (``define_metric``),
    as each begins with step 1. Of a run that wandb resumed (``WandB(id="...", resume="allow")``), rows up to the last
    step that it holds are left out; they are the same as before.

    Needs wandb (``pip install stseg[wandb]``).

    Args:
        run: a run of wandb, which stays open; None takes the active one if there is one and ``init`` is empty, else
            starts one with the first row. Only the first process gets rows, so no other one starts a run.
        init: arguments of ``wandb.init`` for a new run.

    Raises:
        ImportError: if wandb is not installed.
        ValueError: if there are both a run and arguments for a new one.

    Example:
        >>> with WandB(project="crops", config={"lr": 0.001}) as log:  # doctest: +SKIP
        ...     stseg.fit(network, labeled, config, log=log)
    """

    def __init__(self, run: Any = None, **init: Any) -> None:
        super().__init__()
        if run is not None and init:
            raise ValueError(f"got a run and {', '.join(init)}, which are for a new one; expected one of the two")
        if run is not None and not callable(getattr(run, "log", None)):
            raise TypeError(f"run is {run!r}; expected a run of wandb.init, or None")
        self._wandb = _require("wandb", "wandb") if run is None else None
        self.run, self._init, self._own = run, init, False
        self._last: dict[str, int] = {}  # step, by training, up to which the run holds rows
        self._logged: set[tuple[str, int, tuple[str, ...]]] = set()

    def _write(self, training: str, step: int, values: dict[str, float]) -> None:
        prefix = f"{training}/" if training else ""
        if self.run is None:
            assert self._wandb is not None
            active = None if self._init else self._wandb.run
            self._own = active is None
            self.run = self._wandb.init(**self._init) if active is None else active
        if training not in self._last:
            self.run.define_metric(f"{prefix}step")
            self.run.define_metric(f"{prefix}*", step_metric=f"{prefix}step")
            known = self.run.summary.get(f"{prefix}step") if getattr(self.run, "resumed", False) else None
            self._last[training] = -1 if known is None else int(known)
        row = (training, step, _identity(values))
        if step > self._last[training] and row not in self._logged:
            self.run.log({f"{prefix}{name}": value for name, value in {"step": step, **values}.items()})
            self._logged.add(row)

    def _finish(self, *, failed: bool) -> None:
        if self._own:
            self.run.finish(exit_code=int(failed))


class MLflow(_Tracker):
    """Logger of metrics to a run of MLflow.

    Names and steps are those of the rows. A row that the run already holds, as after a training has resumed, is left
    out; ``MLflow(run_id="...")`` goes on with a run in another process.

    Needs mlflow (``pip install stseg[mlflow]``).

    Args:
        start: arguments of ``mlflow.start_run``, such as ``run_name``, ``run_id`` or ``experiment_id``. Without any,
            the active run is taken if there is one, and stays open. Else a run is started with the first row; only the
            first process gets rows, so no other one starts a run.

    Raises:
        ImportError: if mlflow is not installed.

    Example:
        >>> with MLflow(run_name="crops") as log:  # doctest: +SKIP
        ...     stseg.fit(network, labeled, config, log=log)
    """

    def __init__(self, **start: Any) -> None:
        super().__init__()
        self._mlflow = _require("mlflow", "mlflow")
        self._start, self._own = start, False
        self.run: Any = None
        self._logged: dict[str, set[tuple[int, float]]] = {}  # step and loss of the rows of each training

    def _write(self, training: str, step: int, values: dict[str, float]) -> None:
        prefix = f"{training}/" if training else ""
        if self.run is None:
            active = None if self._start else self._mlflow.active_run()
            self._own = active is None
            self.run = self._mlflow.start_run(**self._start) if active is None else active
        client, run_id = self._mlflow.MlflowClient(), self.run.info.run_id
        if training not in self._logged:
            known = client.get_metric_history(run_id, f"{prefix}loss")
            self._logged[training] = {(metric.step, metric.value) for metric in known}
        if (step, values.get("loss")) in self._logged[training]:
            return
        now = int(1000 * time.time())
        metric = self._mlflow.entities.Metric
        metrics = [metric(f"{prefix}{name}", value, now, step) for name, value in values.items()]
        client.log_batch(run_id, metrics=metrics)
        if "loss" in values:
            self._logged[training].add((step, values["loss"]))

    def _finish(self, *, failed: bool) -> None:
        if self._own:
            self._mlflow.end_run(status="FAILED" if failed else "FINISHED")


def _identity(values: dict[str, float]) -> tuple[str, ...]:
    """Return the values of a row by which it is recognized when it is repeated: all but the time."""
    return tuple(repr(value) for name, value in values.items() if name != "seconds")


def _require(package: str, extra: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"this logger needs {package}, which is not installed: pip install stseg[{extra}]") from error
