"""Autocast by name."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from stseg.types import Precision


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """Return bfloat16 autocast for ``"bf16"``; for ``"fp32"`` disable autocast, even inside another one."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
