from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stseg.functional import boundary_region


def eroded_by_hand(mask, distance):
    """A pixel stays where all pixels of the square around it are set; beyond the border none is."""
    height, width = mask.shape
    out = np.zeros_like(mask)
    for y in range(height):
        for x in range(width):
            square = [
                0 <= y + dy < height and 0 <= x + dx < width and mask[y + dy, x + dx]
                for dy in range(-distance, distance + 1)
                for dx in range(-distance, distance + 1)
            ]
            out[y, x] = all(square)
    return out


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 9), st.integers(1, 5))
def test_is_what_erosion_takes_from_each_class(seed, height, width, distance):
    generator = np.random.default_rng(seed)
    maps = np.kron(generator.choice([0, 1, 255], (3, 3)), np.ones((4, 4), int))[:height, :width]
    found = boundary_region(torch.from_numpy(maps), distance).numpy()
    for value in np.unique(maps):
        mask = maps == value
        np.testing.assert_array_equal(found & mask, mask & ~eroded_by_hand(mask, distance))


def test_of_a_batch_is_that_of_each_map():
    maps = torch.randint(3, (2, 3, 7, 11), generator=torch.Generator().manual_seed(0))
    found = boundary_region(maps, 2)
    assert found.shape == maps.shape
    for i in range(2):
        for j in range(3):
            assert torch.equal(found[i, j], boundary_region(maps[i, j], 2))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int32, torch.int64])
def test_takes_integers_of_any_kind(dtype):
    mask = torch.zeros(9, 9, dtype=dtype)
    mask[2:7, 2:7] = 1
    found = boundary_region(mask, 1)
    assert found[2:7, 2:7].sum() == 16
    assert found[0].all()
    assert not found[4, 4]


def test_has_nothing_to_find_in_nothing():
    assert boundary_region(torch.zeros(0, 5, dtype=torch.int64), 2).shape == (0, 5)
    assert boundary_region(torch.zeros(2, 0, 0, dtype=torch.int64), 2).shape == (2, 0, 0)
    assert boundary_region(torch.zeros(1, 1, dtype=torch.int64), 40).item()


def test_refuses_what_is_no_map():
    with pytest.raises(ValueError, match=r"masks have shape \(4,\); expected \(\.\.\., H, W\)"):
        boundary_region(torch.zeros(4, dtype=torch.int64), 1)
    with pytest.raises(TypeError, match=r"masks is torch\.float32; expected integer"):
        boundary_region(torch.zeros(4, 4), 1)
    with pytest.raises(ValueError, match="distance is 0; expected 1 or more"):
        boundary_region(torch.zeros(4, 4, dtype=torch.int64), 0)
    with pytest.raises(TypeError, match=r"distance is 1\.5; expected an integer"):
        boundary_region(torch.zeros(4, 4, dtype=torch.int64), 1.5)
