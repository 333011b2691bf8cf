import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from stseg.augment import Cutout

RATIO = (0.3, 1 / 0.3)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def batch(size=4, channels=3, height=24, width=20, dtype=torch.float32):
    images = torch.full((size, channels, height, width), 2.0, dtype=dtype)  # noise is never 2
    return images, torch.zeros(size, height, width, dtype=torch.uint8)


def drawn(cutout, height, width, total=8000):
    """Rectangles of many images: top, left, height, width; all 0 for none."""
    image = torch.zeros(1000, 1, height, width)
    boxes = torch.cat([cutout.draw(image)[0] for _ in range(total // 1000)]).numpy()
    return np.stack([boxes[:, 0], boxes[:, 1], boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]], 1)


def redrawn_until_it_fits(rng, height, width, area=(0.02, 0.4), ratio=RATIO):
    """The paper's runs, one image at a time."""
    while True:
        size, shape = rng.uniform(*area) * height * width, rng.uniform(*ratio)
        rows, columns = int(math.sqrt(size * shape)), int(math.sqrt(size / shape))
        top, left = rng.integers(height), rng.integers(width)
        if top + rows <= height and left + columns <= width:
            return top, left, rows, columns


class TestRectangle:
    @pytest.mark.parametrize(("height", "width"), [(48, 64), (90, 30)])
    def test_is_distributed_as_one_redrawn_until_it_fits(self, height, width):
        found = drawn(Cutout(p=1), height, width)
        rng = np.random.default_rng(0)
        wanted = np.array([redrawn_until_it_fits(rng, height, width) for _ in range(8000)])
        views = {
            "top": lambda b: b[:, 0],
            "left": lambda b: b[:, 1],
            "height": lambda b: b[:, 2],
            "width": lambda b: b[:, 3],
            "area": lambda b: b[:, 2] * b[:, 3],
            "ratio": lambda b: b[:, 2] / b[:, 3],
            "room below": lambda b: height - b[:, 0] - b[:, 2],
            "top for its height": lambda b: b[:, 0] / (height - b[:, 2] + 1),
        }
        for name, view in views.items():
            assert stats.ks_2samp(view(found), view(wanted)).pvalue > 1e-3, name

    def test_has_its_area_and_ratio_and_lies_inside(self):
        height, width = 48, 64
        top, left, rows, columns = drawn(Cutout(p=1), height, width).T
        assert (top >= 0).all()
        assert (left >= 0).all()
        assert (top + rows <= height).all()
        assert (left + columns <= width).all()
        # Sides are rounded down, so the drawn ones lie between the sides and the sides plus one.
        assert (rows * columns <= 0.4 * height * width).all()
        assert ((rows + 1) * (columns + 1) > 0.02 * height * width).all()
        assert (rows / (columns + 1) < RATIO[1]).all()
        assert ((rows + 1) / columns > RATIO[0]).all()
        assert rows.min() * columns.min() > 0
        # Both ends come about: small and large, flat and tall, at all four borders.
        share = rows * columns / (height * width)
        assert share.min() < 0.025
        assert share.max() > 0.35
        assert (rows / columns).min() < 0.35
        assert (rows / columns).max() > 3
        assert min(top.min(), left.min(), (height - top - rows).min(), (width - left - columns).min()) == 0

    def test_of_given_area_and_ratio_is_uniform_over_the_places(self):
        top, left, rows, columns = drawn(Cutout(p=1, area=(0.25, 0.25), ratio=(1, 1)), 12, 12).T
        assert {*rows} == {*columns} == {6}
        counts = np.bincount(top * 7 + left, minlength=49)
        assert len(counts) == 49
        assert stats.chisquare(counts).pvalue > 1e-3

    def test_of_the_whole_image_is_possible(self):
        boxes, _ = Cutout(p=1, area=(1, 1), ratio=(1, 1)).draw(torch.zeros(64, 1, 4, 4))
        assert (boxes == torch.tensor([0, 0, 4, 4])).all()

    def test_that_never_fits_is_none(self):
        """A row of pixels cannot hold half of itself as a square."""
        images, masks = batch(64, 1, 1, 400)
        new_images, new_masks = Cutout(p=1, area=(0.5, 0.5), ratio=(1, 1))(images, masks)
        assert torch.equal(new_images, images)
        assert torch.equal(new_masks, masks)

    @pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 1.0])
    def test_comes_with_its_probability(self, p):
        rows = drawn(Cutout(p=p), 16, 16)[:, 2]
        assert stats.binomtest(int((rows > 0).sum()), len(rows), p).pvalue > 1e-3

    def test_of_one_image_tells_nothing_of_the_next(self):
        boxes = drawn(Cutout(p=1), 48, 64)
        assert np.abs(np.corrcoef(boxes[:-1].T, boxes[1:].T)[:4, 4:]).max() < 0.05


