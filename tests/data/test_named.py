from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from small import Named
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

import stseg
from stseg.data import ListedFiles, MixedDataset, NamedDataset, SegmentationFolder, SyntheticScenes
from stseg.data.items import Items
from stseg.errors import DataError


class Letters(NamedDataset):
    """Items that tell where they come from."""

    def __init__(self, ids):
        self.ids = list(ids)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return f"item {self.ids[index]}"

    def __repr__(self):
        return "Letters"


def contents(dataset):
    return [dataset[index] for index in range(len(dataset))]


def items(ids):
    return [f"item {id}" for id in ids]


class TestOnly:
    @given(st.permutations("abcdef"), st.integers(1, 6))
    def test_items_come_in_the_order_of_the_ids(self, ids, count):
        part = Letters("abcdef").only(ids[:count])
        assert part.ids == Items.of(part).ids == ids[:count]
        assert contents(part) == items(ids[:count])

    def test_ids_may_be_a_generator(self):
        assert Letters("abc").only(id for id in "cb").ids == ["c", "b"]

    def test_no_ids_are_refused(self):
        with pytest.raises(DataError, match="ids is empty; expected one or more"):
            Letters("abc").only([])

    def test_an_id_that_is_given_twice_is_named(self):
        with pytest.raises(DataError, match="the id 'b' occurs more than once in ids"):
            Letters("abc").only(["b", "a", "b"])


class TestWithout:
    @given(st.permutations("abcdef"), st.integers(0, 5))
    def test_the_others_keep_their_order(self, ids, count):
        part = Letters("abcdef").without(ids[:count])
        assert part.ids == sorted(ids[count:])
        assert contents(part) == items(sorted(ids[count:]))

    def test_an_id_may_be_given_twice_and_ids_may_be_a_set(self):
        assert Letters("abc").without(["a", "a"]).ids == Letters("abc").without({"a"}).ids == ["b", "c"]

    def test_all_of_them_are_refused(self):
        with pytest.raises(DataError, match="ids names every item of Letters; expected one or more others"):
            Letters("abc").without(list("cab"))


@pytest.mark.parametrize("method", ["only", "without"])
class TestIds:
    def choose(self, method, ids, names=("a/1", "a/2", "b/1", "b/2")):
        return getattr(Letters(names), method)(ids)

    def test_that_are_unknown_are_counted_and_some_are_named(self, method):
        with pytest.raises(DataError, match=r"no item with the id 'x', 'y', 'z' and 2 more in Letters \(5 of 6\)"):
            self.choose(method, ["x", "a/1", "y", "z", "u", "v"])

    @pytest.mark.parametrize(
        ("id", "hint"), [("A/1", "differs in letter case"), ("2", "with the folder 'a/' in front")]
    )
    def test_that_are_near_are_shown(self, method, id, hint):
        with pytest.raises(DataError, match=hint):
            self.choose(method, [id])

    @pytest.mark.parametrize("id", [1, None, 2.5, Path("a/1")])
    def test_are_strings(self, method, id):
        with pytest.raises(DataError, match=r"there is no item with the id .* ids are strings"):
            self.choose(method, [id])

    @pytest.mark.parametrize(
        ("ids", "message"),
        [
            ("a/1", "ids is 'a/1'; expected a sequence of ids .*read_ids reads a file of them"),
            (Path("ids.txt"), "ids is .*; expected a sequence"),
            (Letters("a"), "ids is a Letters; expected its ids: ids=dataset.ids"),
            (3, "ids is 3; expected a sequence of ids"),
            (None, "ids is None; expected a sequence of ids"),
        ],
    )
    def test_are_a_sequence(self, method, ids, message):
        with pytest.raises(TypeError, match=message):
            self.choose(method, ids)

    def test_of_a_data_set_that_repeats_one_are_refused(self, method):
        with pytest.raises(DataError, match="the id 'a' occurs more than once in the data set"):
            self.choose(method, ["b"], names=["a", "b", "a"])

    def test_of_another_number_than_items_are_refused(self, method):
        letters = Letters("abc")
        letters.__class__ = type("Short", (Letters,), {"__len__": lambda self: 2})
        with pytest.raises(DataError, match="the data set has 2 items but 3 ids"):
            getattr(letters, method)(["a"])


class TestSum:
    @given(st.lists(st.text("abc", min_size=1, max_size=3), unique=True, min_size=2, max_size=8), st.data())
    def test_has_the_items_and_ids_of_both(self, ids, data):
        cut = data.draw(st.integers(1, len(ids) - 1))
        both = Letters(ids[:cut]) + Letters(ids[cut:])
        assert both.ids == Items.of(both).ids == ids
        assert Items.of(both).has_ids
        assert contents(both) == items(ids)

    def test_of_sums_and_parts(self):
        letters = Letters("abcd")
        whole = letters.only(["d"]) + letters.without(["d", "b"]) + letters.only(["b"])
        assert whole.ids == ["d", "a", "c", "b"]
        assert contents(whole) == items(whole.ids)
        assert contents(whole.without(["a"]).only(["b", "d"])) == items("bd")

    @pytest.mark.parametrize("other", [Subset(Letters("xyz"), [2, 0]), ConcatDataset([Letters("z"), Letters("x")])])
    def test_with_parts_and_sums_of_pytorch(self, other):
        both = Letters("ab") + other
        assert both.ids == ["a", "b", "z", "x"]
        assert contents(both) == items(both.ids)

    def test_with_any_data_set_that_has_ids(self):
        assert (Letters("ab") + Named([1, 2], ["x", "y"])).ids == ["a", "b", "x", "y"]

    def test_with_items_without_ids_numbers_them(self):
        numbers = [7, 8]
        both = Letters("ab") + numbers
        assert both.ids == ["0", "1", "2", "3"]
        assert not Items.of(both).has_ids
        assert contents(both) == ["item a", "item b", 7, 8]

    def test_refuses_ids_of_both(self):
        message = r"the id 'a' is in both data sets, Letters and 2 of Letters \(2 ids in all\); .*id_prefix="
        with pytest.raises(DataError, match=message):
            Letters("ab") + Letters("abc").only(["b", "a"])

    @pytest.mark.parametrize("other", [None, 3, "images", Path("images"), DataLoader([1])])
    def test_with_what_is_no_data_set_is_refused(self, other):
        with pytest.raises(TypeError, match=r"expected a .*data set"):
            Letters("ab") + other


