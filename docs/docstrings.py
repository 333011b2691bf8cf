"""Brings the docstrings into the form that mkdocstrings reads: links for roles, and examples as code."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod):`([\w.]+)`")
_EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites docstrings before they are parsed."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for every object that it has read."""
        if obj.docstring is not None:
            text = _ROLE.sub(r"[`\1`][\1]", obj.docstring.value)
            obj.docstring.value = _EXAMPLE.sub("Examples:", text)
