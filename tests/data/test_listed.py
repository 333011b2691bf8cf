from __future__ import annotations

import csv
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from stseg.data import listed
from stseg.data.folder import SegmentationFolder
from stseg.data.items import Items
from stseg.data.listed import FilePair, ListedFiles, read_pairs
from stseg.errors import DataError, UnreadableImageError
from stseg.inference.mask_store import check_store_id

RGB = np.random.default_rng(0).integers(0, 200, (4, 6, 3), dtype=np.uint8)
CLASSES = np.random.default_rng(1).integers(0, 5, (4, 6), dtype=np.uint8)


def save(path: Path, pixels=RGB) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def mended(caught, pairs):
    """The pairs that the line in a message makes."""
    line = str(caught.value).partition(": pairs = ")[2]
    return eval(line, {"pairs": pairs})


def fill(root: Path, *names: str) -> list[tuple[str, str]]:
    """Files called ``<name>_rgb.png`` and ``<name>_mask.png``, each with other pixels; their pairs."""
    for number, name in enumerate(names):
        save(root / f"{name}_rgb.png", RGB + number)
        save(root / f"{name}_mask.png", CLASSES + number)
    return [(f"{name}_rgb.png", f"{name}_mask.png") for name in names]


class TestReadPairs:
    def read(self, folder: Path, content: str | bytes) -> list[FilePair]:
        path = folder / "list.txt"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return read_pairs(path)

    def test_gives_two_columns_and_where_they_stand(self, tmp_path):
        pairs = self.read(tmp_path, "b.jpg m/b.png\n\na.jpg m/a.png")
        assert pairs == [
            ("b.jpg", "m/b.png", f"{tmp_path / 'list.txt'}, line 1"),
            ("a.jpg", "m/a.png", f"{tmp_path / 'list.txt'}, line 3"),
        ]
        assert all(isinstance(pair, FilePair) for pair in pairs)

    def test_of_one_column_has_no_masks(self, tmp_path):
        assert [pair[:2] for pair in self.read(tmp_path, "b\n a/c.jpg \n")] == [("b", None), ("a/c.jpg", None)]

    @pytest.mark.parametrize("between", [" ", "   ", "\t", " \t ", "\t\t"])
    @pytest.mark.parametrize("end", ["\n", "\r\n", " \n"])
    def test_takes_any_white_space(self, tmp_path, between, end):
        pairs = self.read(tmp_path, f"a.jpg{between}a.png{end}b.jpg{between}b.png{end}")
        assert [pair[:2] for pair in pairs] == [("a.jpg", "a.png"), ("b.jpg", "b.png")]

    def test_keeps_spaces_where_there_are_tabs(self, tmp_path):
        pairs = self.read(tmp_path, "my a.jpg\tmy a.png\nmy b.jpg \t my b.png\n")
        assert [pair[:2] for pair in pairs] == [("my a.jpg", "my a.png"), ("my b.jpg", "my b.png")]
        assert [pair[:2] for pair in self.read(tmp_path, "my a.jpg\t\nb.jpg\n")] == [
            ("my a.jpg", None),
            ("b.jpg", None),
        ]

    NAMES = st.text(st.characters(exclude_categories=["Z", "C"]), min_size=1, max_size=8)

    @given(st.lists(st.tuples(NAMES, NAMES), min_size=1, unique_by=lambda pair: pair[0]), st.sampled_from(" \t"))
    @settings(derandomize=True, deadline=None)
    def test_gives_what_was_written(self, tmp_path_factory, names, between):
        path = tmp_path_factory.mktemp("lists") / "list.txt"
        path.write_text("\n".join(between.join(pair) for pair in names), encoding="utf-8")
        assert [pair[:2] for pair in read_pairs(path)] == names

    def test_refuses_three_columns(self, tmp_path):
        with pytest.raises(DataError, match=r"list\.txt, line 2 has 3 columns; .* spaces need a tab after them"):
            self.read(tmp_path, "a.jpg a.png\nb.jpg b.png 1\n")
        with pytest.raises(DataError, match=r"list\.txt, line 1 has 4 columns; .* spaces need a tab after them"):
            self.read(tmp_path, "my a.jpg my a.png\n")

    @pytest.mark.parametrize(("content", "here", "before"), [("a b\n\nc\n", 1, 2), ("a\n\nc d\n", 2, 1)])
    def test_refuses_a_mixture_of_columns(self, tmp_path, content, here, before):
        with pytest.raises(
            DataError, match=rf"list\.txt, line 3: the columns are {here}, in the lines before it {before}"
        ):
            self.read(tmp_path, content)

    @pytest.mark.parametrize("content", ["a.jpg 1.png\nb.jpg 2.png\n\na.jpg 3.png", "a.jpg\nb.jpg\n\na.jpg\n"])
    def test_refuses_an_image_twice(self, tmp_path, content):
        with pytest.raises(DataError, match=r"list\.txt, line 4: the image 'a\.jpg' is in line 1 already"):
            self.read(tmp_path, content)

    @pytest.mark.parametrize("content", ["", "\n \t\n", b"\xef\xbb\xbf"])
    def test_refuses_an_empty_list(self, tmp_path, content):
        with pytest.raises(DataError, match=r"list\.txt names no file"):
            self.read(tmp_path, content)

    def test_refuses_other_encodings(self, tmp_path):
        with pytest.raises(DataError, match=r"list\.txt is not a text file in UTF-8"):
            self.read(tmp_path, "a b\n".encode("utf-16"))

    @pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
    def test_says_how_to_mend_utf_16(self, tmp_path, encoding):
        with pytest.raises(DataError, match=r"probably in UTF-16; save as UTF-8, .*read_text\('utf-16'\), 'utf-8'\)"):
            self.read(tmp_path, "a.jpg b.png\n".encode(encoding))

    @pytest.mark.parametrize("content", ["a.jpg,a.png", "a.jpg, a.png", "my a.JPG , my a.png, 3", "a.jpg;a.png"])
    def test_says_how_to_read_commas(self, tmp_path, content):
        mark = "," if "," in content else ";"
        with pytest.raises(
            DataError,
            match=rf"line 2 has {'commas' if mark == ',' else 'semicolons'} between the columns; .* csv\.reader",
        ) as caught:
            self.read(tmp_path, f"\n{content}\n")
        assert ("delimiter=';'" in str(caught.value)) == (mark == ";")

    def test_takes_commas_in_names(self, tmp_path):
        assert self.read(tmp_path, "a,b.jpg a,b.png")[0][:2] == ("a,b.jpg", "a,b.png")
        assert self.read(tmp_path, "a.jpg,b.jpg\tm.png")[0][:2] == ("a.jpg,b.jpg", "m.png")

    def test_says_that_a_line_may_be_a_header(self, tmp_path):
        with pytest.raises(DataError, match=r"line 1 may be a header: remove it from the file"):
            self.read(tmp_path, "image mask\na.jpg\n")

    def test_names_a_missing_list(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"none\.txt"):
            read_pairs(tmp_path / "none.txt")