def test_parts_and_sums_survive_pickle_and_workers():
    letters = Letters("abcd")
    whole = letters.only(["d", "c"]) + letters.without(["d", "c"])
    again = pickle.loads(pickle.dumps(whole))
    assert again.ids == whole.ids
    assert contents(again) == contents(whole)
    assert [item for [item] in DataLoader(whole, num_workers=1)] == items("dcab")


def test_messages_show_what_a_part_is_of():
    letters = Letters("abcd")
    assert repr(letters.only(["d"]) + letters.without(["d"])) == "1 of Letters + 3 of Letters"


def test_a_subclass_of_pytorchs_stays_usable_as_one():
    part = Letters("abcd").only(["d", "b"])
    assert isinstance(part, Subset)
    assert isinstance(part + Letters("x"), ConcatDataset)
    assert isinstance(part, Dataset)
    assert part.indices == [3, 1]


def files(folder: Path, count: int = 4) -> Path:
    for index, (image, mask) in enumerate(SyntheticScenes(count, size=16)):
        for kind, pixels in (("images", image.permute(1, 2, 0)), ("masks", mask)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.numpy()).save(folder / kind / f"{index}.png")
    return folder


class TestDataSetsOfTheLibrary:
    def data_sets(self, folder):
        labeled = SegmentationFolder(folder / "images", folder / "masks")
        listed = ListedFiles(folder, [f"images/{index}.png" for index in range(4)], masks=False)
        labeler = stseg.PseudoLabeler(torch.nn.Conv2d(3, 7, 1), num_classes=7, progress=False)
        return [labeled, listed, SyntheticScenes(4, size=16), labeler.label(labeled)]

    def test_have_parts_and_sums(self, tmp_path):
        for dataset in self.data_sets(files(tmp_path)):
            part = dataset.only(dataset.ids[2:0:-1])
            whole = part + dataset.without(part.ids)
            assert whole.ids == [dataset.ids[index] for index in (2, 1, 0, 3)]
            for index, id in enumerate(whole.ids):
                one, other = whole[index], dataset[dataset.ids.index(id)]
                pairs = [(one, other)] if isinstance(one, torch.Tensor) else zip(one, other, strict=True)
                assert all(torch.equal(*pair) for pair in pairs)

    def test_are_read_ahead_in_parts_too(self, tmp_path):
        folder = SegmentationFolder(files(tmp_path) / "images")
        part = folder.only(["1", "2"])
        assert Items.of(part).concurrent
        assert Items.of(part + folder.only(["0"])).concurrent

    def test_labels_of_two_labelings_make_one_training_set(self):
        labeler = stseg.PseudoLabeler(torch.nn.Conv2d(3, 7, 1), num_classes=7, progress=False)
        scenes = SyntheticScenes(6, size=16)
        easy = labeler.label(scenes.only(scenes.ids[:2]))
        hard = labeler.label(scenes.only(scenes.ids[2:4]))
        pseudo = easy + hard
        assert pseudo.ids == scenes.ids[:4]
        mixed = MixedDataset(scenes.without(pseudo.ids), pseudo)
        assert mixed.item_names[-4:] == pseudo.ids

    def test_labels_of_items_without_ids_are_numbered(self):
        labeler = stseg.PseudoLabeler(torch.nn.Conv2d(3, 7, 1), num_classes=7, progress=False)
        images = [image for image, _ in SyntheticScenes(3, size=16)]
        both = labeler.label(images[:2]) + labeler.label(images[2:])
        assert both.ids == ["0", "1", "2"]
        assert len(contents(both)) == 3

    def test_parts_of_one_folder_are_told_apart_before_a_training(self, tmp_path):
        folder = SegmentationFolder(files(tmp_path) / "images", tmp_path / "masks")
        config = stseg.TrainConfig(steps=1, batch_size=1, weak=stseg.WeakAugment(16))
        train = folder.only(["0", "1"])
        with pytest.raises(DataError, match="the id '1' is in both"):
            stseg.fit(torch.nn.Conv2d(3, 7, 1), train, config, val=folder.only(["1", "2"]), progress=False)
        stseg.fit(torch.nn.Conv2d(3, 7, 1), train, config, val=folder.without(train.ids), progress=False)


def test_the_line_of_the_message_of_common_ids_works():
    first, second = Letters("abc"), Letters("bcd")
    with pytest.raises(DataError) as caught:
        first + second
    line = str(caught.value).partition("in one of them: ")[2].partition(", or,")[0]
    assert eval(line, {"first": first, "second": second}).ids == list("abcd")
