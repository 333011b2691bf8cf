"""Reading of the pages that reports are."""

from __future__ import annotations

import io
from base64 import b64decode
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image

VOID = {"meta", "img", "input", "br"}


class Page(HTMLParser):
    """A page that is checked to be one file of balanced tags and unique ids; its text, pictures, links and tables."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text, self.open, self.ids, self.links, self.labels = "", [], [], [], []
        self.pictures: dict[str, str] = {}  # addresses by alternative text
        self.tables: dict[str, list[list[str]]] = {}  # rows of cells by caption
        self.source = path.read_text(encoding="utf-8")
        assert self.source.startswith("<!doctype html>")
        self.feed(self.source)
        self.close()
        assert self.open == []
        assert [id for id, count in Counter(self.ids).items() if count > 1] == []
        for link in self.links:
            assert not link.startswith("#") or link[1:] in self.ids

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(set(names)) == len(names)
        given = dict(attributes)
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given[name] for name in ("href", "xlink:href") if name in given]
        self.labels += [given["aria-label"]] if "aria-label" in given else []
        if tag == "img":
            assert given["src"].startswith("data:image/")
            assert given["loading"] == "lazy"
            self.pictures[given["alt"]] = given["src"]
        assert "src" not in given or tag == "img"
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self._rows = []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("style", "script"):
            return
        self.text += data + "\n"
        if self.open and self.open[-1] == "caption":
            self.tables[data] = self._rows
        elif {"td", "th"} & set(self.open):
            self._rows[-1][-1] += data

    def picture(self, alt: str) -> np.ndarray:
        """The pixels of a picture."""
        return np.asarray(Image.open(io.BytesIO(b64decode(self.pictures[alt].split(",", 1)[1]))))
