"""Damage and remove work directories at random, start the runs again, and follow the advice of their messages.

    python benchmarks/damage.py --cases 1000 --seed 0

Each case takes a finished or an interrupted run, damages one file or folder of it, and starts the run again. It may
end as the undamaged run does, to the bit; or it stops with an error of stseg that says what to delete. Then that is
deleted and the run is started again, until it ends as the undamaged run. Everything else counts as a failure and is
printed with the number of its case: ``--only NUMBER`` repeats it. In a fifth of the cases the folder, or one in it, is
removed or moved while the run uses it: then the run ends with an error that names the path, and a new start as before.
"""

from __future__ import annotations

import argparse
import collections
import random
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

import stseg
from stseg.methods import ST, FixMatch, Labeling, STPlusPlus

DAMAGE = ("truncate", "empty", "flip", "extend", "exchange", "take another run's", "make a folder", "delete")
ADVISING = (stseg.DamagedFileError, stseg.WorkdirMismatchError)
Result = dict[str, Any]


class Images(Dataset[Any]):
    """Data set of drawn images, or pairs; ``event`` happens when any of them is read for the ``after``-th time."""

    reads = 0
    after = -1
    event: Callable[[], object]

    def __init__(self, count: int, *, masks: bool, prefix: str, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        images = torch.rand(count, 3, 12, 16, generator=generator)
        pairs = [(image, (image[0] > 0.5).byte() + (image[1] > 0.7).byte()) for image in images]
        self.items: list[Any] = pairs if masks else list(images)
        self.ids = [f"{prefix}/{index}" for index in range(count)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        Images.reads += 1
        if Images.reads == Images.after:
            Images.event()
        return self.items[index]


def interrupt() -> None:
    """Act as Ctrl+C."""
    raise KeyboardInterrupt


def make_network() -> nn.Module:
    """Make a network of four layers."""
    last = nn.Conv2d(4, 3, 1)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), last)


def config(seed: int, steps: int) -> stseg.TrainConfig:
    """Return settings of trainings that save their state after each step."""
    weak = stseg.WeakAugment(12)
    return stseg.TrainConfig(
        steps=steps, batch_size=2, weak=weak, optimizer="adamw", lr=0.01, seed=seed, eval_every=2, save_every=0
    )


def self_training(recipe: Any, **options: Any) -> Callable[..., Result]:
    """Return a function that runs a recipe in a folder, with a seed and a number of steps."""

    def run(folder: Path, seed: int, steps: int = 6) -> Result:
        settings = config(seed, steps)
        trainer = stseg.SelfTrainer(
            make_network, num_classes=3, config=settings, method=recipe, workdir=folder, progress=False, **options
        )
        return contents(trainer.fit(*datasets(seed)))

    return run


def datasets(seed: int) -> tuple[Images, Images, Images]:
    """Return labeled, unlabeled and validation images."""
    return (
        Images(4, masks=True, prefix="labeled", seed=seed),
        Images(6, masks=False, prefix="plain", seed=seed + 1),
        Images(2, masks=True, prefix="val", seed=seed + 2),
    )


def one_training(folder: Path, seed: int, steps: int = 6) -> Result:
    """Run :func:`stseg.fit` in a folder, with a seed."""
    labeled, unlabeled, val = datasets(seed)
    torch.manual_seed(seed)
    method = FixMatch(make_network())
    found = stseg.fit(
        method,
        labeled,
        config(seed, steps),
        unlabeled=unlabeled,
        val=val,
        snapshots=[2, 4],
        workdir=folder,
        progress=False,
    )
    return training(found)


RUNS: dict[str, Callable[..., Result]] = {
    "ST++": self_training(STPlusPlus(labeling=Labeling(tta=None, keep_per_class=0.6))),
    "ST, best weights": self_training(ST(labeling=Labeling(tta=None), student_init="teacher"), keep="best"),
    "fit": one_training,
}


def training(result: stseg.FitResult) -> Result:
    """Return what a training ended with."""
    rows = [{name: value for name, value in row.items() if name != "seconds"} for row in result.history]
    networks = [result.model, *result.snapshots]
    return {"history": rows, "weights": [{k: v.clone() for k, v in n.state_dict().items()} for n in networks]}


def contents(result: stseg.SelfTrainingResult) -> Result:
    """Return what a run ended with, masks and all."""
    return {
        **{step: training(found) for step, found in result.stages.items()},
        **{step: {data.ids[k]: data[k][1] for k in range(len(data))} for step, data in result.labels.items()},
        "ranking": result.ranking,
        "model": result.model.state_dict(),
    }


