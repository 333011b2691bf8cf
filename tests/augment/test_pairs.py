from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stseg.augment import CropPair


def unflipped(pair, index):
    axes = [-1] if pair["flipped"][index] else []
    return pair["images"][index].flip(axes), pair["valid"][index].flip(axes)


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    base=st.sampled_from([None, 24]),
    low=st.sampled_from([0.05, 0.3, 0.8]),
    seed=st.integers(0, 1000),
)
def test_crops_agree_where_they_overlap(size, base, low, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pairs = CropPair((16, 24), base_size=base, stride=8, iou=(low, 1.0))
        pair = pairs(torch.rand(3, *size))
    assert pair["images"].shape == (2, 3, 16, 24)
    (one, seen), (two, visible) = (unflipped(pair, index) for index in range(2))
    down, right = pair["offset"].tolist()
    assert down % 8 == right % 8 == 0
    common = max(0, 16 - abs(down)) * max(0, 24 - abs(right))
    assert low <= common / (2 * 16 * 24 - common) <= 1
    first = slice(max(0, down), 16 + min(0, down)), slice(max(0, right), 24 + min(0, right))
    second = slice(max(0, -down), 16 - max(0, down)), slice(max(0, -right), 24 - max(0, right))
    assert torch.equal(one[(slice(None), *first)], two[(slice(None), *second)])
    assert torch.equal(seen[first], visible[second])
    assert not one[:, ~seen].any()


def test_draws_all_offsets_that_fit():
    torch.manual_seed(0)
    pairs = CropPair(8, base_size=24, scale=(1.0, 1.0), stride=4, iou=(0.01, 0.99), flip=0.0)
    found = {tuple(pairs(torch.rand(3, 24, 24))["offset"].tolist()) for _ in range(300)}
    assert found == {(y, x) for y in (-4, 0, 4) for x in (-4, 0, 4)} - {(0, 0)}


def test_takes_the_same_crop_twice_where_none_fits():
    torch.manual_seed(0)
    pair = CropPair(8, base_size=40, scale=(1.0, 1.0), iou=(0.9, 0.95), flip=0.0)(torch.rand(3, 40, 40))
    assert pair["offset"].tolist() == [0, 0]
    assert torch.equal(*pair["images"])


def test_takes_bytes_and_pictures():
    pixels = torch.randint(256, (3, 20, 30), dtype=torch.uint8)
    pairs = CropPair(8, base_size=24)
    results = []
    for image in (pixels, Image.fromarray(pixels.movedim(0, -1).numpy())):
        torch.manual_seed(0)
        results.append(pairs(image)["images"])
    assert results[0].dtype == torch.uint8
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_size": 12}, "crop_size is 12; expected multiples of stride, 8"),
        ({"stride": 0}, "stride is 0"),
        ({"iou": (0.0, 1.0)}, "iou is"),
        ({"iou": (0.5, 2.0)}, "iou is"),
        ({"flip": 1.5}, "flip is"),
        ({"scale": (2.0, 1.0)}, "scale is"),
    ],
)
def test_checks_its_settings(options, message):
    with pytest.raises(ValueError, match=message):
        CropPair(**{"crop_size": 16, **options})
