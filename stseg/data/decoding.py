"""Decoding of image and mask files: every sample as the file stores it, or an error."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from stseg.data.observations import observe_palette
from stseg.data.samples import sixteen_bits
from stseg.errors import DataError, StsegError, UnreadableImageError

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_LOSSY_TIFF = {6: "JPEG", 7: "JPEG", 33003: "JPEG 2000", 33005: "JPEG 2000", 34712: "JPEG 2000", 50001: "WebP"}
_LOSSLESS = ("PNG", "BMP", "TIFF")
_ORIENTATION = 0x0112
_BACK = {  # of each orientation, to the pixels as stored
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
_UNSIGNED, _SIGNED, _FLOAT = 1, 2, 3  # TIFF's SampleFormat
_OR_BANDS = (
    "; if the pages are bands of one image: tifffile.imwrite(path, bands, photometric='minisblack', "
    "planarconfig='separate'), with bands (C, H, W)"
)


class Samples(NamedTuple):
    """Samples of a file that an 8-bit PIL image would cut."""

    values: np.ndarray[Any, Any]
    """``(H, W, C)`` integers or floats."""
    has_alpha: bool = False
    """Whether the last channel is transparency."""
    stated: tuple[float, float] | None = None
    """The values of black and white that the file states."""
    inverted: bool = False
    """Whether the file says that the lowest value is white."""
    extra: int = 0
    """Number of last channels whose meaning the file does not state."""


class Decoded(NamedTuple):
    """Content of an image file."""

    image: Image.Image | Samples
    """The upright image."""
    orientation: int
    """EXIF orientation of the file, 1 to 8; 1 for none."""


def decode_image(path: Path, *, apply_exif: bool = True) -> Decoded:
    """Decode an image file.

    Raises:
        UnreadableImageError: if the file is missing or broken; names it.
        DataError: if it holds more than one image, or samples that cannot be read without loss; says how to read it.
    """
    with _errors_of(path):
        if _is_tiff(path) and (deep := _deep_tiff(path, apply_exif=apply_exif)) is not None:
            return deep
        with Image.open(path) as image:
            _refuse_several(image, path)
            depth = _bits_per_channel(image, path)
            orientation = image.getexif().get(_ORIENTATION, 1)  # of a PNG, this loads it
            if image.format == "PNG" and depth > 8 and not image.mode.startswith("I"):
                alpha = image.mode in ("RGBA", "LA")
                values = _turned(_decode_png(path), orientation if apply_exif else 1)
                return Decoded(Samples(values, alpha), orientation)
            if depth > 8 and not image.mode.startswith("I"):
                raise DataError(f"{path} has {depth} bits per channel, of which 8 would be read; expected PNG or TIFF")
            stated = (0.0, 65535.0) if image.format == "PPM" else _stated_range(image)
            inverted = image.format == "TIFF" and _tag(image, 262, 1) == 0
            unsigned = image.format == "TIFF" and _tag(image, 258, 8) == 32 and _tag(image, 339, 1) == _UNSIGNED
            upright = _loaded(image, orientation, apply_exif=apply_exif)
            if upright.mode.startswith("I") or upright.mode == "F":
                values = np.array(upright)
                if image.format == "JPEG2000":  # which PIL spreads over 16 bits
                    values, stated = values >> (16 - depth), (0.0, float(2**depth - 1)) if depth < 16 else None
                if image.format != "TIFF":
                    values = sixteen_bits(values)  # in which older versions of PIL return 16 bits
                values = values.view(np.uint32) if unsigned else values
                return Decoded(Samples(values[..., None], stated=stated, inverted=inverted), orientation)
            return Decoded(upright, orientation)


def decode_mask(path: Path, *, colors: bool = False, apply_exif: bool = True) -> np.ndarray[Any, Any]:
    """Decode a mask file: the values that it stores, or colors.

    TIFF gives the stored values, whatever its photometric interpretation is, as tifffile does; PNG and BMP in gray of
    less than 8 bits give values scaled to 0..255, as PIL and OpenCV do; palette images give indices.

    Args:
        path: PNG, BMP or TIFF.
        colors: whether to return the colors of palette and gray images instead.
        apply_exif: whether to turn the mask by its EXIF orientation.

    Returns:
        ``(H, W)`` integers; ``(H, W, C)`` uint8 or uint16 for an image in color, where the last of 2 or 4 channels is
        transparency.

    Raises:
        UnreadableImageError: if the file is missing or broken; names it.
        DataError: if the file has a lossy format, floats, or several images.
    """
    with _errors_of(path):
        tiff = _is_tiff(path)
        if tiff:
            _refuse_lossy_tiff(path)
        try:
            image = Image.open(path)
        except UnidentifiedImageError:
            if not tiff:
                raise
            return _tiff_mask(path, apply_exif=apply_exif)
        with image:
            if image.format not in _LOSSLESS:
                raise DataError(
                    f"the mask {path} is a {image.format} file, which may change class indices; "
                    "expected PNG, BMP or TIFF that was never compressed with loss"
                )
            _refuse_several(image, path)
            if tiff and not _pil_keeps_mask(image):
                return _tiff_mask(path, apply_exif=apply_exif)
            if image.format == "PNG" and _bits_per_channel(image, path) > 8 and not image.mode.startswith("I"):
                return _turned(_decode_png(path), image.getexif().get(_ORIENTATION, 1) if apply_exif else 1)
            if image.format == "BMP" and image.mode == "1" and path.read_bytes()[28:30] != b"\x01\x00":
                raise ValueError("Pillow misreads a BMP of more than 1 bit whose palette is black and white; use PNG")
            unpack = _stored_values(image) if tiff else None
            upright = _loaded(image, image.getexif().get(_ORIENTATION, 1), apply_exif=apply_exif)
            if upright.mode == "P":
                _observe_palette(upright)
            if colors and upright.mode in ("1", "L", "P", "PA"):
                alpha = "transparency" in upright.info or upright.mode == "PA"
                return np.array(upright.convert("RGBA" if alpha else "RGB"))
            if unpack is not None:
                return unpack(np.array(upright))
            return np.array(upright.convert("L") if upright.mode == "1" else upright)


def orientation_of(path: Path) -> int:
    """Return the EXIF orientation of an image file, 1 to 8."""
    with _errors_of(path):
        try:
            with Image.open(path) as image:
                return int(image.getexif().get(_ORIENTATION, 1))
        except UnidentifiedImageError:
            return _tifffile(path, apply_exif=False)[2]


def pixel_limit_error(name: str, error: Exception) -> DataError:
    """Return the error for an image above PIL's limit of pixels."""
    return DataError(
        f"{name} has more pixels than PIL reads by default ({error}); if you trust the file: "
        "import PIL.Image; PIL.Image.MAX_IMAGE_PIXELS = None"
    )


@contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    try:
        yield
    except StsegError:
        raise
    except Image.DecompressionBombError as error:
        raise pixel_limit_error(str(path), error) from error
    except Exception as error:  # PIL raises many types for a broken file
        raise UnreadableImageError(f"{path} cannot be read as an image: {error}") from error


def _is_tiff(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) in _TIFF


def _count(image: Image.Image) -> int:
    """Return the number of images in a file, without previews."""
    count = getattr(image, "n_frames", 1)
    if count == 1 or image.format == "MPO":  # whose further images are previews
        return 1
    if image.format == "TIFF":
        whole = 0
        for place in range(count):
            image.seek(place)
            whole += not _tag(image, 254, 0) & 1  # not of reduced resolution, as the overviews of GeoTIFFs
        image.seek(0)
        return whole
    return count


def _refuse_several(image: Image.Image, path: Path) -> None:
    count = _count(image)
    if count > 1:
        what, hint = ("pages", _OR_BANDS) if image.format == "TIFF" else ("frames", "")
        raise DataError(
            f"{path} holds {count} {what}; expected one image in a file (save each as a file of its own{hint})"
        )


def _bits_per_channel(image: Image.Image, path: Path) -> int:
    """Return the depth of a file that PIL would read with 8 bits; 8 for others."""
    args = _decoder_arguments(image)
    raw = args[0] if isinstance(args, tuple) and args else args
    if isinstance(raw, str) and ";16" in raw:
        return 16
    if image.format == "PPM" and isinstance(args, tuple) and isinstance(args[-1], int) and args[-1] > 255:
        return int(args[-1]).bit_length()
    if image.format == "JPEG2000":
        content = path.read_bytes()
        size = content.find(b"\xff\x4f\xff\x51")  # start of the codestream, and its sizes
        return 8 if size < 0 else (content[size + 42] & 0x7F) + 1
    return 8


