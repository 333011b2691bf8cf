from __future__ import annotations

import builtins
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import stseg
from stseg import DataError, NetworkError, Tiled, UnreadableImageError, predict_raster
from stseg.models import batching

rasterio = pytest.importorskip("rasterio")
pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

QUIET = {"progress": False}
TRANSFORM = rasterio.Affine(10, 0.5, 500_000, 0.5, -10, 5_000_000)
CRS = rasterio.CRS.from_epsg(32633)


def pixels_of(bands=3, height=50, width=70, dtype=np.uint8, high=256, seed=0):
    return np.random.default_rng(seed).integers(0 if high != 256 else 1, high, (bands, height, width)).astype(dtype)


def write(path, pixels, *, tags=None, mask=None, colorinterp=None, **options):
    count, height, width = pixels.shape
    profile = {"driver": "GTiff", "crs": CRS, "transform": TRANSFORM, **options}
    with rasterio.open(path, "w", width=width, height=height, count=count, dtype=pixels.dtype, **profile) as file:
        file.write(pixels)
        if mask is not None:
            file.write_mask(mask)
        if colorinterp is not None:
            file.colorinterp = colorinterp
        file.update_tags(**(tags or {}))
    return path


def read(path):
    with rasterio.open(path) as file:
        return file.read(1), file.profile


