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


class TestBoxMix:
    @pytest.mark.parametrize(("area", "boxes"), [((0.5, 0.5), 1), ((0.25, 0.5), 3)])
    def test_is_distributed_as_the_authors_draw_it(self, area, boxes):
        height, width = 90, 140
        found = BoxMix(area=area, boxes=boxes).draw(torch.zeros(4000, 1, height, width)).flatten(0, 1)[:4000].numpy()
        rng, wanted = np.random.default_rng(0), []
        for _ in range(4000):
            share = rng.uniform(*area)
            y = math.exp(rng.uniform() * math.log(share))
            x = share / y
            rows, columns = (round(s * math.sqrt(1 / boxes) * side) for s, side in ((y, height), (x, width)))
            top, left = round((height - rows) * rng.uniform()), round((width - columns) * rng.uniform())
            wanted.append((top, left, top + rows, left + columns))
        wanted = np.array(wanted)
        assert (found[:, :2] >= 0).all()
        assert (found[:, 2] <= height).all()
        assert (found[:, 3] <= width).all()
        for view in (
            lambda b: b[:, 0],
            lambda b: b[:, 1],
            lambda b: b[:, 2] - b[:, 0],
            lambda b: b[:, 3] - b[:, 1],
            lambda b: (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]),
        ):
            assert stats.ks_2samp(view(found), view(wanted)).pvalue > 1e-3

    def test_covers_half_of_the_image(self):
        boxes = BoxMix().draw(torch.zeros(500, 1, 321, 321))[:, 0]
        share = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / 321**2
        assert share.sub(0.5).abs().max() < 0.005

    def test_inverts_where_rectangles_overlap(self):
        boxes = torch.tensor([[[0, 0, 3, 3], [2, 2, 4, 4]], [[0, 0, 0, 0], [1, 1, 2, 2]]])
        masks = torch.tensor([0, 1])[:, None, None].expand(2, 4, 4)
        one, other = BoxMix(boxes=2).transform(boxes, masks)[0]
        for y in range(4):
            for x in range(4):
                assert one[y, x] == ((y < 3 and x < 3) != (y >= 2 and x >= 2))
                assert other[y, x] == (0 if (y, x) == (1, 1) else 1)

    @pytest.mark.parametrize("batch", [1, 2, 3, 5])
    def test_pastes_from_the_next_image(self, batch):
        images = torch.arange(batch).view(-1, 1, 1, 1).expand(batch, 3, 8, 8).float()
        (mixed,) = BoxMix(boxes=3)(images)
        for b in range(batch):
            assert set(mixed[b].flatten().tolist()) == {b, (b + 1) % batch}

    def test_is_reproduced_by_a_generator(self):
        images, generator = torch.rand(4, 3, 20, 20), torch.Generator()
        wanted = BoxMix().transform(BoxMix().draw(images, generator.manual_seed(3)), images)
        assert torch.equal(BoxMix()(images, generator=generator.manual_seed(3))[0], wanted[0])

    def test_reads_no_value_back_from_the_device(self):
        images, masks = torch.empty(2, 3, 4, 5, device="meta"), torch.empty(2, 4, 5, device="meta")
        assert [x.shape for x in BoxMix(boxes=3)(images, masks)] == [images.shape, masks.shape]

    @pytest.mark.parametrize(
        ("settings", "message"), [({"area": (0, 1)}, "area is"), ({"boxes": 0}, "boxes is 0; expected 1 or more")]
    )
    def test_refuses_settings_out_of_range(self, settings, message):
        with pytest.raises(ValueError, match=message):
            BoxMix(**settings)

    def test_needs_images_first(self):
        with pytest.raises(ValueError, match=r"expected images \(B, C, H, W\), with pixels"):
            BoxMix()(torch.zeros(2, 4, 5))
