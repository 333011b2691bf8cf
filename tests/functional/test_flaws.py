from __future__ import annotations

import numpy as np
import pytest
import torch

from stseg.functional import flaw_target, less_flawed_target, refine_flaws
from stseg.functional.flaws import _odd, blur_sigma, gaussian_blur


def naive_blur(values: np.ndarray, size: int) -> np.ndarray:
    half, sigma = size // 2, 0.3 * ((size - 1) / 2 - 1) + 0.8
    weights = np.array([np.exp(-(o**2) / (2 * sigma**2)) for o in range(-half, half + 1)])
    weights /= weights.sum()
    height, width = values.shape

    def mirrored(index: int, side: int) -> int:
        return -index if index < 0 else 2 * (side - 1) - index if index >= side else index

    found = np.zeros_like(values)
    for i, j in np.ndindex(height, width):
        for a in range(-half, half + 1):
            for b in range(-half, half + 1):
                where = mirrored(i + a, height), mirrored(j + b, width)
                found[i, j] += weights[a + half] * weights[b + half] * values[where]
    return found


def naive_scale(values: np.ndarray, where: np.ndarray) -> np.ndarray:
    if not where.any():
        return np.zeros_like(values)
    low, high = values[where].min(), values[where].max()
    return np.where(where, (values - low) / max(high - low, 1e-3), 0)


def naive_target(probabilities: np.ndarray, masks: np.ndarray, ignore: int = 255) -> np.ndarray:
    classes, height, width = probabilities.shape[1:]
    found = np.zeros(masks.shape)
    for b in range(len(masks)):
        flaws = np.zeros((height, width))
        for i, j in np.ndindex(height, width):
            if masks[b, i, j] != ignore:
                flaws[i, j] = sum(abs((masks[b, i, j] == k) - probabilities[b, k, i, j]) for k in range(classes)) / 2
        side = min(height, width)
        flaws = naive_blur(flaws, side // 8 + (side // 8 % 2 == 0))
        wide = np.zeros_like(flaws)
        for i, j in np.ndindex(height, width):
            wide[i, j] = flaws[max(0, i - 1) : i + 2, max(0, j - 1) : j + 2].max()
        flaws = naive_blur(wide, side // 4 + (side // 4 % 2 == 0))
        found[b] = naive_scale(flaws, masks[b] != ignore)
    return found


def naive_refined(flaws: np.ndarray, where: np.ndarray) -> np.ndarray:
    found, side = np.zeros(flaws.shape), min(flaws.shape[1:])
    for b in range(len(flaws)):
        one = naive_blur(np.where(where[b], np.maximum(flaws[b], 0), 0), side // 16 + (side // 16 % 2 == 0))
        found[b] = naive_scale(one, where[b]) if one.max() > 0.1 else 0
    return found


@pytest.mark.parametrize(("side", "sizes"), [(513, (33, 65, 129)), (321, (21, 41, 81))])
def test_kernels_are_those_of_the_authors(side, sizes):
    assert tuple(_odd(side // share) for share in (16, 8, 4)) == sizes
    sigmas = {33: 5.3, 65: 10.1, 129: 19.7, 21: 3.5, 41: 6.5, 81: 12.5}
    assert [blur_sigma(size) for size in sizes] == pytest.approx([sigmas[size] for size in sizes])


@pytest.mark.parametrize("size", [1, 3, 7])
def test_blur_is_a_gaussian_with_reflected_borders(size):
    maps = torch.rand(2, 9, 8, generator=torch.Generator().manual_seed(0))
    expected = np.stack([naive_blur(each, size) for each in maps.double().numpy()])
    np.testing.assert_allclose(gaussian_blur(maps, size).numpy(), expected, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gaussian_blur(maps, size), gaussian_blur(maps, size))
        np.testing.assert_allclose(gaussian_blur(maps, size).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("size", [(8, 8), (24, 33)])
def test_the_target_is_the_formula(size):
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.randn(3, 4, *size, generator=generator).mul(2).softmax(1)
    masks = torch.randint(4, (3, *size), generator=generator)
    masks[0, :3], masks[2] = 255, 255
    found = flaw_target(probabilities, masks)
    np.testing.assert_allclose(found.numpy(), naive_target(probabilities.double().numpy(), masks.numpy()), atol=1e-4)
    assert (found[0].min(), found[0].max()) == pytest.approx((0, 1), abs=1e-5)
    assert not found[2].any()


def test_what_has_no_label_is_no_flaw():
    """The authors take it as half of one."""
    masks = torch.zeros(1, 32, 32, dtype=torch.int64)
    masks[:, :, 16:] = 255
    right = torch.zeros(1, 2, 32, 32)
    right[:, 0] = 1
    assert not flaw_target(right, masks).any()


@pytest.mark.parametrize("size", [(8, 8), (33, 48)])
def test_refined_flaws_are_the_formula(size):
    generator = torch.Generator().manual_seed(0)
    flaws = torch.randn(4, *size, generator=generator)
    flaws[1] = flaws[1] * 0.01  # nothing above 0.1
    where = torch.ones(4, *size, dtype=torch.bool)
    where[2, :, 3:], where[3] = False, False
    found = refine_flaws(flaws, where=where)
    np.testing.assert_allclose(found.numpy(), naive_refined(flaws.double().numpy(), where.numpy()), atol=1e-5)
    assert not found[[1, 3]].any()
    torch.testing.assert_close(refine_flaws(flaws[:1]), found[:1])


def test_rounding_errors_are_no_flaws():
    flat = torch.full((1, 48, 48), 0.7) + 1e-6 * torch.rand(1, 48, 48)
    assert refine_flaws(flat).max() < 0.01


def test_the_less_flawed_prediction_is_the_target():
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.rand(2, 3, 5, 5, generator=generator) for _ in range(2))
    flaws, others = (torch.rand(2, 5, 5, generator=generator) for _ in range(2))
    others[0, 0, 0] = flaws[0, 0, 0] = 0.3
    target, bad = less_flawed_target(one, other, flaws, others, threshold=0.6)
    for b, i, j in np.ndindex(2, 5, 5):
        mine, theirs = (1.0 if float(f[b, i, j]) > 0.6 else float(f[b, i, j]) for f in (flaws, others))
        expected = one if theirs >= mine else other
        assert torch.equal(target[b, :, i, j], expected[b, :, i, j])
        assert bool(bad[b, i, j]) == (mine == theirs == 1)
    assert 0 < bad.sum() < bad.numel()
    assert not less_flawed_target(one.requires_grad_(), other, flaws, others)[0].requires_grad


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"one has shape .* and other"):
        less_flawed_target(torch.rand(1, 2, 3, 3), torch.rand(1, 3, 3, 3), torch.rand(1, 3, 3), torch.rand(1, 3, 3))
    with pytest.raises(ValueError, match=r"where has shape .* and flaws"):
        refine_flaws(torch.rand(1, 3, 3), where=torch.ones(1, 3, dtype=torch.bool))
