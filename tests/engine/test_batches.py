from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stseg import TrainConfig, WeakAugment
from stseg.engine import batches
from stseg.engine.batches import AugmentedSamples, BatchSampler, build_loader, collate, steps_per_epoch
from stseg.errors import DataError

QUICK = settings(max_examples=25, deadline=None)


class TestBatches:
    @given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 5))
    @QUICK
    def test_every_epoch_draws_no_sample_twice_and_drops_the_rest(self, samples, size, seed):
        per_epoch = steps_per_epoch(samples, size)
        epochs = list(BatchSampler(samples, size, range(2 * per_epoch), seed=seed))
        assert [len(batch) for batch in epochs] == [size] * 2 * per_epoch
        for start in range(0, 2 * per_epoch, per_epoch):
            drawn = [index for batch in epochs[start : start + per_epoch] for _, index in batch]
            counts = np.bincount(drawn, minlength=samples)
            if samples >= size:
                assert counts.max() == 1
                assert counts.sum() == samples // size * size
            else:  # fewer than a batch: repeated, each about as often as the others
                assert counts.max() - counts.min() <= 1
        assert [number for batch in epochs for number, _ in batch] == list(range(2 * per_epoch * size))

    @given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 30))
    @QUICK
    def test_from_a_later_step_are_those_of_the_whole(self, samples, size, start):
        whole = list(BatchSampler(samples, size, range(31), seed=1))
        assert list(BatchSampler(samples, size, range(start, 31), seed=1)) == whole[start:]

    def test_of_two_epochs_come_in_other_orders(self):
        first, second = list(BatchSampler(50, 50, range(2), seed=0))
        assert [index for _, index in first] != [index for _, index in second]

    def test_of_several_processes_are_parts_of_those_of_one(self, monkeypatch):
        whole = list(BatchSampler(20, 6, range(7), seed=0))
        monkeypatch.setattr(batches, "world_size", lambda: 3)
        parts = []
        for number in range(3):
            monkeypatch.setattr(batches, "rank", lambda number=number: number)
            parts.append(list(BatchSampler(20, 6, range(7), seed=0)))
        assert all(sorted(a + b + c) == w for a, b, c, w in zip(*parts, whole, strict=True))
        with pytest.raises(
            ValueError, match="batch_size is 8 over all processes; expected a multiple of their number, 3"
        ):
            BatchSampler(20, 8, range(7), seed=0)


def pairs(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.rand(3, 20, 24, generator=generator), torch.randint(0, 4, (20, 24), generator=generator).byte())
        for _ in range(count)
    ]


class TestSamples:
    def test_depend_on_the_number_of_the_draw_alone(self):
        samples = AugmentedSamples(pairs(3), ["a", "b", "c"], WeakAugment(16), seed=0)
        image, mask, is_pseudo = samples[5, 1]
        torch.rand(7)
        again = samples[5, 1]
        assert torch.equal(image, again[0])
        assert torch.equal(mask, again[1])
        assert is_pseudo is False
        assert not torch.equal(image, samples[6, 1][0])

    def test_of_any_number_of_workers_are_the_same(self):
        samples = AugmentedSamples(pairs(5), list("abcde"), WeakAugment(16), seed=0)
        runs = []
        for workers in (0, 2):
            config = TrainConfig(steps=4, batch_size=3, num_workers=workers)
            runs.append(list(build_loader(samples, config, range(4), pin_memory=False)))
        for one, other in zip(*runs, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

    def test_pass_on_which_masks_are_guesses(self):
        items = [(*pair, guess) for pair, guess in zip(pairs(3), (False, True, np.True_), strict=True)]
        samples = AugmentedSamples(items, list("abc"), None, seed=0)
        assert [samples[0, index][2] for index in range(3)] == [False, True, True]

    def test_name_the_item_whose_mask_is_wrong(self):
        image, mask = pairs(1)[0]
        mask[3, 4] = 9
        samples = AugmentedSamples([(image, mask)], ["img_0042"], None, seed=0)
        samples.check_masks(4, 255)
        with pytest.raises(DataError, match=r"mask of 'img_0042' holds the value 9; expected 0\.\.3 or 255"):
            samples[0, 0]


class TestCollate:
    def test_brings_bytes_and_floats_together(self):
        image, mask = torch.full((3, 2, 2), 51, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.uint8)
        images, masks, is_pseudo = collate([(image, mask, False), (torch.rand(3, 2, 2), mask.int(), True)])
        assert images.dtype == torch.float32
        assert images[0].unique().tolist() == [pytest.approx(0.2)]
        assert masks.dtype == torch.int32
        assert is_pseudo.tolist() == [False, True]

    def test_names_the_shapes_that_do_not_fit(self):
        samples = [(torch.rand(3, size, 4), torch.zeros(size, 4), False) for size in (4, 5)]
        with pytest.raises(DataError, match=r"shapes \[\(3, 4, 4\), \(3, 5, 4\)\]; expected one"):
            collate(samples)
