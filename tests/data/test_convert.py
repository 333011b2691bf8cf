from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import ConcatDataset, Subset, TensorDataset
from torchvision import tv_tensors

from stseg.data.convert import as_image, as_mask, check_mask_values, image_of, pair_of
from stseg.data.items import Items, duplicate, shared
from stseg.errors import DataError, UnreadableImageError
from stseg.functional.classes import check_classes, index_dtype


class Named(list):
    """A list of items that have ids."""

    def __init__(self, ids, **attributes):
        super().__init__(range(len(ids)))
        self.ids = ids
        vars(self).update(attributes)


class TestIds:
    def test_are_those_of_the_data_set(self):
        assert Items(Named(["b", "a"])).ids == ["b", "a"]

    def test_become_strings(self):
        assert Items(Named(np.array([17, 4]))).ids == ["17", "4"]

    def test_are_numbers_without_any(self):
        assert Items(TensorDataset(torch.zeros(3, 1))).ids == ["0", "1", "2"]
        assert not Items(TensorDataset(torch.zeros(3, 1))).has_ids

    def test_pass_through_subsets_and_concatenations(self):
        both = ConcatDataset([Named(["a", "b"]), Subset(Named(["c", "d", "e"]), [2, 0])])
        assert Items(Subset(both, [3, 1])).ids == ["c", "b"]
        assert Items(both).has_ids

    def test_of_a_concatenation_are_numbers_if_one_part_has_none(self):
        assert Items(ConcatDataset([Named(["a"]), TensorDataset(torch.zeros(2, 1))])).ids == ["0", "1", "2"]

    @pytest.mark.parametrize("named", [True, False])
    def test_made_of_numbers_are_no_names(self, named):
        source = Named(["a", "b"]) if named else TensorDataset(torch.zeros(2, 1))
        wrapper = Named(["1", "0"], dataset=source)
        assert Items(wrapper).has_ids is named
        assert Items(Subset(wrapper, [0])).has_ids is named
        assert Items(ConcatDataset([Named(["c"]), wrapper])).has_ids is named

    def test_ignore_a_method_called_ids(self):
        class WithMethod(list):
            def ids(self):
                return ["never"]

        assert Items(WithMethod([7])).ids == ["0"]

    def test_that_occur_twice_are_refused(self):
        with pytest.raises(DataError, match="the id 'b' occurs more than once"):
            _ = Items(Named(["a", "b", "c", "b"])).ids

    def test_of_another_number_than_the_items_are_refused(self):
        dataset = Named(["a", "b"])
        dataset.ids = ["a"]
        with pytest.raises(DataError, match="2 items but 1 ids"):
            Items(dataset)

    def test_need_a_data_set_with_a_length(self):
        with pytest.raises(TypeError, match="map-style data set with a length, got generator"):
            Items(i for i in range(3))


class TestNames:
    def test_may_occur_twice(self):
        assert Items(Named(["a", "a"])).names == ["a", "a"]

    def test_prefer_item_names(self):
        dataset = Named(["0", "1"], item_names=["x", "x"])
        assert Items(Subset(dataset, [1])).names == ["x"]
        assert Items(dataset).ids == ["0", "1"]


@given(st.lists(st.sampled_from("abcdef")))
@settings(derandomize=True, deadline=None)
def test_duplicate_is_the_first_id_that_occurred_before(ids):
    expected = next((id for i, id in enumerate(ids) if id in ids[:i]), None)
    assert duplicate(ids) == expected


@given(st.lists(st.sampled_from("abcdef")), st.lists(st.sampled_from("cdefgh")))
@settings(derandomize=True, deadline=None)
def test_shared_is_the_first_id_in_both(ids, others):
    assert shared(ids, others) == next((id for id in ids if id in others), None)


