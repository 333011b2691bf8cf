"""Weights on disk, and the checkpoint folder from which a killed stage resumes."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import nn
from torch.optim import Optimizer

from stseg.distributed import all_gather, barrier, rank
from stseg.engine.method import Method
from stseg.errors import DamagedFileError, DataError, NetworkWarning, WorkdirMismatchError, WorkdirMissingError
from stseg.models.rebuild import describe_network, make_network
from stseg.models.segmenter import Segmenter, as_segmenter
from stseg.models.state import bare_network, cpu_state, fingerprint
from stseg.storage.files import write_atomically
from stseg.storage.records import as_json, claim, read_record, write_record
from stseg.storage.seals import damaged, seal, seal_tensors, what_to_delete

Row = dict[str, float]
"""A row of a history: epoch, step, lr (of the backbone), loss and what the method logged (means since the row before),
with validation miou, iou/0, iou/1, ... and the extra metrics, and seconds (since the start)."""

RESERVED = ("epoch", "step", "lr", "loss", "miou", "seconds")

_INITIAL = "initial weights"  # key of the record of a stage
_NETWORK = "network"  # key of how the network is made, in progress.json
_OWNER = "stage"  # key of the seal of that record in progress.json
_METADATA = "stseg"  # key of the digest and the seal of weights: one key, as safetensors shuffles several
_FILES = ("stage.json", "model.safetensors", "progress.json", "history.jsonl", "snapshots", "state")
_TRAIN_AGAIN, _START_AGAIN = "train this stage again", "start this stage from its beginning"


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
        >>> from safetensors.torch import load_file
        >>> sorted(load_file(path))
        ['bias', 'weight']
    """
    _write_weights(cpu_state(_bare(model)), Path(path))


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load weights from a file, such as ``model.safetensors`` of a work directory, into a network.

    Args:
        model: a network of the same architecture, bare or in a :class:`stseg.Segmenter`; changed in place.
        path: file written by :func:`stseg.save_weights`, :func:`stseg.fit` or :class:`stseg.SelfTrainer`.

    Raises:
        DataError: if the file is missing or of another architecture.
        DamagedFileError: if it is damaged.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> one, other = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1)
        >>> save_weights(one, path)
        >>> load_weights(other, path)
        >>> torch.equal(one.weight, other.weight)
        True
    """
    path = Path(path)
    try:
        tensors, digest, _ = _read_weights(path)
    except (FileNotFoundError, IsADirectoryError) as error:
        what = "does not exist" if isinstance(error, FileNotFoundError) else "is a folder"
        raise DataError(f"{path} {what}; expected a file of weights") from None
    except Exception as error:  # a broken file raises many types
        raise DamagedFileError(f"{path} cannot be read as weights: {error}") from error
    if digest and digest != seal_tensors(tensors):
        raise DamagedFileError(f"{path} is damaged: its weights are not those that were saved")
    _load(tensors, model, path)


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
    best_step: int = 0
    """The step of the weights that had it."""
    logged: dict[str, list[float]] = field(default_factory=dict)
    """The loss and what the method logged, for each step since the last row of the history."""
    history: list[Row] = field(default_factory=list)
    val_seconds: float = 0.0
    """How much of the time was spent in validation."""
    warnings: dict[str, str] = field(default_factory=dict)
    """Early signs of a collapse, by kind; see ``collapse.py``."""

    def record(self, numbers: dict[str, float]) -> None:
        """Count a step and keep its numbers for the next row."""
        self.step += 1
        for name, number in numbers.items():
            self.logged.setdefault(name, []).append(number)

    def add_row(self, *, epoch: float, lr: float, validation: Mapping[str, float], seconds: float) -> Row:
        """Add a row to the history: the means of the numbers since the row before, and what validation found."""
        means = {name: math.fsum(numbers) / len(numbers) for name, numbers in self.logged.items()}
        row = {"epoch": epoch, "step": float(self.step), "lr": float(lr), **means}
        self.history.append(_with_nan({**row, **validation, "seconds": seconds}))
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
    writes. Each file is sealed with the record of the stage and its name: what is read again is what was written.

    Args:
        folder: created on the first write.
        record: settings and data of the stage, JSON-serializable.
        method: the method with its initial weights, which are recorded too.

    Raises:
        WorkdirMismatchError: if the folder belongs to a stage with a different record or, if it is finished, of other
            initial weights.
        DamagedFileError: if the record is damaged.
    """

    def __init__(self, folder: str | Path | None, record: dict[str, Any], method: Method) -> None:
        self.folder = None if folder is None else Path(folder)
        self._best: dict[str, torch.Tensor] | None = None
        if self.folder is None:
            return
        if (self.folder / "run.json").exists():
            raise WorkdirMismatchError(f"{self.folder} holds a run of SelfTrainer; use another folder")
        path = self.folder / "stage.json"
        weights = all_gather(seal_tensors(cpu_state(method)))[0]  # the others get those of the first process
        found = read_record(path) or {}
        record = as_json({**record, _INITIAL: found.get(_INITIAL, weights)})
        claim(path, record, delete=what_to_delete(self.folder, _FILES), to=_TRAIN_AGAIN, where=self.folder)
        if record[_INITIAL] != weights and self._has_begun:
            self._meet_other_weights(method.model)
        elif record[_INITIAL] != weights:
            record[_INITIAL] = weights
            barrier()
            if rank() == 0:
                write_record(path, record)
        self._owner = seal(record)

    def finished(self, model: nn.Module) -> StageState | None:
        """Load the weights of the stage into the model if it is finished."""
        if self.folder is None or not (path := self._model).exists():
            return None
        _load(self._read(path), model, path)
        record = _read_progress(self.folder, self._owner)
        record.pop(_NETWORK, None)
        if rank() == 0:
            shutil.rmtree(self.folder / "state", ignore_errors=True)  # left over if killed after the weights
        return StageState(**{**record, "history": [_with_nan(row) for row in record["history"]]})

    def resume(self, method: Method, optimizers: Sequence[Optimizer]) -> StageState:
        """Load the last state that was saved, if there is one."""
        if self.folder is None or not (path := self.folder / "state" / "latest.pt").exists():
            return StageState()
        try:
            digest, found = _read_digest(path)
        except OSError as error:
            raise damaged(path, f"cannot be read ({error})", to=_START_AGAIN) from None
        if found != seal(self._owner, "state", digest):
            raise damaged(path, "is damaged, or was written by another training", to=_START_AGAIN)
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            method.load_state_dict(saved["method"])
            for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            progress = StageState(**saved["progress"])
            progress.history = list(map(_with_nan, progress.history))
        except Exception as error:  # torch raises many types, with advice that does not apply
            raise damaged(path, f"cannot be loaded ({type(error).__name__}: {error})", to=_START_AGAIN) from error
        if progress.best is not None:
            self._read(self._best_path(progress.best_step))
        return progress

    def save(self, method: Method, optimizers: Sequence[Optimizer], state: StageState) -> None:
        """Replace the saved state."""
        if self.folder is None or rank() != 0:
            return
        self._check_folder()
        content = {
            "method": method.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "progress": asdict(state),
        }

        def write(file: BinaryIO) -> None:
            target = _Digested(file)
            torch.save(content, target)  # type: ignore[arg-type]
            file.write(seal(self._owner, "state", target.digest()).encode())

        write_atomically(self.folder / "state" / "latest.pt", write)
        for path in self._best_path(0).parent.glob("best-*.safetensors"):
            if path != self._best_path(state.best_step):
                path.unlink(missing_ok=True)

    def write_history(self, state: StageState) -> None:
        """Replace the saved history."""
        if self.folder is not None and rank() == 0:
            self._check_folder()
            lines = "".join(json.dumps(_without_nan(row), allow_nan=False) + "\n" for row in state.history)
            write_atomically(self.folder / "history.jsonl", lambda file: file.write(lines.encode()))

    def add_snapshot(self, model: nn.Module, at: int) -> nn.Module:
        """Keep a copy of the current model."""
        if self.folder is not None and rank() == 0:
            self._save(model, self._snapshot(at))
        return copy_to_cpu(model)

    def snapshot(self, model: nn.Module, at: int) -> nn.Module:
        """Return a copy of the model with the weights of a snapshot."""
        copied = copy_to_cpu(model)
        _load(self._read(self._snapshot(at)), copied, self._snapshot(at))
        return copied

    def keep_best(self, model: nn.Module, state: StageState) -> None:
        """Keep the weights as the best so far."""
        state.best_step = state.step
        if self.folder is None:
            self._best = cpu_state(model)
        elif rank() == 0:
            self._save(model, self._best_path(state.step))

    def load_best(self, model: nn.Module, state: StageState) -> None:
        """Load the best weights into the model."""
        barrier()
        if self.folder is not None:
            _load(self._read(self._best_path(state.best_step)), model, self._best_path(state.best_step))
        elif self._best is not None:
            model.load_state_dict(self._best)

    def finish(self, model: nn.Module, state: StageState, snapshots: Sequence[int] = ()) -> None:
        """Write the result and remove intermediate files.

        Raises:
            WorkdirMissingError: if the folder or one of the snapshots is gone.
        """
        barrier()  # all processes have read the best weights
        if self.folder is not None and rank() == 0:
            self._check_folder(*map(self._snapshot, snapshots))
            history = [_without_nan(row) for row in state.history]
            progress = {**asdict(state), "history": history, _OWNER: self._owner, _NETWORK: describe_network(model)}
            write_record(self.folder / "progress.json", progress)
            self._save(model, self._model)
            shutil.rmtree(self.folder / "state", ignore_errors=True)
        barrier()

    def _meet_other_weights(self, model: nn.Module) -> None:
        """Refuse or warn of initial weights that are not those of the stage in the folder."""
        assert self.folder is not None
        delete = what_to_delete(self.folder, _FILES)
        if not self._model.exists():
            if rank() == 0:
                warnings.warn(
                    f"the network has other weights than those from which the training in {self.folder} started; it "
                    "goes on from its saved state. To start it from the new ones, use another folder, or delete "
                    f"{delete}",
                    NetworkWarning,
                    stacklevel=4,
                )
            return
        with suppress(Exception):  # a broken file
            trained_here = seal_tensors(_read_weights(self._model)[0]) == seal_tensors(cpu_state(_bare(model)))
            if all_gather(trained_here)[0]:
                return
        raise WorkdirMismatchError(
            f"{self.folder} holds a finished training that started from other initial weights. Use another folder, or "
            f"delete {delete} to train this network; stseg.load_weights(network, {str(self._model)!r}) loads the "
            "result (torch.manual_seed(0) before a network is made makes its random weights the same each time)"
        )

    @property
    def _has_begun(self) -> bool:
        """Whether there is something that was trained."""
        assert self.folder is not None
        return self._model.exists() or (self.folder / "state" / "latest.pt").exists()

    @property
    def _model(self) -> Path:
        assert self.folder is not None
        return self.folder / "model.safetensors"

    def _snapshot(self, at: int) -> Path:
        assert self.folder is not None
        return self.folder / "snapshots" / f"{at}.safetensors"

    def _best_path(self, step: int) -> Path:
        assert self.folder is not None
        return self.folder / "state" / f"best-{step}.safetensors"

    def _check_folder(self, *files: Path) -> None:
        """Raise a ``WorkdirMissingError`` if the folder or a file is gone: what is written would lack the rest."""
        assert self.folder is not None
        for path in (self.folder / "stage.json", *files):
            if not path.exists():
                raise WorkdirMissingError(f"{path} was removed or moved during the training; start the training again")

    def _save(self, model: nn.Module, path: Path) -> None:
        self._check_folder()
        _write_weights(cpu_state(_bare(model)), path, owner=[self._owner, path.name])

    def _read(self, path: Path) -> dict[str, torch.Tensor]:
        """Read weights that this stage wrote.

        Raises:
            DamagedFileError: if the file is missing, damaged or of another stage; says what to delete.
        """
        assert self.folder is not None
        done = self._model.exists()
        delete = [self._model if done else self.folder / "state"]
        return _read_sealed(path, self._owner, delete=delete, to=_TRAIN_AGAIN if done else _START_AGAIN)


