import pickle
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from torch.utils.data import DataLoader

from stseg.augment import WeakAugment
from stseg.errors import DataError

SIDES = st.integers(1, 70)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def sample(height, width, *, channels=3):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (channels, height, width), dtype=np.uint8)
    return torch.from_numpy(image), torch.from_numpy(rng.integers(0, 21, (height, width), dtype=np.uint8))


def coordinates(height, width):
    """Row and column of each pixel in the image, both in one number in the mask; none of them is 0."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows + 1, columns + 1]).byte(), (rows * 256 + columns + 1).int()


def resized_by_pil(array, height, width, how):
    return np.array(Image.fromarray(array).resize((width, height), how))


def new_sides(height, width, long_side):
    """The sides in proportion, exact halves up, counted in integers."""
    old = max(height, width)
    return [max(1, (2 * side * long_side + old) // (2 * old)) for side in (height, width)]


def still(long_side, crop_size=None, *, flip=0, **options):
    """An augmentation in which nothing is left to chance."""
    return WeakAugment(crop_size or long_side, base_size=long_side, scale=(1, 1), flip=flip, **options)


def positions(weak, image, mask, times):
    """Where in the source the first pixel of the crop came from, many times."""
    return [divmod(int(weak(image, mask)[1][0, 0]) - 1, 256) for _ in range(times)]


class TestResize:
    @settings(max_examples=40, deadline=None)
    @given(SIDES, SIDES, st.integers(1, 120))
    def test_is_that_of_pil(self, height, width, long_side):
        image, mask = sample(height, width)
        found_image, found_mask = still(long_side)(image, mask)
        rows, columns = new_sides(height, width, long_side)
        by_pil = resized_by_pil(image.permute(1, 2, 0).numpy(), rows, columns, Image.Resampling.BILINEAR)
        found = found_image[:, :rows, :columns].permute(1, 2, 0).numpy()
        # The two round their weights, and what lies between the two passes, differently.
        assert np.abs(found.astype(int) - by_pil).max() <= 1
        by_pil = resized_by_pil(mask.numpy(), rows, columns, Image.Resampling.NEAREST)
        np.testing.assert_array_equal(found_mask[:rows, :columns].numpy(), by_pil)

    @settings(max_examples=20, deadline=None)
    @given(st.integers(1, 3000), st.integers(1, 4096))
    def test_of_large_masks_takes_the_pixels_that_pil_takes(self, old, new):
        mask = np.arange(old, dtype=np.int32)[None]
        _, found = still(new, (1, new))(torch.zeros(1, 1, old, dtype=torch.uint8), mask)
        np.testing.assert_array_equal(found.numpy(), resized_by_pil(mask, 1, new, Image.Resampling.NEAREST))

    @settings(max_examples=20, deadline=None)
    @given(SIDES, SIDES, st.integers(1, 120))
    def test_of_floats_is_that_of_pil(self, height, width, long_side):
        image, mask = torch.rand(1, height, width), torch.zeros(height, width, dtype=torch.uint8)
        found, _ = still(long_side)(image, mask)
        rows, columns = new_sides(height, width, long_side)
        assert found.dtype == torch.float32
        by_pil = resized_by_pil(image[0].numpy(), rows, columns, Image.Resampling.BILINEAR)
        np.testing.assert_allclose(found[0, :rows, :columns].numpy(), by_pil, atol=2e-5)

    def test_smooths_what_it_shrinks(self):
        stripes = (torch.arange(64) % 2 * 255).byte().expand(3, 64, 64)
        found, _ = still(16)(stripes, torch.zeros(64, 64, dtype=torch.uint8))
        assert (found[..., 1:-1].float() - 127.5).abs().max() < 5

    @pytest.mark.parametrize(
        ("height", "width", "long_side", "short"), [(396, 198, 401, 201), (480, 360, 674, 506), (8, 4, 7, 4)]
    )
    def test_rounds_exact_halves_up(self, height, width, long_side, short):
        _, mask = still(long_side)(*sample(height, width))
        assert (mask[0] != 255).sum() == short

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
    @pytest.mark.parametrize(("height", "width", "long_side"), [(9, 1, 5), (9, 2, 3), (9, 2, 1), (1, 9, 5), (1, 1, 4)])
    def test_of_slivers_is_that_of_pil(self, height, width, long_side, dtype):
        """Where torch's own kernels raise, or give every row the same values."""
        image = torch.rand(3, height, width) * (255 if dtype == torch.uint8 else 1)
        image = image.to(dtype)
        found, _ = still(long_side)(image, torch.zeros(height, width, dtype=torch.uint8))
        rows, columns = new_sides(height, width, long_side)
        for channel, wanted in zip(found[:, :rows, :columns].numpy(), image.numpy(), strict=True):
            by_pil = resized_by_pil(wanted, rows, columns, Image.Resampling.BILINEAR)
            np.testing.assert_allclose(channel, by_pil, rtol=0, atol=1 if dtype == torch.uint8 else 1e-5)

    @pytest.mark.parametrize("channels", [1, 2, 4, 6])
    def test_of_channels_is_one_by_one(self, channels):
        image, mask = sample(20, 31, channels=channels)
        together, _ = still(17)(image, mask)
        for channel in range(channels):
            alone, _ = still(17)(image[channel : channel + 1], mask)
            assert torch.equal(together[channel], alone[0])

    def test_to_the_same_size_changes_nothing(self):
        image, mask = sample(20, 31)
        found_image, found_mask = still(31, (20, 31))(image, mask)
        assert torch.equal(found_image, image)
        assert torch.equal(found_mask, mask)


