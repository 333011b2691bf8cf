from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import Entropic, network

from stseg import TrainConfig, WeakAugment, fit
from stseg.data.items import Items
from stseg.engine import batches
from stseg.engine.batches import BatchSampler, Draw, Streams, collate, steps_per_pass
from stseg.errors import DataError

QUICK = settings(max_examples=25, deadline=None)
CPU = torch.device("cpu")


def of(draws: list[Draw], stream: str) -> list[Draw]:
    return [draw for draw in draws if draw.stream == stream]


class TestSampler:
    @given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 5))
    @QUICK
    def test_every_pass_draws_no_sample_twice_and_drops_the_rest(self, samples, size, seed):
        per_epoch = steps_per_pass(samples, size)
        epochs = list(BatchSampler({"labeled": (samples, size)}, range(2 * per_epoch), seed=seed))
        assert [len(batch) for batch in epochs] == [size] * 2 * per_epoch
        for start in range(0, 2 * per_epoch, per_epoch):
            drawn = [draw.item for batch in epochs[start : start + per_epoch] for draw in batch]
            counts = np.bincount(drawn, minlength=samples)
            if samples >= size:
                assert counts.max() == 1
                assert counts.sum() == samples // size * size
            else:  # fewer than a batch: repeated, each about as often as the others
                assert counts.max() - counts.min() <= 1
        assert [draw.number for batch in epochs for draw in batch] == list(range(2 * per_epoch * size))

    @given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 40), st.integers(1, 12), st.integers(0, 30))
    @QUICK
    def test_from_a_later_step_are_those_of_the_whole(self, samples, size, others, other_size, start):
        sizes = {"labeled": (samples, size), "unlabeled": (others, other_size)}
        whole = list(BatchSampler(sizes, range(31), seed=1))
        assert list(BatchSampler(sizes, range(start, 31), seed=1)) == whole[start:]

    @given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 40), st.integers(1, 12))
    @QUICK
    def test_draws_of_the_labeled_stream_are_the_same_beside_an_unlabeled_one(self, samples, size, others, other_size):
        alone = list(BatchSampler({"labeled": (samples, size)}, range(9), seed=1))
        both = list(BatchSampler({"labeled": (samples, size), "unlabeled": (others, other_size)}, range(9), seed=1))
        assert [of(batch, "labeled") for batch in both] == alone
        assert {len(of(batch, "unlabeled")) for batch in both} == {other_size}

    def test_of_two_epochs_and_of_two_streams_come_in_other_orders(self):
        sampler = BatchSampler({"labeled": (50, 50), "unlabeled": (50, 50)}, range(2), seed=0)
        orders = [tuple(d.item for d in of(batch, name)) for batch in sampler for name in ("labeled", "unlabeled")]
        assert len(set(orders)) == 4

    def test_of_several_processes_are_parts_of_those_of_one(self, monkeypatch):
        sizes = {"labeled": (20, 6), "unlabeled": (31, 9)}
        whole = list(BatchSampler(sizes, range(7), seed=0))
        monkeypatch.setattr(batches, "world_size", lambda: 3)
        parts = []
        for number in range(3):
            monkeypatch.setattr(batches, "rank", lambda number=number: number)
            parts.append(list(BatchSampler(sizes, range(7), seed=0)))
        assert all(sorted(a + b + c) == sorted(w) for a, b, c, w in zip(*parts, whole, strict=True))
        for part in parts:
            assert {len(of(draws, "labeled")) for draws in part} == {2}
            assert {len(of(draws, "unlabeled")) for draws in part} == {3}

    @pytest.mark.parametrize(
        ("sizes", "message"),
        [
            ({"labeled": (20, 8)}, "^batch_size is 8 over all processes; expected a multiple of their number, 3"),
            ({"labeled": (20, 6), "unlabeled": (20, 7)}, "^unlabeled_batch_size is 7 over all processes"),
        ],
    )
    def test_that_processes_cannot_share_names_the_argument(self, monkeypatch, sizes, message):
        monkeypatch.setattr(batches, "world_size", lambda: 3)
        with pytest.raises(ValueError, match=message):
            BatchSampler(sizes, range(7), seed=0)


def pairs(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.rand(3, 20, 24, generator=generator), torch.randint(0, 4, (20, 24), generator=generator).byte())
        for _ in range(count)
    ]


def unlabeled(count: int) -> list[torch.Tensor]:
    """Images of several sizes, most of them smaller than the crop."""
    generator = torch.Generator().manual_seed(4)
    return [torch.rand(3, 10 + 3 * (i % 4), 9 + 5 * (i % 3), generator=generator) for i in range(count)]


def streams(labeled=5, others: int | None = 7, **changes) -> Streams:
    settings = {"steps": 6, "batch_size": 2, "weak": WeakAugment(16), "seed": 0, **changes}
    data = Items.of(pairs(labeled) if isinstance(labeled, int) else labeled)
    return Streams(data, None if others is None else Items.of(unlabeled(others)), TrainConfig(**settings))