def read_result(folder: Path, network: nn.Module | None = None) -> nn.Module:
    """Return the network of a finished training from its folder; see :func:`stseg.load`.

    Args:
        folder: the folder of the training.
        network: a network of its architecture; None makes one, if the training recorded how.
    """
    record = read_record(folder / "stage.json")
    if record is None or not (folder / "model.safetensors").exists():
        raise DataError(f"{folder} holds no finished training")
    owner, path = seal(record), folder / "model.safetensors"
    tensors = _read_sealed(path, owner, delete=[path], to=_TRAIN_AGAIN)
    made = _read_progress(folder, owner).get(_NETWORK)
    if network is None and made is None:
        raise DataError(
            f"the network in {folder} is not one that can be made again from its record; expected "
            f"stseg.load({str(folder)!r}, network) with a network of its architecture"
        )
    model = as_segmenter(network) if network is not None else make_network(made or {})
    try:
        _bare(model).load_state_dict(tensors)
    except RuntimeError as error:
        difference = " ".join(str(error).split())[:400]
        changed = f" (changed after it was made: expected stseg.load({str(folder)!r}, network))"
        way_out = changed if network is None else ""
        raise WorkdirMismatchError(f"{folder} was trained with another network{way_out}: {difference}") from None
    if fingerprint(model, weights=False) not in record["network"].values():
        raise WorkdirMismatchError(
            f"the weights in {folder} fit the network, but it is not the one that was trained: its layers, or the "
            f"settings of its stseg.Segmenter, differ; they are {_settings_of(model)}"
        )
    return model.eval()


