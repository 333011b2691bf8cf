"""Weights on disk, and the checkpoint folder from which a killed stage resumes."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn
from torch.optim import Optimizer

from stseg.distributed import barrier, rank
from stseg.engine.method import Method
from stseg.errors import DataError, WorkdirMismatchError
from stseg.models.segmenter import Segmenter
from stseg.models.state import bare_network, cpu_state
from stseg.storage.files import absolute_folder, write_atomically
from stseg.storage.records import claim, read_record, write_record

Row = dict[str, float]
"""A row of a history: epoch, step, lr (of the backbone), loss and what the method logged (means since the row before),
miou (with validation) and seconds (since the start)."""

RESERVED = ("epoch", "step", "lr", "loss", "miou", "seconds")


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Write the weights of a network as safetensors.

    Args:
        model: a network. For a :class:`stseg.Segmenter`, the wrapped network is saved, so the file does not depend on
            stseg.
        path: file to write, atomically.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> save_weights(nn.Conv2d(3, 2, 1), path)
        >>> sorted(load_file(path))
        ['bias', 'weight']
    """
    content = save(cpu_state(_bare(model)))
    write_atomically(Path(path), lambda file: file.write(content))


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load weights from a file, such as ``model.safetensors`` of a work directory, into a network.

    Args:
        model: a network of the same architecture, bare or in a :class:`stseg.Segmenter`; changed in place.
        path: file written by :func:`stseg.save_weights`, :func:`stseg.fit` or :class:`stseg.SelfTrainer`.

    Raises:
        DataError: if the file is missing, damaged or of another architecture.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> one, other = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1)
        >>> save_weights(one, path)
        >>> load_weights(other, path)
        >>> torch.equal(one.weight, other.weight)
        True
    """
    try:
        _bare(model).load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError, OSError) as error:
        kind = type(_bare(model)).__name__
        raise DataError(
            f"{path} cannot be loaded into a {kind}: {error} "
            "(if the file is damaged, delete it to train its stage again)"
        ) from error


def copy_to_cpu(model: nn.Module) -> nn.Module:
    """Return an independent copy of the model on the CPU, in evaluation mode and without gradients."""
    return copy.deepcopy(model).to("cpu").eval().requires_grad_(False)


@dataclass
class StageState:
    """Progress of a stage."""

    step: int = 0
    seconds: float = 0.0
    best: float | None = None
    """The highest mIoU on the validation set so far."""
    logged: dict[str, list[float]] = field(default_factory=dict)
    """The loss and what the method logged, for each step since the last row of the history."""
    history: list[Row] = field(default_factory=list)

    def record(self, numbers: dict[str, float]) -> None:
        """Count a step and keep its numbers for the next row."""
        self.step += 1
        for name, number in numbers.items():
            self.logged.setdefault(name, []).append(number)

    def add_row(self, *, epoch: float, lr: float, miou: float | None, seconds: float) -> Row:
        """Add a row to the history: the means of the numbers since the row before."""
        means = {name: math.fsum(numbers) / len(numbers) for name, numbers in self.logged.items()}
        row = {"epoch": epoch, "step": float(self.step), "lr": float(lr), **means}
        self.history.append({**row, **({} if miou is None else {"miou": miou}), "seconds": seconds})
        self.logged.clear()
        return self.history[-1]

    def shown(self, numbers: dict[str, float]) -> dict[str, str]:
        """Format the last numbers, and the last mIoU in percent, for a progress bar."""
        miou = self.history[-1].get("miou") if self.history else None
        shown = {name: f"{number:.3f}" for name, number in numbers.items()}
        return shown | ({} if miou is None else {"mIoU": f"{100 * miou:.1f}"})


class StageCheckpoint:
    """Checkpoint of a stage, in a folder, or in memory if ``folder`` is None.

    ``model.safetensors`` is written last, so a folder that contains it holds a finished stage. Only the first process
    writes.

    Args:
        folder: created on the first write.
        record: settings and data of the stage, JSON-serializable.

    Raises:
        WorkdirMismatchError: if the folder belongs to a stage with a different record.
    """

    def __init__(self, folder: str | Path | None, record: dict[str, Any]) -> None:
        self.folder = absolute_folder(folder)
        self._best: dict[str, torch.Tensor] | None = None
        if self.folder is not None:
            if (self.folder / "run.json").exists():
                raise WorkdirMismatchError(f"{self.folder} holds a run of SelfTrainer; use another folder")
            claim(self.folder / "stage.json", record)

    def finished(self, model: nn.Module) -> StageState | None:
        """Load the weights of the stage into the model if it is finished."""
        if self.folder is None or not (self.folder / "model.safetensors").exists():
            return None
        load_weights(model, self.folder / "model.safetensors")
        if rank() == 0:
            shutil.rmtree(self.folder / "state", ignore_errors=True)  # left over if killed after the weights
        path = self.folder / "progress.json"
        try:
            record = read_record(path) or {"missing": path}
            return StageState(**{**record, "history": [_with_nan(row) for row in record["history"]]})
        except (TypeError, KeyError, AttributeError):
            raise DataError(f"{path} is missing or damaged; delete {self.folder} to train this stage again") from None

    def resume(self, method: Method, optimizers: Sequence[Optimizer]) -> StageState:
        """Load the last state that was saved, if there is one."""
        if self.folder is None or not (path := self.folder / "state" / "latest.pt").exists():
            return StageState()
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            method.load_state_dict(saved["method"])
            for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            return StageState(**saved["progress"])
        except Exception as error:  # torch raises many types for a broken file, with advice that does not apply
            raise DataError(
                f"{path} is damaged ({type(error).__name__}); delete it to start the stage from its beginning"
            ) from error

    def save(self, method: Method, optimizers: Sequence[Optimizer], state: StageState) -> None:
        """Replace the saved state."""
        if self.folder is None or rank() != 0:
            return
        content = {
            "method": method.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "progress": asdict(state),
        }
        write_atomically(self.folder / "state" / "latest.pt", lambda file: torch.save(content, file))

    def write_history(self, state: StageState) -> None:
        """Replace the saved history."""
        if self.folder is not None and rank() == 0:
            lines = "".join(json.dumps(_without_nan(row), allow_nan=False) + "\n" for row in state.history)
            write_atomically(self.folder / "history.jsonl", lambda file: file.write(lines.encode()))

    def add_snapshot(self, model: nn.Module, at: int) -> nn.Module:
        """Keep a copy of the current model."""
        if self.folder is not None and rank() == 0:
            save_weights(model, self._snapshot(at))
        return copy_to_cpu(model)

    def snapshot(self, model: nn.Module, at: int) -> nn.Module:
        """Return a copy of the model with the weights of a snapshot."""
        copied = copy_to_cpu(model)
        load_weights(copied, self._snapshot(at))
        return copied

    def keep_best(self, model: nn.Module) -> None:
        """Keep the weights as the best so far."""
        if self.folder is None:
            self._best = cpu_state(model)
        elif rank() == 0:
            save_weights(model, self.folder / "state" / "best.safetensors")

    def load_best(self, model: nn.Module) -> None:
        """Load the best weights into the model."""
        barrier()
        if self.folder is not None:
            load_weights(model, self.folder / "state" / "best.safetensors")
        elif self._best is not None:
            model.load_state_dict(self._best)

    def finish(self, model: nn.Module, state: StageState) -> None:
        """Write the result and remove intermediate files."""
        barrier()  # all processes have read the best weights
        if self.folder is not None and rank() == 0:
            history = [_without_nan(row) for row in state.history]
            write_record(self.folder / "progress.json", {**asdict(state), "history": history})
            save_weights(model, self.folder / "model.safetensors")
            shutil.rmtree(self.folder / "state", ignore_errors=True)
        barrier()

    def _snapshot(self, at: int) -> Path:
        assert self.folder is not None
        return self.folder / "snapshots" / f"{at}.safetensors"


def _without_nan(row: Row) -> dict[str, float | None]:
    """Return a row with None for numbers that JSON lacks."""
    return {name: value if math.isfinite(value) else None for name, value in row.items()}


def _with_nan(row: dict[str, float | None]) -> Row:
    return {name: math.nan if value is None else value for name, value in row.items()}


def _bare(model: nn.Module) -> nn.Module:
    model = bare_network(model)
    return model.network if isinstance(model, Segmenter) else model