def same(one: Any, other: Any) -> bool:
    """Return whether two results are equal to the bit."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@dataclass(frozen=True)
class Source:
    """Folder of a run, finished or interrupted, and how it ends."""

    name: str
    folder: Path
    finish: Callable[[Path], Result]
    expected: Result
    whole: Path
    """The finished run."""
    other: Path
    """A finished run of another seed."""
    reads: int
    """How often items are read in an undisturbed run."""


def prepare(root: Path, *, interruptions: int, draw: random.Random) -> list[Source]:
    """Run everything to its end, and to some moments before."""
    sources = []
    for number, (name, run) in enumerate(RUNS.items()):
        whole, other = root / f"{number}-whole", root / f"{number}-other"
        Images.reads, Images.after = 0, -1
        expected, reads = run(whole, 0), Images.reads
        run(other, 50)
        finish = partial(_finish, run)
        sources.append(Source(f"{name}, finished", whole, finish, expected, whole, other, reads))
        for interruption in range(interruptions):
            folder = root / f"{number}-{interruption}"
            Images.reads, Images.after, Images.event = 0, draw.randrange(reads // 4, reads), staticmethod(interrupt)
            with suppress(KeyboardInterrupt):
                run(folder, 0)
            Images.after = -1
            if folder.exists():
                label = f"{name}, interrupted at {interruption + 1} of {interruptions}"
                sources.append(Source(label, folder, finish, expected, whole, other, reads))
    return sources


def _finish(run: Callable[..., Result], folder: Path) -> Result:
    return run(folder, 0)


def damage(folder: Path, other: Path, draw: random.Random) -> str:
    """Damage something in a folder, and return what was done."""
    paths = sorted(path for path in folder.rglob("*") if path.name != ".lock")
    files = [path for path in paths if path.is_file()]
    path = draw.choice(paths if draw.random() < 0.2 else files)
    return damage_path(path, draw.choice(DAMAGE), folder, other, draw)


def damage_path(path: Path, kind: str, folder: Path, other: Path, draw: random.Random) -> str:
    """Damage a file or folder in a folder in one of several ways, and return what was done."""
    inside = path.relative_to(folder)
    if path.is_dir():
        shutil.rmtree(path)
        if kind in ("truncate", "empty", "flip", "extend"):
            path.write_bytes(b"a file")
            return f"{inside}: a file in place of the folder"
        return f"{inside}: folder deleted"
    content = path.read_bytes()
    if kind == "exchange":
        files = sorted(file for file in folder.rglob("*") if file.is_file() and file not in (path, folder / ".lock"))
        with_ = draw.choice([file for file in files if file.suffix == path.suffix] or files)
        path.write_bytes(with_.read_bytes())
        with_.write_bytes(content)
        return f"{inside}: exchanged with {with_.relative_to(folder)}"
    if kind == "take another run's":
        if (other / inside).is_file():
            shutil.copy(other / inside, path)
        return f"{inside}: that of another run"
    path.unlink()
    if kind == "make a folder":
        path.mkdir()
        (path / "inside").write_text("something")
    elif kind == "flip" and content:
        place = draw.randrange(len(content))
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :])
    elif kind != "delete":
        cut = draw.randrange(len(content) + 1)
        path.write_bytes({"truncate": content[:cut], "extend": content + b"\0more\n"}.get(kind, b""))
    return f"{inside}: {kind}"


def advised(message: str) -> list[Path]:
    """Return what a message says to delete."""
    found = re.search(r"delete (.+?) to [a-z]", message)
    return [] if found is None else [Path(path) for path in re.split(r", | and ", found[1])]


def obey(folder: Path, finish: Callable[[Path], Result]) -> tuple[Result, list[str]]:
    """Start a run until it ends, deleting what its errors say; return its result and the messages.

    Raises:
        AssertionError: if a message says nothing, or nothing new, to delete, or what lies outside of the folder.
    """
    messages: list[str] = []
    while True:
        with suppress(*ADVISING), _remembered(messages):
            return finish(folder), messages
        paths = advised(messages[-1])
        assert paths, f"no advice: {messages[-1]}"
        assert messages[-1] not in messages[:-1], f"the advice does not help: {messages[-1]}"
        for path in paths:
            assert path.is_relative_to(folder), f"{path} is outside: {messages[-1]}"
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


@contextmanager
def _remembered(messages: list[str]) -> Iterator[None]:
    try:
        yield
    except ADVISING as error:
        messages.append(str(error))
        raise


def try_case(
    source: Source, folder: Path, draw: random.Random, *, kind: str | None = None, name: str | None = None
) -> tuple[str, str]:
    """Damage a copy of a run and start it; return what was done and the outcome. ``kind`` and ``name`` choose how."""
    shutil.copytree(source.folder, folder)
    if kind is None or name is None:
        done = damage(folder, source.other, draw)
    else:
        done = damage_path(draw.choice(sorted(folder.glob(name))), kind, folder, source.other, draw)
    done = f"{source.name}: {done}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result, messages = obey(folder, source.finish)
    except Exception as error:
        return done, f"FAILED: {type(error).__name__}: {error}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if not same(result, source.expected):
        return done, "FAILED: another result" + "".join(f"\n    {message}" for message in messages)
    return done, f"identical, after {len(messages)} messages" if messages else "identical"


def try_vanishing(source: Source, folder: Path, draw: random.Random) -> tuple[str, str]:
    """Remove or move a run's folder, or one in it, while it runs; then start it again. As :func:`try_case`."""
    aside, happened = folder.with_name("aside"), []
    kind = draw.choice(("removed", "moved"))
    moment = draw.randrange(source.reads // 4, source.reads)

    def vanish() -> None:
        inside = [path for path in sorted(folder.rglob("*")) if path.is_dir()]
        path = draw.choice([folder, draw.choice(inside or [folder])])
        happened.append(path)
        if path.exists():
            shutil.rmtree(path) if kind == "removed" else path.rename(aside)

    Images.reads, Images.after, Images.event = 0, moment, staticmethod(vanish)
    outcome = "noticed"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                result = source.finish(folder)
                lost = sorted(_results(source.whole) - _results(folder))
                if not same(result, source.expected) or lost:
                    return f"{source.name}: {happened[0]}", f"FAILED: ended as if well, without {', '.join(lost)}"
                outcome = "identical"
            except stseg.StsegError as error:
                if str(folder) not in str(error):
                    return source.name, f"FAILED: no path: {error}"
            if kind == "moved" and aside.exists() and not happened[0].exists():
                aside.rename(happened[0])
            Images.after = -1
            result, _ = obey(folder, source.finish)
    except Exception as error:
        outcome = f"FAILED: {type(error).__name__}: {error}"
    else:
        outcome = outcome if same(result, source.expected) else "FAILED: another result"
    finally:
        Images.after = -1
        for path in (folder, aside):
            shutil.rmtree(path, ignore_errors=True)
    return f"{source.name}: {', '.join(str(p.relative_to(folder)) for p in happened)} {kind} at {moment}", outcome


def _results(folder: Path) -> set[str]:
    """Return the names of the files that a finished run is to hold."""
    kinds = {".safetensors", ".png", ".csv", ".json", ".html", ".jsonl"}
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in kinds}