class TestLongSide:
    def long_sides(self, weak, image, mask, times):
        """Sides of what is no padding; the crop must hold all of it."""
        inside = [(weak(image, mask)[1] != 255) for _ in range(times)]
        return np.array([max(int(i.any(1).sum()), int(i.any(0).sum())) for i in inside])

    @pytest.mark.parametrize("shape", [(7, 10), (10, 7)])
    def test_is_a_uniform_integer_with_both_ends(self, shape):
        weak = WeakAugment(25, base_size=11, scale=(0.5, 2.0))
        found = self.long_sides(weak, *sample(*shape), times=3600)
        counts = np.bincount(found, minlength=26)
        assert counts[:5].sum() == 0
        assert counts[23:].sum() == 0
        assert stats.chisquare(counts[5:23]).pvalue > 1e-3

    def test_is_that_of_each_image_when_none_is_given(self):
        weak = WeakAugment(40, scale=(0.5, 2.0))
        small, large = (self.long_sides(weak, *sample(4, side), times=300) for side in (6, 20))
        assert {*small} == {*range(3, 13)}
        assert {*large} == {*range(10, 41)}

    def test_is_at_least_one_pixel(self):
        _, mask = WeakAugment(4, base_size=3, scale=(0.01, 0.02), flip=0)(*sample(9, 9))
        assert (mask != 255).nonzero().tolist() == [[0, 0]]


class TestPadding:
    @settings(max_examples=30, deadline=None)
    @given(SIDES, SIDES, st.integers(1, 90), st.integers(1, 90), st.booleans())
    def test_is_on_the_right_and_at_the_bottom(self, height, width, crop_height, crop_width, flip):
        image = torch.full((3, height, width), 9, dtype=torch.uint8)
        mask = torch.full((height, width), 3, dtype=torch.uint8)
        weak = still(max(height, width), (crop_height, crop_width), flip=flip)
        image, mask = (x.flip(-1) if flip else x for x in weak(image, mask))
        assert image.shape == (3, crop_height, crop_width)
        assert mask.shape == (crop_height, crop_width)
        assert (image[:, :height, :width] == 9).all()
        assert (mask[:height, :width] == 3).all()
        for outside in (np.s_[..., height:, :], np.s_[..., width:]):
            assert (image[outside] == 0).all()
            assert (mask[outside] == 255).all()

    @pytest.mark.parametrize("ignore_index", [0, 7, 255, -100, 256, 65535])
    def test_of_the_mask_is_the_ignore_index(self, ignore_index):
        _, mask = still(3, (5, 4), ignore_index=ignore_index)(*sample(3, 3))
        assert (mask[3:] == ignore_index).all()
        assert (mask[:, 3:] == ignore_index).all()
        assert mask.dtype == (torch.uint8 if 0 <= ignore_index <= 255 else torch.int32)


