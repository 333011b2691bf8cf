from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from stseg.modules.perturbations import (
    adversarial_direction,
    connected_regions,
    feature_drop,
    feature_noise,
    guided_cutout,
    mask_context,
    mask_objects,
)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@given(st.integers(0, 1000), st.floats(0.1, 0.9))
@settings(max_examples=40, deadline=None)
def test_regions_are_those_of_scipy(seed, density):
    mask = torch.rand(2, 9, 13, generator=torch.Generator().manual_seed(seed)) < density
    for found, one in zip(connected_regions(mask), mask, strict=True):
        expected, count = ndimage.label(one.numpy(), structure=np.ones((3, 3)))
        assert len(found.unique()) == count + bool((~one).any())
        pairs = {(int(a), int(b)) for a, b in zip(found.flatten(), expected.flatten(), strict=True)}
        assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


@given(st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_cutout_zeroes_a_rectangle_of_each_object_in_its_box(seed):
    torch.manual_seed(seed)
    foreground = torch.zeros(2, 16, 20, dtype=torch.bool)
    foreground[0, 1:11, 2:12] = True
    foreground[0, 13:16, 14:20] = True
    foreground[1, 4, 4] = True  # too small
    changed = guided_cutout(torch.ones(2, 3, 16, 20), foreground)
    assert (changed[1] == 1).all()
    zero = changed[0, 0] == 0
    assert torch.equal(zero.expand(3, -1, -1), changed[0] == 0)
    assert int(zero[1:11, 2:12].sum()) == 16
    assert int(zero[13:16, 14:20].sum()) == 2
    assert int(zero.sum()) == 18


def test_masks_are_complements():
    features, foreground = torch.rand(2, 3, 5, 5), torch.rand(2, 5, 5) < 0.5
    one, other = mask_context(features, foreground), mask_objects(features, foreground)
    assert torch.equal(one + other, features)
    assert (one[:, 0][~foreground] == 0).all()
    assert (other[:, 0][foreground] == 0).all()


def test_drop_zeroes_the_most_active_positions_of_each_image():
    features = torch.rand(4, 6, 8, 8)
    changed = feature_drop(features)
    attention = features.mean(1)
    for before, after, active in zip(features, changed, attention, strict=True):
        gone = (after == 0).all(0)
        assert gone[active == active.max()].all()
        assert active[~gone].max() <= 0.9 * active.max()
        assert active[gone].min() > 0.7 * active.max()
        assert torch.equal(after[:, ~gone], before[:, ~gone])


def test_noise_is_shared_by_the_batch_and_bounded():
    changed = feature_noise(torch.ones(3, 50, 8, 8)) - 1
    assert torch.equal(changed[0], changed[2])
    assert 0.28 < changed.max() <= 0.3
    assert -0.3 <= changed.min() < -0.28
    assert abs(changed.mean()) < 0.02


def test_the_adversarial_direction_changes_predictions_more_than_a_random_one():
    decode = torch.nn.Conv2d(6, 3, 1)
    features = torch.rand(4, 6, 5, 5)
    found = adversarial_direction(decode, features)
    assert not found.requires_grad
    torch.testing.assert_close(found.flatten(1).norm(dim=1), torch.full((4,), 2.0))

    def change(direction):
        with torch.no_grad():
            one, other = decode(features).log_softmax(1), decode(features + direction).log_softmax(1)
        return float((one.exp() * (one - other)).sum())

    rivals = []
    for _ in range(20):
        rival = torch.randn_like(features)
        rivals.append(change(2 * rival / rival.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)))
    assert change(found) > 2 * max(rivals)


def test_the_adversarial_direction_leaves_no_gradients_behind():
    decode = torch.nn.Conv2d(6, 3, 1)
    adversarial_direction(decode, torch.rand(2, 6, 4, 4, requires_grad=True))
    assert decode.weight.grad is None