class Near(nn.Module):
    """Classes by the neighbors of a pixel, with clear margins."""

    takes_images = True

    def __init__(self, channels=3, classes=4, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(channels, classes, 3, padding=1)
        self.seen = []

    def forward(self, x):
        self.seen.append(tuple(x.shape))
        x = x.float() / 255 if x.dtype == torch.uint8 else x
        return 20 * self.conv(x - 0.5)


def naive(model, image, tile=16, overlap=0.25):
    """Classes of a whole image ``(C, H, W)`` in memory."""
    with torch.no_grad():
        return Tiled(model, tile, overlap)(torch.from_numpy(image)[None])[0].argmax(0).numpy()


@pytest.fixture
def paths(tmp_path):
    return tmp_path / "scene.tif", tmp_path / "classes.tif"


@pytest.mark.parametrize("size", [(50, 70), (1, 1), (16, 16), (17, 300), (300, 5)])
@pytest.mark.parametrize("options", [{}, {"tiled": True, "blockxsize": 16, "blockysize": 16, "compress": "lzw"}])
def test_equals_the_raster_as_a_whole(paths, size, options):
    pixels = pixels_of(3, *size)
    source = write(paths[0], pixels, **options)
    assert predict_raster(Near(), source, paths[1], tile=16, **QUIET) == paths[1]
    mask, profile = read(paths[1])
    np.testing.assert_array_equal(mask, naive(Near(), pixels))
    assert (profile["width"], profile["height"], profile["count"]) == (size[1], size[0], 1)
    assert (profile["crs"], profile["transform"]) == (CRS, TRANSFORM)
    assert (profile["dtype"], profile["nodata"], profile["compress"]) == ("uint8", 255, "deflate")
    assert sorted(path.name for path in paths[0].parent.iterdir()) == ["classes.tif", "scene.tif"]


class TestNodata:
    def expected(self, pixels, hole):
        """``hole``: ``(C, H, W)`` bool, where there are no data."""
        image = np.where(hole, 0, pixels).astype(pixels.dtype)
        return np.where(hole.all(0), 255, naive(Near(), image))

    def holes(self, pixels):
        hole = np.zeros(pixels.shape, bool)
        hole[:, :30, 20:] = True  # whole tiles
        hole[:, 40, 3] = True
        hole[1, 45:, :9] = True  # of one band alone
        return hole

    def test_by_value(self, paths):
        pixels = pixels_of()
        hole = self.holes(pixels)
        pixels[hole] = 0
        model = Near()
        predict_raster(model, write(paths[0], pixels, nodata=0), paths[1], tile=16, **QUIET)
        np.testing.assert_array_equal(read(paths[1])[0], self.expected(pixels, hole))
        assert sum(shape[0] for shape in model.seen) == 4 * 6 - 2 * 4  # tiles

    def test_by_a_value_that_is_not_black(self, paths):
        pixels = pixels_of()
        pixels[pixels == 200] = 199
        hole = self.holes(pixels)
        pixels[hole] = 200
        predict_raster(Near(), write(paths[0], pixels, nodata=200), paths[1], tile=16, **QUIET)
        np.testing.assert_array_equal(read(paths[1])[0], self.expected(pixels, hole))

    def test_by_nan(self, paths):
        pixels = (pixels_of() / 255).astype(np.float32)
        hole = self.holes(pixels)
        predict_raster(
            Near(),
            write(paths[0], np.where(hole, np.float32(np.nan), pixels), nodata=np.nan),
            paths[1],
            tile=16,
            **QUIET,
        )
        np.testing.assert_array_equal(read(paths[1])[0], self.expected(pixels, hole))

    def test_by_a_mask(self, paths):
        pixels = pixels_of()
        hole = np.broadcast_to(self.holes(pixels)[0], pixels.shape)
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
            write(paths[0], pixels, mask=~hole[0])
        predict_raster(Near(), paths[0], paths[1], tile=16, **QUIET)
        np.testing.assert_array_equal(read(paths[1])[0], self.expected(pixels, hole))

    def test_by_alpha(self, paths):
        pixels = pixels_of(4)
        hole = np.broadcast_to(self.holes(pixels)[0], (3, 50, 70))
        pixels[3] = np.where(hole[0], 0, 255)
        kinds = rasterio.enums.ColorInterp
        write(paths[0], pixels, colorinterp=[kinds.red, kinds.green, kinds.blue, kinds.alpha])
        predict_raster(Near(), paths[0], paths[1], tile=16, **QUIET)
        np.testing.assert_array_equal(read(paths[1])[0], self.expected(pixels[:3], hole))

    @pytest.mark.parametrize("nodata", [4, 200, 65535])
    def test_has_the_value_that_is_wanted(self, paths, nodata):
        pixels = pixels_of()
        pixels[:, 10:20] = 0
        predict_raster(Near(), write(paths[0], pixels, nodata=0), paths[1], tile=16, nodata=nodata, **QUIET)
        mask, profile = read(paths[1])
        assert profile["nodata"] == nodata
        assert profile["dtype"] == ("uint8" if nodata < 256 else "uint16")
        np.testing.assert_array_equal(mask == nodata, np.broadcast_to((pixels == 0).all(0), mask.shape))

    def test_everywhere_calls_no_network(self, paths):
        model = Near()
        predict_raster(model, write(paths[0], np.zeros((3, 50, 70), np.uint8), nodata=0), paths[1], tile=16, **QUIET)
        assert (read(paths[1])[0] == 255).all()
        assert model.seen == []

    @pytest.mark.parametrize(
        ("nodata", "error", "message"),
        [
            (3, ValueError, "nodata is 3, the value of class 3 of 4; expected a value of no class: nodata=255"),
            (-1, ValueError, "nodata is -1; expected 0 or more"),
            (65536, ValueError, r"a value of the output is 65536; expected 0\.\.65535"),
            (None, TypeError, "nodata is None; expected an integer"),
            (255.0, TypeError, "expected an integer"),
        ],
    )
    def test_of_no_use(self, paths, nodata, error, message):
        with pytest.raises(error, match=message):
            predict_raster(Near(), write(paths[0], pixels_of()), paths[1], nodata=nodata, **QUIET)
        assert [path.name for path in paths[0].parent.iterdir()] == ["scene.tif"]

    def test_of_more_than_255_classes(self, paths):
        source = write(paths[0], pixels_of())
        with pytest.raises(ValueError, match=r"nodata is 255, the value of class 255 of 300; .* nodata=65535"):
            predict_raster(nn.Conv2d(3, 300, 1), source, paths[1], **QUIET)
        predict_raster(nn.Conv2d(3, 300, 1), source, paths[1], nodata=65535, **QUIET)
        assert read(paths[1])[1]["dtype"] == "uint16"


class TestBands:
    def test_are_those_that_are_named_in_their_order(self, paths):
        pixels = pixels_of(5)
        predict_raster(Near(), write(paths[0], pixels), paths[1], bands=(4, 2, 2), tile=16, **QUIET)
        np.testing.assert_array_equal(read(paths[1])[0], naive(Near(), pixels[[3, 1, 1]]))

    def test_are_all(self, paths):
        pixels = pixels_of(13)
        predict_raster(Near(13), write(paths[0], pixels), paths[1], tile=16, **QUIET)
        np.testing.assert_array_equal(read(paths[1])[0], naive(Near(13), pixels))

    def test_of_which_the_network_takes_others(self, paths):
        message = r"cannot take an image of shape \(5, .*these are the bands \[1, 2, 3, 4, 5\] of .*bands=\(1, 2, 3\)"
        with pytest.raises(NetworkError, match=message):
            predict_raster(nn.Conv2d(3, 2, 1), write(paths[0], pixels_of(5)), paths[1], **QUIET)

    @pytest.mark.parametrize(
        ("bands", "error"),
        [
            ((), DataError),
            ((4,), DataError),
            ((0, 1, 2), ValueError),
            ("123", TypeError),
            (3, TypeError),
            ((1.0,), TypeError),
        ],
    )
    def test_that_are_not_there(self, paths, bands, error):
        with pytest.raises(error, match="band"):
            predict_raster(Near(), write(paths[0], pixels_of()), paths[1], bands=bands, **QUIET)

    def test_of_a_palette(self, paths):
        with rasterio.open(paths[0], "w", driver="GTiff", width=9, height=8, count=1, dtype="uint8") as file:
            file.write(np.zeros((1, 8, 9), np.uint8))
            file.write_colormap(1, {0: (255, 0, 0, 255), 1: (0, 255, 0, 255)})
        with pytest.raises(DataError, match="indices of a palette; expected the colors: gdal_translate -expand rgb"):
            predict_raster(Near(1), paths[0], paths[1], **QUIET)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"photometric": "miniswhite"}, "stores white as 0"),
            ({"nbits": 4}, "has 4 bits a value; expected values of 8"),
        ],
    )
    def test_whose_values_mean_something_else(self, paths, options, message):
        write(paths[0], pixels_of(1, high=16), **options)
        with pytest.raises(DataError, match=message):
            predict_raster(Near(1), paths[0], paths[1], **QUIET)


