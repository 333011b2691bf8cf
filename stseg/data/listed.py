"""Data sets of image and mask files given in a list."""

from __future__ import annotations

import ntpath
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np

from stseg.data._files import image_suffixes
from stseg.data._reading import MASK_SUFFIXES, ItemReader, Mode, check_folder, listed_suffixes, numbered_lines
from stseg.data.named import NamedDataset
from stseg.errors import DataError


class FilePair(NamedTuple):
    """Paths of an image and, optionally, its mask.

    Attributes:
        image: path of the image, relative to a root.
        mask: path of its mask, or None.
        line: position in the list, such as ``"labeled.txt, line 3"``; prefix of error messages.

    Example:
        >>> FilePair("images/1.jpg", "masks/1.png")
        FilePair(image='images/1.jpg', mask='masks/1.png', line='')
    """

    image: str
    mask: str | None = None
    line: str = ""


def read_pairs(path: str | Path) -> list[FilePair]:
    r"""Read a list of files: on each line an image, or an image and its mask.

    The columns of a line are separated by tabs if it has any, else by white space; names with spaces therefore need a
    tab after them. Empty lines are ignored. Whether the files exist is not checked here. A table with commas is read by
    Python's ``csv.reader``, whose rows :class:`ListedFiles` takes.

    Args:
        path: a text file in UTF-8.

    Raises:
        DataError: if the file is empty, a line has more than two columns or not as many as the first one, the
            columns are separated by commas or semicolons, an image occurs twice, or the file is not UTF-8; names the
            line.
        OSError: if there is no such file.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "labeled.txt"
        >>> _ = path.write_text("images/1.jpg masks/1.png\nimages/2.jpg masks/2.png\n")
        >>> [(pair.image, pair.mask) for pair in read_pairs(path)]
        [('images/1.jpg', 'masks/1.png'), ('images/2.jpg', 'masks/2.png')]
    """
    pairs: list[FilePair] = []
    lines: dict[str, int] = {}
    columns = 0
    _refuse_utf_16(path)
    for number, line in numbered_lines(path):
        _refuse_commas(path, number, line)
        names = [name.strip() for name in line.split("\t") if name.strip()] if "\t" in line else line.split()
        if len(names) > 2:
            raise DataError(
                f"{path}, line {number} has {len(names)} columns; expected an image, or an image and its mask "
                "(names that hold spaces need a tab after them)"
            )
        columns = columns or len(names)
        if len(names) != columns:
            raise DataError(
                f"{path}, line {number}: the columns are {len(names)}, in the lines before it {columns}; "
                "expected an image on each, or an image and its mask on each"
                f"{_header_line(pairs)}"
            )
        if names[0] in lines:
            raise DataError(f"{path}, line {number}: the image {names[0]!r} is in line {lines[names[0]]} already")
        lines[names[0]] = number
        pairs.append(FilePair(names[0], names[1] if columns == 2 else None, f"{path}, line {number}"))
    if not pairs:
        raise DataError(f"{path} names no file; expected an image, or an image and its mask, on each line")
    return pairs


