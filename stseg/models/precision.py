"""Autocast by name."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from stseg.types import Precision


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """bfloat16 autocast where ``precision`` is ``"bf16"``; for ``"fp32"`` none, even inside somebody else's."""
    _check_precision(precision)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def _check_precision(precision: str) -> None:
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision is {precision!r}; expected 'fp32' or 'bf16'")