class TestImage:
    @pytest.mark.parametrize(
        ("mode", "channels"),
        [
            ("1", 1), ("L", 1), ("LA", 2), ("La", 2), ("P", 3), ("PA", 4), ("RGB", 3), ("RGBA", 4),
            ("RGBa", 4), ("RGBX", 3), ("CMYK", 3), ("YCbCr", 3), ("HSV", 3), ("LAB", 3),
        ],
    )  # fmt: skip
    def test_of_any_8_bit_pil_mode_is_uint8_with_its_channels(self, mode, channels):
        image = as_image(Image.new(mode, (6, 4)))
        assert image.shape == (channels, 4, 6)
        assert image.dtype == torch.uint8
        assert image.is_contiguous()

    def test_from_pil_keeps_every_pixel_in_place(self):
        pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
        image = as_image(Image.fromarray(pixels))
        for y in range(5):
            for x in range(7):
                assert image[:, y, x].tolist() == pixels[y, x].tolist()

    def test_of_a_palette_gets_its_colors(self):
        image = Image.new("P", (1, 1), 1)
        image.putpalette([0, 0, 0, 10, 20, 30])
        assert as_image(image).flatten().tolist() == [10, 20, 30]

    def test_of_a_transparent_palette_gets_alpha(self):
        image = Image.new("P", (1, 1), 1)
        image.putpalette([0, 0, 0, 10, 20, 30])
        image.info["transparency"] = bytes([255, 7])
        assert as_image(image).flatten().tolist() == [10, 20, 30, 7]

    def test_in_black_and_white_is_0_and_255(self):
        image = Image.fromarray(np.array([[True, False]]))
        assert as_image(image).tolist() == [[[255, 0]]]

    @pytest.mark.parametrize("dtype", [np.uint16, np.int32])
    def test_of_16_bits_keeps_its_depth(self, dtype):
        gray = np.array([[0, 128, 129, 257, 32896, 65406, 65407, 65535]], dtype=dtype)
        image = as_image(Image.fromarray(gray))
        assert image.dtype == torch.float32
        assert np.abs(image.numpy() - gray[None] / 65535).max() < 1e-7

    @pytest.mark.parametrize("top", [255, 1023, 4095, 16383, 32767])
    def test_of_16_bits_that_are_not_used_is_refused_with_the_line_to_write(self, top):
        gray = Image.fromarray(np.array([[0, top]], dtype=np.uint16))
        line = rf"asarray\(image\) - 0\) / \({top} - 0\)\)\.float\(\)\[None\]"
        with pytest.raises(DataError, match=rf"image 'x' holds 16-bit integers from 0 to {top} .*{line}, the range"):
            as_image(gray, name="x")

    @pytest.mark.parametrize("value", [-1, 65536])
    def test_of_more_than_16_bits_is_refused(self, value):
        image = Image.fromarray(np.array([[0, value]], dtype=np.int32))
        with pytest.raises(DataError, match=f"image 'x' holds 32-bit integers from .*{value}.*expected floats"):
            as_image(image, name="x")

    def test_of_pil_floats_is_in_0_to_1_or_refused(self):
        assert as_image(Image.new("F", (2, 2), 0.25)).tolist() == [[[0.25, 0.25], [0.25, 0.25]]]
        with pytest.raises(DataError, match="image 'x' holds 32-bit floats from 7 to 7"):
            as_image(Image.new("F", (2, 2), 7.0), name="x")

    @pytest.mark.parametrize("path", ["a.png", Path("a.png")])
    def test_as_a_path_names_the_data_sets_of_files(self, path):
        with pytest.raises(TypeError, match=r"SegmentationFolder.*ListedFiles"):
            as_image(path, name="x")

    def test_of_a_truncated_file_is_unreadable(self):
        file = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file, "JPEG")
        lazy = Image.open(io.BytesIO(file.getvalue()[:1500]))
        with pytest.raises(UnreadableImageError, match="image 'x' cannot be read"):
            as_image(lazy, name="x")

    def test_as_an_array_is_refused_with_the_way_to_convert_it(self):
        with pytest.raises(TypeError, match=r"image 'x' is ndarray; .*from_numpy\(array\).permute\(2, 0, 1\)"):
            as_image(np.zeros((4, 6, 3), dtype=np.uint8), name="x")

    @pytest.mark.parametrize("shape", [(4, 6), (1, 3, 4, 6), ()])
    def test_of_another_shape_is_refused(self, shape):
        with pytest.raises(DataError, match=r"image 'x' has shape .*; expected \(C, H, W\)"):
            as_image(torch.zeros(shape), name="x")

    @pytest.mark.parametrize("image", [torch.zeros(3, 0, 4), torch.zeros(0, 4, 4), Image.new("RGB", (0, 4))])
    def test_without_pixels_is_refused(self, image):
        with pytest.raises(DataError, match="image 'x' has no pixels"):
            as_image(image, name="x")

    @pytest.mark.parametrize("value", [-0.1, 1.1, 255.0, float("nan"), float("inf")])
    def test_floats_outside_0_to_1_are_refused(self, value):
        image = torch.full((3, 2, 2), 0.5)
        image[1, 1, 0] = value
        with pytest.raises(DataError, match=r"image 'x' holds values .*expected floats in \[0, 1\]"):
            as_image(image, name="x")

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_of_other_floats_becomes_float32(self, dtype):
        image = as_image(torch.full((1, 2, 2), 0.5, dtype=dtype))
        assert image.dtype == torch.float32
        assert (image == 0.5).all()

    @pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64])
    def test_of_other_dtypes_is_refused(self, dtype):
        with pytest.raises(TypeError, match=r"image 'x' is torch.*; expected uint8"):
            as_image(torch.zeros(3, 2, 2, dtype=dtype), name="x")

    def test_of_a_tensor_subclass_becomes_a_plain_tensor(self):
        image = as_image(tv_tensors.Image(torch.ones(3, 2, 2, dtype=torch.uint8)))
        assert type(image) is torch.Tensor
        assert image.sum() == 12

    def test_takes_no_gradients_along(self):
        assert not as_image(torch.rand(3, 2, 2, requires_grad=True)).requires_grad


