from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stseg.data.splits import read_ids, split_ids
from stseg.errors import DataError


class TestReadIds:
    def read(self, tmp_path, content: bytes):
        path = tmp_path / "ids.txt"
        path.write_bytes(content)
        return read_ids(path)

    def test_one_a_line_in_order(self, tmp_path):
        assert self.read(tmp_path, b"b\na/1\nc") == ["b", "a/1", "c"]

    def test_white_space_around_and_empty_lines_do_not_count(self, tmp_path):
        assert self.read(tmp_path, b"\n  a \t\n\n \nb c\n\n") == ["a", "b c"]

    @pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
    def test_line_ends_of_every_system(self, tmp_path, end):
        assert self.read(tmp_path, b"a" + end + b"b" + end) == ["a", "b"]

    def test_byte_order_mark_is_no_part_of_the_first_id(self, tmp_path):
        assert self.read(tmp_path, b"\xef\xbb\xbfa\nb\n") == ["a", "b"]

    def test_accents_survive(self, tmp_path):
        assert self.read(tmp_path, "é/日本\n".encode()) == ["é/日本"]

    def test_an_id_that_occurs_twice_is_named_with_both_lines(self, tmp_path):
        with pytest.raises(DataError, match=r"ids\.txt, line 5: the id 'b' is in line 2 already"):
            self.read(tmp_path, b"a\nb\n\nc\n b \n")

    @pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
    def test_a_file_without_ids_is_refused(self, tmp_path, content):
        with pytest.raises(DataError, match=r"ids\.txt holds no id"):
            self.read(tmp_path, content)

    def test_a_file_that_is_not_utf8_is_refused(self, tmp_path):
        with pytest.raises(DataError, match=r"ids\.txt is not a text file in UTF-8"):
            self.read(tmp_path, "a\n".encode("utf-16"))

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"none\.txt"):
            read_ids(tmp_path / "none.txt")


IDS = st.lists(st.text(alphabet="abc01/", min_size=1, max_size=4), unique=True, min_size=2, max_size=30)


def split_by_hand(ids, count, seed):
    """The same draw without shortcuts, to pin down what a seed means."""
    generator = torch.Generator()
    generator.manual_seed(seed)
    order = torch.randperm(len(ids), generator=generator)
    chosen = [sorted(ids)[int(order[place])] for place in range(count)]
    return [id for id in ids if id in chosen], [id for id in ids if id not in chosen]


