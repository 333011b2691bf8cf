from __future__ import annotations

import pytest
import torch

from stseg.functional import turn


@pytest.mark.parametrize("channels", [(), (3,)])
def test_each_map_is_turned_clockwise(channels):
    maps = torch.rand(4, *channels, 5, 5)
    found = turn(maps, torch.tensor([0, 1, 2, 3]))
    for i in range(5):
        for j in range(5):
            assert torch.equal(found[0, ..., i, j], maps[0, ..., i, j])
            assert torch.equal(found[1, ..., i, j], maps[1, ..., 4 - j, i])
            assert torch.equal(found[2, ..., i, j], maps[2, ..., 4 - i, 4 - j])
            assert torch.equal(found[3, ..., i, j], maps[3, ..., j, 4 - i])


def test_masks_keep_their_values():
    masks = torch.randint(256, (6, 4, 4))
    found = turn(masks, torch.randint(4, (6,)))
    assert found.dtype == masks.dtype
    assert torch.equal(found.flatten(1).sort().values, masks.flatten(1).sort().values)


@pytest.mark.parametrize(("shape", "count"), [((2, 3, 4, 5), 2), ((2, 4, 4), 3), ((4, 4), 4)])
def test_other_shapes_are_refused(shape, count):
    with pytest.raises(ValueError, match="expected square images"):
        turn(torch.rand(*shape), torch.zeros(count, dtype=torch.int64))
