from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from stseg.augment import BoxMix


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def by_hand(rng, height, width):
    """A box as CutMix-Seg draws it."""
    tall = math.exp(rng.uniform() * math.log(0.5))
    rows, columns = round(tall * height), round(0.5 / tall * width)
    return round((height - rows) * rng.uniform()), round((width - columns) * rng.uniform()), rows, columns


@pytest.mark.parametrize(("height", "width"), [(64, 64), (40, 96)])
def test_boxes_are_distributed_as_the_paper_draws_them(height, width):
    masks = BoxMix().draw(torch.zeros(4000, 1, height, width)).numpy()
    found = []
    for mask in masks:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert mask.sum() == len(rows) * len(columns)  # a rectangle
        found.append((rows[0], columns[0], len(rows), len(columns)))
    rng = np.random.default_rng(0)
    wanted = [by_hand(rng, height, width) for _ in range(4000)]
    for one, other in zip(np.array(found).T, np.array(wanted).T, strict=True):
        assert stats.ks_2samp(one, other).pvalue > 1e-3
    assert abs(masks.mean() - 0.5) < 0.01


def test_several_boxes_flip_one_another():
    mix = BoxMix(area=(0.25, 0.5), boxes=3)
    share = mix.draw(torch.zeros(2000, 1, 48, 48)).float().mean((1, 2))
    assert share.max() < 0.55
    assert 0.15 < share.mean() < 0.35
    torch.manual_seed(3)
    both = BoxMix(area=(1.0, 1.0), boxes=4)  # four boxes of a quarter of the image
    quarter = both.draw(torch.zeros(500, 1, 32, 32)).float().mean((1, 2))
    assert quarter.max() <= 1
    assert quarter.min() >= 0


def test_pastes_the_reversed_batch_in_all_tensors_alike():
    images, masks = torch.rand(3, 2, 20, 24), torch.randint(5, (3, 20, 24))
    torch.manual_seed(1)
    new_images, new_masks = BoxMix()(images, masks)
    torch.manual_seed(1)
    where = BoxMix().draw(images)
    assert torch.equal(new_images, torch.where(where[:, None], images.flip(0), images))
    assert torch.equal(new_masks, torch.where(where, masks.flip(0), masks))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"area": (0.0, 0.5)}, "area"), ({"area": (0.6, 0.5)}, "area"), ({"boxes": 0}, "boxes is 0; expected 1 or more")],
)
def test_settings_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        BoxMix(**options)


def test_what_is_no_image_is_refused():
    with pytest.raises(ValueError, match="expected images"):
        BoxMix()(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="got nothing"):
        BoxMix()()
