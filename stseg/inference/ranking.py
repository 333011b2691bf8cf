"""Ranking of images by reliability, and its split into the two parts of ST++."""

from __future__ import annotations

import codecs
import csv
import io
import math
import operator
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from stseg.errors import DataError
from stseg.inference.reading import Skipped
from stseg.storage.files import write_atomically


def reliable_count(images: int, fraction: float) -> int:
    """Return the number of reliable images: ``floor(images * fraction)``.

    Example:
        >>> reliable_count(100, 0.29)
        29
    """
    return math.floor(images * fraction + 1e-9)  # 100 * 0.29 is 28.999... in floating point


@dataclass(frozen=True)
class Ranking:
    """Ranking of images from the most to the least reliable.

    Attributes:
        indices: index of each image in the data set, best first; ties in the order of the data set.
        scores: score of each, in the same order.
        ids: name of each, in the same order.
        skipped: items that could not be read, if ``skip_unreadable`` was set.

    Example:
        >>> ranking = Ranking.from_scores([0.5, 0.9, 0.5, 0.7], ids=["a", "b", "c", "d"])
        >>> ranking.ids
        ('b', 'd', 'a', 'c')
        >>> ranking.split(0.5)
        ([1, 3], [0, 2])
    """

    indices: tuple[int, ...]
    scores: tuple[float, ...]
    ids: tuple[str, ...]
    skipped: tuple[Skipped, ...] = ()

    def __post_init__(self) -> None:
        for name in ("indices", "scores", "ids", "skipped"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not len(self.indices) == len(self.scores) == len(self.ids):
            raise ValueError(
                f"indices, scores and ids have {len(self.indices)}, {len(self.scores)} and {len(self.ids)} "
                "values; expected equal lengths"
            )

    @classmethod
    def from_scores(
        cls,
        scores: Sequence[float] | Tensor,
        ids: Sequence[str],
        *,
        indices: Sequence[int] | None = None,
        skipped: Sequence[Skipped] = (),
    ) -> Ranking:
        """Rank by score, highest first; ties keep their order.

        Args:
            scores: score of each image.
            ids: name of each image.
            indices: index of each in its data set; by default 0, 1, 2, ...
            skipped: items that were left out.

        Raises:
            ValueError: if a score is not finite, an index is negative, an id or index repeats, or the lengths differ.
        """
        values = [float(s) for s in scores]
        places = list(range(len(values))) if indices is None else [operator.index(i) for i in indices]
        if not len(values) == len(ids) == len(places):
            raise ValueError(f"{len(values)} scores, {len(ids)} ids and {len(places)} indices; expected equal lengths")
        for value, id, place in zip(values, ids, places, strict=True):
            if not math.isfinite(value):
                shown = "NaN" if math.isnan(value) else value
                raise ValueError(f"the score of {id!r} is {shown}; expected a finite number")
            if place < 0:
                raise ValueError(f"the index of {id!r} is {place}; expected 0 or more")
        for name, given in (("id", list(ids)), ("index", places)):
            if len(set(given)) < len(given):
                twice = next(each for each, count in Counter(given).items() if count > 1)
                raise ValueError(f"the {name} {twice!r} is given more than once")
        order = sorted(range(len(values)), key=lambda i: -values[i])  # stable
        return cls(
            indices=tuple(places[i] for i in order),
            scores=tuple(values[i] for i in order),
            ids=tuple(ids[i] for i in order),
            skipped=tuple(skipped),
        )

    def __len__(self) -> int:
        return len(self.indices)

    def split(self, fraction: float = 0.5) -> tuple[list[int], list[int]]:
        """Split into reliable and unreliable images.

        Args:
            fraction: share of reliable images: the first ``floor(n * fraction)`` of n (0.5 in the paper).

        Returns:
            Data-set indices of the reliable and of the unreliable images, each best first.

        Raises:
            ValueError: if ``fraction`` is not in [0, 1].
        """
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction is {fraction}; expected a share in [0, 1]")
        cut = reliable_count(len(self), fraction)
        return list(self.indices[:cut]), list(self.indices[cut:])

    def to_csv(self, path: str | Path) -> None:
        """Write ``index,id,score`` lines, best first; scores are exact."""
        content = self.as_csv()
        write_atomically(Path(path), lambda file: file.write(content))

    def as_csv(self) -> bytes:
        """Return what :meth:`to_csv` writes."""
        # By default the writer does not quote carriage returns, at which the reader ends lines.
        returns = any("\r" in id for id in self.ids)
        text = io.StringIO("index,id,score\n")
        text.seek(0, io.SEEK_END)
        writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC if returns else csv.QUOTE_MINIMAL)
        writer.writerows((int(i), id, float(s)) for i, id, s in zip(self.indices, self.ids, self.scores, strict=True))
        # Ids from file names that are not valid UTF-8 contain surrogates.
        return text.getvalue().encode(errors="surrogatepass")

    @classmethod
    def from_csv(cls, path: str | Path, *, limits: tuple[float, float] | None = (0.0, 1.0)) -> Ranking:
        """Read a file written by ``to_csv``, or by a spreadsheet with the same columns, and check it.

        Args:
            path: the file.
            limits: lowest and highest score; None accepts any finite score, such as those of a ranker of your own.

        Raises:
            DataError: if the file is malformed, a score is not finite or not within the limits, an index or an id
                repeats, or a score is higher than the one before; names the file and the line.
            OSError: if there is no such file, or it is a folder.
        """
        indices: dict[int, int] = {}  # and the ids: with the lines that they are on
        ids: dict[str, int] = {}
        scores: list[float] = []
        rows = _read_rows(path)
        number, head = next(rows, (1, []))
        if head != ["index", "id", "score"]:
            raise _line_error(path, number, f"is {_shown(','.join(head))}; expected index,id,score")
        for number, row in rows:
            fault = partial(_line_error, path, number)
            if len(row) != 3 or not re.fullmatch("[0-9]{1,18}", row[0]):
                raise fault(f"is {_shown(','.join(row))}; expected index,id,score with an index of 0 or more")
            index, id, score = int(row[0]), row[1], _number(row[2])
            if score is None or not math.isfinite(score):
                raise fault(f"gives {_shown(id)} the score {_shown(row[2])}; expected a finite number")
            if limits is not None and not limits[0] <= score <= limits[1]:
                raise fault(
                    f"gives {_shown(id)} the score {score}; expected {limits[0]:g} to {limits[1]:g} "
                    "(Ranking.from_csv(path, limits=None) accepts any finite score)"
                )
            if index in indices or id in ids:
                what, first = (f"index {index}", indices[index]) if index in indices else (f"id {_shown(id)}", ids[id])
                raise fault(f"repeats the {what} of line {first}")
            if scores and score > scores[-1]:
                raise fault(f"has the score {score} after {scores[-1]}; expected the highest first")
            indices[index], ids[id] = number, number
            scores.append(score)
        return cls(indices=tuple(indices), scores=tuple(scores), ids=tuple(ids))


