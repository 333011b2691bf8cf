from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stseg import MultiScaleFlip, Segmenter
from stseg.models import batching


def resized(image, height, width):
    """Bilinear with aligned corners: ``(C, H, W)``, pixel by pixel."""
    channels, old_height, old_width = image.shape
    out = np.zeros((channels, height, width))
    for y in range(height):
        for x in range(width):
            down = y * (old_height - 1) / (height - 1) if height > 1 else 0.0
            right = x * (old_width - 1) / (width - 1) if width > 1 else 0.0
            top, left = min(int(down), old_height - 1), min(int(right), old_width - 1)
            bottom, far = min(top + 1, old_height - 1), min(left + 1, old_width - 1)
            v, u = down - top, right - left
            upper = image[:, top, left] * (1 - u) + image[:, top, far] * u
            lower = image[:, bottom, left] * (1 - u) + image[:, bottom, far] * u
            out[:, y, x] = upper * (1 - v) + lower * v
    return out


def mean_probability(network, image, scales, flip):
    """The paper's labeling of one image ``(C, H, W)``; ``network`` maps arrays to logits of equal size."""
    _, height, width = image.shape
    views = []
    for scale in scales:
        small = resized(image, max(1, int(height * scale)), max(1, int(width * scale)))
        for mirrored in (False, True) if flip else (False,):
            logits = network(small[:, :, ::-1].copy() if mirrored else small)
            exponentials = np.exp(logits - logits.max(0))
            probability = exponentials / exponentials.sum(0)
            views.append(resized(probability[:, :, ::-1] if mirrored else probability, height, width))
    return sum(views) / len(views)


class Lopsided(nn.Module):
    """Logits that depend on the neighbors to the left and on the whole image, so that views differ."""

    takes_images = True

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv, self.whole = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.sizes = []

    def forward(self, x):
        self.sizes += len(x) * [tuple(x.shape[-2:])]
        return 3 * self.conv(x) + 5 * self.whole(x.mean((2, 3), keepdim=True))


def on_arrays(model):
    def network(image):
        with torch.no_grad():
            return model(torch.from_numpy(image)[None].float())[0].double().numpy()

    return network


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("size", [(9, 14), (5, 5), (1, 7)])
def test_equals_the_recipe_of_the_paper(size, flip):
    model = Lopsided()
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = MultiScaleFlip(model, flip=flip)(images)
    for row, image in zip(found, images, strict=True):
        expected = mean_probability(on_arrays(model), image.double().numpy(), (0.5, 0.75, 1.0, 1.5, 2.0), flip)
        np.testing.assert_allclose(row.exp().numpy(), expected, rtol=0, atol=2e-6)


def test_looks_at_10_views_of_sides_rounded_down():
    model = Lopsided()
    MultiScaleFlip(model)(torch.rand(1, 3, 9, 15))
    assert sorted(model.sizes) == sorted(2 * [(4, 7), (6, 11), (9, 15), (13, 22), (18, 30)])


def test_has_at_least_one_pixel_to_look_at():
    model = Lopsided()
    found = MultiScaleFlip(model, scales=(0.1,), flip=False)(torch.rand(1, 3, 4, 15))
    assert model.sizes == [(1, 1)]
    assert found.shape == (1, 4, 4, 15)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 1000),
    st.tuples(st.integers(1, 3), st.just(3), st.integers(1, 12), st.integers(1, 12)),
    st.lists(st.floats(0.2, 2.0), min_size=1, max_size=3),
    st.booleans(),
)
def test_softmax_is_the_mean_probability_again(seed, shape, scales, flip):
    images = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        found = MultiScaleFlip(Lopsided(seed), scales, flip)(images)
    assert found.shape == (shape[0], 4, *shape[2:])
    torch.testing.assert_close(found.exp().sum(1), torch.ones(shape[0], *shape[2:]), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.softmax(1), found.exp(), rtol=0, atol=1e-5)


def test_of_a_mirrored_image_is_the_mirrored_result():
    model, images = MultiScaleFlip(Lopsided()), torch.rand(2, 3, 8, 11)
    with torch.no_grad():
        torch.testing.assert_close(model(images.flip(-1)), model(images).flip(-1), rtol=0, atol=1e-5)
        plain = MultiScaleFlip(Lopsided(), flip=False)
        assert (plain(images.flip(-1)) - plain(images).flip(-1)).abs().max() > 0.01


def test_of_one_view_is_the_model():
    images = torch.rand(2, 3, 8, 11)
    with torch.no_grad():
        found = MultiScaleFlip(Lopsided(), scales=(1,), flip=False)(images)
        torch.testing.assert_close(found, Lopsided()(images).log_softmax(1), rtol=0, atol=1e-5)


def test_of_8_bits_is_that_of_floats():
    images = torch.randint(0, 256, (2, 3, 8, 11), dtype=torch.uint8)
    with torch.no_grad():
        model = MultiScaleFlip(Lopsided())
        assert torch.equal(model(images), model(images.float() / 255))


def test_of_an_impossible_class_is_finite():
    class Certain(nn.Module):
        takes_images = True

        def forward(self, x):
            return torch.cat([torch.full_like(x[:, :1], 1e4), torch.full_like(x[:, :1], -1e4)], 1)

    found = MultiScaleFlip(Certain())(torch.rand(1, 3, 6, 6))
    assert found.isfinite().all()
    assert float(found.exp()[:, 1].max()) < 1e-30


def test_of_nan_logits_is_nan():
    model = Lopsided()
    nn.init.constant_(model.conv.bias, math.nan)
    assert MultiScaleFlip(model)(torch.rand(1, 3, 6, 6)).isnan().all()


def test_wraps_bare_networks_only():
    bare = nn.Conv2d(3, 4, 1)
    assert isinstance(MultiScaleFlip(bare).model, Segmenter)
    wrapped = Segmenter(bare, mean=None, std=None)
    assert MultiScaleFlip(wrapped).model is wrapped


def test_is_trained_and_saved_through():
    model = MultiScaleFlip(nn.Conv2d(3, 4, 1), scales=(0.5, 1.0))
    model(torch.rand(1, 3, 6, 6))[:, 0].sum().backward()
    weight = model.model.network.weight
    assert float(weight.grad.abs().max()) > 0
    assert [key for key in model.state_dict() if key.endswith("weight")] == ["model.network.weight"]


@pytest.mark.parametrize("scales", [(), (0.0, 1.0), (-1.0,), (1.0, math.nan), (math.inf,)])
def test_refuses_scales_that_make_no_sense(scales):
    with pytest.raises(ValueError, match="scales are"):
        MultiScaleFlip(nn.Conv2d(3, 4, 1), scales)


def test_large_views_are_computed_one_by_one_with_the_same_result(monkeypatch):
    model, images = MultiScaleFlip(Lopsided()), torch.rand(3, 3, 8, 11)
    calls = []
    model.model.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    with torch.no_grad():
        together = model(images)
        assert calls == [6] * 5
        monkeypatch.setattr(batching, "_MOST_PIXELS", 2 * 8 * 11)
        calls.clear()
        torch.testing.assert_close(model(images), together, rtol=0, atol=1e-6)
    assert calls == [6, 3, 3, 2, 2, 2, *[1] * 12]


def test_the_softmax_of_logits_laid_out_by_pixel_is_that_of_others():
    class Laid(Lopsided):
        def forward(self, x):
            return super().forward(x).contiguous(memory_format=torch.channels_last)

    images = torch.rand(2, 3, 8, 11)
    with torch.no_grad():
        torch.testing.assert_close(MultiScaleFlip(Laid())(images), MultiScaleFlip(Lopsided())(images))
