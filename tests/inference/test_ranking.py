from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stseg import DataError, Ranking


class TestRanking:
    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]) | st.floats(0, 1), max_size=12))
    def test_is_highest_first_and_stable(self, scores):
        ranking = Ranking.from_scores(scores, [f"i{n}" for n in range(len(scores))])
        left = list(range(len(scores)))
        for index, score, id in zip(ranking.indices, ranking.scores, ranking.ids, strict=True):
            best = max(left, key=lambda i: scores[i])  # the first of them
            assert (index, score, id) == (best, scores[best], f"i{best}")
            left.remove(best)
        assert left == []
        assert len(ranking) == len(scores)

    @pytest.mark.parametrize(
        ("count", "fraction", "reliable"),
        [
            (8, 0.5, 4), (9, 0.5, 4), (1, 0.5, 0), (10399, 0.5, 5199), (9920, 0.5, 4960), (9118, 0.5, 4559),
            (7, 0, 0), (7, 1, 7), (7, 0.999, 6), (100, 0.29, 29), (10, 0.7, 7), (3, 1 / 3, 1), (0, 0.5, 0),
            (49, 1 / 49, 1),
        ],
    )  # fmt: skip
    def test_split_rounds_down(self, count, fraction, reliable):
        indices = list(reversed(range(count)))
        ranking = Ranking(indices, [0.5] * count, [str(i) for i in indices])
        first, rest = ranking.split(fraction)
        assert (first, rest) == (indices[:reliable], indices[reliable:])
        assert isinstance(first, list)
        assert isinstance(rest, list)

    def test_splits_in_halves_by_default(self):
        assert Ranking.from_scores([0.1, 0.9, 0.5], ["a", "b", "c"]).split() == ([1], [2, 0])

    @pytest.mark.parametrize("fraction", [-0.1, 1.1, math.nan])
    def test_refuses_a_fraction_that_is_none(self, fraction):
        with pytest.raises(ValueError, match="fraction is"):
            Ranking([0], [0.5], ["a"]).split(fraction)

    def test_refuses_columns_of_different_lengths_and_nan(self):
        with pytest.raises(ValueError, match="2, 1 and 2 values"):
            Ranking([0, 1], [0.5], ["a", "b"])
        with pytest.raises(ValueError, match="2 scores, 1 ids"):
            Ranking.from_scores([0.5, 0.2], ["a"])
        with pytest.raises(ValueError, match="score of 'b' is NaN"):
            Ranking.from_scores([0.5, math.nan], ["a", "b"])


class TestCsv:
    weird = (
        'a,b', '"', '""quoted""', "new\nline", "re\rturn", "both\r\nof them", " spaces ", "",
        "日本語", "é", "#", "'", "\udcff",
    )  # fmt: skip

    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.tuples(st.integers(0, 10**9), st.text(max_size=8), st.floats(0, 1)), max_size=8))
    @example([(i, id, 0.1 + i / 3) for i, id in enumerate(weird)])
    @example([(0, "a", 0.1 + 0.2), (1, "b", 5e-324), (2, "c", 1 - 2**-53)])
    def test_comes_back_exactly(self, tmp_path_factory, rows):
        rows = [row for row in rows if "\0" not in row[1]]  # Python 3.10 reads none
        path = tmp_path_factory.mktemp("csv") / "ranking.csv"
        ranking = Ranking([r[0] for r in rows], [r[2] for r in rows], [r[1] for r in rows])
        ranking.to_csv(path)
        found = Ranking.from_csv(str(path))
        assert found == ranking
        assert [s.hex() for s in found.scores] == [s.hex() for s in ranking.scores]

    def test_is_a_plain_table(self, tmp_path):
        Ranking.from_scores([0.25, 0.5], ["a/b", "c d"]).to_csv(tmp_path / "deep" / "ranking.csv")
        assert (tmp_path / "deep" / "ranking.csv").read_bytes() == b"index,id,score\n1,c d,0.5\n0,a/b,0.25\n"

    def test_of_numpy_values_is_that_of_numbers(self, tmp_path):
        Ranking(np.array([1, 0]), np.array([0.5, 0.1]), ["a", "b"]).to_csv(tmp_path / "ranking.csv")
        assert Ranking.from_csv(tmp_path / "ranking.csv") == Ranking([1, 0], [0.5, 0.1], ["a", "b"])

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"id,score\na,0.5\n",
            b"index,id,score\n0,a\n",
            b"index,id,score\n0,a,0.5,more\n",
            b"index,id,score\nzero,a,0.5\n",
            b"index,id,score\n0,a,high\n",
            b"index,id,score\n0,a,nan\n",
            b"index,id,score\n0,a,0.5\n1,b,",
            b'index,id,score\n0,"a,0.5\n',
            b"index,id,score\n0,\xff\xfe,0.5\n",
            b"\x89PNG\r\n\x1a\n\0\0\0",
        ],
    )
    def test_of_something_else_is_an_error_that_names_the_file(self, tmp_path, content):
        path = tmp_path / "ranking.csv"
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"ranking\.csv"):
            Ranking.from_csv(path)

    def test_that_is_missing_is_no_empty_ranking(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            Ranking.from_csv(tmp_path / "ranking.csv")
