"""Schedule of a stage: its length, history rows and snapshots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stseg.engine.config import TrainConfig


@dataclass(frozen=True)
class Plan:
    """Length, history rows and snapshots of a stage.

    Attributes:
        steps: length in steps.
        steps_per_epoch: steps of a pass over the longer stream.
        rows: after which steps a row is added to the history.
        snapshots: after which epochs (steps if the length is given in steps) a copy is kept.
        unit: steps between two values of ``snapshots``: those of an epoch, or 1.
    """

    steps: int
    steps_per_epoch: int
    rows: frozenset[int]
    snapshots: tuple[int, ...]
    unit: int

    @classmethod
    def of(cls, config: TrainConfig, steps_per_epoch: int, snapshots: Sequence[int] = ()) -> Plan:
        """Plan a stage.

        Raises:
            ValueError: if a snapshot lies outside the training.

        Example:
            >>> plan = Plan.of(TrainConfig(epochs=3), steps_per_epoch=2, snapshots=[1, 3])
            >>> plan.steps, sorted(plan.rows), plan.snapshot_at(2), plan.snapshot_at(4)
            (6, [2, 4, 6], 1, None)
        """
        unit = steps_per_epoch if config.epochs else 1
        wanted = tuple(sorted(set(snapshots)))
        if wanted and not 1 <= wanted[0] <= wanted[-1] <= config.length:
            raise ValueError(f"snapshots are {list(wanted)}; expected values in 1..{config.length}")
        steps = unit * config.length
        if config.eval_every is not None:
            rows = {*range(config.eval_every * unit, steps + 1, config.eval_every * unit), steps}
        elif config.epochs:
            rows = set(range(unit, steps + 1, unit))
        else:
            count = min(20, steps)
            rows = {steps * row // count for row in range(1, count + 1)}
        return cls(steps, steps_per_epoch, frozenset(rows), wanted, unit)

    def snapshot_at(self, step: int) -> int | None:
        """Return the snapshot that is due after ``step`` steps; None if there is none."""
        at, rest = divmod(step, self.unit)
        return at if not rest and at in self.snapshots else None
