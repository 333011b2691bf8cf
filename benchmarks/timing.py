"""Timing of alternatives in turns in a single run, so that their ratios are comparable."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping

import torch


def seconds(
    ways: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 5,
    of: Callable[[list[float]], float] = statistics.median,
) -> dict[str, float]:
    """Measure the median, or another summary, over several rounds of all alternatives, after one warm-up round."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            synchronize()
            began = time.perf_counter()
            way()
            synchronize()
            if turn:
                found[name].append(time.perf_counter() - began)
    return {name: of(values) for name, values in found.items()}


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def table(title: str, found: dict[str, float], *, floor: str, items: int) -> str:
    """Format a Markdown table: each alternative as a multiple of the floor, and in milliseconds per item."""
    lines = [f"| {title} | ratio to the floor | ms an image |", "|---|---:|---:|"]
    for name, value in found.items():
        lines.append(f"| {name} | {value / found[floor]:.2f} | {1000 * value / items:.2f} |")
    return "\n".join(lines)


def device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def conditions() -> str:
    """Describe date, hardware and versions of a measurement."""
    where = f"{os.cpu_count()} cores ({platform.machine()})"
    if torch.cuda.is_available():
        where = torch.cuda.get_device_name()
    return f"{datetime.date.today()}, {where}, {torch.get_num_threads()} threads, torch {torch.__version__}"
