from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset

from stseg.data.items import Items
from stseg.data.mixed import MixedDataset
from stseg.errors import DataError
from stseg.inference.labeler import PseudoLabeled
from stseg.inference.mask_store import MaskStore


class Numbered(Dataset):
    """Tiny items that tell their number: image and mask are filled with it."""

    def __init__(self, n, first=0, ids=None):
        self.n, self.first = n, first
        if ids is not None:
            self.ids = ids

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        if not 0 <= index < self.n:
            raise IndexError(index)
        value = self.first + index
        return torch.full((3, 2, 2), value, dtype=torch.uint8), torch.full((2, 2), value, dtype=torch.uint8)


class WithoutMasks(Numbered):
    def __getitem__(self, index):
        return super().__getitem__(index)[0]


class TestGolden:
    """Iterations per epoch at batch 16, from the paper's settings."""

    @pytest.mark.parametrize(
        ("labeled", "unlabeled", "supervised", "last", "first"),
        [(183, 10399, 22, 1301, 656), (662, 9920, 41, 1240, 641), (1464, 9118, 91, 1210, 650)],
    )
    def test_iterations_of_pascal_voc(self, labeled, unlabeled, supervised, last, first):
        few = Numbered(labeled)
        reliable = unlabeled // 2
        assert len(MixedDataset(few, repeat=2 if labeled < 200 else 1)) // 16 == supervised
        assert len(MixedDataset(few, Numbered(unlabeled))) // 16 == last
        assert len(MixedDataset(few, Numbered(reliable))) // 16 == first


class TestMixture:
    @given(st.integers(1, 9), st.integers(1, 30), st.none() | st.integers(1, 4))
    @settings(derandomize=True, deadline=None)
    def test_is_the_labeled_items_over_and_over_then_the_pseudo_labeled(self, labeled, pseudo, repeat):
        mixed = MixedDataset(Numbered(labeled), Numbered(pseudo, first=100), repeat=repeat)
        times = math.ceil(pseudo / labeled) if repeat is None else repeat
        expected = [(i, False) for _ in range(times) for i in range(labeled)]
        expected += [(100 + i, True) for i in range(pseudo)]
        found = []
        for image, mask, is_pseudo in mixed:
            assert image.unique().tolist() == mask.unique().tolist()
            found.append((int(mask[0, 0]), is_pseudo))
        assert found == expected
        assert len(mixed) == len(expected)
        assert [mixed[i - len(mixed)][1][0, 0] for i in range(len(mixed))] == [v for v, _ in expected]

    def test_says_is_pseudo_as_a_bool(self):
        mixed = MixedDataset(Numbered(1), Numbered(1))
        assert mixed[0][2] is False
        assert mixed[1][2] is True

    @pytest.mark.parametrize("repeat", [None, 1, 3])
    def test_without_pseudo_is_the_labeled_items(self, repeat):
        mixed = MixedDataset(Numbered(2), repeat=repeat)
        assert [(int(mask[0, 0]), p) for _, mask, p in mixed] == [(0, False), (1, False)] * (repeat or 1)

    @pytest.mark.parametrize("index", [3, -4])
    def test_ends(self, index):
        with pytest.raises(IndexError):
            MixedDataset(Numbered(2), Numbered(1))[index]

    def test_takes_indices_of_numpy(self):
        assert MixedDataset(Numbered(2), Numbered(3))[np.int64(1)][1][0, 0] == 1

    def test_takes_items_of_every_form(self):
        pil = Image.new("RGB", (2, 2)), Image.new("P", (2, 2), 3)
        arrays = [torch.rand(3, 2, 2), np.full((2, 2), 4), "more"]
        mixed = MixedDataset([pil], [arrays])
        assert [(image.dtype, int(mask[1, 1]), p) for image, mask, p in mixed] == [
            (torch.uint8, 3, False),
            (torch.float32, 4, True),
        ]

    def test_goes_through_a_loader_with_workers(self):
        mixed = MixedDataset(Numbered(3), Numbered(5, first=100))
        images, masks, is_pseudo = next(iter(DataLoader(mixed, batch_size=11, num_workers=1)))
        assert is_pseudo.tolist() == [False] * 6 + [True] * 5
        assert masks[:, 0, 0].tolist() == [0, 1, 2, 0, 1, 2, 100, 101, 102, 103, 104]
        assert images.shape == (11, 3, 2, 2)

    def test_can_be_pickled(self):
        mixed = pickle.loads(pickle.dumps(MixedDataset(Numbered(2), Numbered(3))))
        assert len(mixed) == 7