def _decoder_arguments(image: Image.Image) -> Any:
    """Return what PIL tells its decoder: the layout of the samples in the file, alone or first in a tuple."""
    tile = getattr(image, "tile", None)
    return tile[0][3] if tile else None


def _decode_png(path: Path) -> np.ndarray[Any, Any]:
    """Return ``(H, W, C)`` uint16 of a 16-bit PNG, which PIL would cut to 8 bits."""
    try:
        import imagecodecs
    except ImportError:
        raise DataError(
            f"{path} has 16 bits per channel, of which Pillow reads 8; "
            'pip install "stseg[tiff]" reads all (with imagecodecs)'
        ) from None
    values: np.ndarray[Any, Any] = imagecodecs.png_decode(path.read_bytes())
    return values


def _loaded(image: Image.Image, orientation: int, *, apply_exif: bool) -> Image.Image:
    """Return an image, turned by its EXIF orientation or as it is stored; PIL turns TIFFs while it loads them."""
    image.load()
    turned = orientation != 1 and image.getexif().get(_ORIENTATION, 1) == 1
    if apply_exif or not turned:
        return ImageOps.exif_transpose(image) if apply_exif and orientation != 1 else image.copy()
    return image.transpose(_BACK[orientation])


def _observe_palette(mask: Image.Image) -> None:
    palette = mask.getpalette("RGB") or []
    held = [index for index, count in enumerate(mask.histogram()) if count and 3 * index + 2 < len(palette)]
    observe_palette({index: tuple(palette[3 * index : 3 * index + 3]) for index in held})


def _turned(values: np.ndarray[Any, Any], orientation: int) -> np.ndarray[Any, Any]:
    """Apply an EXIF orientation to ``(H, W, C)``."""
    if orientation in (5, 6, 7, 8):
        values = values.swapaxes(0, 1)
    rows = slice(None, None, -1 if orientation in (3, 4, 7, 8) else 1)
    columns = slice(None, None, -1 if orientation in (2, 3, 6, 7) else 1)
    return values[rows, columns]


def _tag(image: Image.Image, number: int, default: int) -> int:
    value = image.tag_v2.get(number, default)  # type: ignore[attr-defined]
    return int(value[0] if isinstance(value, tuple) else value)


def _stated_range(image: Image.Image) -> tuple[float, float] | None:
    """Return the range that a TIFF states by its sample limits, or by a depth that is no power of 2."""
    if image.format != "TIFF":
        return None
    lows, highs = ([t for n in pair if (t := _tag(image, n, -1)) >= 0] for pair in ((340, 280), (341, 281)))
    if highs:
        return float(lows[0] if lows else 0), float(highs[0])
    bits = _tag(image, 258, 8)
    return (0.0, float(2**bits - 1)) if bits in (10, 12, 14) else None


def _refuse_lossy_tiff(path: Path) -> None:
    try:
        with Image.open(path) as image:
            lossy = _LOSSY_TIFF.get(_tag(image, 259, 1))
    except UnidentifiedImageError:
        return
    if lossy is not None:
        raise DataError(f"the mask {path} is compressed with {lossy}, which may change class indices; expected LZW")


def _pil_keeps_mask(image: Image.Image) -> bool:
    """Return whether PIL keeps all values of a TIFF mask."""
    if image.mode in ("1", "L", "P", "I;16", "I;16B", "I"):
        return _tag(image, 277, 1) == 1
    return image.mode in ("RGB", "RGBA", "LA") and _tag(image, 258, 8) == 8 and not _unstated_bands(image)


def _unstated_bands(image: Image.Image) -> int:
    return len(image.tag_v2.get(338, ())) - (image.mode in ("RGBA", "LA"))  # type: ignore[attr-defined]