class TestSplitIds:
    @given(IDS, st.data())
    @settings(derandomize=True, deadline=None)
    def test_counts_are_taken_at_their_word(self, ids, data):
        count = data.draw(st.integers(1, len(ids) - 1))
        labeled, unlabeled = split_ids(ids, count, seed=3)
        assert (labeled, unlabeled) == split_by_hand(ids, count, 3)
        assert len(labeled) == count
        assert sorted(labeled + unlabeled) == sorted(ids)

    @given(IDS, st.randoms(use_true_random=False), st.integers(0, 5))
    @settings(derandomize=True, deadline=None)
    def test_the_order_of_the_ids_does_not_change_the_draw(self, ids, random, seed):
        shuffled = ids[:]
        random.shuffle(shuffled)
        labeled, unlabeled = split_ids(ids, 1, seed)
        again, rest = split_ids(shuffled, 1, seed)
        assert set(labeled) == set(again)
        assert rest == [id for id in shuffled if id in unlabeled]

    def test_both_lists_keep_the_order_of_the_ids(self):
        ids = [f"{i:02d}" for i in reversed(range(40))]
        for part in split_ids(ids, 0.3):
            assert part == sorted(part, reverse=True)

    @given(st.integers(2, 3000), st.integers(2, 64))
    @settings(derandomize=True, deadline=None, max_examples=50)
    def test_shares_are_rounded_up_exactly(self, total, parts):
        expected = math.ceil(Fraction(total, parts))
        labeled, _ = split_ids([str(i) for i in range(total)], 1 / parts)
        assert len(labeled) == expected

    @pytest.mark.parametrize(("total", "share", "count"), [(30, 0.1, 3), (100, 0.07, 7), (10, 0.3, 3)])
    def test_rounding_of_floats_adds_no_image(self, total, share, count):
        assert len(split_ids([str(i) for i in range(total)], share)[0]) == count

    @pytest.mark.parametrize(("share", "count"), [(1 / 16, 662), (1 / 8, 1323), (1 / 4, 2646)])
    def test_shares_of_pascal_voc(self, share, count):
        assert len(split_ids([str(i) for i in range(10582)], share)[0]) == count

    def test_a_share_too_small_for_one_image_gives_one(self):
        assert len(split_ids(["a", "b", "c"], 1e-12)[0]) == 1

    def test_an_eighth_is_the_default(self):
        ids = [str(i) for i in range(80)]
        assert split_ids(ids) == split_ids(ids, 10, seed=0)

    def test_seeds_draw_differently(self):
        ids = [str(i) for i in range(200)]
        draws = {tuple(split_ids(ids, 10, seed)[0]) for seed in range(20)}
        assert len(draws) == 20

    def test_every_id_is_drawn_equally_often(self):
        ids = list("abcdefgh")
        counts = dict.fromkeys(ids, 0)
        for seed in range(800):
            for id in split_ids(ids, 2, seed)[0]:
                counts[id] += 1
        assert all(150 < count < 250 for count in counts.values())  # 200 expected, 4 deviations of 12

    def test_smaller_labeled_sets_lie_within_larger_ones(self):
        ids = [str(i) for i in range(64)]
        sixteenth, eighth, quarter = (set(split_ids(ids, 1 / n, seed=5)[0]) for n in (16, 8, 4))
        assert sixteenth < eighth < quarter

    def test_the_global_generator_is_left_alone(self):
        before = torch.get_rng_state()
        split_ids(["a", "b", "c"], 1)
        assert torch.equal(before, torch.get_rng_state())

    @pytest.mark.parametrize("labeled", [0.0, 1.0, 1.5, -0.1, float("nan")])
    def test_shares_outside_0_to_1_are_refused(self, labeled):
        with pytest.raises(ValueError, match=r"labeled is .*; expected a share in \(0, 1\)"):
            split_ids(["a", "b"], labeled)

    @pytest.mark.parametrize("labeled", [0, -1, 3, 4, 0.9])
    def test_splits_with_an_empty_side_are_refused(self, labeled):
        with pytest.raises(ValueError, match="of 3 ids; expected one or more on either side"):
            split_ids(["a", "b", "c"], labeled)

    def test_too_few_ids_are_refused(self):
        with pytest.raises(ValueError, match="of 1 ids; expected one or more on either side"):
            split_ids(["a"], 0.5)
        with pytest.raises(DataError, match="there are no ids to split"):
            split_ids([], 0.5)

    def test_ids_that_occur_twice_are_refused(self):
        with pytest.raises(DataError, match="the id 'b' occurs more than once"):
            split_ids(["a", "b", "c", "b"], 1)

    @pytest.mark.parametrize("labeled", [True, "1/8", None])
    def test_other_types_are_refused(self, labeled):
        with pytest.raises(TypeError, match="labeled is"):
            split_ids(["a", "b"], labeled)

    def test_a_path_is_no_sequence_of_ids(self):
        with pytest.raises(TypeError, match=r"ids is the string 'train\.txt'"):
            split_ids("train.txt", 1)


@st.composite
def grouped(draw):
    """Ids with a group each, of two groups or more, and a number of images to draw."""
    sizes = draw(st.lists(st.integers(1, 6), min_size=2, max_size=8))
    groups = {f"{group}/{index}": group for group, size in enumerate(sizes) for index in range(size)}
    ids = draw(st.permutations(sorted(groups)))
    return ids, groups, draw(st.integers(1, len(ids) - 1)), draw(st.integers(0, 5))


def members(ids, groups):
    return {group: {id for id in ids if groups[id] == group} for group in {groups[id] for id in ids}}


