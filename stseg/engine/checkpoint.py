"""Weights on disk, and the folder in which a training stage can be killed at any moment and go on."""

from __future__ import annotations

import copy
import json
import math
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from stseg.distributed import barrier, rank
from stseg.errors import DataError
from stseg.models.segmenter import Segmenter
from stseg.models.state import cpu_state
from stseg.storage.files import write_atomically
from stseg.storage.records import claim, read_record, write_record

Row = dict[str, float]
"""A line of a history: epoch, step, lr (of the backbone), loss (mean since the line before), miou (with validation) and
seconds (since the beginning)."""


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the state dict of a network, or of the network inside a :class:`stseg.Segmenter`, as safetensors."""
    content = save(cpu_state(_bare(model)))
    write_atomically(path, lambda file: file.write(content))


def load_weights(model: nn.Module, path: Path) -> None:
    """Read what ``save_weights`` wrote into a network of the same architecture.

    Raises:
        DataError: if the file is broken or belongs to another architecture.
    """
    try:
        _bare(model).load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError, OSError) as error:
        kind = type(_bare(model)).__name__
        raise DataError(
            f"{path} cannot be loaded into a {kind}: {error} (if it is damaged, remove it to train its stage anew)"
        ) from error


def copy_on_cpu(model: nn.Module) -> nn.Module:
    """A copy that shares nothing with the model, on the CPU, in evaluation mode and without gradients."""
    return copy.deepcopy(model).to("cpu").eval().requires_grad_(False)


@dataclass
class StageState:
    """How far a stage has come."""

    step: int = 0
    seconds: float = 0.0
    best: float = -math.inf
    losses: list[float] = field(default_factory=list)
    """Those since the last row of the history."""
    history: list[Row] = field(default_factory=list)

    def add_row(self, *, epoch: float, lr: float, miou: float | None, seconds: float) -> None:
        """Close a part of the training: the mean of its losses goes into the history."""
        row = {"epoch": epoch, "step": self.step, "lr": lr, "loss": math.fsum(self.losses) / len(self.losses)}
        self.history.append({**row, **({} if miou is None else {"miou": miou}), "seconds": seconds})
        self.losses.clear()

    def shown(self, loss: float) -> dict[str, str]:
        """What a progress bar tells: the last loss, and the last mIoU in per cent."""
        miou = self.history[-1].get("miou") if self.history else None
        return {"loss": f"{loss:.3f}"} | ({} if miou is None else {"mIoU": f"{100 * miou:.1f}"})


class StageCheckpoint:
    """What a stage keeps: in a folder, or in memory where that is None.

    ``model.safetensors`` comes last, so where it is, the stage is done. Of several processes the first one writes.

    Args:
        folder: made when there is something to write.
        record: settings and data of the stage, of JSON's types.

    Raises:
        WorkdirMismatchError: if the folder belongs to a stage of another record.
    """

    def __init__(self, folder: str | Path | None, record: dict[str, Any]) -> None:
        self.folder = None if folder is None else Path(folder)
        self._best: dict[str, torch.Tensor] | None = None
        if self.folder is not None:
            claim(self.folder / "stage.json", record)

    def finished(self, model: nn.Module) -> StageState | None:
        """Load the weights of the stage into the model if it is done."""
        if self.folder is None or not (self.folder / "model.safetensors").exists():
            return None
        load_weights(model, self.folder / "model.safetensors")
        if rank() == 0:
            shutil.rmtree(self.folder / "state", ignore_errors=True)  # left over if killed right after the weights
        path = self.folder / "progress.json"
        try:
            return StageState(**(read_record(path) or {"missing": path}))
        except TypeError:
            raise DataError(f"{path} is missing or damaged; remove {self.folder} to train this stage anew") from None

    def resume(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> StageState:
        """Load the last state that was saved, if there is one."""
        if self.folder is None or not (path := self.folder / "state" / "latest.pt").exists():
            return StageState()
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            _bare(model).load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            return StageState(**state["progress"])
        except Exception as error:  # torch raises many kinds for a broken file, with advice that does not fit here
            raise DataError(f"{path} is damaged ({type(error).__name__}); remove it to begin the stage anew") from error

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: StageState) -> None:
        """Replace the saved state."""
        if self.folder is None or rank() != 0:
            return
        state = {
            "model": _bare(model).state_dict(),
            "optimizer": optimizer.state_dict(),
            "progress": asdict(progress),
        }
        write_atomically(self.folder / "state" / "latest.pt", lambda file: torch.save(state, file))

    def log(self, progress: StageState) -> None:
        """Write the history as it is."""
        if self.folder is not None and rank() == 0:
            lines = "".join(json.dumps(row) + "\n" for row in progress.history)
            write_atomically(self.folder / "history.jsonl", lambda file: file.write(lines.encode()))

    def add_snapshot(self, model: nn.Module, at: int) -> nn.Module:
        """Keep a copy of the model as it is."""
        if self.folder is not None and rank() == 0:
            save_weights(model, self._snapshot(at))
        return copy_on_cpu(model)

    def snapshot(self, model: nn.Module, at: int) -> nn.Module:
        """A copy of the model with the weights that were kept."""
        copied = copy_on_cpu(model)
        load_weights(copied, self._snapshot(at))
        return copied

    def keep_best(self, model: nn.Module) -> None:
        """Keep the weights as the best so far."""
        if self.folder is None:
            self._best = cpu_state(model)
        elif rank() == 0:
            save_weights(model, self.folder / "state" / "best.safetensors")

    def load_best(self, model: nn.Module) -> None:
        """Give the model the weights that were best."""
        barrier()
        if self.folder is not None:
            load_weights(model, self.folder / "state" / "best.safetensors")
        elif self._best is not None:
            model.load_state_dict(self._best)

    def finish(self, model: nn.Module, progress: StageState) -> None:
        """Write the result and remove what was only needed on the way."""
        barrier()  # all have read the best weights by now
        if self.folder is not None and rank() == 0:
            write_record(self.folder / "progress.json", asdict(progress))
            save_weights(model, self.folder / "model.safetensors")
            shutil.rmtree(self.folder / "state", ignore_errors=True)
        barrier()

    def _snapshot(self, at: int) -> Path:
        assert self.folder is not None
        return self.folder / "snapshots" / f"{at}.safetensors"


def _bare(model: nn.Module) -> nn.Module:
    return model.network if isinstance(model, Segmenter) else model
