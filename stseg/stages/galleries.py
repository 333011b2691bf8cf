"""Pictures of pseudo-labels and predictions: images with their masks over them, embedded in a page."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Callable, Collection, Sequence
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

SCRIPT = """const sliders = document.querySelectorAll(".slider input");
const show = value => {
  sliders.forEach(slider => { slider.value = value });
  document.documentElement.style.setProperty("--mask", value / 100);
};
sliders.forEach(slider => slider.addEventListener("input", () => show(slider.value)));
if (sliders.length) show(sliders[0].value)"""


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
    legend = list_colors(found, ignore_index, class_name, "no color: left out of the pseudo-mask")
    return join((slider("opacity"), legend, *parts))


def slider(id: str) -> Html:
    """Return the slider of the opacity of masks; several on a page move together."""
    label = element("label", "Opacity of the masks", **{"for": id})
    return element("div", label, Html(f'<input id="{id}" type="range" min="0" max="100" value="50">'), kind="slider")


def list_colors(values: Collection[int], ignore_index: int, class_name: Callable[[int], str], ignored: str) -> Html:
    """Return the legend of the values in masks, with a text for ignored pixels if there are any."""
    colors = np.array(palette()).reshape(-1, 3).tolist()
    names = [
        element("li", element("i", style=f"background: rgb{tuple(colors[index % 256])}"), class_name(index))
        for index in sorted({*values} - {ignore_index})
    ]
    return element("ul", *names, *([element("li", ignored)] if ignore_index in values else []), kind="legend")


def draw_image(image: Tensor, *, most: int = _SIDES[0]) -> str:
    """Return the data URI of an image ``(C, H, W)``, uint8 or float in [0, 1], its sides ``most`` pixels or less."""
    return _encode(_as_picture(image), "JPEG", most)


def draw_mask(mask: Tensor, ignore_index: int | None, *, most: int = _SIDES[0]) -> str:
    """Return the data URI of a mask ``(H, W)`` in the colors of the classes; ignored pixels are transparent."""
    return _encode(_colored(mask, ignore_index), "PNG", most)


def overlay(image: str, mask: str, size: tuple[int, int], alts: tuple[str, str]) -> Html:
    """Return an image with a mask over it.

    Args:
        image: data URI of the image.
        mask: data URI of the mask; empty for none.
        size: height and width of the image.
        alts: texts in place of the two.
    """
    shape = {"style": f"aspect-ratio: {size[1]} / {size[0]}"} | ({"kind": "small"} if max(size) < _SMALL else {})
    return element("div", _img(image, alts[0], **shape), _img(mask, alts[1]) if mask else "", kind="overlay")


def _draw(picture: Picture, image: Tensor, mask: Tensor, ignore_index: int) -> Html:
    id = picture.data.ids[picture.position]
    drawn = overlay(
        draw_image(image),
        draw_mask(mask, ignore_index),
        (mask.shape[0], mask.shape[1]),
        (f"image {id}", f"pseudo-mask of {id}"),
    )
    by = f"mask of {picture.labeled_by}" if picture.labeled_by else ""
    texts = (element("div", text) for text in (picture.score, by) if text)
    return element("figure", drawn, element("figcaption", element("b", id), *texts))


def _img(address: str, alt: str, **attributes: object) -> Html:
    return Html(element("img", loading="lazy", src=address, alt=alt, **attributes).removesuffix("</img>"))


def _as_picture(image: Tensor) -> Image.Image:
    """Return the first three channels as colors, or the first one in gray if there are fewer."""
    pixels = image if image.dtype == torch.uint8 else (image.float().clamp(0, 1) * 255).round().byte()
    return Image.fromarray(pixels[:3].permute(1, 2, 0).numpy() if len(pixels) >= 3 else pixels[0].numpy())


def _colored(mask: Tensor, ignore_index: int | None) -> Image.Image:
    """Return a mask in the colors of the store; ignored pixels are transparent."""
    colors = np.array(palette(), dtype=np.uint8).reshape(-1, 3)
    values = mask.numpy().astype(np.int64)
    opaque = np.full(values.shape, 255, dtype=np.uint8)
    opaque[values == ignore_index] = 0
    return Image.fromarray(np.dstack((colors[values % 256], opaque)))


def _encode(picture: Image.Image, kind: str, most: int) -> str:
    """Return a picture as a data URI, made smaller until its file is small enough."""
    resample = Image.Resampling.NEAREST if kind == "PNG" else Image.Resampling.LANCZOS
    for side in (side for side in _SIDES if side <= most):
        scale = min(1.0, side / max(picture.size))
        size = [max(1, round(length * scale)) for length in picture.size]
        file, options = io.BytesIO(), {"quality": 80} if kind == "JPEG" else {}
        picture.resize((size[0], size[1]), resample).save(file, kind, optimize=True, **options)
        if file.tell() <= _MOST_BYTES:
            break
    return f"data:image/{kind.lower()};base64,{b64encode(file.getvalue()).decode()}"
