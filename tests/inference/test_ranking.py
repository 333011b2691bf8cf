from __future__ import annotations

import math
import re

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

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"scores": [0.5, math.inf]}, "score of 'b' is inf; expected a finite number"),
            ({"ids": ["a", "a"]}, "the id 'a' is given more than once"),
            ({"indices": [3, 3]}, "the index 3 is given more than once"),
            ({"indices": np.array([3, 3])}, "the index 3 is given more than once"),
            ({"indices": [3, -1]}, "the index of 'b' is -1; expected 0 or more"),
        ],
    )
    def test_refuses_infinite_scores_and_indices_and_ids_that_are_none(self, options, message):
        with pytest.raises(ValueError, match=message):
            Ranking.from_scores(**{"scores": [0.5, 0.2], "ids": ["a", "b"], **options})

    def test_finds_a_repetition_among_many_at_once(self):
        ids = [*map(str, range(200_000)), "199999"]
        with pytest.raises(ValueError, match="the id '199999' is given more than once"):
            Ranking.from_scores([0.5] * len(ids), ids)


class TestCsv:
    weird = (
        'a,b', '"', '""quoted""', "new\nline", "re\rturn", "both\r\nof them", " spaces ", "",
        "日本語", "é", "#", "'", "\udcff",
    )  # fmt: skip

    @settings(max_examples=40, deadline=None)
    @given(
        st.lists(
            st.tuples(st.integers(0, 10**9), st.text(max_size=8), st.floats(0, 1)),
            max_size=8,
            unique_by=(lambda row: row[0], lambda row: row[1].replace("\0", "")),
        )
    )
    @example([(i, id, i / 20) for i, id in enumerate(weird)])
    @example([(0, "a", 0.1 + 0.2), (1, "b", 5e-324), (2, "c", 1 - 2**-53)])
    def test_comes_back_exactly(self, tmp_path_factory, rows):
        rows = [row for row in rows if "\0" not in row[1]]  # Python 3.10 reads none
        path = tmp_path_factory.mktemp("csv") / "ranking.csv"
        ranking = Ranking.from_scores([r[2] for r in rows], [r[1] for r in rows], indices=[r[0] for r in rows])
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

    @pytest.mark.parametrize(
        ("lines", "message"),
        [
            ("0,a,inf", "line 2 of .* gives 'a' the score 'inf'; expected a finite number"),
            ("0,a,0.5\n1,b,-inf", "line 3 of .* gives 'b' the score '-inf'; expected a finite"),
            ("0,a,1e400", "gives 'a' the score '1e400'; expected a finite"),
            ("0,a,7", r"gives 'a' the score 7.0; expected 0 to 1 \(Ranking.from_csv\(path, limits=None\) accepts"),
            ("0,a,-1", r"gives 'a' the score -1.0; expected 0 to 1"),
            ("-1,a,0.5", "line 2 of .* is '-1,a,0.5'; expected index,id,score with an index of 0 or more"),
            ("1,a,0.5\n1,b,0.4", "line 3 of .* repeats the index 1 of line 2"),
            ("1,a,0.5\n2,a,0.4", "line 3 of .* repeats the id 'a' of line 2"),
            ("1,a,0.4\n2,b,0.5", "line 3 of .* has the score 0.5 after 0.4; expected the highest first"),
            ("1_0,a,0.4", "is '1_0,a,0.4'; expected"),
            (" 1,a,0.4", "is ' 1,a,0.4'; expected"),
            ("+1,a,0.4", "expected index,id,score"),
            ("１,a,0.4", "expected index,id,score"),
            ("0x1,a,0.4", "expected index,id,score"),
            ("9" * 5000 + ",a,0.4", "expected index,id,score"),
            ("1,a,0_1.0", "gives 'a' the score '0_1.0'; expected a finite number"),
            ("1,a, 0.5", "gives 'a' the score ' 0.5'; expected a finite number"),
            ("1,a,0x1p-1", "expected a finite number"),
            ("1,a,1-1", "expected a finite number"),
            ("1,a,0.5\n\n2,b,0.4", "line 3 of .* is ''; expected index,id,score"),
            ('1,"a\nb",0.5\n2,"c\nd",0.9\n', "line 4 of .* has the score 0.9 after 0.5"),
            ('1,"a\nb",0.5\n2,"a\nb",0.4\n', "line 4 of .* repeats the id 'a.nb' of line 2"),
            ("1,a,0.5\n2,b\0,0.4", "line 3 of .* contains a NUL character"),
            ("1,a,0.5\n2,b,0.4\0", "line 3 of .* contains a NUL character"),
            ('1,a,0.5\n2,"b,0.4\n3,c,0.3', "line 3 of .* cannot be read as CSV: unexpected end of data"),
            ('1,a,0.5\n2,"b"c,0.4', "line 3 of .* cannot be read as CSV: ',' expected"),
            ("1,a,0.5\n2," + "b" * 200_000, "line 3 of .* cannot be read as CSV: field larger than"),
            ("1,a," + "z" * 5000, "line 2 of .* gives 'a' the score 'z+...'; expected"),
            ("1," + "a" * 5000, "line 2 of .* is '1,a+...'; expected"),
        ],
    )
    def test_of_values_that_make_no_ranking_is_refused_with_the_line(self, tmp_path, lines, message):
        path = tmp_path / "ranking.csv"
        path.write_text(f"index,id,score\n{lines}\n", encoding="utf-8")
        with pytest.raises(DataError, match=message) as caught:
            Ranking.from_csv(path)
        assert len(str(caught.value)) < 400 + len(str(path))

    @pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
    def test_that_is_not_utf_8_is_refused_with_the_line(self, tmp_path, end):
        path = tmp_path / "ranking.csv"
        text = f"index,id,score{end}0,a,0.5{end}1,é,0.4{end}2,b,0.1{end}"
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(DataError, match=r"line 3 of .*ranking\.csv is not UTF-8: .* 0xe9"):
            Ranking.from_csv(path)
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert Ranking.from_csv(path).ids == ("a", "é", "b")
        path.write_bytes(text.encode("utf-16"))
        with pytest.raises(DataError, match=r"line 1 of .*ranking\.csv is not UTF-8"):
            Ranking.from_csv(path)

    @pytest.mark.parametrize("head", ["index;id;score", "id,score", "", " index,id,score", "index,id,score,more"])
    def test_of_another_head_says_which(self, tmp_path, head):
        path = tmp_path / "ranking.csv"
        path.write_text(f"{head}\n0,a,0.5\n")
        with pytest.raises(DataError, match=f"line 1 of .*csv is '{head}'; expected index,id,score"):
            Ranking.from_csv(path)

    @given(st.binary(max_size=40) | st.text('0123456789,.-+eEnaif"\r\n\0 _１x').map(str.encode))
    @settings(max_examples=200, deadline=None)
    def test_of_anything_is_read_exactly_or_refused(self, tmp_path_factory, content):
        path = tmp_path_factory.mktemp("csv") / "ranking.csv"
        path.write_bytes(b"index,id,score\n" + content)
        try:
            ranking = Ranking.from_csv(path, limits=None)
        except DataError:
            with pytest.raises(DataError, match=rf"^line \d+ of {re.escape(str(path))} "):
                Ranking.from_csv(path, limits=None)
            return
        assert Ranking.from_scores(ranking.scores, ranking.ids, indices=ranking.indices) == ranking
        ranking.to_csv(path)
        assert Ranking.from_csv(path, limits=None) == ranking

    def test_that_is_a_folder_is_said_to_be_one(self, tmp_path):
        with pytest.raises(IsADirectoryError, match=f"{tmp_path.name} is a folder; expected the file of a ranking"):
            Ranking.from_csv(tmp_path)

    def test_of_any_finite_scores_is_read_without_limits(self, tmp_path):
        ranking = Ranking.from_scores([7.0, -1.0, 1e300], ["a", "b", "c"])
        ranking.to_csv(tmp_path / "ranking.csv")
        assert Ranking.from_csv(tmp_path / "ranking.csv", limits=None) == ranking
        assert Ranking.from_csv(tmp_path / "ranking.csv", limits=(-1, 1e300)) == ranking

    def test_of_a_spreadsheet_is_read(self, tmp_path):
        path = tmp_path / "ranking.csv"
        path.write_bytes(b"\xef\xbb\xbfindex,id,score\r\n1,b,0.5\r\n0,a,0.5\r\n")
        assert Ranking.from_csv(path) == Ranking([1, 0], [0.5, 0.5], ["b", "a"])

    def test_that_is_missing_is_no_empty_ranking(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            Ranking.from_csv(tmp_path / "ranking.csv")