class TestCrop:
    def test_is_uniform(self):
        image, mask = coordinates(10, 12)
        found = positions(still(12, (8, 8)), image, mask, 3000)
        tops, lefts = np.array(found).T
        assert (tops.max(), lefts.max()) == (2, 4)
        assert stats.chisquare(np.bincount(tops * 5 + lefts, minlength=15)).pvalue > 1e-3

    def test_covers_only_what_does_not_fit(self):
        """Padded in one direction, cut in the other."""
        image, mask = coordinates(4, 12)
        assert {*positions(still(12, 8), image, mask, 100)} == {(0, left) for left in range(5)}

    @settings(max_examples=30, deadline=None)
    @given(SIDES, SIDES, st.integers(1, 40), st.integers(1, 40))
    def test_and_mirror_move_image_and_mask_alike(self, height, width, crop_height, crop_width):
        weak = WeakAugment((crop_height, crop_width), scale=(1, 1), flip=0.5, ignore_index=0)
        for _ in range(4):
            image, mask = weak(*coordinates(height, width))
            rows, columns = image.int() - 1
            inside = mask != 0
            assert (mask[inside] == (rows * 256 + columns + 1)[inside]).all()
            assert (image[:, ~inside] == 0).all()
            assert inside.sum() == min(height, crop_height) * min(width, crop_width)

    @settings(max_examples=30, deadline=None)
    @given(st.integers(2, 60), st.integers(2, 60), st.sampled_from([0.4, 0.7, 1.3, 2.6]))
    def test_and_scale_move_image_and_mask_alike(self, height, width, scale):
        """Row and column as the smooth image tells them are within a pixel, old or new, of those of the mask."""
        image, mask = coordinates(height, width)
        weak = WeakAugment(24, scale=(scale, scale), flip=0.5, ignore_index=0)
        image, mask = weak((image / 255), mask)
        inside = mask != 0
        rows, columns = new_sides(height, width, int(max(height, width) * scale))
        steps = height / rows, width / columns
        for found, wanted, step in zip(image * 255 - 1, ((mask - 1) // 256, (mask - 1) % 256), steps, strict=True):
            assert (found - wanted)[inside].abs().max() <= max(1, step)


class TestMirror:
    @pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 1.0])
    def test_comes_with_its_probability(self, p):
        image, mask = coordinates(2, 3)
        found = [column for _, column in positions(still(3, (2, 3), flip=p), image, mask, 1500)]
        assert {*found} <= {0, 2}
        assert stats.binomtest(found.count(2), 1500, p).pvalue > 1e-3

    def test_turns_left_and_right(self):
        image, mask = sample(5, 8)
        found_image, found_mask = still(8, (5, 8), flip=1)(image, mask)
        np.testing.assert_array_equal(found_image.numpy(), image.numpy()[:, :, ::-1])
        np.testing.assert_array_equal(found_mask.numpy(), mask.numpy()[:, ::-1])

    def test_is_independent_of_the_crop(self):
        image, mask = coordinates(1, 4)
        weak = still(4, (1, 2), flip=0.5)
        found = [tuple(((weak(image, mask)[1] - 1) % 256)[0].tolist()) for _ in range(1200)]
        pairs = [(0, 1), (1, 2), (2, 3), (1, 0), (2, 1), (3, 2)]
        assert {*found} == {*pairs}
        assert stats.chisquare([found.count(pair) for pair in pairs]).pvalue > 1e-3


class TestRandomness:
    weak = WeakAugment((16, 20), base_size=24)

    def test_is_that_of_torch_alone(self):
        image, mask = sample(19, 30)
        found = []
        for other in (0, 1):
            random.seed(other)
            np.random.seed(other)  # noqa: NPY002  the legacy generator is what must not matter
            torch.manual_seed(5)
            found.append([self.weak(image, mask) for _ in range(8)])
        for (image_a, mask_a), (image_b, mask_b) in zip(*found, strict=True):
            assert torch.equal(image_a, image_b)
            assert torch.equal(mask_a, mask_b)
        assert len({tuple(m.flatten().tolist()) for _, m in found[0]}) == 8

    def test_does_not_depend_on_the_default_device(self):
        image, mask = sample(19, 30)
        wanted_image, wanted_mask = self.weak(image, mask)
        torch.manual_seed(0)
        with torch.device("meta"):
            found_image, found_mask = self.weak(image, mask)
        assert torch.equal(found_image, wanted_image)
        assert torch.equal(found_mask, wanted_mask)

    def test_differs_between_the_workers_of_a_loader(self):
        class Same(torch.utils.data.Dataset):
            def __len__(self):
                return 4

            def __getitem__(self, index):
                return TestRandomness.weak(*sample(19, 30))[1]

        masks = list(DataLoader(Same(), batch_size=1, num_workers=2))
        assert len({tuple(m.flatten().tolist()) for m in masks}) == 4

    def test_survives_pickling(self):
        assert pickle.loads(pickle.dumps(self.weak)) == self.weak


