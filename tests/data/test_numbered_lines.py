from __future__ import annotations

import pytest

from stseg.data._reading import numbered_lines
from stseg.errors import DataError


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_lines_have_the_numbers_that_editors_show(tmp_path, mark, end):
    (tmp_path / "list.txt").write_bytes(mark + end.join([b"a", b"", b" \t", b" b\tc ", b"", "é".encode()]))
    assert list(numbered_lines(tmp_path / "list.txt")) == [(1, "a"), (4, " b\tc "), (6, "é")]


def test_other_separators_of_unicode_end_no_line(tmp_path):
    (tmp_path / "list.txt").write_text("a\u2028b\x0cc\x85d", encoding="utf-8")
    assert list(numbered_lines(tmp_path / "list.txt")) == [(1, "a\u2028b\x0cc\x85d")]


def test_other_encodings_are_refused(tmp_path):
    (tmp_path / "list.txt").write_bytes("aé".encode("latin-1"))
    with pytest.raises(DataError, match=r"list\.txt is not a text file in UTF-8"):
        list(numbered_lines(tmp_path / "list.txt"))
