from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stseg
from stseg.augment import ClassMix


def labels(seed, rows=4, size=6, classes=5):
    found = torch.randint(0, classes, (rows, size, size), generator=torch.Generator().manual_seed(seed))
    found[0, :2] = 255
    found[1] = 3  # a single class
    return found


class TestClasses:
    @given(st.integers(0, 200), st.sampled_from([0.0, 0.3, 0.5, 1.0]))
    @settings(max_examples=40, deadline=None)
    def test_are_half_of_those_that_are_there_and_whole(self, seed, share):
        masks = labels(seed)
        torch.manual_seed(seed)
        where = ClassMix(share).draw(masks)
        for mask, chosen in zip(masks, where, strict=True):
            present = set(mask.unique().tolist()) - {255}
            taken = set(mask[chosen].unique().tolist())
            assert taken <= present
            assert len(taken) == int(len(present) * share + 1e-6)
            assert torch.equal(chosen, torch.isin(mask, torch.tensor(sorted(taken))) if taken else chosen & False)

    def test_are_drawn_evenly(self):
        masks = torch.arange(4).repeat(4000, 1)[:, None]
        torch.manual_seed(0)
        where = ClassMix().draw(masks)
        assert (where.sum(2) == 2).all()
        assert (where.float().mean((0, 1)) - 0.5).abs().max() < 0.03

    def test_of_nothing_but_ignored_pixels_are_none(self):
        assert not ClassMix().draw(torch.full((2, 3, 3), 255)).any()
        assert not ClassMix().draw(torch.zeros(2, 0, 3, dtype=torch.int64)).any()

    @pytest.mark.parametrize("wrong", [torch.zeros(2, 3, 3), torch.zeros(3, 3, dtype=torch.int64)])
    def test_of_no_labels_are_refused(self, wrong):
        with pytest.raises(ValueError, match=r"labels are .* of shape .*; expected integers"):
            ClassMix().draw(wrong)


def test_pastes_into_the_next_image_all_tensors_alike():
    masks, images = labels(0), torch.rand(4, 3, 6, 6)
    torch.manual_seed(1)
    new_images, new_masks = ClassMix()(masks, images, masks)
    torch.manual_seed(1)
    where = ClassMix().draw(masks)
    for b in range(4):
        for i in range(6):
            for j in range(6):
                source = b if where[b, i, j] else (b + 1) % 4
                assert torch.equal(new_images[b, :, i, j], images[source, :, i, j])
                assert new_masks[b, i, j] == masks[source, i, j]


def test_is_public_and_refuses_shares_that_are_none():
    assert stseg.ClassMix is ClassMix
    with pytest.raises(ValueError, match=r"share is 1\.5"):
        ClassMix(1.5)