class TestNoise:
    def noise(self, channels=3):
        """What fills the rectangles of 8 images."""
        images, masks = batch(8, channels, 128, 128)
        images, masks = Cutout(p=1, area=(0.25, 0.25), ratio=(1, 1))(images, masks)
        return np.stack([x[:, m == 255].view(channels, 64, 64).numpy() for x, m in zip(images, masks, strict=True)])

    def test_is_uniform(self):
        found = self.noise()
        assert found.min() >= 0
        assert found.max() < 1
        assert stats.kstest(found.ravel(), "uniform").pvalue > 1e-3

    @pytest.mark.parametrize("channels", [3, 6])
    def test_is_independent_for_pixels_channels_and_images(self, channels):
        found = self.noise(channels)
        neighbors = [
            (found[:, :-1], found[:, 1:]),
            (found[..., :-1, :], found[..., 1:, :]),
            (found[..., :-1], found[..., 1:]),
            (found[:-1], found[1:]),
        ]
        for one, other in neighbors:
            assert stats.pearsonr(one.ravel(), other.ravel()).pvalue > 1e-3

    def test_is_drawn_in_the_rectangles_only(self):
        """On a CPU, where random numbers take long."""
        boxes, noise = Cutout(p=0.7).draw(torch.zeros(20, 3, 40, 30))
        for (top, left, bottom, right), image in zip(boxes.tolist(), noise, strict=True):
            drawn = torch.zeros(40, 30, dtype=torch.bool)
            drawn[top:bottom, left:right] = True
            assert torch.equal((image != 0).any(0), drawn)

    def test_is_drawn_everywhere_where_rectangles_are_not_read(self, monkeypatch):
        monkeypatch.setattr("stseg.augment.cutout.may_read", lambda x: False)
        noise = Cutout(p=0.7).draw(torch.zeros(4, 3, 40, 30))[1]
        assert stats.kstest(noise.numpy().ravel(), "uniform").pvalue > 1e-3


