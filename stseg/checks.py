"""Checks of single arguments; each names the argument, its value and what was expected."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from numbers import Integral, Real

import torch
from torch import Tensor, nn

_MARGIN = 0.1  # beyond [0, 1], for interpolation and small perturbations


def check_number(name: str, value: object) -> None:
    """Raise a ``TypeError`` unless the value is a number."""
    if not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r}; expected a number")


def check_probability(name: str, value: float) -> None:
    """Raise a ``ValueError`` unless the value lies in [0, 1]."""
    check_number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}; expected a probability in [0, 1]")


def check_nonnegative(name: str, value: float) -> None:
    """Raise a ``ValueError`` unless the value is a finite number, 0 or more."""
    check_number(name, value)
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value}; expected 0 or more")


def check_positive(name: str, value: float) -> None:
    """Raise a ``ValueError`` unless the value is a finite number above 0."""
    check_number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}; expected a number above 0")


def check_count(name: str, value: int, *, least: int = 1) -> None:
    """Raise an error unless the value is an integer, ``least`` or more."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; expected an integer")
    if value < least:
        raise ValueError(f"{name} is {value}; expected {least} or more")


def check_choice(name: str, value: object, *choices: object) -> None:
    """Raise a ``ValueError`` unless the value is one of the choices.

    Example:
        >>> check_choice("keep", "last", "final", "best")
        Traceback (most recent call last):
        ValueError: keep is 'last'; expected 'final' or 'best'
    """
    if value not in choices:
        *others, last = (repr(choice) for choice in choices)
        raise ValueError(f"{name} is {value!r}; expected {', '.join(others)} or {last}{did_you_mean(value, choices)}")


def did_you_mean(value: object, choices: Iterable[object]) -> str:
    """Return the end of a message that names the most similar texts, or ``""``.

    Example:
        >>> did_you_mean("unimatchh", ["fixmatch", "unimatch"]), did_you_mean("st", ["fixmatch"])
        ("; did you mean 'unimatch'?", '')
    """
    texts = [choice for choice in choices if isinstance(choice, str)]
    near = get_close_matches(value, texts, n=1, cutoff=0.75) if isinstance(value, str) else []
    return f"; did you mean {near[0]!r}?" if near else ""


def check_class_names(names: object, num_classes: int | None) -> None:
    """Raise an error unless it is None or a sequence of one name for each class.

    Example:
        >>> check_class_names(["road", "car"], 3)
        Traceback (most recent call last):
        ValueError: class_names has 2 names; expected 3, one for each class
    """
    if names is None:
        return
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"class_names is {names!r}; expected a list of names, such as ['background', 'car']")
    if num_classes is not None and len(names) != num_classes:
        raise ValueError(f"class_names has {len(names)} names; expected {num_classes}, one for each class")


def check_mixing(mix: object) -> None:
    """Raise a ``TypeError`` unless it is None or a function that mixes batches."""
    if mix is not None and (not callable(mix) or isinstance(mix, (type, nn.Module))):
        came = f"the class {mix.__name__}" if isinstance(mix, type) else repr(mix)
        came = f"a {type(mix).__name__}" if isinstance(mix, nn.Module) else came
        raise TypeError(
            f"mix is {came}; expected None or a function (images, masks, ...) -> (images, masks, ...), such as "
            "stseg.CutMix() or stseg.ClassMix()"
        )


def check_log(log: object) -> None:
    """Raise a ``TypeError`` unless it is callable, a list or tuple of callables, or None."""
    several = isinstance(log, (list, tuple))
    for each in log if isinstance(log, (list, tuple)) else () if log is None else (log,):
        if not callable(each) or isinstance(each, type):
            what = f"the class {each.__name__}" if isinstance(each, type) else repr(each)
            raise TypeError(
                f"log {'holds' if several else 'is'} {what}; expected a function of a dictionary of numbers, such as "
                "print or stseg.loggers.TensorBoard(folder), or a list of them"
            )


def check_image_range(images: Tensor, checked: set[str], *, rows: Tensor | None = None) -> None:
    """Raise a ``ValueError`` unless float images are in [0, 1], with a small margin.

    Always on the CPU; on other devices, where looking waits for the device, only the first time.

    Args:
        images: ``(B, ...)`` float.
        checked: names of the other devices on which images were checked already; the device is added.
        rows: ``(B,)`` bool, which images to look at; None for all.
    """
    device = images.device.type
    if device in checked or device == "meta" or torch.compiler.is_compiling():
        return
    if device != "cpu":
        checked.add(device)
    images = images if rows is None else images[rows]
    if not images.numel():
        return
    low, high = (float(extreme) for extreme in torch.aminmax(images.detach()))
    if low < -_MARGIN or high > 1 + _MARGIN:  # NaN becomes a loss that is not finite, which is reported
        hint = "images / 255" if low >= 0 else "not normalized: stseg.Segmenter(network, mean=..., std=...) does that"
        raise ValueError(f"images hold values from {low:g} to {high:g}; expected floats in [0, 1] ({hint})")