def read_progress(folder: Path) -> StageState:
    """Return the progress of a training from its folder: the whole of a finished one, the rows of one under way.

    Raises:
        DamagedFileError: if a file is damaged, or is not one that a training wrote.
    """
    if (folder / "model.safetensors").exists():
        record = _read_progress(folder, seal(read_record(folder / "stage.json")))
        record.pop(_NETWORK, None)
        return StageState(**{**record, "history": [_with_nan(row) for row in record["history"]]})
    history = _read_rows(folder / "history.jsonl")
    last = history[-1] if history else {"step": 0.0, "seconds": 0.0}
    return StageState(step=int(last["step"]), seconds=last["seconds"], history=history)


def _read_rows(path: Path) -> list[Row]:
    """Return the history of a training under way; empty before its first row."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    rows: list[Row] = []
    try:
        for line in lines:
            row = json.loads(line)
            float(row["step"] + row["seconds"])  # both are there, and are numbers
            rows.append({name: float(value) for name, value in _with_nan(row).items()})
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        what = f"is damaged: line {len(rows) + 1} is no row of a history ({type(error).__name__}: {error})"
        raise damaged(path, what, to="have the training write it again") from None
    return rows


def _settings_of(model: nn.Module) -> str:
    """Describe the wrapper of a network."""
    if not isinstance(model, Segmenter):
        return type(model).__name__
    settings = {name: getattr(model, name) for name in ("mean", "std", "stride", "select")}
    return f"now {', '.join(f'{name}={value}' for name, value in settings.items())} of a {type(model.network).__name__}"


def _read_progress(folder: Path, owner: str) -> dict[str, Any]:
    """Return what ``progress.json`` of a finished training holds.

    Raises:
        DamagedFileError: if it is missing, damaged or of another training.
    """
    path, model = folder / "progress.json", folder / "model.safetensors"
    record = read_record(path, delete=[model], to=_TRAIN_AGAIN)
    if record is None or record.pop(_OWNER, None) != owner:
        what = "is missing" if record is None else "is that of another training"
        raise damaged(path, what, delete=[model], to=_TRAIN_AGAIN)
    return record


def _read_sealed(path: Path, owner: str, *, delete: Sequence[Path], to: str) -> dict[str, torch.Tensor]:
    """Read the weights that a stage wrote.

    Raises:
        DamagedFileError: if the file is missing, damaged or of another stage; says what to delete.
    """
    again = partial(damaged, path, delete=delete, to=to)
    try:
        tensors, digest, found = _read_weights(path)
    except FileNotFoundError:
        raise again("is missing") from None
    except Exception as error:  # a broken file raises many types
        raise again(f"is damaged ({error})") from None
    if digest != seal_tensors(tensors):
        raise again("is damaged" if digest else "was not written by a training")
    if found != seal(owner, path.name, digest):
        raise again("was written by another training, or under another name")
    return tensors


class _Digested:
    """File to write to, with the digest of what was written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._total = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self._total.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def digest(self) -> str:
        return self._total.hexdigest()


