from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import stseg
from stseg import MultiScaleFlip, Segmenter, Tiled
from stseg.models import batching, tiled


class Positional(nn.Module):
    """Logits that depend on the neighbors, on the whole view and on the place in it, so that tiles differ."""

    takes_images = True

    def __init__(self, classes=4, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv, self.whole = nn.Conv2d(3, classes, 3, padding=1), nn.Conv2d(3, classes, 1)
        self.sizes = []

    def forward(self, x):
        x = x.float() / 255 if x.dtype == torch.uint8 else x
        self.sizes.append((len(x), *x.shape[-2:]))
        place = torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype) * torch.linspace(0, 1, x.shape[-2])[:, None]
        return 3 * self.conv(x) + 5 * self.whole(x.mean((2, 3), keepdim=True)) + place * torch.arange(4)[:, None, None]


def naive_starts(length, size, overlap):
    """The fewest evenly spaced tiles whose neighbors share ``overlap`` of their size or more."""
    size = min(size, length)
    for count in range(1, length + 1):
        starts = [math.floor(i * (length - size) / (count - 1)) if count > 1 else 0 for i in range(count)]
        gaps = [b - a for a, b in itertools.pairwise(starts)]
        if starts[-1] + size == length and all(gap <= max(1, size * (1 - overlap) + 1e-9) for gap in gaps):
            return starts
    raise AssertionError


def naive(model, image, size, overlap):
    """Mean probability of one image ``(C, H, W)``: all tiles one by one, the Gaussian pixel by pixel."""
    _, height, width = image.shape
    h, w = min(size[0], height), min(size[1], width)
    weight = np.array(
        [
            [
                math.exp(-0.5 * ((y - (h - 1) / 2) / (h / 8)) ** 2 - 0.5 * ((x - (w - 1) / 2) / (w / 8)) ** 2)
                for x in range(w)
            ]
            for y in range(h)
        ]
    )
    total, weights = 0.0, np.zeros((height, width))
    for top in naive_starts(height, size[0], overlap):
        for left in naive_starts(width, size[1], overlap):
            window = slice(top, top + h), slice(left, left + w)
            with torch.no_grad():
                logits = model(image[None, :, window[0], window[1]])[0].double().numpy()
            exponentials = np.exp(logits - logits.max(0))
            if isinstance(total, float):
                total = np.zeros((len(logits), height, width))
            total[:, window[0], window[1]] += weight * exponentials / exponentials.sum(0)
            weights[window] += weight
    return total / weights


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 1000),
    st.tuples(st.integers(1, 32), st.integers(1, 32)),
    st.tuples(st.integers(2, 24), st.integers(2, 24)),
    st.floats(0, 0.8),
)
def test_equals_all_tiles_one_by_one(seed, shape, size, overlap):
    images = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(seed))
    model = Positional(seed=seed)
    with torch.no_grad():
        found = Tiled(model, size, overlap)(images)
    assert found.shape == (2, 4, *shape)
    for row, image in zip(found, images, strict=True):
        np.testing.assert_allclose(row.exp().numpy(), naive(model, image, size, overlap), rtol=0, atol=5e-6)
    torch.testing.assert_close(found.softmax(1), found.exp(), rtol=0, atol=1e-5)


@given(st.integers(1, 400), st.integers(1, 100), st.floats(0, 0.99))
def test_tiles_cover_an_axis_from_border_to_border(length, size, overlap):
    axis = tiled.Axis.cover(length, size, overlap)
    assert list(axis.starts) == naive_starts(length, size, overlap)
    assert axis.starts[0] == 0
    assert axis.starts[-1] + axis.size == length
    total = torch.zeros(length, dtype=torch.float64)
    for tile, weights in zip(axis.slices(), axis.weights(), strict=True):
        assert weights.min() > 0
        total[tile] += weights
    torch.testing.assert_close(total, torch.ones_like(total))