def equal(one, other) -> bool:
    """Whether two batches hold the same."""
    tensors = (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one, other, strict=True))
    return all(tensors)


def drawn(made: Streams, start: int = 0, *, num_workers: int = 0):
    return list(made.batches(range(start, 6), 6, CPU, num_workers=num_workers))


class TestStreams:
    def test_samples_depend_on_the_number_of_the_draw_alone(self):
        made = streams()
        for name in ("labeled", "unlabeled"):
            _, one = made[Draw(name, 5, 1)]
            torch.rand(7)
            np.random.rand()  # noqa: NPY002
            _, again = made[Draw(name, 5, 1)]
            assert equal(one, again)
            assert not torch.equal(one[0], made[Draw(name, 6, 1)][1][0])

    def test_are_those_of_any_number_of_workers(self):
        for one, other in zip(drawn(streams()), drawn(streams(), num_workers=2), strict=True):
            assert equal(one, other)

    def test_from_a_later_step_are_those_of_the_whole(self):
        assert all(equal(a, b) for a, b in zip(drawn(streams())[4:], drawn(streams(), 4), strict=True))

    def test_of_two_processes_are_halves_of_those_of_one(self, monkeypatch):
        settings = {"batch_size": 4, "unlabeled_batch_size": 6}
        whole = drawn(streams(**settings))
        monkeypatch.setattr(batches, "world_size", lambda: 2)
        parts = []
        for number in range(2):
            monkeypatch.setattr(batches, "rank", lambda number=number: number)
            parts.append(drawn(streams(**settings)))
        for first, second, both in zip(*parts, whole, strict=True):
            for name in ("images", "masks", "is_pseudo", "unlabeled", "valid"):
                assert torch.equal(getattr(first, name), getattr(both, name)[0::2])
                assert torch.equal(getattr(second, name), getattr(both, name)[1::2])

    def test_the_labeled_one_is_the_same_with_and_without_an_unlabeled_one(self):
        for both, alone in zip(drawn(streams()), drawn(streams(others=None)), strict=True):
            assert equal(both[:3], alone[:3])
            assert alone.unlabeled is None
            assert alone.valid is None

    def test_the_unlabeled_one_does_not_depend_on_the_labeled_one(self):
        for one, other in zip(drawn(streams(5)), drawn(streams(3, batch_size=1, unlabeled_batch_size=2)), strict=True):
            assert torch.equal(one.unlabeled, other.unlabeled)

    def test_of_other_seeds_are_others(self):
        one, other = drawn(streams())[0], drawn(streams(seed=1))[0]
        assert not torch.equal(one.images, other.images)
        assert not torch.equal(one.unlabeled, other.unlabeled)

    @given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 40), st.integers(1, 9))
    @QUICK
    def test_an_epoch_is_a_pass_over_the_longer_one(self, labeled, size, others, other_size):
        zeros = [torch.zeros(1, 1, 1)] * 40
        made = Streams(
            Items.of(list(zip(zeros, zeros, strict=True))[:labeled]),
            Items.of(zeros[:others]),
            TrainConfig(steps=1, batch_size=size, unlabeled_batch_size=other_size),
        )
        assert made.steps_per_epoch == max(1, labeled // size, others // other_size)
        sampler = BatchSampler(made.sizes, range(made.steps_per_epoch), seed=0)
        counts = {name: Counter(d.item for b in sampler for d in of(b, name)) for name in ("labeled", "unlabeled")}
        for name, count, of_batch in (("labeled", labeled, size), ("unlabeled", others, other_size)):
            if count >= of_batch and count // of_batch == made.steps_per_epoch:
                assert max(counts[name].values()) == 1

    def test_number_their_steps_and_know_the_ignore_index(self):
        made = drawn(streams(ignore_index=9, weak=WeakAugment(16, ignore_index=9)), 2)
        assert [(batch.step, batch.steps, batch.ignore_index) for batch in made] == [(s, 6, 9) for s in range(2, 6)]

    def test_turn_bytes_into_floats(self):
        data = [((image * 255).to(torch.uint8), mask) for image, mask in pairs(4)]
        made = streams(data, None, weak=None, batch_size=4)
        batch = drawn(made)[0]
        order = [draw.item for draw in next(iter(BatchSampler(made.sizes, range(1), seed=0)))]
        assert batch.images.dtype == torch.float32
        assert batch.masks.dtype == torch.int64
        assert torch.equal(batch.images, torch.stack([data[i][0] for i in order]).float() / 255)

    def test_pass_on_which_masks_are_guesses(self):
        items = [(*pair, guess) for pair, guess in zip(pairs(3), (False, True, np.True_), strict=True)]
        made = streams(items, None, weak=None)
        assert [made[Draw("labeled", 0, index)][1][2] for index in range(3)] == [False, True, True]

    def test_ignore_a_third_element_that_is_no_bool(self):
        items = [(*pair, other) for pair, other in zip(pairs(4), (1, "true", torch.tensor(1), None), strict=True)]
        made = streams(items, None, weak=None)
        assert [made[Draw("labeled", 0, index)][1][2] for index in range(4)] == [False] * 4

    def test_name_the_item_whose_mask_is_wrong(self):
        class Named(list):
            ids = ("img_0042",)

        image, mask = pairs(1)[0]
        mask[3, 4] = 9
        made = streams(Named([(image, mask)]), None, weak=None)
        made.num_classes = 4
        with pytest.raises(DataError, match=r"mask of 'img_0042' holds the value 9; expected 0\.\.3 or 255"):
            made[Draw("labeled", 0, 0)]


class TestValid:
    def test_is_false_exactly_where_a_crop_is_padding(self):
        """Of images of ones, which the weak augmentation pads with zeros."""
        ones = [torch.ones_like(image) for image in unlabeled(12)]
        config = TrainConfig(steps=6, batch_size=2, unlabeled_batch_size=5, weak=WeakAugment(16, scale=(0.5, 1.5)))
        made = Streams(Items.of(pairs(3)), Items.of(ones), config)
        shares = []
        for batch in drawn(made):
            assert batch.valid.dtype == torch.bool
            assert torch.equal(batch.valid, batch.unlabeled.amax(1) > 0.5)
            shares += batch.valid.float().mean((1, 2)).tolist()
        assert min(shares) < 0.6
        assert max(shares) == 1

    def test_is_true_everywhere_without_a_weak_augmentation(self):
        made = Streams(Items.of(pairs(3)), Items.of([image for image, _ in pairs(4)]), TrainConfig(steps=6, weak=None))
        assert all(batch.valid.all() for batch in drawn(made))


class Untouchable:
    """A mask of an unlabeled image: whoever uses it fails."""

    def __getattribute__(self, name):
        raise AssertionError("the mask of an unlabeled image was used")

    def __array__(self, *args, **kwargs):
        raise AssertionError("the mask of an unlabeled image was used")


def test_masks_of_unlabeled_images_are_never_used():
    settings = TrainConfig(steps=3, batch_size=2, weak=WeakAugment(16))
    labeled = [(image, (image[0] > 0.5).byte()) for image, _ in pairs(3)]
    results = [
        fit(Entropic(network()), labeled, settings, unlabeled=data, progress=False).history
        for data in (unlabeled(5), [(image, Untouchable()) for image in unlabeled(5)])
    ]
    assert [{**row, "seconds": 0} for row in results[0]] == [{**row, "seconds": 0} for row in results[1]]


def as_labeled(samples):
    return [("labeled", sample) for sample in samples]


class TestCollate:
    def test_brings_bytes_and_floats_together(self):
        image, mask = torch.full((3, 2, 2), 51, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.uint8)
        samples = [(image, mask, False), (torch.rand(3, 2, 2), mask.int(), True)]
        (images, masks, is_pseudo), nothing = collate(as_labeled(samples))
        assert nothing == (None, None)
        assert images.dtype == torch.float32
        assert images[0].unique().tolist() == [pytest.approx(0.2)]
        assert masks.dtype == torch.int32
        assert is_pseudo.tolist() == [False, True]

    def test_names_the_shapes_that_do_not_fit(self):
        samples = [(torch.rand(3, size, 4), torch.zeros(size, 4), False) for size in (4, 5)]
        with pytest.raises(DataError, match=r"shapes \[\(3, 4, 4\), \(3, 5, 4\)\]; expected one"):
            collate(as_labeled(samples))
        views = [("unlabeled", (torch.rand(3, size, 4), None)) for size in (4, 5)]
        with pytest.raises(DataError, match=r"shapes \[\(3, 4, 4\), \(3, 5, 4\)\]; expected one"):
            collate([*as_labeled(samples[:1]), *views])

    def test_stacks_views_of_any_nesting(self):
        labeled = as_labeled([(torch.rand(3, 2, 2), torch.zeros(2, 2), False)])
        views = [
            ("unlabeled", ({"crops": (torch.full((1,), i), torch.full((2,), -i)), "at": (i, i + 1.5)}, None))
            for i in range(3)
        ]
        _, (unlabeled, valid) = collate([*labeled, *views])
        assert valid is None
        assert unlabeled["crops"][0].tolist() == [[0], [1], [2]]
        assert unlabeled["crops"][1].tolist() == [[0, 0], [-1, -1], [-2, -2]]
        assert [column.tolist() for column in unlabeled["at"]] == [[0, 1, 2], [1.5, 2.5, 3.5]]
