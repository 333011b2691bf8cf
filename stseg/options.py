"""Messages about arguments of Python calls, in the words of the console command."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Mapping

_VALUE = r"(?:\{[^{}]*\}|\([^()]*\)|\[[^\[\]]*\]|'[^']*'|\"[^\"]*\"|[\w.+-]*[\w+-])"


def as_options(message: str, options: Mapping[str, str]) -> str:
    """Replace ``name=value``, and ``name is`` at the start, by the option of that name.

    Names without an option, and values that are no literals, stay as they are.

    Args:
        message: the message.
        options: the option of each argument, such as ``{"class_map": "--class-map"}``.

    Example:
        >>> options = {"class_map": "--class-map", "mask_suffix": "--mask-suffix", "steps": "--steps"}
        >>> as_options("write mask_suffix='_m', class_map={0: 0, 255: 1} or ids=...", options)
        'write --mask-suffix _m, --class-map 0:0 255:1 or ids=...'
        >>> as_options("steps is 0; expected 1 or more", options)
        '--steps is 0; expected 1 or more'
        >>> as_options("runs/steps=5/run.json is damaged", options), as_options("steps=5/run.json", options)
        ('runs/steps=5/run.json is damaged', 'steps=5/run.json')
    """
    if not options:
        return message
    names = "|".join(sorted(map(re.escape, options), key=len, reverse=True))

    def replaced(found: re.Match[str]) -> str:
        try:
            value = ast.literal_eval(found[2])
        except (ValueError, SyntaxError):
            return found[0]
        return f"{options[found[1]]} {_words(value)}"

    # Not in a path such as runs/lr=0.01/run.json.
    message = re.sub(rf"(?<![\w./\\-])({names})=({_VALUE})(?![\w/\\]|\.\w)", replaced, message)
    return re.sub(rf"^({names})(?= is )", lambda found: options[found[1]], message)


def _words(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(f"{_joined(key)}:{to}" for key, to in value.items())
    if isinstance(value, (tuple, list)):
        return " ".join(map(_words, value))
    return "none" if value is None else shlex.quote(str(value))


def _joined(key: object) -> str:
    return ",".join(map(str, key)) if isinstance(key, tuple) else str(key)
