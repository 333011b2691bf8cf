"""What is told of a training while it runs: the log, early warnings, and its rows to the ``log=`` of the caller."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

from stseg.distributed import rank
from stseg.engine.checkpoint import Row, StageState
from stseg.engine.collapse import signs_in, slow_validation
from stseg.engine.plan import Plan
from stseg.progress import LOG, format_duration, warn_of_run

Log: TypeAlias = Callable[[Row], object]
"""What is called with each row of a history."""


class Watch:
    """Watch over a training; only the first process tells anything.

    Args:
        title: name of the training.
        plan: its schedule.
        log: what is called with each row, one or several.
        prefix: what the names in those rows begin with.
        progress: whether warnings are shown on the standard error stream.
    """

    def __init__(
        self, title: str, plan: Plan, *, log: Log | Sequence[Log] | None, prefix: str = "", progress: bool = True
    ) -> None:
        self.title, self.plan, self.prefix, self.show = title, plan, prefix, progress
        self.logs: tuple[Log, ...] = () if log is None else (log,) if callable(log) else tuple(log)
        self._failed = [0] * len(self.logs)  # rows that each did not take
        self._slow = False  # whether slow validation was told of

    def reused(self, state: StageState, folder: object) -> None:
        """Tell that the training was finished before."""
        self._info(f"was trained before, in {format_duration(state.seconds)}; taken from {folder}")

    def started(self, state: StageState) -> None:
        """Tell that the training starts, or resumes."""
        steps = f"{self.plan.steps} step{'s' if self.plan.steps > 1 else ''}"
        self._info(
            f"training for {steps}" if not state.step else f"training resumes after step {state.step} of {steps}"
        )

    @contextmanager
    def validation(self, state: StageState) -> Iterator[None]:
        """Add the time of a validation to the state."""
        began = time.monotonic()
        yield
        state.val_seconds += time.monotonic() - began

    def row(self, state: StageState) -> None:
        """Tell of the last row of the history, and add what it shows to the warnings of the state."""
        for kind, text in signs_in(state.history, self.plan.steps).items():
            if kind not in state.warnings:
                state.warnings[kind] = text
                self._warn(text)
        if rank() != 0:
            return
        row = state.history[-1]
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in row.items() if name not in ("epoch", "step"))
        LOG.debug(f"{self.title}: step {row['step']:.0f} of {self.plan.steps}, {numbers}")
        self._tell_of_slow_validation(state)
        for number in range(len(self.logs)):
            self._hand_out(row, number)

    def finished(self, state: StageState) -> None:
        """Tell how the training went."""
        validated = ""
        if state.history and "miou" in state.history[-1]:
            share = f"{state.val_seconds / max(state.seconds, 1e-9):.0%}".replace("%", " %")
            miou = f"{100 * state.history[-1]['miou']:.1f} %"
            validated = f", {share} of it in validation; mIoU {miou} on validation"
        self._info(f"trained for {state.step} steps in {format_duration(state.seconds)}{validated}")
        for log, failed in zip(self.logs, self._failed, strict=True):
            if failed:
                self._warn(f"log={_name(log)} did not take {failed} of the rows; all of them are in the history")

    def _hand_out(self, row: Row, number: int) -> None:
        try:
            self.logs[number]({f"{self.prefix}{name}": value for name, value in row.items()})
        except Exception as error:  # of any type: a tracker fails with its network, and the training goes on
            self._tell_of_failure(number, error)

    def _tell_of_slow_validation(self, state: StageState) -> None:
        if self._slow or "miou" not in state.history[-1]:
            return
        rows, plan = sorted(self.plan.rows), self.plan
        text = slow_validation(
            state.val_seconds,
            state.history[-1]["seconds"],
            len(state.history),
            every=max(1, rows[0] // plan.unit),
            length=plan.steps // plan.unit,
        )
        if text is not None:
            self._slow = True
            self._warn(text)

    def _tell_of_failure(self, number: int, error: Exception) -> None:
        self._failed[number] += 1
        if self._failed[number] == 1:
            warnings.warn(
                f"{self.title}: log={_name(self.logs[number])} raised {type(error).__name__}: {error}. The training "
                "goes on, and each further row is tried; all rows are in the history of the result",
                RuntimeWarning,
                stacklevel=6,
            )

    def _info(self, text: str) -> None:
        if rank() == 0:
            LOG.info(f"{self.title}: {text}")

    def _warn(self, text: str) -> None:
        if rank() == 0:
            warn_of_run(f"{self.title}: {text}", show=self.show)


def _name(log: Log) -> str:
    return getattr(log, "__qualname__", type(log).__name__)