class TestMask:
    @given(
        st.sampled_from(["?", "u1", "i1", "<u2", ">u2", "i2", "<i4", ">i4", "i8", "u4", "u8"]),
        st.lists(st.integers(-300, 300), min_size=1, max_size=6),
    )
    @settings(derandomize=True, deadline=None)
    def test_of_any_integer_dtype_keeps_its_values(self, dtype, values):
        lowest, highest = (0, 1) if dtype == "?" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        mask = np.array([[min(max(v, lowest), highest) for v in values]], dtype=dtype)
        result = as_mask(mask)
        assert result.dtype == (torch.uint8 if dtype in ("?", "u1") else torch.int32)
        assert result.tolist() == mask.astype(int).tolist()
        if mask.dtype.isnative:
            assert torch.equal(as_mask(torch.from_numpy(mask)), result)

    @pytest.mark.parametrize("value", [2**31, -(2**31) - 1, 2**40])
    @pytest.mark.parametrize("make", [np.array, torch.tensor])
    def test_values_beyond_32_bits_are_refused_not_wrapped(self, value, make):
        with pytest.raises(DataError, match=f"mask of 'x' holds values from .*{value}"):
            as_mask(make([[0, value]]), name="x")

    @pytest.mark.parametrize("make", [lambda a: a, torch.from_numpy])
    def test_uint64_beyond_64_bits_with_sign_is_refused(self, make):
        with pytest.raises(DataError, match="mask of 'x' holds values from 0 to 184467440737095"):
            as_mask(make(np.array([[0, 2**64 - 1]], dtype=np.uint64)), name="x")

    def test_extreme_32_bit_values_are_kept(self):
        assert as_mask(torch.tensor([[2**31 - 1, -(2**31)]])).tolist() == [[2**31 - 1, -(2**31)]]

    @pytest.mark.parametrize(
        ("mode", "dtype"),
        [("1", torch.uint8), ("L", torch.uint8), ("P", torch.uint8),
         ("I", torch.int32), ("I;16", torch.int32), ("I;16B", torch.int32)],
    )  # fmt: skip
    def test_from_pil_holds_indices(self, mode, dtype):
        mask = as_mask(Image.new(mode, (3, 2), 1))
        assert mask.dtype == dtype
        assert mask.tolist() == [[1, 1, 1], [1, 1, 1]]

    def test_of_a_palette_holds_indices_not_colors(self):
        image = Image.fromarray(np.array([[0, 1, 255]], dtype=np.uint8))
        image.putpalette([9, 9, 9] * 256)
        assert as_mask(image).tolist() == [[0, 1, 255]]

    @pytest.mark.parametrize("mode", ["F", "CMYK", "HSV"])
    def test_of_other_modes_is_refused(self, mode):
        with pytest.raises(DataError, match=f"mask of 'x' is an image of mode {mode}; expected class indices"):
            as_mask(Image.new(mode, (3, 2)), name="x")

    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
    def test_in_equal_channels_is_gray(self, mode):
        gray = Image.fromarray(np.array([[0, 1, 255]], dtype=np.uint8))
        assert as_mask(gray.convert(mode)).tolist() == [[0, 1, 255]]

    @pytest.mark.parametrize("mode", ["RGB", "RGBA"])
    def test_in_color_is_refused_with_the_line_to_write(self, mode):
        with pytest.raises(DataError, match=r"in color; .*class_map=\{\(9, 8, 7\): 0, .*ClassMap"):
            as_mask(Image.new(mode, (3, 2), (9, 8, 7)), name="x")

    @pytest.mark.parametrize("mode", ["RGBA", "LA"])
    def test_with_transparent_pixels_is_refused(self, mode):
        with pytest.raises(DataError, match="mask of 'x' has transparent pixels"):
            as_mask(Image.new(mode, (3, 2)), name="x")

    @pytest.mark.parametrize(
        "mask",
        [np.zeros((2, 2)), torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.complex64), np.float16([[0]])],
    )
    def test_of_floats_is_refused(self, mask):
        with pytest.raises(TypeError, match=r"mask of 'x' is torch.*; expected integer class indices"):
            as_mask(mask, name="x")

    @pytest.mark.parametrize("mask", [[[0, 1]], None, np.array([["a"]]), "a.png"])
    def test_of_another_type_is_refused(self, mask):
        with pytest.raises(TypeError, match=r"mask of 'x' is .*expected an integer"):
            as_mask(mask, name="x")

    @pytest.mark.parametrize("shape", [(2,), (2, 3, 4), (2, 3, 1), (1, 1, 2, 2)])
    def test_of_another_shape_is_refused(self, shape):
        with pytest.raises(DataError, match=r"mask of 'x' has shape .*; expected \(H, W\)"):
            as_mask(torch.zeros(shape, dtype=torch.uint8), name="x")

    @pytest.mark.parametrize("make", [torch.ones, np.ones])
    def test_with_one_channel_loses_it(self, make):
        dtype = torch.uint8 if make is torch.ones else np.uint8
        assert as_mask(make((1, 2, 3), dtype=dtype)).shape == (2, 3)

    @pytest.mark.parametrize("mask", [torch.zeros(0, 3, dtype=torch.int64), Image.new("L", (0, 2))])
    def test_without_pixels_is_refused(self, mask):
        with pytest.raises(DataError, match="mask of 'x' has no pixels"):
            as_mask(mask, name="x")

    def test_of_an_array_shares_no_memory_with_it(self):
        array = np.zeros((2, 2), dtype=np.uint8)
        as_mask(array)[0, 0] = 1
        assert array[0, 0] == 0

    def test_of_a_mirrored_or_read_only_array_is_taken(self):
        array = np.array([[1, 2]], dtype=np.uint8)
        array.flags.writeable = False
        assert as_mask(array[:, ::-1]).tolist() == [[2, 1]]

    def test_of_a_tensor_subclass_becomes_a_plain_tensor(self):
        assert type(as_mask(tv_tensors.Mask(torch.zeros(2, 2, dtype=torch.int64)))) is torch.Tensor


