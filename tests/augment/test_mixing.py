from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from stseg import CutMix
from stseg.augment import Cutout
from stseg.functional import box_mask, paste

few = settings(max_examples=25, deadline=None)
RATIO = (0.3, 1 / 0.3)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def drawn(mix, height, width, total=8000):
    """Top, left, height and width of many rectangles."""
    image = torch.zeros(1000, 1, height, width)
    boxes = torch.cat([mix.draw(image) for _ in range(total // 1000)]).numpy()
    return np.stack([boxes[:, 0], boxes[:, 1], boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]], 1)


def as_unimatch_draws(rng, height, width):
    area = rng.uniform(0.02, 0.4) * height * width
    while True:
        ratio = rng.uniform(*RATIO)
        columns, rows = int(math.sqrt(area / ratio)), int(math.sqrt(area * ratio))
        left, top = rng.integers(width), rng.integers(height)
        if left + columns <= width and top + rows <= height:
            return top, left, rows, columns


class TestRectangle:
    @pytest.mark.parametrize(("height", "width"), [(48, 64), (321, 321)])
    def test_is_distributed_as_unimatch_draws_it(self, height, width):
        found = drawn(CutMix(p=1), height, width)
        rng = np.random.default_rng(0)
        wanted = np.array([as_unimatch_draws(rng, height, width) for _ in range(8000)])
        views = {
            "top": lambda b: b[:, 0],
            "left": lambda b: b[:, 1],
            "height": lambda b: b[:, 2],
            "width": lambda b: b[:, 3],
            "area": lambda b: b[:, 2] * b[:, 3],
            "ratio": lambda b: b[:, 2] / b[:, 3],
            "room below": lambda b: height - b[:, 0] - b[:, 2],
        }
        for name, view in views.items():
            assert stats.ks_2samp(view(found), view(wanted)).pvalue > 1e-3, name

    def test_has_an_area_drawn_once_unlike_the_one_of_cutout(self):
        top, left, rows, columns = drawn(CutMix(p=1), 321, 321).T
        share = rows * columns / 321**2
        assert (top >= 0).all()
        assert (left >= 0).all()
        assert (top + rows <= 321).all()
        assert (left + columns <= 321).all()
        # Sides are rounded down: the shares are uniform but for that.
        assert stats.kstest(share, stats.uniform(0.02, 0.38).cdf).statistic < 0.03
        boxes = torch.cat([Cutout(p=1).draw(torch.zeros(1000, 1, 321, 321))[0] for _ in range(4)]).numpy()
        small = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / 321**2
        assert small.mean() < share.mean() - 0.03

    def test_comes_as_often_as_told(self):
        assert not drawn(CutMix(p=0), 32, 32).any()
        count = int(drawn(CutMix(p=0.3), 32, 32).any(1).sum())
        assert stats.binomtest(count, 8000, 0.3).pvalue > 1e-3

    def test_mixes_a_tenth_of_the_pixels_in_the_mean(self):
        _, _, rows, columns = drawn(CutMix(), 321, 321).T
        assert (rows * columns).mean() / 321**2 == pytest.approx(0.105, abs=0.005)

    def test_is_none_where_none_fits(self):
        assert not CutMix(p=1, area=(1, 1), ratio=(3, 3)).draw(torch.zeros(8, 1, 6, 6)).any()

    def test_is_reproduced_by_a_generator(self):
        images = torch.zeros(8, 1, 30, 40)
        one, two = (CutMix().draw(images, torch.Generator().manual_seed(5)) for _ in range(2))
        assert torch.equal(one, two)
        assert not torch.equal(one, CutMix().draw(images, torch.Generator().manual_seed(6)))


class TestMixing:
    @few
    @given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
    def test_pastes_the_rectangle_of_the_image_counted_from_the_end(self, batch, height, width, seed):
        generator = torch.Generator().manual_seed(seed)
        images = torch.rand(batch, 3, height, width, generator=generator)
        masks = torch.randint(-3, 300, (batch, height, width), generator=generator)
        mix = CutMix(p=0.8, area=(0.1, 0.9))
        boxes = mix.draw(images, generator)
        found = mix.transform(boxes, images, masks, images.double())
        wanted_images, wanted_masks = images.clone(), masks.clone()
        for i, (top, left, bottom, right) in enumerate(boxes.tolist()):
            for y in range(top, bottom):
                for x in range(left, right):
                    wanted_images[i, :, y, x] = images[batch - 1 - i, :, y, x]
                    wanted_masks[i, y, x] = masks[batch - 1 - i, y, x]
        assert torch.equal(found[0], wanted_images)
        assert torch.equal(found[1], wanted_masks)
        assert torch.equal(found[2], wanted_images.double())
        assert [x.dtype for x in found] == [images.dtype, masks.dtype, torch.float64]

    def test_a_call_mixes_everything_alike_and_changes_no_input(self):
        images = torch.rand(4, 3, 20, 20)
        masks = (images[:, 0] * 1000).long()
        before = images.clone(), masks.clone()
        new_images, new_masks = CutMix(p=1)(images, masks)
        assert torch.equal((new_images[:, 0] * 1000).long(), new_masks)
        assert not torch.equal(new_images, images)
        assert torch.equal(images, before[0])
        assert torch.equal(masks, before[1])

    def test_a_call_draws_what_draw_draws(self):
        images, generator = torch.rand(4, 3, 20, 20), torch.Generator()
        mix = CutMix(p=1)
        wanted = mix.transform(mix.draw(images, generator.manual_seed(3)), images)
        assert torch.equal(mix(images, generator=generator.manual_seed(3))[0], wanted[0])

    @pytest.mark.parametrize("tensors", [(), (torch.zeros(2, 4, 5),), (torch.zeros(2, 3, 0, 5),)])
    def test_needs_images_first(self, tensors):
        with pytest.raises(ValueError, match=r"expected images \(B, C, H, W\), with pixels"):
            CutMix()(*tensors)

    def test_refuses_tensors_that_do_not_belong_together(self):
        with pytest.raises(ValueError, match=r"where has shape \(2, 4, 5\), into \(3, 4, 5\)"):
            CutMix()(torch.zeros(2, 3, 4, 5), torch.zeros(3, 4, 5))

    def test_a_batch_without_images_stays_one(self):
        assert CutMix()(torch.zeros(0, 3, 4, 5))[0].shape == (0, 3, 4, 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"p": 1.5}, "p is 1.5"),
        ({"area": (0, 0.5)}, "area is"),
        ({"area": (0.5, 1.5)}, "area is"),
        ({"ratio": (2, 1)}, "ratio is"),
        ({"ratio": 1.0}, "ratio is"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CutMix(**settings)


@few
@given(st.lists(st.integers(-2, 8), min_size=4, max_size=4), st.integers(1, 6), st.integers(1, 6))
def test_a_box_is_what_lies_between_its_sides(box, height, width):
    top, left, bottom, right = box
    found = box_mask(torch.tensor([box]), height, width)
    for y in range(height):
        for x in range(width):
            assert found[0, y, x] == (top <= y < bottom and left <= x < right)


def test_paste_refuses_other_shapes():
    where = torch.ones(2, 4, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"into \(2, 3, 4, 5\) and source \(2, 1, 4, 5\)"):
        paste(where, torch.zeros(2, 3, 4, 5), torch.zeros(2, 1, 4, 5))
    with pytest.raises(ValueError, match=r"where has shape \(4, 5\)"):
        paste(where[0], torch.zeros(2, 4, 5), torch.zeros(2, 4, 5))


def test_mixing_reads_no_value_back_from_the_device():
    images, masks = torch.empty(2, 3, 4, 5, device="meta"), torch.empty(2, 4, 5, device="meta")
    assert [x.shape for x in CutMix()(images, masks)] == [images.shape, masks.shape]
