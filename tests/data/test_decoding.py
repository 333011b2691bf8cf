"""Values that are read from image and mask files, beside those that tifffile, OpenCV and PIL read."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from stseg.data import ClassMap, ListedFiles, SegmentationFolder
from stseg.data.decoding import decode_mask
from stseg.errors import DataError, DataWarning, UnreadableImageError

tifffile = pytest.importorskip("tifffile", reason="tifffile is not installed: pip install stseg[tiff]")

RNG = np.random.default_rng(0)
CLASSES = np.array([[0, 1, 2, 3], [3, 2, 1, 0], [1, 1, 0, 0]], dtype=np.uint8)


def read_image(path, **settings):
    return ListedFiles(path.parent, [path.name], masks=False, **settings)[0]


MASKS = {
    "bool": (CLASSES > 1, {}),
    "bool, white is zero": (CLASSES > 1, {"photometric": "miniswhite"}),
    "bool, black is zero": (CLASSES > 1, {"photometric": "minisblack"}),
    "2 bits": (CLASSES, {"bitspersample": 2}),
    "4 bits": (CLASSES, {"bitspersample": 4}),
    "4 bits, white is zero": (CLASSES, {"bitspersample": 4, "photometric": "miniswhite"}),
    "uint8": (CLASSES, {}),
    "uint8, white is zero": (CLASSES, {"photometric": "miniswhite"}),
    "0 and 255, white is zero": ((CLASSES > 1) * np.uint8(255), {"photometric": "miniswhite"}),
    "int8": (CLASSES.astype(np.int8) - 1, {}),
    "uint16": (CLASSES.astype(np.uint16) * 20000, {}),
    "uint16, white is zero": (CLASSES.astype(np.uint16), {"photometric": "miniswhite"}),
    "uint16, big endian": (CLASSES.astype(">u2") * 300, {"byteorder": ">"}),
    "12 bits": (CLASSES.astype(np.uint16) * 1000, {"bitspersample": 12}),
    "int16": (CLASSES.astype(np.int16) - 1, {}),
    "int32": (CLASSES.astype(np.int32) - 1, {}),
    "uint32": (CLASSES.astype(np.uint32), {}),
    "uint32, large": (CLASSES.astype(np.uint32) + 2**31 - 4, {}),
    "uint64": (CLASSES.astype(np.uint64), {}),
    "int64": (CLASSES.astype(np.int64) - 1, {}),
    "deflate": (CLASSES, {"compression": "zlib", "predictor": True}),
    "LZW, white is zero": (CLASSES, {"compression": "lzw", "photometric": "miniswhite"}),
    "tiles": (np.pad(CLASSES, ((0, 20), (0, 20))), {"tile": (16, 16)}),
    "BigTIFF": (CLASSES, {"bigtiff": True}),
    "ImageJ": (CLASSES, {"imagej": True}),
    "gray in three channels": (np.repeat(CLASSES[..., None], 3, axis=2), {"photometric": "rgb"}),
    "16-bit gray in three channels": (np.repeat(CLASSES[..., None].astype("u2"), 3, axis=2), {"photometric": "rgb"}),
}


@pytest.mark.parametrize("kind", MASKS)
def test_tiff_masks_hold_what_tifffile_reads(tmp_path, kind):
    array, settings = MASKS[kind]
    tifffile.imwrite(tmp_path / "mask.tif", array, **settings)
    Image.new("L", array.shape[1::-1]).save(tmp_path / "image.png")
    mask = ListedFiles(tmp_path, [("image.png", "mask.tif")])[0][1]
    expected = tifffile.imread(tmp_path / "mask.tif").astype(np.int64)
    assert np.array_equal(mask, expected if expected.ndim == 2 else expected[..., 0])


@pytest.mark.parametrize("missing", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex64])
def test_tiff_masks_of_floats_are_refused(tmp_path, monkeypatch, dtype, missing):
    tifffile.imwrite(tmp_path / "mask.tif", CLASSES.astype(dtype))
    if missing:
        monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(DataError, match=r"stseg\[tiff\]" if missing else "expected integers"):
        decode_mask(tmp_path / "mask.tif")


@pytest.mark.parametrize("compression", ["jpeg", "webp"])
def test_masks_compressed_with_loss_are_refused(tmp_path, compression):
    pytest.importorskip("imagecodecs")
    tifffile.imwrite(tmp_path / "mask.tif", np.zeros((16, 16, 3), np.uint8), compression=compression, photometric="rgb")
    with pytest.raises(DataError, match=r"mask\.tif is compressed with .*may change class indices"):
        decode_mask(tmp_path / "mask.tif")


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "GIF"])
def test_masks_of_a_lossy_format_under_another_name_are_refused(tmp_path, format):
    Image.fromarray(CLASSES).save(tmp_path / "mask.png", format=format)
    with pytest.raises(DataError, match=rf"mask\.png is a {format} file, which may change class indices"):
        decode_mask(tmp_path / "mask.png")


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_gray_masks_in_several_channels_are_taken(tmp_path, suffix, mode):
    Image.fromarray(CLASSES).convert(mode).save(tmp_path / f"mask.{suffix}")
    Image.new("L", (4, 3)).save(tmp_path / "image.png")
    assert np.array_equal(ListedFiles(tmp_path, [("image.png", f"mask.{suffix}")])[0][1], CLASSES)


COLORS = np.array([[0, 0, 0], [128, 0, 0], [0, 128, 0], [7, 7, 7]], dtype=np.uint8)


@pytest.mark.parametrize("kind", ["png", "bmp", "tif", "palette", "opaque"])
def test_colors_become_their_classes(tmp_path, kind):
    picture = Image.fromarray(COLORS[CLASSES])
    if kind == "palette":
        picture = Image.fromarray(CLASSES)
        picture.putpalette(COLORS.flatten().tolist())
    if kind == "opaque":
        picture = picture.convert("RGBA")
    suffix = kind if kind in ("png", "bmp", "tif") else "png"
    picture.save(tmp_path / f"mask.{suffix}")
    Image.new("L", (4, 3)).save(tmp_path / "image.png")
    class_map = {(0, 0, 0): 0, (128, 0, 0): 5, (0, 128, 0): 2}
    mask = ListedFiles(tmp_path, [("image.png", f"mask.{suffix}")], class_map=class_map)[0][1]
    assert mask.tolist() == np.array([0, 5, 2, 255])[CLASSES].tolist()
    strict = ListedFiles(tmp_path, [("image.png", f"mask.{suffix}")], class_map=class_map, unmapped=None)
    with pytest.raises(DataError, match=r"mask of 'image' holds the value \(7, 7, 7\)"):
        strict[0]


IMAGES = {
    "2 bands": ((2,), np.uint8, {"photometric": "minisblack", "planarconfig": "contig"}),
    "3 bands": ((3,), np.uint8, {"photometric": "minisblack", "planarconfig": "contig"}),
    "4 bands": ((4,), np.uint8, {"photometric": "rgb", "extrasamples": ["unspecified"]}),
    "4 bands of 16 bits": ((4,), np.uint16, {"photometric": "rgb", "extrasamples": ["unspecified"]}),
    "5 bands": ((5,), np.uint8, {"photometric": "rgb", "extrasamples": ["unspecified"] * 2}),
    "6 bands": ((6,), np.uint8, {"photometric": "minisblack", "planarconfig": "contig"}),
    "13 bands of 16 bits": ((13,), np.uint16, {"photometric": "minisblack", "planarconfig": "contig"}),
    "5 bands, LZW": ((5,), np.uint8, {"photometric": "minisblack", "planarconfig": "contig", "compression": "lzw"}),
    "RGB of 16 bits": ((3,), np.uint16, {"photometric": "rgb"}),
    "gray of 16 bits": ((), np.uint16, {}),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_tiff_images_keep_bands_and_depth(tmp_path, kind):
    bands, dtype, settings = IMAGES[kind]
    top = np.iinfo(dtype).max
    array = RNG.integers(0, top, (9, 12, *bands), dtype=dtype, endpoint=True)
    array.flat[0] = top
    tifffile.imwrite(tmp_path / "a.tif", array, **settings)
    image = read_image(tmp_path / "a.tif", mode=None)
    expected = (array if bands else array[..., None]).transpose(2, 0, 1) / top
    got = image.numpy() / (255 if image.dtype == torch.uint8 else 1)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() < 1e-6


def test_bands_in_planes_and_imagej_channels_are_channels(tmp_path):
    array = RNG.integers(0, 255, (5, 9, 12), dtype=np.uint8)
    array[0, 0, 0] = 255
    tifffile.imwrite(tmp_path / "planes.tif", array, photometric="minisblack", planarconfig="separate")
    tifffile.imwrite(tmp_path / "imagej.tif", array, imagej=True, metadata={"axes": "CYX"})
    for name in ("planes.tif", "imagej.tif"):
        assert np.abs(read_image(tmp_path / name, mode=None).numpy() - array / 255).max() < 1e-6


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
@pytest.mark.parametrize("kind", ["2 bands", "4 bands", "5 bands", "6 bands", "13 bands of 16 bits"])
def test_no_band_is_dropped_for_a_mode(tmp_path, kind, mode):
    bands, dtype, settings = IMAGES[kind]
    tifffile.imwrite(tmp_path / "a.tif", np.full((9, 12, *bands), np.iinfo(dtype).max, dtype), **settings)
    with pytest.raises(DataError, match=rf"image 'a' has {bands[0]} bands, .*expected mode=None"):
        read_image(tmp_path / "a.tif", mode=mode)


@pytest.mark.parametrize("kind", ["4 bands", "5 bands", "6 bands", "RGB of 16 bits"])
def test_without_tifffile_they_are_refused_with_the_line_to_write(tmp_path, monkeypatch, kind):
    bands, dtype, settings = IMAGES[kind]
    tifffile.imwrite(tmp_path / "a.tif", np.full((9, 12, *bands), 1, dtype), **settings)
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(DataError, match=r'pip install "stseg\[tiff\]"'):
        read_image(tmp_path / "a.tif", mode=None)


def test_alpha_is_not_a_band(tmp_path):
    array = RNG.integers(0, 255, (9, 12, 4), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="rgb", extrasamples=["unassalpha"])
    assert np.array_equal(read_image(tmp_path / "a.tif").permute(1, 2, 0), array[..., :3])
    deep = array.astype(np.uint16) * 257
    deep[0, 0] = 65535
    tifffile.imwrite(tmp_path / "b.tif", deep, photometric="rgb", extrasamples=["unassalpha"])
    assert np.allclose(read_image(tmp_path / "b.tif").permute(1, 2, 0), deep[..., :3] / 65535)
    assert read_image(tmp_path / "b.tif", mode="RGBA").shape == (4, 9, 12)


def test_pages_and_stacks_are_refused(tmp_path):
    stack = RNG.integers(0, 255, (6, 9, 12), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "pages.tif", stack, photometric="minisblack", metadata=None)
    tifffile.imwrite(tmp_path / "z.tif", stack, imagej=True, metadata={"axes": "ZYX"})
    pictures = [Image.fromarray(each) for each in stack]
    pictures[0].save(tmp_path / "animated.webp", save_all=True, append_images=pictures[1:], lossless=True)
    pictures[0].save(tmp_path / "animated.png", save_all=True, append_images=pictures[1:])
    for name in ("pages.tif", "z.tif", "animated.webp", "animated.png"):
        with pytest.raises(DataError, match=r"(holds 6 (pages|frames)|several images).*expected one image in a file"):
            read_image(tmp_path / name)
    for name in ("pages.tif", "z.tif"):
        with pytest.raises(DataError, match=r"if the pages are bands of one image: tifffile\.imwrite.*planarconfig"):
            read_image(tmp_path / name)
    for name in ("pages.tif", "animated.png"):
        with pytest.raises(DataError, match="expected one image in a file"):
            decode_mask(tmp_path / name)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("top", [255, 1023, 4095, 16383])
def test_depth_in_a_deeper_file_needs_its_range(tmp_path, suffix, top):
    array = RNG.integers(0, top, (20, 20), endpoint=True).astype(np.uint16)
    array[0, 0] = top
    Image.fromarray(array).save(tmp_path / f"a.{suffix}")
    with pytest.raises(DataError, match=rf"image 'a' holds 16-bit integers .*value_range=\(0, {top}\) or \(0, 65535\)"):
        read_image(tmp_path / f"a.{suffix}", mode="L")
    image = read_image(tmp_path / f"a.{suffix}", mode="L", value_range=(0, top))
    assert np.abs(image[0].numpy() - array / top).max() < 1e-6
    assert len(image.unique()) == len(np.unique(array))
    with pytest.raises(DataError, match=rf"from \d+ to {top}; value_range is \(0, {top - 1}\)"):
        read_image(tmp_path / f"a.{suffix}", value_range=(0, top - 1))


def test_a_range_that_the_file_states_is_used(tmp_path):
    array = RNG.integers(0, 4096, (20, 20)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "packed.tif", array, bitspersample=12)
    tifffile.imwrite(tmp_path / "tags.tif", array, extratags=[(280, "H", 1, 0, False), (281, "H", 1, 4095, False)])
    for name in ("packed.tif", "tags.tif"):
        assert np.abs(read_image(tmp_path / name, mode="L")[0].numpy() - array / 4095).max() < 1e-6


def test_white_is_zero_is_white(tmp_path):
    for dtype, top in ((np.uint8, 255), (np.uint16, 65535)):
        array = np.array([[0, 1, top]], dtype=dtype)
        tifffile.imwrite(tmp_path / "a.tif", array, photometric="miniswhite")
        image = read_image(tmp_path / "a.tif", mode="L")
        assert (image / (255 if image.dtype == torch.uint8 else 1)).flatten().tolist() == pytest.approx(
            [1, 1 - 1 / top, 0], abs=1e-6
        )


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_16_bit_color_pngs_keep_their_depth(tmp_path, channels, orientation):
    cv2 = pytest.importorskip("cv2")
    array = RNG.integers(0, 65536, (5, 7, channels)).astype(np.uint16)
    array[0, 0] = 65535
    cv2.imwrite(str(tmp_path / "a.png"), array[..., [2, 1, 0, 3][:channels]])
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode in ("RGB", "RGBA")  # PIL would cut it
    image = read_image(tmp_path / "a.png", mode=None)
    assert np.abs(image.permute(1, 2, 0).numpy() - array / 65535).max() < 1e-6
    gray = read_image(tmp_path / "a.png", mode="L")
    assert np.abs(gray[0].numpy() - (array[..., :3] / 65535) @ [0.299, 0.587, 0.114]).max() < 1e-6


def test_images_of_more_bits_than_are_read_are_refused(tmp_path):
    cv2 = pytest.importorskip("cv2")
    cv2.imwrite(str(tmp_path / "a.ppm"), RNG.integers(0, 65536, (5, 7, 3)).astype(np.uint16))
    with pytest.raises(DataError, match=r"a\.ppm has 16 bits per channel, of which 8 would be read"):
        read_image(tmp_path / "a.ppm")


@pytest.mark.parametrize("value", [(1, 1), (5, 2), "12", (0, float("inf")), (0,), 4095, ("a", "b")])
def test_nonsense_ranges_are_refused(tmp_path, value):
    Image.new("L", (4, 3)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"value_range is .*expected"):
        read_image(tmp_path / "a.png", value_range=value)


class TestExif:
    """A photo that its tag turns, whose mask was drawn on the stored pixels."""

    def folder(self, root, shape, orientation=6):
        exif = Image.Exif()
        exif[0x0112] = orientation
        mask = np.zeros(shape, np.uint8)
        mask[: shape[0] // 2, : shape[1] // 3] = 1
        for name, array, settings in (("images", mask * 200, {"exif": exif}), ("masks", mask, {})):
            (root / name).mkdir()
            Image.fromarray(array).save(root / name / "0.png", **settings)
        return root / "images", root / "masks"

    def test_swapped_sides_are_refused(self, tmp_path):
        folders = self.folder(tmp_path, (30, 50))
        for apply_exif in (None, True):
            with pytest.raises(DataError, match=r"EXIF orientation of the image \(6\).*apply_exif=False"):
                SegmentationFolder(*folders, apply_exif=apply_exif)[0]
        image, mask = SegmentationFolder(*folders, apply_exif=False)[0]
        assert torch.equal(image[0] > 100, mask == 1)

    @pytest.mark.parametrize(("shape", "orientation"), [((40, 40), 6), ((30, 50), 3), ((30, 50), 2)])
    def test_sides_that_do_not_tell_are_warned_of(self, tmp_path, shape, orientation):
        folders = self.folder(tmp_path, shape, orientation)
        with pytest.warns(DataWarning, match="the image '0' was turned by an EXIF orientation tag"):
            SegmentationFolder(*folders)[0]
        image, mask = SegmentationFolder(*folders, apply_exif=False)[0]
        assert torch.equal(image[0] > 100, mask == 1)
        turned = SegmentationFolder(*folders, apply_exif=True)[0][0]
        assert not torch.equal(turned, image)


@pytest.mark.parametrize("suffix", ["png", "tif", "jpg"])
@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
def test_images_are_turned_or_read_as_stored(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    array = (RNG.integers(0, 2, (3, 5, 1)) * 255).astype(np.uint8).repeat(16, 0).repeat(16, 1).repeat(3, 2)
    Image.fromarray(array).save(tmp_path / f"a.{suffix}", exif=exif, **({"quality": 95} if suffix == "jpg" else {}))
    stored = read_image(tmp_path / f"a.{suffix}", apply_exif=False).permute(1, 2, 0).numpy()
    assert np.array_equal(stored > 127, array > 127)
    turned = read_image(tmp_path / f"a.{suffix}").permute(1, 2, 0).numpy()
    rows, columns = (stored.swapaxes(0, 1), True) if orientation >= 5 else (stored, False)
    flip_rows, flip_columns = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    expected = rows[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
    assert columns == (orientation >= 5)
    assert np.array_equal(turned, expected)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("with_tag", ["image", "mask", "both"])
@pytest.mark.parametrize("orientation", [3, 6])
def test_image_and_mask_are_read_alike(tmp_path, suffix, with_tag, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    mask = np.zeros((20, 20), np.uint8)
    mask[:10, :7] = 1
    for name, array in (("image", mask * 200), ("mask", mask)):
        tags = {"exif": exif} if with_tag in (name, "both") else {}
        Image.fromarray(array).save(tmp_path / f"{name}.{suffix}", **tags)
    pairs = [(f"image.{suffix}", f"mask.{suffix}")]
    image, classes = ListedFiles(tmp_path, pairs, apply_exif=False)[0]
    assert torch.equal(image[0] > 100, classes == 1)
    if with_tag == "both":
        image, classes = ListedFiles(tmp_path, pairs)[0]
        assert torch.equal(image[0] > 100, classes == 1)
    else:
        with pytest.warns(DataWarning, match="EXIF"):
            ListedFiles(tmp_path, pairs)[0]


def test_a_value_range_is_for_more_than_8_bits(tmp_path):
    Image.new("L", (4, 3), 200).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", mode="L", value_range=(0, 4095)).unique().tolist() == [200]


def test_what_is_no_image_stays_unreadable(tmp_path):
    (tmp_path / "a.tif").write_bytes(b"II*\0" + bytes(20))
    (tmp_path / "b.png").write_bytes(b"")
    for name in ("a.tif", "b.png"):
        with pytest.raises(UnreadableImageError, match="cannot be read as an image"):
            read_image(tmp_path / name)
        with pytest.raises(UnreadableImageError, match="cannot be read as an image"):
            decode_mask(tmp_path / name)


def test_overviews_of_reduced_resolution_are_no_images_of_their_own(tmp_path):
    array = RNG.integers(0, 4, (64, 80), dtype=np.uint8)
    bands = RNG.integers(0, 255, (64, 80, 5), dtype=np.uint8)
    for name, content in (("mask.tif", array), ("bands.tif", bands)):
        photometric = {"photometric": "minisblack", "planarconfig": "contig"} if content.ndim == 3 else {}
        with tifffile.TiffWriter(tmp_path / name) as file:
            file.write(content, metadata=None, **photometric)
            file.write(content[::2, ::2], subfiletype=1, metadata=None, **photometric)
    assert np.array_equal(decode_mask(tmp_path / "mask.tif"), array)
    assert read_image(tmp_path / "mask.tif").shape == (3, 64, 80)
    assert read_image(tmp_path / "bands.tif", mode=None).shape == (5, 64, 80)


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_jpeg_2000_states_its_depth(tmp_path, bits):
    imagecodecs = pytest.importorskip("imagecodecs")
    array = RNG.integers(0, 2**bits, (40, 48)).astype(np.uint8 if bits == 8 else np.uint16)
    array[0, 0] = 2**bits - 1
    content = imagecodecs.jpeg2k_encode(array, level=0, reversible=True, bitspersample=bits)
    (tmp_path / "a.jp2").write_bytes(content)
    image = read_image(tmp_path / "a.jp2", mode="L")
    scaled = image.numpy()[0] / (255 if image.dtype == torch.uint8 else 1)
    assert np.abs(scaled - array / (2**bits - 1)).max() < 2e-3


def test_black_and_white_images_of_pil_are_0_and_255_for_a_class_map():
    black_and_white = Image.fromarray(np.array([[False, True]]))
    assert ClassMap({0: 0, 255: 1})(black_and_white).tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("array", "line"),
    [
        (np.array([[-998, 2999]], dtype=np.int16), r"value_range=\(-998, 2999\)"),
        (np.array([[0.5, 300]], dtype=np.float32), r"value_range=\(0, 300\)"),
        (np.array([[0, 300]], dtype=np.uint16), r"value_range=\(0, 1023\)"),
        (np.array([[0.5, np.nan]], dtype=np.float32), "NaN or infinite values"),
        (np.array([[0.5, np.inf]], dtype=np.float32), "NaN or infinite values"),
    ],
)
def test_the_line_to_write_holds_all_values(tmp_path, array, line):
    tifffile.imwrite(tmp_path / "a.tif", array)
    with pytest.raises(DataError, match=line):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_deep_tiffs_are_turned_or_read_as_stored(tmp_path, orientation):
    tags = [(274, "H", 1, orientation, True)]
    bands = RNG.integers(0, 255, (20, 30, 5), dtype=np.uint8)
    bands[0, 0] = 255
    mask = RNG.integers(0, 4, (20, 30)).astype(np.int64)
    tifffile.imwrite(tmp_path / "a.tif", bands, photometric="minisblack", planarconfig="contig", extratags=tags)
    tifffile.imwrite(tmp_path / "m.tif", mask, extratags=tags)
    turns = {1: lambda x: x, 3: lambda x: x[::-1, ::-1], 6: lambda x: x[::-1].swapaxes(0, 1)}
    for apply_exif in (False, None):
        turn = turns[1 if apply_exif is False else orientation]
        image, classes = ListedFiles(tmp_path, [("a.tif", "m.tif")], mode=None, apply_exif=apply_exif)[0]
        assert np.allclose(image.permute(1, 2, 0), turn(bands) / 255)
        assert np.array_equal(classes, turn(mask))


@pytest.mark.parametrize("apply_exif", [None, False])
def test_16_bit_gray_in_three_channels_is_turned_as_its_image(tmp_path, apply_exif):
    cv2 = pytest.importorskip("cv2")
    mask = RNG.integers(0, 4, (20, 30)).astype(np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray((mask * 80).astype(np.uint8)).save(tmp_path / "image.png", exif=exif)
    cv2.imwrite(str(tmp_path / "plain.png"), np.stack([mask] * 3, axis=-1))
    chunk = (tmp_path / "image.png").read_bytes()
    start = chunk.index(b"eXIf") - 4
    length = int.from_bytes(chunk[start : start + 4], "big") + 12
    content = (tmp_path / "plain.png").read_bytes()
    place = content.index(b"IDAT") - 4
    (tmp_path / "mask.png").write_bytes(content[:place] + chunk[start : start + length] + content[place:])
    image, classes = ListedFiles(tmp_path, [("image.png", "mask.png")], apply_exif=apply_exif)[0]
    assert classes.shape == ((30, 20) if apply_exif is None else (20, 30))
    assert torch.equal(image[0].int(), classes * 80)
