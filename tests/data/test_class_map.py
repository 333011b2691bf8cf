from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stseg.data.class_map import ClassMap
from stseg.errors import DataError


def by_hand(mask, classes, unmapped):
    """Pixel by pixel."""
    return [[classes.get(value, unmapped) for value in row] for row in mask.tolist()]


VALUES = st.integers(0, 255)
WIDE = st.one_of(st.integers(-5, 300), st.sampled_from([-(2**31), 2**31 - 1, 65535]))


class TestClassMap:
    @given(st.dictionaries(VALUES, VALUES, min_size=1), st.lists(VALUES, min_size=1, max_size=40), VALUES)
    @settings(derandomize=True, deadline=None)
    def test_of_8_bits_is_the_mapping_pixel_by_pixel(self, classes, values, unmapped):
        mask = torch.tensor([values], dtype=torch.uint8)
        mapped = ClassMap(classes, unmapped)(mask, name="a")
        assert mapped.dtype == torch.uint8
        assert mapped.tolist() == by_hand(mask, classes, unmapped)

    @given(
        st.dictionaries(WIDE, st.integers(0, 70000), min_size=1),
        st.lists(WIDE, min_size=1, max_size=40),
        st.integers(0, 70000),
    )
    @settings(derandomize=True, deadline=None)
    def test_of_32_bits_is_the_mapping_pixel_by_pixel(self, classes, values, unmapped):
        mask = torch.tensor([values], dtype=torch.int32)
        assert ClassMap(classes, unmapped)(mask, name="a").tolist() == by_hand(mask, classes, unmapped)

    @pytest.mark.parametrize(("highest", "dtype"), [(255, torch.uint8), (256, torch.int32)])
    @pytest.mark.parametrize("given", [torch.uint8, torch.int32])
    def test_gives_8_bits_where_they_suffice(self, highest, dtype, given):
        mask = torch.tensor([[0, 1]]).to(given)
        mapped = ClassMap({1: highest})(mask, name="a")
        assert mapped.dtype == dtype
        assert mapped.tolist() == [[255, highest]]

    def test_ignores_all_other_values(self):
        assert ClassMap({7: 0, 8: 1})(torch.arange(256)[None].byte(), name="a").tolist() == [
            [255] * 7 + [0, 1] + [255] * 247
        ]

    def test_works_on_transposed_masks(self):
        mask = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.int32).T
        assert ClassMap({5: 0})(mask, name="a").tolist() == [[255, 255], [255, 0], [255, 255]]

    def test_leaves_the_mask_as_it_was(self):
        mask = torch.tensor([[1, 2]], dtype=torch.uint8)
        ClassMap({1: 5})(mask, name="a")
        assert mask.tolist() == [[1, 2]]

    def test_takes_integers_of_numpy(self):
        assert ClassMap({np.int64(7): np.uint8(1)})(torch.tensor([[7]]).byte(), name="a").tolist() == [[1]]

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
    def test_without_others_refuses_them(self, dtype):
        strict = ClassMap({0: 0, 255: 1}, unmapped=None)
        assert strict(torch.tensor([[0, 255]]).to(dtype), name="a").tolist() == [[0, 1]]
        with pytest.raises(
            DataError, match=r"mask of 'a' holds the value 34, which class_map does not have; expected 0, 255 \("
        ):
            strict(torch.tensor([[0, 255, 34, 2]]).to(dtype), name="a")

    def test_names_a_few_of_many_values(self):
        with pytest.raises(DataError, match=r"expected 0, 1, 2, 3, 4, 5, 6, 7, \.\.\. or 99 \(unmapped=255"):
            ClassMap(dict.fromkeys(range(100), 0), None)(torch.tensor([[100]]).byte(), name="a")


class TestRefuses:
    @pytest.mark.parametrize("classes", [[7, 8], "7", 7, None])
    def test_what_is_no_mapping(self, classes):
        with pytest.raises(TypeError, match=r"class_map is .*; expected a mapping"):
            ClassMap(classes)

    @pytest.mark.parametrize("classes", [{"7": 0}, {7: 0.0}, {None: 1}, {True: 1}, {1: "road"}])
    def test_what_is_no_integer(self, classes):
        with pytest.raises(TypeError, match=r"class_map has the (value|class) .*; expected an integer"):
            ClassMap(classes)

    def test_nothing(self):
        with pytest.raises(ValueError, match="class_map is empty"):
            ClassMap({})

    def test_classes_below_0(self):
        with pytest.raises(ValueError, match="class_map gives the class -1; expected 0 or more"):
            ClassMap({7: -1})
        with pytest.raises(ValueError, match="unmapped is -1; expected 0 or more"):
            ClassMap({7: 1}, unmapped=-1)

    @pytest.mark.parametrize("value", [2**31, -(2**31) - 1])
    def test_values_that_no_mask_holds(self, value):
        with pytest.raises(ValueError, match=r"class_map has values from .* to .*; expected 32 bits"):
            ClassMap({value: 0})
