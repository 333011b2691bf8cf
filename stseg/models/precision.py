"""Precision of computations: what ``"auto"`` means on a device, and autocast by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from stseg.checks import check_choice
from stseg.models.state import is_compiled
from stseg.types import Precision


def resolve_precision(precision: Precision, *devices: torch.device) -> Literal["fp32", "bf16"]:
    """Return the precision that is computed in: ``"auto"`` is ``"bf16"`` where all devices compute bfloat16 natively.

    Raises:
        ValueError: if ``precision`` is not one of the three.

    Example:
        >>> resolve_precision("fp32", torch.device("cpu")), resolve_precision("auto", torch.device("meta"))
        ('fp32', 'fp32')
    """
    check_choice("precision", precision, "auto", "fp32", "bf16")
    if precision != "auto":
        return precision
    return "bf16" if all(map(computes_bfloat16, devices)) else "fp32"


def computes_bfloat16(device: torch.device) -> bool:
    """Return whether a device has instructions for bfloat16, so that nothing emulates it.

    GPUs of Nvidia from compute capability 8 on, and CPUs with AVX-512 BF16 or AMX, for which PyTorch has oneDNN. Of
    other devices it is not known, and the answer is no.
    """
    if device.type == "cuda":
        return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 8
    if device.type == "cpu":
        flags = _cpu_flags()
        return torch._C._has_mkldnn and bool(flags.get("avx512_bf16") or flags.get("amx_bf16"))
    return False


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """Return bfloat16 autocast, or disable autocast, even inside another one, where the precision is float32."""
    enabled = resolve_precision(precision, device) == "bf16"
    keeps = None if not enabled or not torch.is_grad_enabled() or _rounds_for_gradients() else False
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled, cache_enabled=keeps)


@contextmanager
def casting_once(device: torch.device, *models: nn.Module) -> Iterator[None]:
    """Let autocast round each weight once for all calls inside, in place of once in each :func:`autocast`.

    PyTorch keeps rounded weights until the outermost autocast is left, and only those that require gradients: here, all
    do meanwhile. The weights must not change inside.
    """
    frozen = [
        parameter
        for model in models
        if not is_compiled(model)
        for parameter in model.parameters()
        if parameter.is_floating_point() and not (parameter.requires_grad or parameter.is_inference())
    ]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=False):
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        torch.clear_autocast_cache()  # made without gradients, which an autocast of the caller around this would keep


@cache
def _rounds_for_gradients() -> bool:
    """Return whether autocast rounds a weight for gradients that it has rounded and kept without: not in PyTorch 2.4.

    Else a network that predicts without gradients first, such as the one that makes its own targets, learns nothing.
    """
    weight = torch.zeros(1, 1, device="cpu", requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=True):
        with torch.no_grad():
            torch.mm(weight, weight)
        return torch.mm(weight, weight).requires_grad


@cache
def _cpu_flags() -> Mapping[str, Any]:
    """Return the instruction sets of the CPU; none where neither PyTorch nor the system tells them."""
    if (capabilities := getattr(torch.cpu, "get_capabilities", None)) is not None:
        found: Mapping[str, Any] = capabilities()
        return found
    try:  # before PyTorch 2.11
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    return dict.fromkeys(next((line.split() for line in lines if line.startswith("flags")), ()), True)
