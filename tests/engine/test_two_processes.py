"""Two processes train one network. This file is also the program that they run."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import Entropic
from torch import nn

import stseg
from stseg.distributed import all_gather
from stseg.methods import STPlusPlus
from stseg.models.state import fingerprint

STEPS = 12


class Two(nn.Module):
    """Without batch normalization, whose statistics each process keeps for itself; one part is not for the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.unused = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 3, 1), nn.Conv2d(6, 3, 1)

    def forward(self, x):
        return {"out": self.last(self.first(x).relu())}


class Normalized(nn.Module):
    """With batch normalization: each process sees other statistics, but they must have one model in the end."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 3, 1))

    def forward(self, x):
        return self.layers(x)


def data(count: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, 18, 20, generator=generator)
    pairs = [(image, (image[0] > 0.5).byte() + (image[1] > 0.7)) for image in images]
    pairs[0][1][:9] = 255  # so the processes have different numbers of pixels that count
    return pairs


def run(out: Path) -> None:
    """``fit`` and all of ST++, with everything in ``out``."""
    settings = {"steps": STEPS, "batch_size": 4, "lr": 0.05, "precision": "fp32"}
    config = stseg.TrainConfig(weak=stseg.WeakAugment(16, base_size=20), **settings)
    torch.manual_seed(0)
    val = data(5, seed=9)
    fitted = stseg.fit(Two(), data(6, seed=1), config, val=val, snapshots=[4], workdir=out / "fit", progress=False)
    plain = STPlusPlus(strong=None)
    trainer = stseg.SelfTrainer(Two, num_classes=3, config=config, method=plain, workdir=out / "run", progress=False)
    result = trainer.fit(data(6, seed=1), [image for image, _ in data(9, seed=2)], val)
    miou = stseg.evaluate(result.model, val, num_classes=3, precision="fp32", progress=False).compute()
    options = {"num_classes": 3, "config": config, "workdir": out / "normalized", "progress": False}
    normalized = stseg.SelfTrainer(Normalized, **options)
    final = normalized.fit(data(6, seed=1), [image for image, _ in data(9, seed=2)], val)
    for model in (final.model, *final.stages["teacher"].snapshots):
        assert len(set(all_gather(fingerprint(model)))) == 1
    unlabeled = [image for image, _ in data(7, seed=3)]
    own = stseg.TrainConfig(unlabeled_batch_size=2, weak=config.weak, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        entropic = Entropic(Two(), weight=0.3)
    two_streams = stseg.fit(entropic, data(6, seed=1), own, unlabeled=unlabeled, workdir=out / "own", progress=False)
    process = os.environ.get("RANK", "alone")
    known = {
        "history": fitted.history,
        "ids": result.ranking.ids,
        "miou": miou,
        "labels": len(result.labels["reliable"]),
        "own": two_streams.history,
    }
    (out / f"{process}.json").write_text(json.dumps(known))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What one process and what two leave behind."""
    alone, two = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    group = {**shared, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    command = [sys.executable, __file__]
    processes = [subprocess.Popen([*command, str(alone)], env=shared)]
    processes += [
        subprocess.Popen([*command, str(two)], env={**group, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"
    ]
    assert [process.wait(timeout=240) for process in processes] == [0, 0, 0]
    # Once more over the same folders, of which some results are lost: everything must still fit together.
    for lost in ("ranking/ranking.csv", "student-2/model.safetensors", "run.json"):
        (two / "normalized" / lost).unlink()
    processes = [
        subprocess.Popen([*command, str(two)], env={**group, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"
    ]
    assert [process.wait(timeout=240) for process in processes] == [0, 0]
    return alone, two


@pytest.mark.slow
class TestTwoProcesses:
    def test_come_to_the_weights_of_one(self, folders):
        alone, two = (load_file(folder / "fit" / "model.safetensors") for folder in folders)
        for name, value in alone.items():
            torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)

    def test_come_to_the_weights_of_one_by_a_method_of_two_streams(self, folders):
        alone, two = (load_file(folder / "own" / "model.safetensors") for folder in folders)
        for name, value in alone.items():
            torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)
        alone, first, second = (json.loads((folder / f"{name}.json").read_text()) for folder, name in self.all(folders))
        for key in ("loss", "entropy"):
            rows = [[row[key] for row in found["own"]] for found in (alone, first, second)]
            assert rows[1] == rows[2] == pytest.approx(rows[0], rel=1e-4)

    def test_have_the_same_history(self, folders):
        histories = [json.loads((folder / f"{name}.json").read_text())["history"] for folder, name in self.all(folders)]
        for history in histories:
            assert [row["loss"] for row in history] == pytest.approx([row["loss"] for row in histories[0]], rel=1e-4)
            assert [row["miou"] for row in history] == pytest.approx([row["miou"] for row in histories[0]], abs=0.02)

    def test_have_the_same_run(self, folders):
        alone, first, second = (json.loads((folder / f"{name}.json").read_text()) for folder, name in self.all(folders))
        assert first == {**second, "history": first["history"], "own": first["own"]}
        assert sorted(first["ids"]) == sorted(alone["ids"])
        assert first["labels"] == alone["labels"] == 4

    def test_leave_the_same_files(self, folders):
        files = [
            {path.relative_to(folder / "run").as_posix() for path in (folder / "run").rglob("*") if path.is_file()}
            for folder in folders
        ]
        masks = [{name for name in found if name.endswith(".png") and "masks" in name} for found in files]
        assert len(masks[0]) == len(masks[1]) == 9
        one, two = (
            {name for name in found - images if not name.startswith("ranking/scores")}
            for found, images in zip(files, masks, strict=True)
        )
        assert one == two

    @staticmethod
    def all(folders: tuple[Path, Path]) -> list[tuple[Path, str]]:
        return [(folders[0], "alone"), (folders[1], "0"), (folders[1], "1")]


if __name__ == "__main__":
    run(Path(sys.argv[1]))