class TestItems:
    def test_are_the_files_in_the_order_of_the_list(self, tmp_path):
        pairs = fill(tmp_path, "c", "a/b", "a/a")
        dataset = ListedFiles(tmp_path, pairs)
        assert dataset.ids == ["c_rgb", "a/b_rgb", "a/a_rgb"]
        for number, (image, mask) in enumerate(dataset):
            assert np.array_equal(image.permute(1, 2, 0), RGB + number)
            assert np.array_equal(mask, CLASSES + number)
        assert number == 2
        with pytest.raises(IndexError):
            dataset[3]

    def test_without_masks_are_images_alone(self, tmp_path):
        pairs = fill(tmp_path, "a", "b")
        for path in tmp_path.glob("*_mask.png"):
            path.unlink()
        named = ListedFiles(tmp_path, pairs, masks=False)
        alone = ListedFiles(tmp_path, [image for image, _ in pairs], masks=False)
        assert named.ids == alone.ids == ["a_rgb", "b_rgb"]
        assert isinstance(named[1], torch.Tensor)
        assert torch.equal(named[1], alone[1])

    @pytest.mark.parametrize("mask", ["../none.png", "/etc/passwd", "a.jpg", "", "C:\\x"])
    def test_without_masks_do_not_look_at_their_names(self, tmp_path, mask):
        fill(tmp_path, "a")
        assert ListedFiles(tmp_path, [("a_rgb.png", mask)], masks=False)[0].shape == (3, 4, 6)

    def test_are_those_of_a_folder_of_the_same_files(self, tmp_path):
        for number, name in enumerate(("x/1", "x/2", "y/1")):
            save(tmp_path / "images" / f"{name}.jpg", RGB + number)
            save(tmp_path / "masks" / f"{name}.png", CLASSES + number)
        folder = SegmentationFolder(tmp_path / "images", tmp_path / "masks")
        pairs = ListedFiles(tmp_path, [(f"images/{id}.jpg", f"masks/{id}.png") for id in folder.ids])
        assert [id.removeprefix("images/") for id in pairs.ids] == folder.ids
        for ours, theirs in zip(pairs, folder, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))

    def test_take_a_mode_and_a_class_map(self, tmp_path):
        pairs = fill(tmp_path, "a")
        image, mask = ListedFiles(tmp_path, pairs, mode="L", class_map={3: 0, 1: 1}, unmapped=7)[0]
        assert image.shape == (1, 4, 6)
        assert mask.tolist() == [[{3: 0, 1: 1}.get(value, 7) for value in row] for row in CLASSES.tolist()]

    def test_have_ids_that_stores_take(self, tmp_path):
        dataset = ListedFiles(tmp_path, fill(tmp_path, "a.b/c d", "é"))
        assert Items(dataset).ids == ["a.b/c d_rgb", "é_rgb"]
        for id in dataset.ids:
            check_store_id(id)

    def test_go_through_workers_and_pickling(self, tmp_path):
        dataset = pickle.loads(pickle.dumps(ListedFiles(str(tmp_path), fill(tmp_path, "a", "b"))))
        images, masks = next(iter(DataLoader(dataset, batch_size=2, num_workers=1)))
        assert np.array_equal(images[1].permute(1, 2, 0), RGB + 1)
        assert np.array_equal(masks[1], CLASSES + 1)

    def test_may_come_as_paths(self, tmp_path):
        fill(tmp_path, "a/b")
        pair = (Path("a") / "b_rgb.png", Path("a") / "b_mask.png")
        assert ListedFiles(tmp_path, [pair]).ids == ["a/b_rgb"]
        assert ListedFiles(tmp_path, [pair[0]], masks=False).ids == ["a/b_rgb"]

    def test_may_be_rows_of_a_table(self, tmp_path):
        fill(tmp_path, "a", "b")
        (tmp_path / "list.csv").write_text("a_rgb.png,a_mask.png\nb_rgb.png,b_mask.png\n")
        with open(tmp_path / "list.csv", newline="") as file:
            rows = list(csv.reader(file))
        for pairs in (rows, np.array(rows), np.array(rows, dtype=object)):
            dataset = ListedFiles(tmp_path, pairs)
            assert dataset.ids == ["a_rgb", "b_rgb"]
            assert {type(id) for id in dataset.ids} == {str}
        assert ListedFiles(tmp_path, np.array(rows)[:, 0], masks=False).ids == ["a_rgb", "b_rgb"]

    @pytest.mark.parametrize("make", [str, Path])
    def test_may_have_absolute_paths_below_the_root(self, tmp_path, make, monkeypatch):
        fill(tmp_path / "data", "x/a")
        pair = [make(tmp_path / "data" / "x" / name) for name in ("a_rgb.png", "a_mask.png")]
        monkeypatch.chdir(tmp_path)
        (tmp_path / "link").symlink_to("data")
        for root in (tmp_path / "data", "data", "data/", "./data", "link"):
            dataset = ListedFiles(root, [pair])
            assert dataset.ids == ["x/a_rgb"]
            assert dataset[0][1].shape == (4, 6)
        with pytest.raises(DataError, match="is not one below the root"):
            ListedFiles(tmp_path / "data" / "x", [(make(tmp_path / "data" / "xx.png"), pair[1])])

    def test_may_lie_behind_links(self, tmp_path):
        fill(tmp_path / "elsewhere", "a")
        (tmp_path / "root").mkdir()
        (tmp_path / "root" / "linked").symlink_to(tmp_path / "elsewhere")
        assert ListedFiles(tmp_path / "root", [("linked/a_rgb.png", "linked/a_mask.png")])[0][1].shape == (4, 6)

    def test_of_a_file_that_broke_are_named(self, tmp_path):
        dataset = ListedFiles(tmp_path, fill(tmp_path, "a"))
        (tmp_path / "a_rgb.png").write_bytes(b"no image")
        with pytest.raises(UnreadableImageError, match=r"a_rgb\.png cannot be read as an image"):
            dataset[0]

    def test_repr_tells_root_and_size(self, tmp_path):
        pairs = fill(tmp_path, "a", "b")
        assert repr(ListedFiles(tmp_path, pairs)) == f"ListedFiles({str(tmp_path)!r}: 2 pairs)"
        assert repr(ListedFiles(tmp_path, pairs, masks=False)) == f"ListedFiles({str(tmp_path)!r}: 2 images)"

    def test_of_a_large_list_keep_their_names_alone(self, tmp_path, monkeypatch):
        monkeypatch.setattr(listed.os.path, "isfile", lambda path: True)
        pairs = [(f"images/{number:06d}.png", f"masks/{number:06d}.png") for number in range(100_000)]
        dataset = ListedFiles(tmp_path, pairs)
        assert dataset.ids[-1] == "images/099999"
        assert len(pickle.dumps(dataset)) < 60 * len(dataset)