class TestWhatComesIn:
    @pytest.mark.parametrize("mode", ["L", "P"])
    def test_may_be_pil(self, mode):
        image, mask = sample(13, 17)
        pil_image, pil_mask = Image.fromarray(image.permute(1, 2, 0).numpy()), Image.fromarray(mask.numpy())
        if mode == "P":
            pil_mask.putpalette(list(range(256)) * 3)
        weak = WeakAugment(12, base_size=20)
        wanted_image, wanted_mask = weak(image, mask)
        torch.manual_seed(0)
        found_image, found_mask = weak(pil_image, pil_mask)
        assert torch.equal(found_image, wanted_image)
        assert torch.equal(found_mask, wanted_mask)

    @pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
    def test_may_have_many_classes(self, dtype):
        mask = torch.tensor([[300, 40000], [0, 1]]).clamp(max=torch.iinfo(dtype).max).to(dtype)
        _, found = still(4, ignore_index=-1)(torch.zeros(3, 2, 2, dtype=torch.uint8), mask)
        assert found.dtype == torch.int32
        assert torch.equal(found, mask.int().repeat_interleave(2, 0).repeat_interleave(2, 1))

    @pytest.mark.parametrize("kind", ["uint8", "float"])
    @pytest.mark.parametrize("flip", [0, 1])
    @pytest.mark.parametrize("crop", [(6, 8), (3, 3), (3, 8), (9, 9)])
    def test_is_neither_changed_nor_shared(self, kind, flip, crop):
        image, mask = sample(6, 8)
        image = image / 255 if kind == "float" else image
        copies = image.clone(), mask.clone()
        out = still(8, crop, flip=flip)(image, mask)
        for x in out:
            assert x.is_contiguous()
            assert x.untyped_storage().nbytes() == x.numel() * x.element_size()
            x.zero_()
        assert torch.equal(image, copies[0])
        assert torch.equal(mask, copies[1])

    def test_need_not_be_contiguous(self):
        image, mask = sample(9, 14)
        wanted_image, wanted_mask = still(11)(image, mask)
        turned = image.permute(1, 2, 0).contiguous().permute(2, 0, 1), mask.T.contiguous().T
        found_image, found_mask = still(11)(*turned)
        assert torch.equal(found_image, wanted_image)
        assert torch.equal(found_mask, wanted_mask)


class TestRefuses:
    @pytest.mark.parametrize("size", [0, -1, 2.5, None, (4,), (4, 4, 4), (4, 0), (4.0, 4), "ab"])
    def test_crop_sizes(self, size):
        with pytest.raises(ValueError, match=r"crop_size is .*; expected a positive integer or"):
            WeakAugment(size)

    @pytest.mark.parametrize("size", [0, -5, 400.0, "400"])
    def test_base_sizes(self, size):
        with pytest.raises(ValueError, match=f"base_size is {size}; expected a positive integer or None"):
            WeakAugment(4, base_size=size)

    @pytest.mark.parametrize("scale", [(2.0, 0.5), (0, 1), (-1, 1), (1, float("inf")), (float("nan"), 1), (1,)])
    def test_scales(self, scale):
        with pytest.raises(ValueError, match=r"scale is .*; expected \(low, high\) with low <= high, both above 0"):
            WeakAugment(4, scale=scale)

    @pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
    def test_probabilities(self, p):
        with pytest.raises(ValueError, match=f"flip is {p}; expected a probability"):
            WeakAugment(4, flip=p)

    @pytest.mark.parametrize("index", [2**31, -(2**31) - 1])
    def test_ignore_indices(self, index):
        with pytest.raises(ValueError, match=f"ignore_index is {index}; expected an integer of 32 bits"):
            WeakAugment(4, ignore_index=index)

    def test_an_image_and_a_mask_of_different_size(self):
        with pytest.raises(DataError, match=r"image 4 x 6, mask 6 x 4 \(height x width\)"):
            WeakAugment(4)(torch.rand(3, 4, 6), torch.zeros(6, 4, dtype=torch.uint8))

    def test_a_batch(self):
        with pytest.raises(DataError, match=r"shape \(2, 3, 4, 6\); expected \(C, H, W\)"):
            WeakAugment(4)(torch.rand(2, 3, 4, 6), torch.zeros(4, 6, dtype=torch.uint8))

    def test_a_mask_of_floats(self):
        with pytest.raises(TypeError, match=r"torch\.float32; expected integer"):
            WeakAugment(4)(torch.rand(3, 4, 6), torch.zeros(4, 6))

    def test_an_image_already_normalized(self):
        with pytest.raises(DataError, match=r"floats in \[0, 1\]"):
            WeakAugment(4)(torch.randn(3, 4, 6), torch.zeros(4, 6, dtype=torch.uint8))