def _read_digest(path: Path) -> tuple[str, str]:
    """Return the digest of what a file holds before its seal, and the seal."""
    length = len(seal())
    rest = path.stat().st_size - length
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while rest > 0 and (part := file.read(min(rest, 1 << 20))):
            total.update(part)
            rest -= len(part)
        return total.hexdigest(), file.read(length).decode("latin-1")


def _write_weights(tensors: dict[str, torch.Tensor], path: Path, *, owner: Sequence[str] = ()) -> None:
    digest = seal_tensors(tensors)
    content = save(tensors, {_METADATA: f"{digest} {seal(*owner, digest) if owner else ''}"})
    write_atomically(path, lambda file: file.write(content))


def _read_weights(path: Path) -> tuple[dict[str, torch.Tensor], str, str]:
    """Return the tensors in a file, their digest and their seal, ``""`` if it has none."""
    if not path.is_file():
        raise IsADirectoryError(path) if path.exists() else FileNotFoundError(path)
    with safe_open(path, "pt") as file:
        digest, _, found = (file.metadata() or {}).get(_METADATA, "").partition(" ")
        return {name: file.get_tensor(name) for name in file.keys()}, digest, found  # noqa: SIM118


def _load(tensors: dict[str, torch.Tensor], model: nn.Module, path: Path) -> None:
    """Load weights, all or none."""
    before = cpu_state(_bare(model))
    try:
        _bare(model).load_state_dict(tensors)
    except RuntimeError as error:
        _bare(model).load_state_dict(before, strict=False)
        raise DataError(f"{path} cannot be loaded into a {type(_bare(model)).__name__}: {error}") from error


def _without_nan(row: Row) -> dict[str, float | None]:
    """Return a row with None for numbers that JSON lacks."""
    return {name: value if math.isfinite(value) else None for name, value in row.items()}


def _with_nan(row: Mapping[str, float | None]) -> Row:
    """Return a row with the one ``math.nan`` for all that is no number, so that equal rows compare equal."""
    return {name: math.nan if value is None or math.isnan(value) else value for name, value in row.items()}


def _bare(model: nn.Module) -> nn.Module:
    model = bare_network(model)
    return model.network if isinstance(model, Segmenter) else model