def _read_rows(path: str | Path) -> Iterator[tuple[int, list[str]]]:
    """Yield number of the first line, and fields, of each row of a CSV file."""
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    while True:
        number = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise _line_error(path, number, f"cannot be read as CSV: {error}") from None
        if row is None:
            return
        yield number, row


def _read_text(path: str | Path) -> str:
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path} is a folder; expected the file of a ranking")
    content = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)  # which spreadsheets write
    try:
        text = content.decode(errors="surrogatepass")
    except UnicodeDecodeError as error:
        raise _line_error(path, _line_at(content, error.start), f"is not UTF-8: {error}") from None
    if (place := content.find(0)) >= 0:  # which the reader of Python 3.10 does not take
        raise _line_error(path, _line_at(content, place), "contains a NUL character")
    return text


def _line_at(content: bytes, place: int) -> int:
    return len(re.findall(rb"\r\n|\r|\n", content[:place])) + 1


def _line_error(path: str | Path, number: int, fault: str) -> DataError:
    return DataError(f"line {number} of {path} {fault}")


def _number(text: str) -> float | None:
    """Return the number that a text is, as ``repr`` writes it; None if it is none."""
    try:
        return float(text) if re.fullmatch(r"[-+.0-9eE]+|-?inf|nan", text) else None
    except ValueError:
        return None


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:80] + "...")