def test_an_image_within_a_tile_is_that_of_the_model():
    images = torch.rand(2, 3, 20, 31)
    with torch.no_grad():
        model = Positional()
        for size in (31, (20, 31), 1024, (20, 400)):
            found = Tiled(model, size)(images)
            assert torch.equal(found, model(images).log_softmax(1))
        assert model.sizes[0] == (2, 20, 31)


def test_all_tiles_have_one_size_and_none_reaches_beyond_the_image():
    model = Positional()
    with torch.no_grad():
        Tiled(model, (16, 8))(torch.rand(1, 3, 10, 21))
    assert {size[1:] for size in model.sizes} == {(10, 8)}


def test_the_weight_falls_towards_the_border_of_a_tile():
    class Constant(nn.Module):
        takes_images = True
        calls = 0

        def forward(self, x):
            logits = torch.zeros(len(x), 2, *x.shape[-2:])
            for row in range(len(x)):
                logits[row, self.calls % 2] = 50
                self.calls += 1
            return logits

    found = Tiled(Constant(), (8, 16), 0.5)(torch.rand(1, 3, 8, 24)).exp()[0, :, 0]
    assert found[0, :8].eq(1).all()
    assert found[1, 16:].eq(1).all()
    shared = found[0, 8:16]
    assert (shared.diff() < 0).all()
    torch.testing.assert_close(shared, 1 - shared.flip(0), rtol=0, atol=1e-6)


def test_of_8_bits_is_that_of_floats():
    images = torch.randint(0, 256, (2, 3, 18, 11), dtype=torch.uint8)
    with torch.no_grad():
        model = Tiled(Segmenter(nn.Conv2d(3, 4, 3, padding=1)), 8)
        torch.testing.assert_close(model(images), model(images.float() / 255))


def test_tiles_are_augmented_or_views_tiled():
    images = torch.rand(2, 3, 18, 23)
    model = Positional()
    scales = (0.5, 1.0)
    with torch.no_grad():
        found = Tiled(MultiScaleFlip(model, scales), 12)(images)
        for row, image in zip(found, images, strict=True):
            expected = naive(MultiScaleFlip(model, scales), image, (12, 12), 0.25)
            np.testing.assert_allclose(row.exp().numpy(), expected, rtol=0, atol=5e-6)
        views = MultiScaleFlip(Tiled(model, 12), (1.0,))(images).exp()
        both = Tiled(model, 12)(images).exp() + Tiled(model, 12)(images.flip(-1)).exp().flip(-1)
        torch.testing.assert_close(views, both / 2)


def test_large_tiles_are_computed_one_by_one_with_the_same_result(monkeypatch):
    model, images = Positional(), torch.rand(3, 3, 20, 31)
    with torch.no_grad():
        together = Tiled(model, 16)(images)
        assert [size[0] for size in model.sizes] == [18]
        for pixels, most in ((2 * 256, 2), (6 * 256, 6), (1, 1)):
            monkeypatch.setattr(batching, "_MOST_PIXELS", pixels)
            model.sizes.clear()
            torch.testing.assert_close(Tiled(model, 16)(images), together, rtol=0, atol=1e-5)
            assert max(size[0] for size in model.sizes) == most
            assert sum(size[0] for size in model.sizes) == 18


def test_a_pass_is_bounded_on_every_device(monkeypatch):
    monkeypatch.setattr(tiled, "images_per_pass", lambda device, height, width, most: most)  # as a GPU does
    monkeypatch.setattr(tiled, "_MOST_PIXELS", 4 * 256)
    model = Positional()
    with torch.no_grad():
        Tiled(model, 16)(torch.rand(1, 3, 40, 40))
    assert [size[0] for size in model.sizes] == [4, 4, 1]


