"""Networks from the work directories of finished trainings."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from stseg.engine.checkpoint import read_result
from stseg.errors import DataError
from stseg.models.state import place
from stseg.storage.files import absolute_folder
from stseg.storage.records import read_record


def load(workdir: str | os.PathLike[str], network: nn.Module | None = None, *, step: str | None = None) -> nn.Module:
    """Return the trained network in a work directory of :class:`stseg.SelfTrainer` or :func:`stseg.fit`.

    Args:
        workdir: the folder.
        network: a network of the architecture that was trained, bare or in a :class:`stseg.Segmenter` with the
            settings of the training; it gets the weights. Networks of segmentation_models_pytorch can be left out.
        step: the training of a run, such as ``"teacher"``; None for the last one of a finished run.

    Returns:
        The network, wrapped, in evaluation mode, laid out in memory as in the training: its logits are the same to the
        bit.

    Raises:
        DataError: if the folder holds no finished training, or the network cannot be left out.
        WorkdirMismatchError: if the network is not of the architecture that was trained; names the difference.
        DamagedFileError: if a file is damaged.

    Example:
        >>> import tempfile, torch, stseg
        >>> folder = tempfile.mkdtemp()
        >>> data = [(torch.rand(3, 16, 16), torch.randint(2, (16, 16)).byte()) for _ in range(2)]
        >>> config = stseg.TrainConfig(steps=2, batch_size=2, weak=None)
        >>> result = stseg.fit(nn.Conv2d(3, 2, 1), data, config, workdir=folder, progress=False)
        >>> model = load(folder, nn.Conv2d(3, 2, 1))
        >>> torch.equal(model.network.weight, result.model.network.weight)
        True
    """
    folder = absolute_folder(workdir)
    assert folder is not None
    return place(read_result(_training(folder, step), network))


def _training(folder: Path, step: str | None) -> Path:
    """Return the folder of a finished training in a work directory."""
    run = read_record(folder / "run.json")
    if run is None:
        if not (folder / "stage.json").exists():
            raise DataError(f"{folder} is not a work directory: it has neither run.json nor stage.json")
        if step is not None:
            raise DataError(f"{folder} holds a single training; expected no step, got {step!r}")
        return folder
    trained = [str(name) for name in run["steps"] if (folder / name / "model.safetensors").exists()]
    if step is None and trained and (folder / "report.html").exists():
        return folder / trained[-1]
    if step is not None and step in trained:
        return folder / step
    done = ", ".join(map(repr, trained)) or "none"
    if step is None:
        raise DataError(f"the run in {folder} is not finished; expected step=, one of its finished trainings: {done}")
    raise DataError(f"the run in {folder} has no finished training {step!r}; expected one of {done}")