class TestCall:
    @settings(max_examples=40, deadline=None)
    @given(st.integers(0, 5), st.sampled_from([1, 3, 4, 6]), st.integers(1, 40), st.integers(1, 40))
    def test_ignores_exactly_where_the_noise_is(self, size, channels, height, width):
        images, masks = batch(size, channels, height, width)
        new_images, new_masks = Cutout(p=0.7)(images, masks)
        noisy = new_images != 2
        assert torch.equal(noisy.all(1), new_masks == 255)
        assert torch.equal(noisy.any(1), new_masks == 255)
        assert (new_masks[new_masks != 255] == 0).all()

    def test_makes_rectangles(self):
        images, masks = batch(200)
        boxes, noise = Cutout(p=0.7).draw(images)
        new_images, new_masks = Cutout(p=0.7).transform(images, masks, boxes, noise)
        wanted_images, wanted_masks = images.numpy().copy(), masks.numpy().copy()
        for i, (top, left, bottom, right) in enumerate(boxes.tolist()):
            wanted_images[i, :, top:bottom, left:right] = noise[i, :, top:bottom, left:right]
            wanted_masks[i, top:bottom, left:right] = 255
        np.testing.assert_array_equal(new_images.numpy(), wanted_images)
        np.testing.assert_array_equal(new_masks.numpy(), wanted_masks)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    @pytest.mark.parametrize("mask_dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
    def test_keeps_what_where_leaves_out_and_the_dtypes(self, dtype, mask_dtype):
        images, masks = batch(6, dtype=dtype)
        images[1:3] = torch.tensor([float("nan"), -3]).to(dtype).view(2, 1, 1, 1)
        masks = masks.to(mask_dtype) + 7
        where = torch.tensor([True, False, False, True, True, False])
        copies = images.clone(), masks.clone(), where.clone()
        new_images, new_masks = Cutout(p=1)(images, masks, where)
        assert new_images.dtype == dtype
        assert new_masks.dtype == mask_dtype
        torch.testing.assert_close((images, masks, where), copies, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(new_images[~where].view(torch.uint8), images[~where].view(torch.uint8))
        assert torch.equal(new_masks[~where], masks[~where])
        assert (new_masks[where] == 255).any((1, 2)).all()

    @pytest.mark.parametrize(("index", "dtype"), [(-1, torch.int32), (300, torch.int16), (0, torch.uint8)])
    def test_writes_its_ignore_index(self, index, dtype):
        images, masks = batch(8)
        new_images, new_masks = Cutout(p=1, ignore_index=index)(images, masks.to(dtype) + 5)
        assert {*new_masks.unique().tolist()} == {index, 5}
        assert torch.equal(new_masks == index, (new_images != 2).all(1))

    def test_shares_no_memory_with_what_came(self):
        images, masks = batch()
        for p in (0.0, 1.0):
            for x in Cutout(p=p)(images, masks):
                x.fill_(9)
        assert (images == 2).all()
        assert (masks == 0).all()


class TestRandomness:
    def test_is_that_of_the_seed(self):
        images, masks = batch(8)
        results = []
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            results.append(Cutout()(images, masks))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])
        assert not torch.equal(results[0][0], results[2][0])

    def test_is_that_of_the_generator_if_there_is_one(self):
        images, masks = batch(8)
        state = torch.get_rng_state()
        results = [Cutout()(images, masks, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])
        assert not torch.equal(results[0][0], results[2][0])


class TestRefuses:
    @pytest.mark.parametrize("p", [-0.1, 1.5, float("nan")])
    def test_probabilities(self, p):
        with pytest.raises(ValueError, match=f"^p is {p}; expected a probability in"):
            Cutout(p=p)

    @pytest.mark.parametrize("area", [(0, 0.4), (0.4, 0.1), (0.1, 1.01), (0.1,), (0.1, float("nan")), 0.4])
    def test_areas(self, area):
        with pytest.raises(ValueError, match=r"area is .*; expected .* both above 0 and at most 1"):
            Cutout(area=area)

    @pytest.mark.parametrize("ratio", [(0, 1), (-1, 1), (2, 1), (1, float("inf")), (1, 2, 3)])
    def test_ratios(self, ratio):
        with pytest.raises(ValueError, match=r"ratio is \(.*; expected .* both above 0"):
            Cutout(ratio=ratio)

    @pytest.mark.parametrize(("index", "dtype"), [(300, torch.uint8), (-1, torch.uint8), (255, torch.int8)])
    def test_an_ignore_index_that_the_masks_cannot_hold(self, index, dtype):
        images, masks = batch()
        with pytest.raises(ValueError, match=f"ignore_index {index} .* does not fit into masks of {dtype}"):
            Cutout(ignore_index=index)(images, masks.to(dtype))

    def test_batches_that_are_none(self):
        images, masks = batch()
        with pytest.raises(TypeError, match=r"images are torch\.uint8; expected float in \[0, 1\]"):
            Cutout()(images.byte(), masks)
        with pytest.raises(TypeError, match=r"where is torch\.int64; expected bool"):
            Cutout()(images, masks, torch.arange(4))
        with pytest.raises(ValueError, match=r"\(4, 3, 24, 20\) and masks \(4, 24, 19\); expected"):
            Cutout()(images, masks[..., 1:])