class TestRefuses:
    def listed(self, root: Path, content: str, **options) -> ListedFiles:
        (root / "list.txt").write_text(content)
        return ListedFiles(root, read_pairs(root / "list.txt"), **options)

    def test_a_missing_image(self, tmp_path):
        fill(tmp_path, "a")
        with pytest.raises(DataError, match=rf"list\.txt, line 3: there is no image {tmp_path}/d/b\.png$"):
            self.listed(tmp_path, "a_rgb.png a_mask.png\n\nd/b.png a_mask.png\n")
        with pytest.raises(DataError, match=rf"pair 1: there is no image {tmp_path}/b\.png$"):
            ListedFiles(tmp_path, ["a_rgb.png", "b.png"], masks=False)

    def test_a_missing_mask(self, tmp_path):
        fill(tmp_path, "a", "b")
        with pytest.raises(DataError, match=rf"list\.txt, line 2: there is no mask {tmp_path}/c_mask\.png"):
            self.listed(tmp_path, "a_rgb.png a_mask.png\nb_rgb.png c_mask.png\n")

    def test_a_folder_in_place_of_a_file(self, tmp_path):
        (tmp_path / "a").mkdir()
        with pytest.raises(DataError, match=r"list\.txt, line 1: there is no image .*/a$"):
            self.listed(tmp_path, "a\n", masks=False)

    def test_a_list_without_masks_where_they_are_wanted(self, tmp_path):
        fill(tmp_path, "a")
        with pytest.raises(DataError, match=r"list\.txt, line 1 names no mask for 'a_rgb\.png'; .*masks=False"):
            self.listed(tmp_path, "a_rgb.png\n")

    def test_a_name_with_spaces_and_says_how_to_write_it(self, tmp_path):
        save(tmp_path / "my a.png")
        with pytest.raises(DataError, match=r"there is no image .*/my \(a tab after 'my a\.png' would keep"):
            self.listed(tmp_path, "my a.png\n", masks=False)
        assert self.listed(tmp_path, "my a.png\t\n", masks=False).ids == ["my a"]

    @pytest.mark.parametrize(
        "path", ["/a_rgb.png", "../a_rgb.png", "x/../../a_rgb.png", "x/../a_rgb.png", "C:/a_rgb.png", "x\\a_rgb.png"]
    )
    @pytest.mark.parametrize("column", [0, 1])
    def test_a_path_that_is_not_below_the_root(self, tmp_path, path, column):
        fill(tmp_path, "a", "root/a", "root/x/a")
        pair = ["a_rgb.png", "a_mask.png"]
        pair[column] = path
        (tmp_path / "list.txt").write_text(" ".join(pair))
        pairs = read_pairs(tmp_path / "list.txt")
        with pytest.raises(DataError, match=rf"line 1: the path {re.escape(repr(path))} is not one below the root"):
            ListedFiles(tmp_path / "root", pairs)

    @pytest.mark.parametrize("path", ["", ".", "./", "//"])
    def test_a_path_of_nothing(self, tmp_path, path):
        with pytest.raises(DataError, match=r"pair 0: the path '.*' is not one below the root"):
            ListedFiles(tmp_path, [path], masks=False)

    @pytest.mark.parametrize("wrong", ["/x/a{}", "\\x\\a{}", "x\\a{}", "//x/a{}"])
    @pytest.mark.parametrize("kind", ["pairs", "images", "rows", "list of pairs", "list of images"])
    def test_slashes_of_other_kinds_with_the_line_that_mends_the_list(self, tmp_path, wrong, kind):
        fill(tmp_path, "x/a")
        image, mask = wrong.format("_rgb.png"), wrong.format("_mask.png")
        (tmp_path / "list.txt").write_text(f"{image} {mask}" if kind == "list of pairs" else image)
        pairs = {
            "pairs": [(image, mask)],
            "images": [image],
            "rows": [[image]],
            "list of pairs": read_pairs(tmp_path / "list.txt"),
            "list of images": read_pairs(tmp_path / "list.txt"),
        }[kind]
        masks = "pairs" in kind
        with pytest.raises(DataError, match="is not one below the root; expected a relative one, with '/'") as caught:
            ListedFiles(tmp_path, pairs, masks=masks)
        assert ListedFiles(tmp_path, mended(caught, pairs), masks=masks).ids == ["x/a_rgb"]

    def test_a_path_outside_with_no_line_that_mends_nothing(self, tmp_path):
        with pytest.raises(DataError, match=r"without '\.\.'$"):
            ListedFiles(tmp_path, ["/elsewhere/a.png"], masks=False)

    def test_a_path_that_has_the_root_in_front(self, tmp_path, monkeypatch):
        fill(tmp_path / "data", "a")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(DataError, match=r"\(data/a_rgb.png is there: paths are relative to the root, data\)"):
            ListedFiles("data", sorted(Path("data").glob("*_rgb.png")), masks=False)

    def test_a_header_of_a_file_and_of_a_table(self, tmp_path):
        fill(tmp_path, "a")
        with pytest.raises(DataError, match=r"line 1 may be a header: read_pairs\('.*list\.txt'\)\[1:\]\)"):
            self.listed(tmp_path, "image mask\na_rgb.png a_mask.png\n")
        assert ListedFiles(tmp_path, read_pairs(tmp_path / "list.txt")[1:]).ids == ["a_rgb"]
        with pytest.raises(DataError, match=r"pair 0 may be a header: pairs\[1:\]"):
            ListedFiles(tmp_path, [["image", "mask"], ["a_rgb.png", "a_mask.png"]])

    def test_a_data_frame(self, tmp_path):
        class DataFrame(dict):
            def itertuples(self):
                return iter(())

        with pytest.raises(TypeError, match=r"pairs is a DataFrame; expected its rows .*\.values\.tolist\(\)"):
            ListedFiles(tmp_path, DataFrame(image=["a_rgb.png"]))

    @pytest.mark.parametrize("row", [["a", "b", "c"], ("a", "b", "c")])
    def test_rows_of_three_columns(self, tmp_path, row):
        with pytest.raises(TypeError, match=r"pair 0 is .*: \[row\[:2\] for row in pairs\] takes two columns"):
            ListedFiles(tmp_path, [row])

    def test_a_row_with_an_empty_mask(self, tmp_path):
        fill(tmp_path, "a")
        with pytest.raises(DataError, match=r"pair 0 names no mask for 'a_rgb\.png'"):
            ListedFiles(tmp_path, [["a_rgb.png", ""]])

    @pytest.mark.parametrize("again", ["./a_rgb.png", "a_rgb.jpg", ".//a_rgb.png"])
    def test_two_images_of_one_id(self, tmp_path, again):
        fill(tmp_path, "a")
        save(tmp_path / "a_rgb.jpg")
        with pytest.raises(DataError, match=r"line 2: the id 'a_rgb' is that of .*list\.txt, line 1 already"):
            self.listed(tmp_path, f"a_rgb.png a_mask.png\n{again} a_mask.png\n")

    @pytest.mark.parametrize("suffix", [".jpg", ".JPG", ".webp", ".gif", ""])
    def test_a_mask_of_a_lossy_format(self, tmp_path, suffix):
        fill(tmp_path, "a")
        (tmp_path / f"m{suffix}").write_bytes((tmp_path / "a_mask.png").read_bytes())
        with pytest.raises(
            DataError, match=re.escape(f"the mask 'm{suffix}' has a format that may not preserve class")
        ):
            ListedFiles(tmp_path, [("a_rgb.png", f"m{suffix}")])

    def test_an_image_as_its_own_mask(self, tmp_path):
        save(tmp_path / "a.png", CLASSES)
        with pytest.raises(DataError, match=r"image and mask are the same file 'a\.png'"):
            ListedFiles(tmp_path, [("a.png", "./a.png")])

    def test_a_mask_of_another_size_or_in_color_when_it_is_read(self, tmp_path):
        dataset = ListedFiles(tmp_path, fill(tmp_path, "a"))
        save(tmp_path / "a_mask.png", CLASSES[:3])
        with pytest.raises(DataError, match="'a_rgb' differ in size"):
            dataset[0]
        save(tmp_path / "a_mask.png", RGB)
        with pytest.raises(DataError, match="mask of 'a_rgb' is in color"):
            dataset[0]

    def test_a_value_without_class_when_it_is_read(self, tmp_path):
        dataset = ListedFiles(tmp_path, fill(tmp_path, "a"), class_map={0: 0}, unmapped=None)
        with pytest.raises(DataError, match="mask of 'a_rgb' holds the value"):
            dataset[0]

    def test_a_root_that_is_missing_or_a_file(self, tmp_path):
        fill(tmp_path, "a")
        with pytest.raises(DataError, match=r"there is no folder .*none"):
            ListedFiles(tmp_path / "none", ["a_rgb.png"], masks=False)
        with pytest.raises(DataError, match=r"a_rgb\.png is not a folder"):
            ListedFiles(tmp_path / "a_rgb.png", ["a_rgb.png"], masks=False)

    def test_no_pairs(self, tmp_path):
        with pytest.raises(DataError, match="pairs is empty"):
            ListedFiles(tmp_path, [])

    @pytest.mark.parametrize("make", [str, Path])
    def test_the_path_of_a_list(self, tmp_path, make):
        with pytest.raises(TypeError, match=r"stseg\.data\.read_pairs reads a file of them"):
            ListedFiles(tmp_path, make("list.txt"))

    def test_what_is_no_path(self, tmp_path):
        with pytest.raises(TypeError, match="pair 0: the path is 7; expected a string"):
            ListedFiles(tmp_path, [(7, "a.png")])

    def test_nonsense_settings(self, tmp_path):
        with pytest.raises(ValueError, match="mode is 'BGR'"):
            ListedFiles(tmp_path, ["a"], mode="BGR")
        with pytest.raises(TypeError, match="class_map is list"):
            ListedFiles(tmp_path, ["a"], class_map=[1, 2])


@pytest.mark.parametrize("pair", [None, 3, (), ("a", "b", "c", "d")])
def test_a_pair_that_is_none_is_named_by_its_place(tmp_path, pair):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(TypeError, match=r"pair 1 is .*; expected"):
        ListedFiles(tmp_path, ["a.png", pair], masks=False)
