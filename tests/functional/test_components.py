from __future__ import annotations

import numpy as np
import pytest
import torch

from stseg.functional import connected_components


def flooded(mask: np.ndarray) -> np.ndarray:
    """Number every component by its last pixel, from 1."""
    height, width = mask.shape
    found = np.zeros((height, width), dtype=int)
    for start in reversed(range(height * width)):
        stack = [divmod(start, width)]
        while stack:
            i, j = stack.pop()
            if 0 <= i < height and 0 <= j < width and mask[i, j] and not found[i, j]:
                found[i, j] = start + 1
                stack += [(i + a, j + b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
    return found


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4, 1.0])
def test_components_are_those_of_a_flood(share):
    masks = torch.rand(4, 11, 17, generator=torch.Generator().manual_seed(0)) < share
    found = connected_components(masks).numpy()
    for one, mask in zip(found, masks.numpy(), strict=True):
        np.testing.assert_array_equal(one, flooded(mask))


def test_pixels_touch_at_corners():
    assert connected_components(torch.eye(5, dtype=torch.bool)[None]).unique().tolist() == [0, 25]


def test_images_do_not_touch():
    assert connected_components(torch.ones(2, 3, 3, dtype=torch.bool)).unique().tolist() == [9]


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"masks have shape \(2, 1, 3, 3\); expected \(B, H, W\)"):
        connected_components(torch.ones(2, 1, 3, 3, dtype=torch.bool))
