"""Pictures of pseudo-labels: images with their masks over them, embedded in a page."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stseg.inference.labeler import PseudoLabeled
from stseg.inference.mask_files import palette
from stseg.stages.page import Html, element, join

_SIDES = (400, 320, 240)  # longest side of a picture, smaller where the file would be too large
_MOST_BYTES = 48_000  # of the file of a picture
_SMALL = 120  # images that are shown with their pixels as squares

_SLIDER = element(
    "div",
    element("label", "Opacity of the masks", **{"for": "opacity"}),
    Html('<input id="opacity" type="range" min="0" max="100" value="50">'),
    kind="slider",
)
SCRIPT = """const slider = document.getElementById("opacity");
const show = () => document.documentElement.style.setProperty("--mask", slider.value / 100);
if (slider) { slider.addEventListener("input", show); show() }"""


@dataclass(frozen=True)
class Picture:
    """A pseudo-labeled image to show.

    Attributes:
        data: the data set that it is in.
        position: where.
        labeled_by: whose mask it is; None if not known.
        score: its score in words; empty without one.
    """

    data: PseudoLabeled
    position: int
    labeled_by: str | None
    score: str


@dataclass(frozen=True)
class Gallery:
    """Pictures under a heading, with a note below it."""

    title: str
    note: object
    pictures: Sequence[Picture]


def draw_galleries(galleries: Sequence[Gallery], *, ignore_index: int, class_name: Callable[[int], str]) -> Html:
    """Return the slider, the colors of all classes that occur, and the galleries that are not empty.

    Args:
        galleries: what to show.
        ignore_index: mask value of pixels that get no color.
        class_name: returns the name of a class.
    """
    found: set[int] = set()
    parts = []
    for gallery in galleries:
        figures = []
        for picture in gallery.pictures:
            image, mask = picture.data[picture.position]
            found.update(torch.unique(mask).tolist())
            figures.append(_draw(picture, image, mask, ignore_index))
        if figures:
            parts.append(join((element("h3", gallery.title), gallery.note, element("div", *figures, kind="pictures"))))
    if not parts:
        return Html("")
    colors = np.array(palette()).reshape(-1, 3).tolist()
    names = [
        element("li", element("i", style=f"background: rgb{tuple(colors[index % 256])}"), class_name(index))
        for index in sorted(found - {ignore_index})
    ]
    ignored = [element("li", "no color: left out of the pseudo-mask")] if ignore_index in found else []
    return join((_SLIDER, element("ul", *names, *ignored, kind="legend"), *parts))


def _draw(picture: Picture, image: Tensor, mask: Tensor, ignore_index: int) -> Html:
    id = picture.data.ids[picture.position]
    height, width = mask.shape
    size = {"style": f"aspect-ratio: {width} / {height}"} | ({"kind": "small"} if max(mask.shape) < _SMALL else {})
    overlay = element(
        "div",
        _img(_encode(_as_picture(image), "JPEG"), f"image {id}", **size),
        _img(_encode(_colored(mask, ignore_index), "PNG"), f"pseudo-mask of {id}"),
        kind="overlay",
    )
    by = f"mask of {picture.labeled_by}" if picture.labeled_by else ""
    texts = (element("div", text) for text in (picture.score, by) if text)
    return element("figure", overlay, element("figcaption", element("b", id), *texts))


def _img(address: str, alt: str, **attributes: object) -> Html:
    return Html(element("img", loading="lazy", src=address, alt=alt, **attributes).removesuffix("</img>"))


def _as_picture(image: Tensor) -> Image.Image:
    """Return the first three channels as colors, or the first one in gray if there are fewer."""
    pixels = image if image.dtype == torch.uint8 else (image.float().clamp(0, 1) * 255).round().byte()
    return Image.fromarray(pixels[:3].permute(1, 2, 0).numpy() if len(pixels) >= 3 else pixels[0].numpy())


def _colored(mask: Tensor, ignore_index: int) -> Image.Image:
    """Return a mask in the colors of the store; ignored pixels are transparent."""
    colors = np.array(palette(), dtype=np.uint8).reshape(-1, 3)
    values = mask.numpy().astype(np.int64)
    opaque = np.where(values == ignore_index, 0, 255).astype(np.uint8)
    return Image.fromarray(np.dstack((colors[values % 256], opaque)))


def _encode(picture: Image.Image, kind: str) -> str:
    """Return a picture as a data URI, made smaller until its file is small enough."""
    resample = Image.Resampling.NEAREST if kind == "PNG" else Image.Resampling.LANCZOS
    for side in _SIDES:
        scale = min(1.0, side / max(picture.size))
        size = [max(1, round(length * scale)) for length in picture.size]
        file, options = io.BytesIO(), {"quality": 80} if kind == "JPEG" else {}
        picture.resize((size[0], size[1]), resample).save(file, kind, optimize=True, **options)
        if file.tell() <= _MOST_BYTES:
            break
    return f"data:image/{kind.lower()};base64,{b64encode(file.getvalue()).decode()}"
