"""Labels of georeferenced rasters, read and written by window."""

from __future__ import annotations

import os
import secrets
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stseg.checks import check_count
from stseg.errors import DataError, UnreadableImageError
from stseg.inference.tiles import Block, Range, TileLabeler, ValueScale
from stseg.types import Precision

_MOST = 65535  # of the values that are written
_ROWS = 256  # read at once where all values are looked at


def predict_raster(
    model: nn.Module,
    path: str | Path,
    out: str | Path,
    *,
    bands: Sequence[int] | None = None,
    values: Mapping[int, int] | Sequence[int] | None = None,
    value_range: tuple[float, float] | None = None,
    tile: int | tuple[int, int] = 1024,
    overlap: float = 0.25,
    nodata: int = 255,
    precision: Precision = "auto",
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Path:
    """Label a georeferenced raster of any size in bounded memory, and write the classes as a GeoTIFF beside it.

    The classes are those of ``stseg.Tiled(model, tile, overlap)``. The raster is read and written by window; memory
    holds what is stated at :func:`stseg.predict_array`, and the cache of GDAL (``GDAL_CACHEMAX``, by default 5 % of the
    memory). The output has one band and the width, height, CRS and transform (or ground control points or rational
    polynomial coefficients) of the raster. It is tiled, compressed (Deflate), and uint8, or uint16 where a value is
    above 255.

    A pixel has no data where all bands that are read have none, by the nodata value, the mask or the alpha band of the
    raster. It gets ``nodata`` in the output, where that value is recorded. The network sees 0 (black) in place of each
    value without data, and tiles without any data are not computed.

    The output is written under a hidden name (``.<name>.<8 digits>.part``) in the same folder, read back, and renamed
    at the end: a file named ``out`` is always whole. A killed run leaves the hidden file, which may be deleted.

    Needs ``pip install "stseg[geo]"`` (rasterio).

    Args:
        model: a network or a wrapped one, with as many input channels as bands are read. Its training mode is restored.
        path: the raster, any that GDAL opens.
        out: the GeoTIFF, ``.tif`` or ``.tiff``; replaced if it exists.
        bands: numbers of the bands to read, in order, from 1, such as ``(4, 3, 2)``; None for all but an alpha band.
        values: what is written for each class, such as ``{0: 0, 1: 100}`` or ``[0, 100]``, 0 to 65535; None for the
            class itself.
        value_range: the values of black and white, such as ``(0, 10000)``. None for uint8, which stays as it is, for
            floats in [0, 1], for ranges that the file states, and for 16 bits of which the highest is used, which are 0
            to 65535: the rule of :class:`stseg.data.SegmentationFolder`. To know that, up to all values are read first.
            Values are taken as stored, without the scale and offset that a raster may name.
        tile: height and width of a tile, or one number for both.
        overlap: least share of a tile that overlaps with the next one, in [0, 1).
        nodata: value of pixels without data, which no class may have.
        precision: ``"fp32"``, ``"bf16"``, or ``"auto"`` for bfloat16 where the device computes it natively.
        device: device to move the model to; None leaves it where it is.
        progress: whether to show a bar.

    Returns:
        The path of the output.

    Raises:
        ImportError: if rasterio is not installed.
        UnreadableImageError: if the raster is missing or broken; names it.
        DataError: if there is no such band; if bands differ in dtype, hold indices of a palette or less than 8 bits, or
            store white as 0; if values do not tell their range or lie outside of it.
        NetworkError: if the network does not take a tile, or returns NaN or infinite logits.
        ValueError: if an argument is out of its range, or ``nodata`` is the value of a class.
        OSError: if the output cannot be written, as in a read-only folder or on a full disk.

    Example:
        >>> import rasterio, tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> pixels = np.random.default_rng(0).integers(1, 256, (3, 80, 90), dtype=np.uint8)
        >>> pixels[:, :20] = 0
        >>> with rasterio.open(
        ...     folder / "scene.tif", "w", driver="GTiff", width=90, height=80, count=3, dtype="uint8", nodata=0,
        ...     crs="EPSG:32633", transform=rasterio.transform.from_origin(500_000, 5_000_000, 10, 10),
        ... ) as raster:
        ...     raster.write(pixels)
        >>> out = predict_raster(nn.Conv2d(3, 4, 1), folder / "scene.tif", folder / "classes.tif", progress=False)
        >>> with rasterio.open(out) as classes:
        ...     classes.shape, classes.crs.to_epsg(), classes.nodata, int(classes.read(1)[:20].min())
        ((80, 90), 32633, 255.0, 255)
    """
    rasterio = _import_rasterio()
    labeler = TileLabeler(model, tile, overlap, precision, device, progress)
    target = _check_out(path, out)
    written = ClassValues(values, nodata)
    with _no_warning(rasterio), _open(rasterio, path) as source:
        reader = RasterReader(rasterio, source, str(path), bands, value_range)
        with RasterWriter(rasterio, target, source, written) as writer:

            def write(block: Block) -> None:
                writer.write(block, reader.pop_valid(block.rows, block.columns))

            way_out = f"; these are the bands {reader.bands} of {path}, bands=(1, 2, 3) reads some of them"
            labeler.label(source.height, source.width, reader.read, write, name=str(path), way_out=way_out)
    return target


class ClassValues:
    """The value of each class in the output.

    Raises:
        TypeError: if a value is not an integer.
        ValueError: if a value is not in 0..65535, or ``nodata`` is the value of a class.
    """

    def __init__(self, values: Mapping[int, int] | Sequence[int] | None, nodata: int) -> None:
        check_count("nodata", nodata, least=0)
        if values is not None and not isinstance(values, (Mapping, Sequence)):
            raise TypeError(f"values is {values!r}; expected the value of each class, such as {{0: 0, 1: 100}}")
        given = None if values is None else dict(values.items() if isinstance(values, Mapping) else enumerate(values))
        for value in (nodata, *(given or {}).values()):
            check_count("a value of the output", value, least=0)
            if value > _MOST:
                raise ValueError(f"a value of the output is {value}; expected 0..{_MOST}")
        self.given, self.nodata = given, int(nodata)
        if given is not None:
            self._check_nodata(list(given.values()))

    def of(self, num_classes: int) -> np.ndarray[Any, Any]:
        """Return the value of each class, ``(K,)`` uint8 or uint16.

        Raises:
            ValueError: if a class has no value, or ``nodata`` is the value of a class.
        """
        given = {index: index for index in range(num_classes)} if self.given is None else self.given
        if sorted(given) != list(range(num_classes)):
            raise ValueError(
                f"values has the classes {sorted(given)}; expected 0..{num_classes - 1}, as of the network"
            )
        found = [given[index] for index in range(num_classes)]
        self._check_nodata(found)
        return np.array(found, self.dtype(found))

    def dtype(self, values: Sequence[int]) -> np.dtype[Any]:
        """Return the dtype of the output: uint8 if all values fit, else uint16."""
        return np.dtype(np.uint8 if max(*values, self.nodata, 0) <= 255 else np.uint16)

    def _check_nodata(self, values: list[int]) -> None:
        if self.nodata in values:
            free = next(value for value in (255, 0, *range(_MOST, -1, -1)) if value not in values)
            raise ValueError(
                f"nodata is {self.nodata}, the value of class {values.index(self.nodata)} of {len(values)}; "
                f"expected a value of no class: nodata={free}"
            )


class RasterReader:
    """Windows of a raster as images.

    Args:
        rasterio: the module.
        source: the raster.
        name: its name for error messages.
        bands: numbers of the bands, from 1; None for all but alpha.
        value_range: the values of black and white.

    Raises:
        DataError: see ``predict_raster``.
    """

    def __init__(
        self, rasterio: ModuleType, source: Any, name: str, bands: Sequence[int] | None, value_range: Range | None
    ) -> None:
        self._rasterio, self._source, self._name = rasterio, source, name
        self.bands = _check_bands(source, name, bands, rasterio.enums.ColorInterp)
        dtypes = {source.dtypes[band - 1] for band in self.bands}
        if len(dtypes) > 1:
            raise DataError(f"the bands {self.bands} of {name} are {', '.join(sorted(dtypes))}; expected one dtype")
        dtype = np.dtype(dtypes.pop())
        if dtype.kind not in "iuf":
            raise DataError(f"{name} holds {dtype}; expected integers or real numbers")
        stated = _stated_range(source, self.bands[0])
        self._scale = ValueScale(dtype, value_range, stated=stated, windows=self._values(), name=name)
        self._valid: dict[tuple[int, int], np.ndarray[Any, Any]] = {}

    def read(self, rows: slice, columns: slice) -> Tensor | None:
        """Return a window ``(C, h, w)``, uint8 or float32 in [0, 1], 0 where there are no data; None without any."""
        values, empty = self._window(rows, columns)
        if empty.all():
            return None
        valid: np.ndarray[Any, Any] = np.logical_not(empty.all(0))
        self._valid[rows.start, columns.start] = valid
        values[empty] = values[~empty][0]  # one within the range
        image = self._scale(values, rows, columns)
        image[torch.from_numpy(empty)] = 0
        return image

    def pop_valid(self, rows: slice, columns: slice) -> np.ndarray[Any, Any]:
        """Return where there are data, ``(h, w)`` bool, in the beginning of a window that was read, and forget it."""
        height, width = rows.stop - rows.start, columns.stop - columns.start
        valid = self._valid.pop((rows.start, columns.start), np.zeros((height, width), bool))
        return valid[:height, :width]

    def _window(self, rows: slice, columns: slice) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Return values ``(C, h, w)``, and where there are none."""
        window = _window(self._rasterio, rows, columns)
        with _reading(self._rasterio, self._name):
            values = self._source.read(self.bands, window=window)
            return values, self._source.read_masks(self.bands, window=window) == 0

    def _values(self) -> Iterator[np.ndarray[Any, Any]]:
        height, width = self._source.shape
        for top in range(0, height, _ROWS):
            values, empty = self._window(slice(top, min(height, top + _ROWS)), slice(0, width))
            yield values[~empty]


class RasterWriter:
    """A GeoTIFF of classes, which has its name when it is whole.

    Args:
        rasterio: the module.
        out: the file.
        source: the raster whose georeference it gets.
        values: what is written for each class.
    """

    def __init__(self, rasterio: ModuleType, out: Path, source: Any, values: ClassValues) -> None:
        self._rasterio, self._out, self._source, self._values = rasterio, out, source, values
        self._temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}.part")
        self._file: Any = None
        self._of_class: np.ndarray[Any, Any] | None = None
        self._counts = np.zeros(_MOST + 1, np.int64)  # of the values that were written

    def __enter__(self) -> RasterWriter:
        self._out.parent.mkdir(parents=True, exist_ok=True)
        self._temporary.touch()  # in a read-only folder, an error before anything is computed
        return self

    def write(self, block: Block, valid: np.ndarray[Any, Any]) -> None:
        """Write a part of the classes, and nodata where it is not valid."""
        if self._of_class is None:
            self._of_class = self._values.of(block.num_classes)
            with self._writing():
                self._open(self._of_class.dtype)
        found = self._of_class[block.mask]
        found[~valid] = self._values.nodata
        with self._writing():
            self._file.write(found, 1, window=_window(self._rasterio, block.rows, block.columns))
        self._counts += np.bincount(found.ravel(), minlength=len(self._counts))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                with self._writing():
                    if self._file is None:  # no data at all
                        self._open(self._values.dtype(list((self._values.given or {}).values())))
                    self._file.close()
                    self._verify()
                os.replace(self._temporary, self._out)
            elif self._file is not None:
                self._file.close()
        finally:
            with suppress(FileNotFoundError):
                self._temporary.unlink()

    def _open(self, dtype: np.dtype[Any]) -> None:
        source, side = self._source, 256
        points, crs_of_points = source.gcps
        self._file = self._rasterio.open(
            self._temporary,
            "w",
            driver="GTiff",
            width=source.width,
            height=source.height,
            count=1,
            dtype=dtype,
            nodata=self._values.nodata,  # which is also what is not written
            crs=source.crs,
            transform=None if source.transform.is_identity else source.transform,
            tiled=True,
            blockxsize=side,
            blockysize=side,
            compress="deflate",
            BIGTIFF="IF_SAFER",
        )
        if points:
            self._file.gcps = (points, crs_of_points)
        if source.rpcs is not None:
            self._file.rpcs = source.rpcs

    def _verify(self) -> None:
        """Read the file back: GDAL may close it without an error although the disk is full."""
        counts = np.zeros_like(self._counts)
        with self._rasterio.open(self._temporary) as file:
            for top in range(0, file.height, _ROWS):
                rows = slice(top, min(file.height, top + _ROWS))
                found = file.read(1, window=_window(self._rasterio, rows, slice(0, file.width)))
                counts += np.bincount(found.ravel(), minlength=len(counts))
        expected = self._counts.copy()
        expected[self._values.nodata] += self._source.width * self._source.height - int(expected.sum())
        if not np.array_equal(counts, expected):
            raise OSError(f"{self._out} cannot be written: the file does not hold what was written; is the disk full?")
        with open(self._temporary, "rb+") as whole:
            os.fsync(whole.fileno())

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except self._rasterio.errors.RasterioError as error:
            raise OSError(f"{self._out} cannot be written: {error} Is the disk full?") from error


def _import_rasterio() -> ModuleType:
    try:
        import rasterio
    except ImportError:
        raise ImportError('predict_raster reads and writes with rasterio: pip install "stseg[geo]"') from None
    module: ModuleType = rasterio
    return module


def _check_out(path: str | Path, out: str | Path) -> Path:
    target = Path(out)
    if target.suffix.lower() not in (".tif", ".tiff"):
        raise ValueError(f"out is {str(out)!r}; expected the name of a GeoTIFF, which ends in .tif")
    if target.exists() and Path(path).exists() and os.path.samefile(path, target):
        raise ValueError(f"out is the raster itself ({out}); expected another file")
    if target.is_dir():
        raise IsADirectoryError(f"out is a folder ({out}); expected a file")
    return target


def _check_bands(source: Any, name: str, bands: Sequence[int] | None, kinds: Any) -> list[int]:
    if not source.count:
        parts = f", such as {source.subdatasets[0]}" if source.subdatasets else ""
        raise DataError(f"{name} holds no bands; expected a raster of one image{parts}")
    interpretations = source.colorinterp
    if bands is None:
        chosen = [band for band in source.indexes if interpretations[band - 1] != kinds.alpha]
    elif isinstance(bands, str) or not hasattr(bands, "__len__"):
        raise TypeError(f"bands is {bands!r}; expected a sequence of numbers, such as (1, 2, 3)")
    else:
        chosen = list(bands)
    for band in chosen:
        check_count("a band", band)
    if not chosen or max(chosen) > source.count:
        raise DataError(f"bands is {bands} of {name}, which has {source.count}; expected some of 1..{source.count}")
    if any(interpretations[band - 1] == kinds.palette for band in chosen):
        raise DataError(
            f"{name} holds indices of a palette; expected the colors: gdal_translate -expand rgb {name} colors.tif"
        )
    structure = {**source.tags(ns="IMAGE_STRUCTURE"), **source.tags(chosen[0], ns="IMAGE_STRUCTURE")}
    if structure.get("MINISWHITE") == "YES":
        raise DataError(f"{name} stores white as 0; expected a raster in which 0 is black (PHOTOMETRIC=MINISBLACK)")
    if int(structure.get("NBITS", 8)) < 8:
        raise DataError(f"{name} has {structure['NBITS']} bits a value; expected values of 8 bits or more")
    return [int(band) for band in chosen]


def _stated_range(source: Any, band: int) -> Range | None:
    """Return the range that the file states by its sample limits, or by a depth that is no power of 2."""
    tags = source.tags()
    if (high := tags.get("TIFFTAG_MAXSAMPLEVALUE")) is not None:
        return float(tags.get("TIFFTAG_MINSAMPLEVALUE", 0)), float(high)
    bits = int(source.tags(band, ns="IMAGE_STRUCTURE").get("NBITS", 8))
    return (0.0, float(2**bits - 1)) if bits in (10, 12, 14) else None


def _window(rasterio: ModuleType, rows: slice, columns: slice) -> Any:
    return rasterio.windows.Window(columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start)


@contextmanager
def _open(rasterio: ModuleType, path: str | Path) -> Iterator[Any]:
    with _reading(rasterio, str(path)):
        source = rasterio.open(path)
    with source:
        yield source


@contextmanager
def _reading(rasterio: ModuleType, name: str) -> Iterator[None]:
    try:
        yield
    except rasterio.errors.RasterioError as error:
        raise UnreadableImageError(f"{name} cannot be read as a raster: {error}") from error


@contextmanager
def _no_warning(rasterio: ModuleType) -> Iterator[None]:
    """Leave out the warning of rasters without a georeference, which give classes without one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        yield
