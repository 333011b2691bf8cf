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