def cases(count: int, *, seed: int, interruptions: int, only: int | None = None) -> Iterator[tuple[int, str, str]]:
    """Yield number, damage and outcome of each case."""
    with tempfile.TemporaryDirectory() as root:
        sources = prepare(Path(root), interruptions=interruptions, draw=random.Random(seed))
        for number in range(count) if only is None else [only]:
            draw = random.Random(seed * 1_000_003 + number)
            try_one = try_case if draw.random() < 0.8 else try_vanishing
            yield number, *try_one(draw.choice(sources), Path(root) / "case", draw)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--interruptions", type=int, default=12, help="interrupted runs of each kind")
    parser.add_argument("--only", type=int, help="number of the one case to try")
    options = parser.parse_args()
    torch.set_num_threads(1)
    outcomes: collections.Counter[str] = collections.Counter()
    bar = tqdm(total=options.cases if options.only is None else 1)
    for number, done, outcome in cases(
        options.cases, seed=options.seed, interruptions=options.interruptions, only=options.only
    ):
        bar.update()
        outcomes[outcome.split(":")[0]] += 1
        if outcome.startswith("FAILED") or options.only is not None:
            bar.write(f"case {number}: {done}\n  {outcome}")
    bar.close()
    for outcome, count in sorted(outcomes.items()):
        print(f"{count:6} {outcome}")
    raise SystemExit(1 if outcomes["FAILED"] else 0)


if __name__ == "__main__":
    main()
