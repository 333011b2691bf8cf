"""Kill runs at random moments and start them again until they end; compare the ends with those of undisturbed runs.

    python benchmarks/kills.py --kills 100 --seed 0
    python benchmarks/kills.py --kills 100 --processes 2

The runs are those of ``damage.py``, with more steps. Each start gets a random time to live and is then killed by
SIGKILL; of two processes one is, and the other one a moment later. All files that count are compared byte by byte:
weights, snapshots, ranking and masks, and the histories but for their seconds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import damage
import torch
from tqdm.auto import tqdm

STEPS = 150


def work(folder: Path, name: str) -> None:
    """Run one of the runs in this process."""
    torch.set_num_threads(1)
    damage.RUNS[name](folder, 0, STEPS)


def start(folder: Path, name: str, processes: int) -> list[subprocess.Popen[bytes]]:
    """Start a run in one or several processes."""
    command = [sys.executable, __file__, "--worker", str(folder), "--run", name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if processes == 1:
        return [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {**environment, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    group |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    return [
        subprocess.Popen(command, env={**group, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE)
        for rank in range(processes)
    ]


def outcome(folder: Path) -> dict[str, bytes]:
    """Return the files of a finished run that count, by name."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix in (".safetensors", ".csv", ".png"):
            found[name] = path.read_bytes()
        elif path.name == "history.jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = repr([{k: v for k, v in row.items() if k != "seconds"} for row in rows]).encode()
        elif path.suffix == ".part":
            found[name] = b"a leftover"
    return found


def run_to_end(folder: Path, name: str, processes: int) -> float:
    """Run without disturbance, and return the seconds it took."""
    began = time.monotonic()
    group = start(folder, name, processes)
    for process in group:
        _, errors = process.communicate()
        if process.returncode:
            raise SystemExit(f"{name} ended with {process.returncode}:\n{errors.decode()}")
    return time.monotonic() - began


def kill_until_done(folder: Path, name: str, processes: int, longest: float, draw: random.Random) -> int:
    """Start a run until it ends, killing it each time but the last; return the number of kills."""
    for kills in itertools.count():
        group = start(folder, name, processes)
        until = time.monotonic() + draw.uniform(0.3, 1) * longest * (1 + kills / 10)  # it ends on a busy machine too
        while time.monotonic() < until and any(process.poll() is None for process in group):
            time.sleep(0.005)
        codes = [process.poll() for process in group]
        if all(code == 0 for code in codes):
            return kills
        first, *others = draw.sample(group, len(group))
        for process in (first, *others):
            process.send_signal(signal.SIGKILL)
            time.sleep(draw.choice((0, 0.2)))
        errors = [process.communicate()[1].decode() for process in group]
        if any(code not in (None, 0) for code in codes):
            raise SystemExit(f"{name} ended by itself with {codes}:\n" + "\n".join(errors))
    raise AssertionError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--run", default="ST++", choices=damage.RUNS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        return work(options.worker, options.run)
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as temporary, tqdm(total=options.kills) as bar:
        root = Path(temporary)
        seconds = {name: run_to_end(root / name, name, options.processes) for name in damage.RUNS}
        expected = {name: outcome(root / name) for name in damage.RUNS}
        runs = 0
        for name in itertools.cycle(damage.RUNS):
            if bar.n >= options.kills:
                break
            bar.update(kill_until_done(root / "killed", name, options.processes, seconds[name], draw))
            found, runs = outcome(root / "killed"), runs + 1
            if found != expected[name]:
                differing = [f for f in {**found, **expected[name]} if found.get(f) != expected[name].get(f)]
                raise SystemExit(f"{name} came to another end: {', '.join(differing)}")
            shutil.rmtree(root / "killed")
    print(f"{bar.n} kills of {runs} runs in {options.processes} process(es): all ended as undisturbed ones")
    return None


if __name__ == "__main__":
    main()