class TestValues:
    def whole(self, paths, pixels, low, high, **options):
        predict_raster(Near(), paths[0], paths[1], tile=16, **options, **QUIET)
        scaled = ((pixels.astype(np.float64) - low) / (high - low)).astype(np.float32)
        np.testing.assert_array_equal(read(paths[1])[0], naive(Near(), scaled))

    def test_of_16_bits_as_files_in_folders_have_them(self, paths):
        pixels = pixels_of(dtype=np.uint16, high=65536)
        write(paths[0], pixels)
        self.whole(paths, pixels, 0, 65535)
        folder = pytest.importorskip("tifffile") and stseg.data.SegmentationFolder(
            paths[0].parent, ids=["scene"], mode=None
        )
        np.testing.assert_array_equal(read(paths[1])[0], naive(Near(), folder[0].numpy()))

    def test_of_16_bits_whose_highest_is_not_used(self, paths):
        pixels = pixels_of(dtype=np.uint16, high=4096)
        write(paths[0], pixels)
        with pytest.raises(DataError, match=r"16-bit integers from 0 to 40.. .*expected value_range=\(0, 4095\)"):
            predict_raster(Near(), paths[0], paths[1], **QUIET)
        self.whole(paths, pixels, 0, 4095, value_range=(0, 4095))

    def test_without_data_do_not_tell_the_range(self, paths):
        pixels = pixels_of(dtype=np.uint16, high=4096)
        pixels[:, 3:5] = 65535
        write(paths[0], pixels, nodata=65535)
        with pytest.raises(DataError, match="16-bit integers from 0 to 40"):
            predict_raster(Near(), paths[0], paths[1], **QUIET)
        predict_raster(Near(), paths[0], paths[1], value_range=(0, 4095), **QUIET)
        assert (read(paths[1])[0][3:5] == 255).all()

    def test_of_a_range_that_the_file_states(self, paths):
        pixels = pixels_of(dtype=np.uint16, high=4096)
        write(paths[0], pixels, nbits=12)
        self.whole(paths, pixels, 0, 4095)
        tifffile = pytest.importorskip("tifffile")
        tags = [(280, "H", 1, 0, True), (281, "H", 1, 4200, True)]
        tifffile.imwrite(paths[0], pixels, photometric="rgb", planarconfig="separate", extratags=tags)
        self.whole(paths, pixels, 0, 4200)

    def test_of_floats(self, paths):
        pixels = (pixels_of() / 255).astype(np.float32)
        write(paths[0], pixels)
        self.whole(paths, pixels, 0, 1)
        write(paths[0], pixels * 3)
        with pytest.raises(DataError, match=r"rows 0 to 16, columns 0 to 16' holds 32-bit floats from .*value_range"):
            predict_raster(Near(), paths[0], paths[1], tile=16, **QUIET)
        self.whole(paths, pixels * 3, 0, 3, value_range=(0, 3))

    def test_of_a_range_that_is_too_small(self, paths):
        write(paths[0], pixels_of(dtype=np.int16, high=1000))
        with pytest.raises(DataError, match=r"value_range is \(0, 500\)"):
            predict_raster(Near(), paths[0], paths[1], value_range=(0, 500), **QUIET)
        assert not paths[1].exists()

    def test_of_8_bits_with_a_range(self, paths):
        with pytest.raises(ValueError, match="holds uint8, which are 0 to 255"):
            predict_raster(Near(), write(paths[0], pixels_of()), paths[1], value_range=(0, 100), **QUIET)

    def test_that_are_complex(self, paths):
        write(paths[0], pixels_of().astype(np.complex64))
        with pytest.raises(DataError, match="holds complex64"):
            predict_raster(Near(), paths[0], paths[1], **QUIET)


