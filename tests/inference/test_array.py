from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import network
from torch import nn

import stseg
from stseg import DataError, MultiScaleFlip, NetworkError, Segmenter, Tiled, predict_array

QUIET = {"progress": False}


class Positional(nn.Module):
    """Logits that depend on the neighbors, on the whole view and on the place in it."""

    takes_images = True

    def __init__(self, classes=4, channels=3, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv, self.whole = nn.Conv2d(channels, classes, 3, padding=1), nn.Conv2d(channels, classes, 1)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        x = x.float() / 255 if x.dtype == torch.uint8 else x
        place = torch.linspace(-1, 1, x.shape[-1]) * torch.linspace(0, 1, x.shape[-2])[:, None]
        return 9 * self.conv(x) + 9 * self.whole(x.mean((2, 3), keepdim=True)) + place


def random_image(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def whole(model, image, tile, overlap=0.25):
    with torch.no_grad():
        return Tiled(model, tile, overlap)(torch.from_numpy(np.ascontiguousarray(image))[None])[0]


def assert_classes_of(mask, log_probability):
    """Those of the highest probability, up to the rounding of the convolutions."""
    chosen = log_probability.gather(0, torch.from_numpy(mask.astype(np.int64))[None])[0]
    torch.testing.assert_close(chosen, log_probability.amax(0), rtol=0, atol=1e-5)
    assert (mask != log_probability.argmax(0).numpy()).mean() < 0.001


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 1000),
    st.tuples(st.integers(1, 50), st.integers(1, 50)),
    st.tuples(st.integers(3, 30), st.integers(3, 30)),
    st.floats(0, 0.8),
)
def test_equals_the_image_as_a_whole(seed, shape, tile, overlap):
    image, model = random_image(3, *shape, seed=seed), Positional(seed=seed)
    confidence = np.full(shape, -1, np.float32)
    mask = predict_array(model, image, confidence=confidence, tile=tile, overlap=overlap, **QUIET)
    expected = whole(model, image, tile, overlap)
    assert_classes_of(mask, expected)
    np.testing.assert_allclose(confidence, expected.amax(0).exp().numpy(), rtol=0, atol=1e-5)
    assert mask.dtype == np.uint8


def test_augments_each_tile():
    image, model = random_image(3, 40, 50), MultiScaleFlip(Positional(), (0.5, 1.0))
    expected = whole(model, image, 24)
    assert_classes_of(predict_array(model, image, tile=24, **QUIET), expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float16, np.float64])
def test_of_memory_mapped_files(tmp_path, dtype):
    pixels = random_image(37, 52, 3)
    stored = pixels if dtype == np.uint8 else (pixels / 255).astype(dtype)
    file = np.memmap(tmp_path / "image", dtype, "w+", shape=stored.shape)
    file[:] = stored
    image = np.memmap(tmp_path / "image", dtype, "r", shape=stored.shape).transpose(2, 0, 1)
    out = np.memmap(tmp_path / "mask", np.uint16, "w+", shape=(37, 52))
    model = Positional()
    assert predict_array(model, image, out, tile=16, **QUIET) is out
    floats = stored if dtype == np.uint8 else stored.astype(np.float32)
    assert_classes_of(out, whole(model, floats.transpose(2, 0, 1), 16))


def test_reads_no_more_than_a_tile_at_a_time():
    class Sliced:
        """As data sets of h5py and zarr are."""

        shape, dtype = (3, 60, 80), np.dtype(np.uint8)
        pixels = random_image(3, 60, 80)
        most = 0

        def __getitem__(self, where):
            found = self.pixels[where]
            self.most = max(self.most, found.size)
            return found

    image, model = Sliced(), Positional()
    mask = predict_array(model, image, tile=(16, 24), **QUIET)
    assert image.most == 3 * 16 * 24
    assert_classes_of(mask, whole(model, image.pixels, (16, 24)))