class TestItems:
    image, mask = torch.zeros(3, 4, 6), torch.zeros(4, 6, dtype=torch.uint8)

    @pytest.mark.parametrize("rest", [(), (None,), ("anything", 3)])
    def test_what_stands_behind_an_image_is_ignored(self, rest):
        assert image_of((self.image, *rest), name="x") is not None
        assert image_of(self.image, name="x").shape == (3, 4, 6)

    def test_an_empty_tuple_is_no_image(self):
        with pytest.raises(DataError, match="item 'x' is empty"):
            image_of((), name="x")

    def test_a_pair_may_have_more_behind_it(self):
        image, mask = pair_of([self.image, self.mask, True], name="x")
        assert (image.shape, mask.shape) == ((3, 4, 6), (4, 6))

    @pytest.mark.parametrize("item", [image, (image,), ()])
    def test_a_missing_mask_is_named(self, item):
        with pytest.raises(DataError, match="item 'x' has no mask"):
            pair_of(item, name="x")

    def test_a_mask_that_is_none_is_named(self):
        with pytest.raises(TypeError, match="mask of 'x' is NoneType"):
            pair_of((self.image, None), name="x")

    def test_sizes_that_differ_are_named(self):
        with pytest.raises(DataError, match="'x' differ in size: image 4 x 6, mask 6 x 4"):
            pair_of((self.image, self.mask.T), name="x")


