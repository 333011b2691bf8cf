"""Times of several ways to do one thing, taken in turns in one run, so that only their ratios matter."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping

import torch


def seconds(ways: Mapping[str, Callable[[], object]], *, rounds: int = 5) -> dict[str, float]:
    """Median over some rounds; each round runs all ways, after one round that does not count."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            synchronize()
            began = time.perf_counter()
            way()
            synchronize()
            if turn:
                found[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in found.items()}


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def table(title: str, found: dict[str, float], *, floor: str, items: int) -> str:
    """Markdown: each way as a multiple of the floor, and in milliseconds an item."""
    lines = [f"| {title} | ratio to the floor | ms an image |", "|---|---:|---:|"]
    for name, value in found.items():
        lines.append(f"| {name} | {value / found[floor]:.2f} | {1000 * value / items:.2f} |")
    return "\n".join(lines)


def device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def conditions() -> str:
    """When and on what something was measured."""
    where = f"{os.cpu_count()} cores ({platform.machine()})"
    if torch.cuda.is_available():
        where = torch.cuda.get_device_name()
    return f"{datetime.date.today()}, {where}, {torch.get_num_threads()} threads, torch {torch.__version__}"