class TestWithoutAnUprightPosition:
    image = torch.arange(1, 61, dtype=torch.uint8).reshape(1, 6, 10)
    mask = torch.arange(1, 61, dtype=torch.uint8).reshape(6, 10)

    def seen(self, weak, count=400):
        """How often each result came, by its bytes."""
        torch.manual_seed(0)
        found = {}
        for _ in range(count):
            image, mask = weak(self.image, self.mask)
            assert torch.equal(image[0], mask)
            assert image.is_contiguous()
            found[mask.numpy().tobytes()] = found.get(mask.numpy().tobytes(), 0) + 1
        return found

    def padded(self, mask):
        return F.pad(mask, (0, 10 - mask.shape[1], 0, 10 - mask.shape[0]), value=0).numpy().tobytes()

    def test_images_are_turned_by_every_quarter_alike(self):
        weak = WeakAugment(10, scale=(1.0, 1.0), flip=0.0, quarter_turns=True, ignore_index=0)
        found = self.seen(weak)
        wanted = {self.padded(torch.rot90(self.mask, turns)) for turns in range(4)}
        assert found.keys() == wanted
        assert stats.chisquare(list(found.values())).pvalue > 1e-3

    def test_images_are_mirrored_vertically_as_often_as_told(self):
        weak = WeakAugment((6, 10), scale=(1.0, 1.0), flip=0.0, vertical_flip=0.3)
        found = self.seen(weak)
        assert found.keys() == {self.mask.numpy().tobytes(), self.mask.flip(0).numpy().tobytes()}
        assert stats.binomtest(found[self.mask.flip(0).numpy().tobytes()], 400, 0.3).pvalue > 1e-3

    def test_both_mirrors_are_independent(self):
        weak = WeakAugment((6, 10), scale=(1.0, 1.0), flip=0.5, vertical_flip=0.5)
        assert len(self.seen(weak)) == 4
        assert stats.chisquare(list(self.seen(weak).values())).pvalue > 1e-3

    def test_turns_fit_any_crop(self):
        weak = WeakAugment((4, 7), quarter_turns=True, vertical_flip=1.0)
        for _ in range(20):
            image, mask = weak(torch.rand(3, 5, 30), torch.zeros(5, 30, dtype=torch.uint8))
            assert image.shape == (3, 4, 7)
            assert mask.shape == (4, 7)

    def test_nothing_more_is_drawn_unless_asked_for(self):
        results = []
        for weak in (WeakAugment(8), WeakAugment(8, vertical_flip=0.0, quarter_turns=False)):
            torch.manual_seed(5)
            results.append((weak(self.image, self.mask)[1], torch.rand(())))
        torch.manual_seed(5)
        for low, high in ((5, 20), (0, 0), (0, 0)):
            torch.randint(low, high + 1, ())
        torch.rand(())
        assert torch.equal(results[0][0], results[1][0])
        assert results[0][1] == results[1][1] == torch.rand(())

    def test_a_probability_out_of_range_is_refused(self):
        with pytest.raises(ValueError, match=r"vertical_flip is 1\.5; expected a probability"):
            WeakAugment(8, vertical_flip=1.5)
