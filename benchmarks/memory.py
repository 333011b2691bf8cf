"""Memory and time of labeling and ranking by the number of images, and what a second process gains.

    python benchmarks/memory.py --publish       up to 200,000 images, about an hour
    python benchmarks/memory.py --counts 1000 4000

Each row is a program of its own on one thread. The images are made when they are read, and the network is small, so
that what is measured is what the package itself keeps of every image.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from pages import publish
from timing import conditions
from torch import Tensor, nn
from torch.utils.data import Dataset

import stseg

COUNTS = (12_500, 50_000, 200_000)
SIZE, CLASSES = 32, 4
TASKS = {"label": "labeling to PNG files", "rank": "ranking by 3 checkpoints"}


class Scenes(Dataset[Tensor]):
    """Images of noise around a brightness of their own, made when they are read."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self.noise = torch.randint(0, 64, (3, size, size), dtype=torch.uint8)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        return self.noise + index * 37 % 191


def network(width: int, seed: int) -> nn.Module:
    """Make a network of three convolutions."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(width, CLASSES, 1))


def run(task: str, count: int, size: int, width: int, folder: Path) -> dict[str, float]:
    """Label or rank in this process; return seconds and the highest memory, in MiB, before and in the end."""
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    data = Scenes(count, size)

    def work(data: Dataset[Any], out: Path) -> None:
        options: dict[str, Any] = {"num_classes": CLASSES, "device": "cpu", "progress": False}
        if task == "label":
            stseg.PseudoLabeler(network(width, 0), **options).label(data, out / "masks")
        else:
            networks = [network(width, seed) for seed in range(3)]
            stseg.StabilityRanker(networks, **options).rank(data, store=out / "scores")

    work(Scenes(256, size), folder / "warm")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    began = time.perf_counter()
    work(data, folder / "all")
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "before": before, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def start(processes: int, *arguments: object) -> dict[str, float]:
    """Run ``run`` in one or several programs of one thread; return what the first one found."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(processes)}
        command = [sys.executable, __file__, "--run", *map(str, arguments), folder]
        programs = []
        for rank in range(processes):
            own = {**group, "WORLD_SIZE": str(processes), "RANK": str(rank), "LOCAL_RANK": str(rank)}
            shared = environment if processes == 1 else {**environment, **own}
            programs.append(subprocess.Popen(command, env=shared, stdout=subprocess.PIPE, text=True))
        printed = [program.communicate()[0] for program in programs]
        if any(program.returncode for program in programs):
            raise RuntimeError(f"{command} failed")
        found: dict[str, float] = json.loads(printed[0].splitlines()[-1])
        return found


def main() -> None:
    """Measure and print the tables; with ``--publish``, put them into the documentation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--publish", action="store_true", help="put the tables into docs/speed.md")
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--pairs", type=int, default=5, help="of measurements of one process and of two")
    parser.add_argument("--run", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        task, count, size, width, folder = args.run
        print(json.dumps(run(task, int(count), int(size), int(width), Path(folder))))
        return
    figures: dict[str, Any] = {"conditions": conditions()}
    lines = ["| | images | highest memory | above 256 images | ms an image |", "|---|---:|---:|---:|---:|"]
    for task, title in TASKS.items():
        for count in args.counts:
            found = start(1, task, count, SIZE, 8)
            figures[f"{task} {count}"] = found
            more = found["peak"] - found["before"]
            each, milliseconds = more * 2**20 / count, 1000 * found["seconds"] / count
            row = (title, f"{count:,}", f"{found['peak']:.0f} MiB", f"{more:.0f} MiB ({each:.0f} bytes each)")
            lines.append("| " + " | ".join((*row, f"{milliseconds:.2f}")) + " |")
            print(lines[-1], flush=True)
    ratios = []
    for _ in range(args.pairs):
        one, two = (start(processes, "label", 64, 256, 96)["seconds"] for processes in (1, 2))
        ratios.append(one / two)
    figures["two processes"] = ratios
    text = (
        f"Labeling 64 images of 256 x 256, one thread a process: two processes are {max(ratios):.2f} times as fast as "
        f"one in the best of {args.pairs} pairs of runs, {sorted(ratios)[len(ratios) // 2]:.2f} times in the median."
    )
    print(text)
    if args.publish:
        how = f"`python benchmarks/memory.py --publish`: images of {SIZE} x {SIZE}; {conditions()}."
        publish("memory", "\n\n".join([how, "\n".join(lines), text]), figures)


if __name__ == "__main__":
    main()