def _stored_values(image: Image.Image) -> Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]] | None:
    """Return what undoes PIL's inversion and scaling of the gray values of a TIFF."""
    args = _decoder_arguments(image)
    raw = args[0] if isinstance(args, tuple) else args
    inverted = "I" in str(raw).partition(";")[2]
    bits, signed = _tag(image, 258, 1 if image.mode == "1" else 8), _tag(image, 339, 1) == _SIGNED
    if image.mode == "1":
        return lambda values: (values ^ inverted).astype(np.uint8)
    if image.mode == "L":
        factor = {2: 85, 4: 17}.get(bits, 1)
        flip = 255 if inverted else 0
        return lambda values: ((values ^ flip) // factor).view(np.int8 if signed and bits == 8 else np.uint8)
    if image.mode == "I" and bits == 32 and not signed:
        return lambda values: values.view(np.uint32)
    return None


def _deep_tiff(path: Path, *, apply_exif: bool) -> Decoded | None:
    """Read a TIFF of samples or bands that PIL would drop; None if PIL keeps them."""
    stated = None
    with suppress(UnidentifiedImageError), Image.open(path) as image:
        several = _count(image) > 1
        if several and importlib.util.find_spec("tifffile") is None:
            _refuse_several(image, path)
        bands, bits, signed = _tag(image, 277, 1), _tag(image, 258, 8), _tag(image, 339, 1) == _SIGNED
        whole = bits <= 8 and not signed and _unstated_bands(image) <= 0 if bands > 1 else not (bits == 8 and signed)
        if whole and not several:
            return None
        stated = _stated_range(image)
    values, page, orientation = _tifffile(path, apply_exif=apply_exif)
    alpha = any(int(kind) in (1, 2) for kind in page.extrasamples[-1:])
    colors = 3 if int(page.photometric) == 2 else 1
    extra = values.shape[2] - colors - alpha
    if int(page.photometric) == 3:
        raise DataError(f"{path} has a palette that cannot be read; expected PNG")
    samples = Samples(values, alpha, stated, inverted=int(page.photometric) == 0, extra=max(extra, 0))
    return Decoded(samples, orientation)


def _tiff_mask(path: Path, *, apply_exif: bool) -> np.ndarray[Any, Any]:
    values, _, _ = _tifffile(path, apply_exif=apply_exif)
    if values.dtype.kind == "f":
        raise DataError(
            f"the mask {path} holds {values.dtype}; expected integers, as "
            "tifffile.imwrite(path, tifffile.imread(path).astype('uint8')) makes them of whole numbers"
        )
    if values.dtype.kind not in "biu":
        raise DataError(f"the mask {path} holds {values.dtype}; expected integers")
    return values[..., 0] if values.shape[2] == 1 else values


def _tifffile(path: Path, *, apply_exif: bool) -> tuple[np.ndarray[Any, Any], Any, int]:
    """Return the samples ``(H, W, C)`` of a TIFF, its first page and its orientation.

    Raises:
        DataError: if tifffile is missing, or the file holds several images.
    """
    try:
        import tifffile
    except ImportError:
        raise DataError(
            f"{path} holds samples that Pillow cannot read without loss; "
            'pip install "stseg[tiff]" reads them (with tifffile)'
        ) from None
    with tifffile.TiffFile(path) as file:
        series = file.series[0]
        axes, values = series.axes, series.asarray()
        page = file.pages.first
        whole = [each for each in file.series if not each.keyframe.is_reduced]
        kept = [axis for axis, size in zip(axes, values.shape, strict=True) if size > 1 or axis in "YX"]
        channels = [axis for axis in kept if axis in "CS"]
        others = [axis for axis in kept if axis not in "YXCS"]
        if len(whole) > 1 or others or len(channels) > 1 or "Y" not in kept or "X" not in kept:
            sizes = " x ".join(f"{size} ({axis})" for axis, size in zip(axes, values.shape, strict=True))
            raise DataError(
                f"{path} holds several images: {len(whole)} series, the first one of {sizes}; "
                f"expected one image in a file (save each as a file of its own{_OR_BANDS})"
            )
        values = values.reshape([size for axis, size in zip(axes, values.shape, strict=True) if axis in kept])
        order = [kept.index("Y"), kept.index("X"), *(kept.index(axis) for axis in channels)]
        values = values.transpose(order)
        values = values if channels else values[..., None]
        orientation = int(page.tags.valueof("Orientation", default=1))
        return _turned(values, orientation if apply_exif else 1), page, orientation