def test_of_an_impossible_class_is_finite_and_of_nan_logits_nan():
    class Certain(nn.Module):
        takes_images = True

        def forward(self, x):
            return torch.cat([torch.full_like(x[:, :1], 1e4), torch.full_like(x[:, :1], -1e4)], 1)

    found = Tiled(Certain(), 4)(torch.rand(1, 3, 6, 6))
    assert found.isfinite().all()
    assert float(found.exp()[:, 1].max()) < 1e-30
    model = Positional()
    nn.init.constant_(model.conv.bias, math.nan)
    assert Tiled(model, 4)(torch.rand(1, 3, 6, 6)).isnan().all()


def test_gradients_are_those_of_the_whole():
    images = torch.rand(2, 3, 9, 13)
    weights = torch.rand(2, 4, 9, 13)
    pixelwise, other = nn.Conv2d(3, 4, 1).double(), nn.Conv2d(3, 4, 1).double()
    other.load_state_dict(pixelwise.state_dict())
    for network in (Tiled(pixelwise, 5, 0.5), lambda x: Segmenter(other)(x).log_softmax(1)):
        (weights * network(images.double())).sum().backward()
    torch.testing.assert_close(pixelwise.weight.grad, other.weight.grad)


def test_wraps_bare_networks_only_and_adds_no_weights():
    bare = nn.Conv2d(3, 4, 1)
    model = Tiled(bare)
    assert isinstance(model.model, Segmenter)
    assert Tiled(model.model).model is model.model
    assert list(model.state_dict()) == ["model.network.weight", "model.network.bias"]


def test_its_settings_are_shown_and_change_its_fingerprint():
    from stseg.models.state import fingerprint

    bare = nn.Conv2d(3, 4, 1)
    assert "size=(512, 256), overlap=0.5" in repr(Tiled(bare, (512, 256), 0.5))
    prints = {fingerprint(Tiled(bare, size, overlap)) for size in (8, 9) for overlap in (0.25, 0.5)}
    assert len(prints) == 4


@pytest.mark.parametrize(
    ("size", "error", "message"),
    [
        (0, ValueError, "size of a tile is 0; expected 1 or more"),
        ((8, -1), ValueError, "size of a tile is -1"),
        (8.0, TypeError, r"size of a tile is 8\.0; expected an integer, or \(height, width\)"),
        ((8, 8.5), TypeError, r"size of a tile is 8\.5; expected an integer"),
        ((8, 8, 8), TypeError, r"size of a tile is \(8, 8, 8\)"),
        ("88", TypeError, "size of a tile is '88'"),
        (None, TypeError, "size of a tile is None"),
        (True, TypeError, "size of a tile is True; expected an integer"),
    ],
)
def test_refuses_sizes_out_of_range(size, error, message):
    with pytest.raises(error, match=message):
        Tiled(nn.Conv2d(3, 4, 1), size)


@pytest.mark.parametrize("overlap", [-0.1, 1, 1.5, math.nan])
def test_refuses_overlaps_out_of_range(overlap):
    with pytest.raises(ValueError, match=r"overlap is .*; expected a share of a tile in \[0, 1\)"):
        Tiled(nn.Conv2d(3, 4, 1), overlap=overlap)
    with pytest.raises(TypeError, match="overlap is 'half'; expected a number"):
        Tiled(nn.Conv2d(3, 4, 1), overlap="half")


@pytest.mark.parametrize("images", [torch.rand(3, 8, 8), torch.rand(1, 3, 0, 8), None, np.zeros((1, 3, 8, 8))])
def test_refuses_what_is_no_batch_of_images(images):
    with pytest.raises(ValueError, match="expected a batch of images"):
        Tiled(nn.Conv2d(3, 4, 1))(images)


def test_refuses_what_is_no_network():
    with pytest.raises(TypeError, match="expected a network"):
        Tiled("network")


def test_an_empty_batch_stays_empty():
    model = Tiled(Segmenter(nn.Conv2d(3, 4, 1), stride=1), 4)
    assert model(torch.rand(0, 3, 9, 9)).shape == (0, 4, 9, 9)


def test_is_public():
    assert stseg.models.Tiled is stseg.Tiled