class TestValuesOfClasses:
    @pytest.mark.parametrize("values", [{0: 10, 1: 0, 2: 7, 3: 1000}, [10, 0, 7, 1000]])
    def test_are_written(self, paths, values):
        pixels = pixels_of()
        predict_raster(Near(), write(paths[0], pixels), paths[1], tile=16, values=values, **QUIET)
        mask, profile = read(paths[1])
        np.testing.assert_array_equal(mask, np.array([10, 0, 7, 1000])[naive(Near(), pixels)])
        assert profile["dtype"] == "uint16"

    @pytest.mark.parametrize(
        ("values", "error", "message"),
        [
            ([0, 100], ValueError, r"values has the classes \[0, 1\]; expected 0\.\.3, as of the network"),
            ({0: 0, 1: 1, 2: 2, 4: 3}, ValueError, "values has the classes"),
            ([0, 1, 2, 255], ValueError, "nodata is 255, the value of class 3 of 4; .*nodata=65535|nodata=0"),
            ([0, 1, 2, 70000], ValueError, "a value of the output is 70000"),
            ([0, 1, 2, 0.5], TypeError, "expected an integer"),
            (7, TypeError, "values is 7; expected the value of each class"),
        ],
    )
    def test_of_no_use(self, paths, values, error, message):
        with pytest.raises(error, match=message):
            predict_raster(Near(), write(paths[0], pixels_of()), paths[1], values=values, **QUIET)
        assert not paths[1].exists()


class TestGeoreference:
    def test_by_ground_control_points(self, paths):
        point = rasterio.control.GroundControlPoint
        points = [point(0, 0, 10, 50), point(0, 70, 11, 50), point(50, 0, 10, 49)]
        with rasterio.open(paths[0], "w", driver="GTiff", width=70, height=50, count=3, dtype="uint8") as file:
            file.write(pixels_of())
            file.gcps = (points, rasterio.CRS.from_epsg(4326))
        predict_raster(Near(), paths[0], paths[1], **QUIET)
        with rasterio.open(paths[1]) as file:
            found, crs = file.gcps
        assert [(p.row, p.col, p.x, p.y) for p in found] == [(p.row, p.col, p.x, p.y) for p in points]
        assert crs.to_epsg() == 4326

    def test_that_is_missing(self, paths, recwarn):
        with rasterio.open(paths[0], "w", driver="PNG", width=70, height=50, count=3, dtype="uint8") as file:
            file.write(pixels_of())
        recwarn.clear()
        predict_raster(Near(), paths[0], paths[1], **QUIET)
        assert not [each for each in recwarn if "eoreferenc" in str(each.category)]
        assert read(paths[1])[1]["crs"] is None