def _refuse_utf_16(path: str | Path) -> None:
    start = Path(path).read_bytes()[:64]
    if start[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in start:
        raise DataError(
            f"{path} is not a text file in UTF-8, but probably in UTF-16; save as UTF-8, in an editor or with "
            f"Path({str(path)!r}).write_text(Path({str(path)!r}).read_text('utf-16'), 'utf-8')"
        )


def _refuse_commas(path: str | Path, number: int, line: str) -> None:
    for mark in ",;":
        names = [name.strip() for name in line.split(mark)]
        if "\t" not in line and len(names) > 1 and all(map(_is_image, names[:2])):
            kind, option = ("commas", "") if mark == "," else ("semicolons", f", delimiter={mark!r}")
            raise DataError(
                f"{path}, line {number} has {kind} between the columns; expected white space or tabs. "
                f"The rows of csv.reader work instead: ListedFiles(root, list(csv.reader(open({str(path)!r}){option})))"
            )


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in image_suffixes()


def _header_line(pairs: list[FilePair]) -> str:
    header = len(pairs) == 1 and not any(_is_image(name) for name in pairs[0][:2] if name)
    return f"; {pairs[0].line} may be a header: remove it from the file" if header else ""


class ListedFiles(NamedDataset[Any]):
    """Data set of the images, with or without masks, given in a list.

    For data whose masks are not where :class:`SegmentationFolder` expects them, such as next to their images or under
    other names. The id is the path of the image without its suffix: ``train/a/0001_rgb`` for ``train/a/0001_rgb.jpg``.

    Args:
        root: folder that the paths are relative to.
        pairs: the files, such as :func:`read_pairs` returns, or ``(image, mask)`` paths, as tuples or as lists (such as
            the rows of a table), or paths of images. Paths are relative to the root, or absolute and below it. Images
            may have any file format that PIL reads and any mode of :class:`SegmentationFolder`; masks PNG, BMP or TIFF.
        masks: whether items have masks. If False, masks in the list are not read and need not exist.
        mode: ``"RGB"``, ``"RGBA"`` or ``"L"`` (gray), into which images are converted, or None for the
            channels that each file has.
        class_map: the class of each value of the masks, such as ``{0: 0, 255: 1}``, or of each color, such as
            ``{(0, 0, 0): 0, (128, 0, 0): 1}``; by default the values are the classes.
        unmapped: class of the values that ``class_map`` lacks: by default the ignore index, 255; None raises an
            error for them.
        value_range: the values of black and white in images of more than 8 bits, such as ``(0, 4095)`` for 12 bits in
            16-bit files; None where the files state them or use their highest bit.
        apply_exif: whether images are turned by their EXIF orientation; None turns them, and warns where the mask may
            lie on the pixels as stored.

    Attributes:
        ids: name of each item.

    Shape:
        Items are the image, uint8 ``(C, H, W)``, or float32 in [0, 1] from files of more than 8 bits; with masks, the
        image and the mask, ``(H, W)`` uint8 or int32. Masks hold the values that TIFFs store, whatever their
        photometric interpretation; 0 and 255 for black and white PNG and BMP; the indices of palettes.

    Raises:
        DataError: if the root or a file is missing, a path is not below the root or has backslashes, a mask is not
            given or has a lossy format, two images have the same id, or there is no pair; names the line. When an item
            is read, if its mask is a color image, has an unmapped value, or differs from the image in size.
        TypeError: if ``pairs`` is a path or a data frame, or a pair is none.
        UnreadableImageError: when an item is read, if its file is broken; names the file.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> root = Path(tempfile.mkdtemp())
        >>> for name in ("0001_rgb.png", "0001_mask.png"):
        ...     Image.new("L", (6, 4), color=7).save(root / name)
        >>> dataset = ListedFiles(root, [("0001_rgb.png", "0001_mask.png")], class_map={7: 0, 8: 1})
        >>> image, mask = dataset[0]
        >>> dataset.ids, image.shape, mask.unique()
        (['0001_rgb'], torch.Size([3, 4, 6]), tensor([0], dtype=torch.uint8))
    """

    concurrent = True

    def __init__(
        self,
        root: str | Path,
        pairs: Sequence[FilePair | Sequence[str | Path] | str | Path],
        *,
        masks: bool = True,
        mode: Mode | None = "RGB",
        class_map: Mapping[Any, int] | None = None,
        unmapped: int | None = 255,
        value_range: tuple[float, float] | None = None,
        apply_exif: bool | None = None,
    ) -> None:
        _refuse_other_lists(pairs)
        self._read = ItemReader(mode, class_map, unmapped, value_range, apply_exif)
        self.root = Path(root)
        check_folder(self.root)
        self.ids: list[str] = []
        # Keep only names, and for images only the suffix beside the id: there may be a million files.
        self._suffixes: list[str] = []
        self._masks: list[str] | None = [] if masks else None
        roots = _roots(self.root)
        lines: dict[str, str] = {}
        for index, pair in enumerate(pairs):
            files = _file_pair(pair, index)
            line = files.line or f"pair {index}"
            image = _relative(files.image, line, roots, pair)
            id, suffix = os.path.splitext(image)
            if not os.path.isfile(os.path.join(root, image)):
                raise DataError(f"{line}: there is no image {self.root / image}{_why_none(self.root, files, index)}")
            if id in lines:
                raise DataError(f"{line}: the id {id!r} is that of {lines[id]} already; ids must be unique")
            lines[id] = line
            self.ids.append(id)
            self._suffixes.append(sys.intern(suffix))
            if self._masks is not None:
                self._masks.append(_mask(self.root, files, image, line, roots, pair))
        if not self.ids:
            raise DataError(f"pairs is empty; expected one or more, of files in {self.root}")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Any:
        mask = None if self._masks is None else self.root / self._masks[index]
        return self._read(self.root / (self.ids[index] + self._suffixes[index]), mask, name=self.ids[index])

    def __repr__(self) -> str:
        return f"ListedFiles({str(self.root)!r}: {len(self)} {'images' if self._masks is None else 'pairs'})"


def _refuse_other_lists(pairs: Any) -> None:
    if isinstance(pairs, (str, os.PathLike)):
        raise TypeError(f"pairs is {pairs!r}; expected a sequence (stseg.data.read_pairs reads a file of them)")
    if hasattr(pairs, "itertuples"):
        raise TypeError(
            f"pairs is a {type(pairs).__name__}; expected its rows of two columns: "
            "pairs[['image', 'mask']].values.tolist(), with the names of yours"
        )


def _file_pair(pair: Any, index: int) -> FilePair:
    if isinstance(pair, FilePair):
        return pair
    if isinstance(pair, (str, PurePath)):
        return FilePair(str(pair) if isinstance(pair, str) else pair.as_posix())
    row = pair.tolist() if isinstance(pair, np.ndarray) else pair
    columns = len(row) if isinstance(row, (tuple, list)) else 0
    if 1 <= columns <= 2:
        return FilePair(*row)
    more = ": [row[:2] for row in pairs] takes two columns" if columns else ""
    raise TypeError(f"pair {index} is {pair!r}; expected (image, mask) paths, or the path of an image{more}")


def _mask(root: Path, files: FilePair, image: str, line: str, roots: tuple[str, ...], pair: Any) -> str:
    if not files.mask:
        raise DataError(
            f"{line} names no mask for {str(files.image)!r}; expected one (masks=False makes a data set of images)"
        )
    mask = _relative(files.mask, line, roots, pair)
    if not os.path.isfile(os.path.join(root, mask)):
        raise DataError(f"{line}: there is no mask {root / mask}")
    if os.path.splitext(mask)[1].lower() not in MASK_SUFFIXES:
        raise DataError(
            f"{line}: the mask {mask!r} has a format that may not preserve class indices; "
            f"expected one of the suffixes {listed_suffixes(MASK_SUFFIXES)}"
        )
    if mask == image:
        raise DataError(f"{line}: image and mask are the same file {mask!r}")
    return mask


def _roots(root: Path) -> tuple[str, ...]:
    """Return the absolute paths of a root, with its links and without."""
    paths = (root, Path(os.path.abspath(root)), root.resolve())
    return tuple(dict.fromkeys(path.as_posix().rstrip("/") + "/" for path in paths if path.is_absolute()))


def _relative(path: str | PurePath, line: str, roots: tuple[str, ...], pair: Any) -> str:
    """Return a normalized path relative to the root, checked to stay below it."""
    path = path.as_posix() if isinstance(path, PurePath) else path
    if not isinstance(path, str):
        raise TypeError(f"{line}: the path is {path!r}; expected a string")
    parts = path.split("/")
    names = [part for part in parts if part not in ("", ".")]
    if not names or not parts[0] or ".." in parts or "\\" in path or ntpath.splitdrive(path)[0]:
        for root in roots:
            if path.startswith(root):
                return _relative(path[len(root) :], line, roots, pair)
        raise DataError(
            f"{line}: the path {str(path)!r} is not one below the root; "
            f"expected a relative one, with '/' between folders and without '..'{_mended(path, roots, pair)}"
        )
    return "/".join(names)


def _mended(path: str, roots: tuple[str, ...], pair: Any) -> str:
    """Return the code that mends the paths of a list, if it mends this one, for a message."""
    mends = {r".replace('\\', '/')": "\\" in path, ".lstrip('/')": path.startswith(("/", "\\"))}
    mend = "".join(code for code, needed in mends.items() if needed)
    mended = path.replace("\\", "/").lstrip("/")
    if not mend or ".." in mended.split("/") or not os.path.isfile(roots[-1] + mended):
        return ""
    if isinstance(pair, (str, PurePath)):
        return f": pairs = [path{mend} for path in pairs]"
    if len(pair) == 1 or pair[1] is None:
        return f": pairs = [pair[0]{mend} for pair in pairs]"
    return f": pairs = [[path{mend} for path in pair[:2]] for pair in pairs]"


def _why_none(root: Path, files: FilePair, index: int) -> str:
    """Say what may have been meant by an image that is not there."""
    image, whole = str(files.image), f"{files.image} {files.mask}"
    if (root / whole).is_file():
        return f" (a tab after {whole!r} would keep it in one piece)"
    if os.path.isfile(image):
        return f" ({image} is there: paths are relative to the root, {root})"
    if index == 0 and not ({"/", "."} & {*image} or (root / image).exists()):
        path = files.line.rpartition(", line ")[0]
        return f" ({files.line or 'pair 0'} may be a header: {f'read_pairs({path!r})' if path else 'pairs'}[1:])"
    if "," in image:
        return " (commas between the columns? The rows of csv.reader work)"
    return ""