class TestTransform:
    def test_is_applied_to_both_kinds_as_tensors(self):
        def transform(image, mask):
            return image + 1, mask + 2

        mixed = MixedDataset(Numbered(1), Numbered(1, first=100), transform=transform)
        assert [(int(i[0, 0, 0]), int(m[0, 0])) for i, m, _ in mixed] == [(1, 2), (101, 102)]

    def test_may_return_pil(self):
        def transform(image, mask):
            return Image.new("L", (5, 4)), Image.new("L", (5, 4), 7)

        image, mask, _ = MixedDataset(Numbered(1), transform=transform)[0]
        assert image.shape == (1, 4, 5)
        assert mask.unique().tolist() == [7]

    def test_that_breaks_the_pair_is_named_by_item(self):
        mixed = MixedDataset(Numbered(2, ids=["a", "b"]), transform=lambda image, mask: (image, mask[:1]))
        with pytest.raises(DataError, match="image and mask of 'b' differ in size"):
            mixed[1]


class TestNames:
    def test_repeat_with_the_items(self):
        mixed = MixedDataset(Numbered(2, ids=["a", "b"]), Numbered(3, ids=["x", "y", "z"]))
        assert Items(mixed).names == ["a", "b", "a", "b", "x", "y", "z"]
        assert Items(Subset(mixed, [6, 2])).names == ["z", "a"]

    def test_are_not_ids(self):
        assert Items(MixedDataset(Numbered(2, ids=["a", "b"]), repeat=2)).ids == ["0", "1", "2", "3"]

    def test_stand_in_errors(self):
        bad = [(torch.zeros(3, 4, 4), torch.zeros(4, 4))]
        with pytest.raises(TypeError, match=r"mask of '0' is torch\.float32"):
            MixedDataset(bad)[0]
        with pytest.raises(DataError, match="item 'q' has no mask"):
            MixedDataset(Numbered(2, ids=["a", "b"]), WithoutMasks(2, ids=["p", "q"]))[3]


class TestRefuses:
    def test_an_empty_labeled_set(self):
        with pytest.raises(DataError, match="the labeled data set is empty"):
            MixedDataset(Numbered(0), Numbered(3))

    def test_an_empty_pseudo_labeled_set(self):
        with pytest.raises(DataError, match="the pseudo-labeled data set is empty"):
            MixedDataset(Numbered(3), Numbered(0))

    def test_an_id_in_both(self):
        with pytest.raises(DataError, match="the id 'b' is in both the labeled and the pseudo-labeled"):
            MixedDataset(Numbered(2, ids=["a", "b"]), Numbered(2, ids=["c", "b"]))

    def test_no_numbers_that_both_have(self):
        labels = PseudoLabeled(Numbered(2), MaskStore(), indices=[0, 1], ids=["0", "1"])
        assert len(MixedDataset(Numbered(2), Numbered(2))) == 4
        assert len(MixedDataset(Numbered(2, ids=["0", "1"]), labels)) == 4

    def test_an_id_in_both_of_what_a_labeler_made(self):
        images = Numbered(2, ids=["0", "1"])
        labels = PseudoLabeled(images, MaskStore(), indices=[0, 1], ids=["0", "1"])
        with pytest.raises(DataError, match="the id '1' is in both"):
            MixedDataset(Numbered(2, ids=["1", "5"]), labels)

    @pytest.mark.parametrize("repeat", [0, -1])
    def test_a_repeat_below_1(self, repeat):
        with pytest.raises(ValueError, match=f"repeat is {repeat}; expected 1 or more"):
            MixedDataset(Numbered(2), repeat=repeat)

    def test_a_repeat_that_is_no_integer(self):
        with pytest.raises(TypeError):
            MixedDataset(Numbered(2), repeat=1.5)

    def test_what_has_no_length(self):
        with pytest.raises(TypeError, match="map-style data set"):
            MixedDataset(iter([]))