def draw_groups_by_hand(ids, groups, count, seed):
    """The rule of the documentation, word for word."""
    asked = min(count, len(ids) - count)
    by_first_id = sorted(members(ids, groups).values(), key=min)
    order = torch.randperm(len(by_first_id), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [by_first_id[place] for place in order]
    side = []
    for group in shuffled:
        if abs(len(side) + len(group) - asked) < abs(len(side) - asked):
            side += group
    if not side:
        side = next(group for group in shuffled if len(group) == min(map(len, shuffled)))
    return set(side) if count <= len(ids) - count else set(ids) - set(side)


class TestSplitOfGroups:
    @given(grouped())
    @settings(derandomize=True, deadline=None)
    def test_no_group_is_split_and_no_side_is_empty(self, given):
        ids, groups, count, seed = given
        labeled, unlabeled = split_ids(ids, count, seed, groups=groups)
        assert labeled
        assert unlabeled
        assert not {groups[id] for id in labeled} & {groups[id] for id in unlabeled}
        assert sorted(labeled + unlabeled) == sorted(ids)

    @given(grouped())
    @settings(derandomize=True, deadline=None)
    def test_the_draw_is_that_of_the_documentation(self, given):
        ids, groups, count, seed = given
        labeled, unlabeled = split_ids(ids, count, seed, groups=groups)
        assert set(labeled) == draw_groups_by_hand(ids, groups, count, seed)
        assert labeled == [id for id in ids if id in labeled]
        assert unlabeled == [id for id in ids if id in unlabeled]

    @given(grouped())
    @settings(derandomize=True, deadline=None)
    def test_no_further_group_would_come_nearer(self, given):
        ids, groups, count, seed = given
        labeled, unlabeled = split_ids(ids, count, seed, groups=groups)
        asked = min(count, len(ids) - count)
        side, rest = (labeled, unlabeled) if count <= len(ids) - count else (unlabeled, labeled)
        for group in members(rest, groups).values():
            assert abs(len(side) + len(group) - asked) >= abs(len(side) - asked)

    @given(grouped())
    @settings(derandomize=True, deadline=None)
    def test_the_number_is_off_by_less_than_the_largest_group(self, given):
        ids, groups, count, seed = given
        labeled, _ = split_ids(ids, count, seed, groups=groups)
        assert abs(len(labeled) - count) < max(map(len, members(ids, groups).values()))

    @given(grouped())
    @settings(derandomize=True, deadline=None)
    def test_a_function_names_and_order_do_not_change_the_draw(self, given):
        ids, groups, count, seed = given
        expected = {*split_ids(ids, count, seed, groups=groups)[0]}
        assert {*split_ids(sorted(ids), count, seed, groups=groups.get)[0]} == expected
        renamed = {id: f"patient {99 - group}" for id, group in groups.items()}
        assert {*split_ids(ids, count, seed, groups=renamed.__getitem__)[0]} == expected

    @pytest.mark.parametrize("count", [1, 7, 20])
    def test_groups_of_one_image_are_single_images(self, count):
        ids = [str(i) for i in range(40)]
        assert split_ids(ids, count, 3, groups=lambda id: id) == split_ids(ids, count, 3)

    def test_seeds_draw_differently_even_if_one_draw_fits_best(self):
        groups = {f"{group}-{index}": group for group in range(8) for index in range(20 + group)}
        draws = {tuple(split_ids(list(groups), 20, seed, groups=groups)[0]) for seed in range(40)}
        assert len(draws) == 8

    def test_equal_groups_are_drawn_equally_often(self):
        groups = {f"{group}-{index}": group for group in range(4) for index in range(3)}
        counts = dict.fromkeys(range(4), 0)
        for seed in range(400):
            counts[groups[split_ids(list(groups), 3, seed, groups=groups)[0][0]]] += 1
        assert all(65 < count < 135 for count in counts.values())  # 100 expected, 4 deviations of 8.7

    def test_training_validation_and_test_sets_share_no_group(self):
        groups = {f"{group}-{index}": group for group in range(20) for index in range(5)}
        test, others = split_ids(list(groups), 0.2, groups=groups)
        val, train = split_ids(others, 0.25, groups=groups)
        assert [len(part) for part in (test, val, train)] == [20, 20, 60]
        assert sum(len({groups[id] for id in part}) for part in (test, val, train)) == 20

    def test_ids_without_a_group_are_counted_and_one_is_named(self):
        with pytest.raises(DataError, match=r"groups lacks the id 'a/2' \(2 of 3\).*'A/2' is there, which differs"):
            split_ids(["a/1", "a/2", "a/3"], 1, groups={"a/1": 0, "A/2": 0})

    @pytest.mark.parametrize("group", [None, float("nan")])
    def test_an_empty_cell_is_no_group(self, group):
        with pytest.raises(DataError, match=r"the group of 'b' is (None|nan); expected a name or a number"):
            split_ids(["a", "b"], 1, groups={"a": 1, "b": group})

    def test_a_single_group_is_refused(self):
        with pytest.raises(DataError, match="all 3 ids are of the group 'ann'; expected two groups or more"):
            split_ids(["a", "b", "c"], 1, groups=lambda id: "ann")

    @pytest.mark.parametrize("group", [["ann", 1], torch.tensor(1)])
    def test_a_group_that_cannot_be_compared_is_named(self, group):
        with pytest.raises(TypeError, match=r"the group of 'a' is .*; expected a name or a number"):
            split_ids(["a", "b"], 1, groups=lambda id: group)

    @pytest.mark.parametrize("groups", [[0, 1], "ab", 3])
    def test_other_types_of_groups_say_how_to_make_a_mapping(self, groups):
        with pytest.raises(
            TypeError, match=r"groups is a \w+; expected a mapping or a function .*dict\(zip\(ids, groups"
        ):
            split_ids(["a", "b"], 1, groups=groups)

    def test_an_error_of_the_function_is_not_hidden(self):
        with pytest.raises(ZeroDivisionError):
            split_ids(["a", "b"], 1, groups=lambda id: 1 / 0)
