"""Seeds for the parts of a run, and reproducible blocks of code."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(seed: int, *keys: int | str) -> int:
    """Derive a seed for a part of a run, independent of those of all other parts and runs.

    Example:
        >>> derive_seed(0, "teacher") == derive_seed(0, "teacher")
        True
        >>> derive_seed(0, "teacher") == derive_seed(0, "student")
        False
    """
    numbers = (int.from_bytes(key.encode(), "little") if isinstance(key, str) else key for key in keys)
    return int(np.random.SeedSequence([seed & (2**64 - 1), *numbers]).generate_state(1, np.uint64)[0])


@contextmanager
def preserved_random_states() -> Iterator[None]:
    """Restore the states of the generators of torch (on the CPU), numpy and ``random`` on exit."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002  transforms use it
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        random.setstate(before[2])


def seed_all(seed: int) -> None:
    """Seed torch (on the CPU), numpy and ``random``."""
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)


def seed_step(seed: int, device: torch.device) -> None:
    """Seed torch on the CPU and on a device.

    ``torch.manual_seed`` formats the stack at each call, once for each kind of device that is not in use.
    """
    if device.type not in ("cpu", "cuda"):
        torch.manual_seed(seed)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


@contextmanager
def fixed_seed(seed: int) -> Iterator[None]:
    """Seed torch (on the CPU), numpy and ``random``, and restore their states on exit.

    Example:
        >>> with fixed_seed(3):
        ...     a = torch.rand(())
        >>> with fixed_seed(3):
        ...     bool(torch.rand(()) == a)
        True
    """
    with preserved_random_states():
        seed_all(seed)
        yield