class TestFiles:
    @pytest.mark.parametrize("content", [None, b"", b"II*\0 no raster", b"text"])
    def test_that_are_missing_or_broken(self, paths, content):
        if content is not None:
            paths[0].write_bytes(content)
        with pytest.raises(UnreadableImageError, match=r"scene\.tif cannot be read as a raster"):
            predict_raster(Near(), paths[0], paths[1], **QUIET)

    def test_that_are_cut_off(self, paths):
        write(paths[0], pixels_of(height=600))
        os.truncate(paths[0], paths[0].stat().st_size // 2)
        paths[1].write_bytes(b"of before")
        with pytest.raises(UnreadableImageError, match=r"scene\.tif cannot be read as a raster"):
            predict_raster(Near(), paths[0], paths[1], tile=64, **QUIET)
        assert paths[1].read_bytes() == b"of before"
        assert len(list(paths[0].parent.iterdir())) == 2

    def test_of_other_kinds_are_not_written(self, paths):
        source = write(paths[0], pixels_of())
        with pytest.raises(ValueError, match="expected the name of a GeoTIFF"):
            predict_raster(Near(), source, source.with_suffix(".png"), **QUIET)
        with pytest.raises(ValueError, match="out is the raster itself"):
            predict_raster(Near(), source, source.parent / "." / source.name, **QUIET)
        paths[1].mkdir()
        with pytest.raises(IsADirectoryError, match="out is a folder"):
            predict_raster(Near(), source, paths[1], **QUIET)

    def test_are_replaced_and_their_folders_made(self, paths):
        source = write(paths[0], pixels_of())
        out = source.parent / "a" / "b" / "classes.tiff"
        for seed in (1, 2):
            predict_raster(Near(seed=seed), source, out, tile=16, **QUIET)
            np.testing.assert_array_equal(read(out)[0], naive(Near(seed=seed), pixels_of()))

    def test_that_a_stopped_run_leaves(self, paths, monkeypatch):
        monkeypatch.setattr(batching, "_MOST_PIXELS", 1)

        class Stopped(Near):
            def forward(self, x):
                if len(self.seen) == 4:
                    raise KeyboardInterrupt
                return super().forward(x)

        with pytest.raises(KeyboardInterrupt):
            predict_raster(Stopped(), write(paths[0], pixels_of()), paths[1], tile=16, **QUIET)
        assert [path.name for path in paths[0].parent.iterdir()] == ["scene.tif"]


CHILD = """
import os, signal, sys
import torch
import stseg

class Killed(torch.nn.Conv2d):
    takes_images = True

    def forward(self, x):
        if len(x) == 4:  # tiles of the second pass
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x.float())

stseg.predict_raster(Killed(3, 4, 1), *sys.argv[1:], tile=128, precision="fp32", progress=False)
"""


def test_a_killed_run_leaves_no_file_of_that_name(paths):
    write(paths[0], pixels_of(height=400, width=400))
    ran = subprocess.run([sys.executable, "-c", CHILD, *map(str, paths)], capture_output=True, text=True)
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    assert not paths[1].exists()
    (left,) = [path.name for path in paths[0].parent.iterdir() if path != paths[0]]
    assert left.startswith(".classes.tif.")
    assert left.endswith(".part")


def test_a_full_disk_is_an_error(paths):
    resource = pytest.importorskip("resource")
    write(paths[0], pixels_of(height=400, width=400))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(OSError, match=r"cannot be written: .*s the disk full"):
            predict_raster(nn.Conv2d(3, 60, 1), *paths, tile=128, **QUIET)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in paths[0].parent.iterdir()] == ["scene.tif"]


def test_without_rasterio_the_error_is_the_line_to_install(paths, monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "rasterio":
            raise ImportError
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "stseg\[geo\]"'):
        predict_raster(Near(), *paths, **QUIET)