@given(
    st.sampled_from([torch.uint8, torch.int32, torch.int64]),
    st.integers(2, 400),
    st.integers(-2, 400),
    st.lists(st.integers(0, 255), min_size=1, max_size=5),
)
@settings(derandomize=True, deadline=None)
def test_mask_values_are_classes_or_the_ignore_index(dtype, num_classes, ignore_index, values):
    mask = torch.tensor([values], dtype=dtype)
    wrong = [v for v in values if not 0 <= v < num_classes and v != ignore_index]
    if not wrong:
        check_mask_values(mask, num_classes, ignore_index, name="x")
        return
    with pytest.raises(
        DataError,
        match=f"mask of 'x' holds the value {wrong[0]}; expected 0..{num_classes - 1} or {ignore_index}",
    ):
        check_mask_values(mask, num_classes, ignore_index, name="x")


def test_an_ignore_index_beyond_8_bits_is_not_its_remainder():
    mask = torch.tensor([[44]], dtype=torch.uint8)  # 300 % 256
    with pytest.raises(DataError, match="holds the value 44"):
        check_mask_values(mask, 21, 300, name="x")


def test_256_classes_fit_8_bits():
    check_mask_values(torch.arange(256, dtype=torch.uint8).reshape(16, 16), 256, -1, name="x")


@pytest.mark.parametrize(("num_classes", "ignore_index"), [(1, 255), (0, 255), (21, 20), (21, 0), (256, 255)])
def test_classes_that_make_no_sense_are_refused(num_classes, ignore_index):
    with pytest.raises(ValueError, match=r"num_classes is|ignore_index \d+ is one of"):
        check_classes(num_classes, ignore_index)


@pytest.mark.parametrize(
    ("num_classes", "ignore_index", "dtype"),
    [(2, 255, torch.uint8), (255, 255, torch.uint8), (256, -1, torch.int32), (257, 300, torch.int32)],
)
def test_masks_are_8_bits_where_all_values_fit(num_classes, ignore_index, dtype):
    check_classes(num_classes, ignore_index)
    assert index_dtype(num_classes, ignore_index) == dtype
