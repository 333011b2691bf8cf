"""The files themselves, of every kind, are read in ``test_folder.py``."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from PIL import Image

from stseg.data._reading import ItemReader, check_folder
from stseg.data.decoding import decode_image, decode_mask
from stseg.errors import DataError, UnreadableImageError

RGB = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
CLASSES = np.random.default_rng(1).integers(0, 5, (4, 6), dtype=np.uint8)


@pytest.fixture
def files(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "image.png")
    Image.fromarray(CLASSES).save(tmp_path / "mask.png")
    return tmp_path / "image.png", tmp_path / "mask.png"


def test_an_item_is_an_image_or_a_pair(files):
    image, mask = files
    alone = ItemReader()(image, None, name="a")
    assert np.array_equal(alone.permute(1, 2, 0), RGB)
    first, second = ItemReader()(image, mask, name="a")
    assert torch.equal(first, alone)
    assert np.array_equal(second, CLASSES)


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1), ("RGBA", 4), (None, 3)])
def test_the_mode_gives_the_channels(files, mode, channels):
    assert ItemReader(mode)(*files, name="a")[0].shape == (channels, 4, 6)


def test_classes_are_mapped(files):
    mask = ItemReader(class_map={3: 0, 1: 1}, unmapped=9)(*files, name="a")[1]
    assert mask.tolist() == [[{3: 0, 1: 1}.get(value, 9) for value in row] for row in CLASSES.tolist()]


def test_messages_have_the_name(files):
    with pytest.raises(DataError, match="mask of 'city/a' holds the value"):
        ItemReader(class_map={0: 0}, unmapped=None)(*files, name="city/a")
    Image.fromarray(CLASSES[:3]).save(files[1])
    with pytest.raises(DataError, match="'city/a' differ in size"):
        ItemReader()(*files, name="city/a")


def test_nonsense_is_refused_at_once():
    with pytest.raises(ValueError, match="mode is 'BGR'"):
        ItemReader("BGR")
    with pytest.raises(ValueError, match="class_map is empty"):
        ItemReader(class_map={})


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(UnreadableImageError, match=r"none\.png cannot be read as an image"):
        decode_image(tmp_path / "none.png")


def test_a_folder_is_none_of_these(files, tmp_path):
    check_folder(tmp_path)
    with pytest.raises(DataError, match="is not a folder"):
        check_folder(files[0])
    with pytest.raises(DataError, match="there is no folder"):
        check_folder(tmp_path / "none")


def bitmap_tiff(values, bits):
    """A gray TIFF of so many bits a pixel, written out byte by byte."""
    height, width = values.shape
    rows = b""
    for row in values:
        text = "".join(f"{value:0{bits}b}" for value in row)
        rows += int(text.ljust(-(-len(text) // 8) * 8, "0"), 2).to_bytes(-(-len(text) // 8), "big")
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8 + 2 + 9 * 12 + 4, 277: 1, 278: height}
    tags[279] = len(rows)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + rows


@pytest.mark.parametrize("bits", [2, 4])
def test_tiff_masks_of_few_bits_keep_every_value(tmp_path, bits):
    values = np.random.default_rng(bits).integers(0, 2**bits, (5, 7))
    (tmp_path / "mask.tif").write_bytes(bitmap_tiff(values, bits))
    assert np.array_equal(decode_mask(tmp_path / "mask.tif"), values)


def test_a_black_and_white_palette_bmp_is_refused_not_misread(tmp_path):
    mask = Image.fromarray(np.array([[0, 1, 1], [0, 0, 1]], dtype=np.uint8))
    mask.putpalette([0, 0, 0, 255, 255, 255])
    mask.save(tmp_path / "mask.bmp")
    with pytest.raises(UnreadableImageError, match=r"mask\.bmp cannot be read .* use PNG"):
        decode_mask(tmp_path / "mask.bmp")
    Image.fromarray(np.array([[0, 255, 0]], dtype=np.uint8)).convert("1").save(tmp_path / "bits.bmp")
    assert decode_mask(tmp_path / "bits.bmp").tolist() == [[0, 255, 0]]


def test_unmapped_needs_a_class_map():
    with pytest.raises(ValueError, match="unmapped is None without a class_map"):
        ItemReader(unmapped=None)
    with pytest.raises(ValueError, match="unmapped is -100"):
        ItemReader(class_map={1: 0}, unmapped=-100)