def test_takes_tensors_and_leaves_them_as_they_are():
    image = torch.from_numpy(random_image(3, 20, 30))
    before = image.clone()
    mask = predict_array(Positional(), image, tile=16, **QUIET)
    assert torch.equal(image, before)
    np.testing.assert_array_equal(mask, predict_array(Positional(), image.numpy(), tile=16, **QUIET))


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1)])
def test_of_the_smallest_images(shape):
    image = random_image(13, *shape)
    mask = predict_array(Positional(channels=13), image, tile=8, **QUIET)
    assert_classes_of(mask, whole(Positional(channels=13), image, 8))


class TestValues:
    def test_of_16_bits_whose_highest_is_used(self):
        image = np.random.default_rng(0).integers(0, 65536, (3, 300, 40), dtype=np.uint16)
        expected = whole(Positional(), (image / 65535).astype(np.float32), 16)
        assert_classes_of(predict_array(Positional(), image, tile=16, **QUIET), expected)

    def test_whose_highest_bit_is_used_in_one_place_alone(self):
        image = np.random.default_rng(0).integers(0, 4096, (3, 600, 40), dtype=np.uint16)
        image[1, 590, 30] = 40000
        expected = whole(Positional(), (image / 65535).astype(np.float32), 16)
        assert_classes_of(predict_array(Positional(), image, tile=16, **QUIET), expected)

    def test_of_a_range_that_is_given(self):
        image = np.random.default_rng(0).integers(-100, 4000, (3, 40, 40), dtype=np.int16)
        scaled = ((image + 100.0) / 4100).astype(np.float32)
        found = predict_array(Positional(), image, tile=16, value_range=(-100, 4000), **QUIET)
        assert_classes_of(found, whole(Positional(), scaled, 16))

    def test_that_do_not_tell_their_range(self):
        image = np.random.default_rng(0).integers(0, 4000, (3, 40, 40), dtype=np.uint16)
        with pytest.raises(DataError, match=r"16-bit integers from 0 to 3999 .* value_range=\(0, 4095\)"):
            predict_array(Positional(), image, **QUIET)
        with pytest.raises(DataError, match=r"32-bit integers from 0 to .*expected value_range"):
            predict_array(Positional(), image.astype(np.int32), **QUIET)

    def test_outside_of_their_range(self):
        image = np.random.default_rng(0).random((3, 40, 40), dtype=np.float32)
        image[0, 30, 5] = 1.5
        with pytest.raises(DataError, match=r"rows 24 to 40, columns 0 to 16' holds 32-bit floats from .* to 1\.5"):
            predict_array(Positional(), image, tile=16, **QUIET)
        image[0, 30, 5] = np.nan
        with pytest.raises(DataError, match="holds NaN or infinite values"):
            predict_array(Positional(), image, tile=16, **QUIET)
        with pytest.raises(DataError, match=r"value_range is \(0, 1000\)"):
            predict_array(Positional(), np.full((3, 9, 9), 1001, np.uint16), value_range=(0, 1000), **QUIET)

    def test_of_8_bits_with_a_range(self):
        with pytest.raises(ValueError, match=r"value_range is \(0, 100\), but the image holds uint8"):
            predict_array(Positional(), random_image(3, 9, 9), value_range=(0, 100), **QUIET)

    @pytest.mark.parametrize("dtype", [bool, complex, "datetime64[s]"])
    def test_of_no_numbers(self, dtype):
        with pytest.raises(DataError, match=r"image is .*; expected uint8, or floats in \[0, 1\]"):
            predict_array(Positional(), np.zeros((3, 9, 9), dtype), **QUIET)


class TestRefuses:
    @pytest.mark.parametrize("image", [None, "image.npy", [[[1]]], 3])
    def test_what_is_no_array(self, image):
        with pytest.raises(TypeError, match=r"expected an array \(C, H, W\)"):
            predict_array(network(), image, **QUIET)

    @pytest.mark.parametrize("shape", [(9, 9), (1, 3, 9, 9), (3, 0, 9)])
    def test_other_shapes(self, shape):
        with pytest.raises(DataError, match="image has"):
            predict_array(network(), np.zeros(shape, np.uint8), **QUIET)

    def test_channels_last_with_the_line_to_write(self):
        image = np.zeros((3000, 2000, 3), np.uint8)
        with pytest.raises(DataError, match=r"image has 3000 channels .* expected image\.transpose\(2, 0, 1\)"):
            predict_array(network(), image, **QUIET)
        mask = predict_array(network(), image[:40].transpose(2, 0, 1), tile=1024, **QUIET)
        assert mask.shape == (40, 2000)

    @pytest.mark.parametrize(
        ("out", "error", "message"),
        [
            (np.zeros((9, 8), np.uint8), DataError, r"out is uint8 of shape \(9, 8\); expected integers .*\(8, 9\)"),
            (np.zeros((8, 9), np.float32), DataError, "out is float32"),
            (np.zeros((8, 9), bool), DataError, "out is bool"),
            (torch.zeros(8, 9, dtype=torch.uint8), TypeError, "out is Tensor; expected a numpy array"),
            (np.broadcast_to(np.zeros(9, np.uint8), (8, 9)), DataError, "out is read-only"),
        ],
    )
    def test_other_targets(self, out, error, message):
        model = Positional()
        with pytest.raises(error, match=message):
            predict_array(model, random_image(3, 8, 9), out, **QUIET)
        assert model.calls == 0

    def test_another_confidence(self):
        with pytest.raises(DataError, match="confidence is uint8"):
            predict_array(network(), random_image(3, 8, 9), confidence=np.zeros((8, 9), np.uint8), **QUIET)

    def test_a_target_that_cannot_hold_the_classes(self):
        with pytest.raises(DataError, match="out is int8, which cannot hold 200 classes; expected int32"):
            predict_array(nn.Conv2d(3, 200, 1), random_image(3, 8, 9), np.zeros((8, 9), np.int8), **QUIET)

    def test_logits_that_are_not_finite(self):
        model = nn.Conv2d(3, 2, 1)
        nn.init.constant_(model.bias, float("nan"))
        with pytest.raises(NetworkError, match="logits for rows 0 to 7 and columns 0 to 12 of the image"):
            predict_array(model, random_image(3, 30, 40), tile=16, **QUIET)

    def test_settings_out_of_range(self):
        image = random_image(3, 8, 9)
        with pytest.raises(ValueError, match="size of a tile is 0"):
            predict_array(network(), image, tile=0, **QUIET)
        with pytest.raises(ValueError, match="overlap is 1"):
            predict_array(network(), image, overlap=1, **QUIET)
        with pytest.raises(ValueError, match="precision is 'fp16'"):
            predict_array(network(), image, precision="fp16", **QUIET)
        with pytest.raises(TypeError, match="expected a network"):
            predict_array("network", image, **QUIET)


def test_many_classes_are_int32():
    mask = predict_array(nn.Conv2d(3, 300, 1), random_image(3, 20, 20), tile=16, **QUIET)
    assert mask.dtype == np.int32


def test_leaves_the_network_as_it_was():
    model = network().train()
    model[1].eval()
    weights = [each.data_ptr() for each in model.parameters()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    predict_array(model, random_image(3, 40, 40), tile=16, **QUIET)
    assert [each.training for each in model] == [True, False, True, True]
    assert weights == [each.data_ptr() for each in model.parameters()]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.is_grad_enabled()


def test_equals_evaluation_and_labeling_with_tiles():
    """The same numbers wherever tiles are used."""
    image, bare = random_image(3, 40, 50), network(3, classes=4)
    model = Tiled(bare, 16)
    mask = predict_array(bare, image, tile=16, **QUIET)
    data = [(torch.from_numpy(image), torch.from_numpy(mask))]
    assert stseg.evaluate(model, data, num_classes=4, progress=False).compute() == 1
    ((_, labeled),) = stseg.PseudoLabeler(model, num_classes=4, progress=False).label(data)
    np.testing.assert_array_equal(labeled.numpy(), mask)
    assert isinstance(model.model, Segmenter)
