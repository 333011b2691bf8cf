from __future__ import annotations

import os
import pickle
import re
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Subset

import stseg
from stseg.data._files import image_suffixes
from stseg.data._names import nearest
from stseg.data.folder import SegmentationFolder, split_by_masks
from stseg.data.items import Items
from stseg.data.listed import ListedFiles
from stseg.data.splits import read_ids
from stseg.errors import DataError, DataWarning, UnreadableImageError
from stseg.inference.preflight import refuse_common_ids

CAMVID = Path(os.environ.get("STSEG_CAMVID", Path(__file__).parents[3] / "shared" / "camvid"))
ORIENTATION = 0x0112
RGB = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
CLASSES = np.random.default_rng(1).integers(0, 5, (4, 6), dtype=np.uint8)


def save(path: Path, pixels=RGB, **settings) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **settings)
    return path


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


@pytest.fixture
def images(tmp_path):
    return tmp_path / "images"


@pytest.fixture
def masks(tmp_path):
    return tmp_path / "masks"


def fill(images: Path, masks: Path | None, *ids: str) -> None:
    for id in ids:
        save(images / f"{id}.png")
        if masks is not None:
            save(masks / f"{id}.png", CLASSES)


class TestPairs:
    def test_have_the_same_path_without_suffix(self, images, masks):
        for number, id in enumerate(["b", "a", "drive/0001", "other/0001"]):
            save(images / f"{id}.bmp", RGB + number)
            save(masks / f"{id}.png", CLASSES + number)
        dataset = SegmentationFolder(images, masks)
        assert dataset.ids == ["a", "b", "drive/0001", "other/0001"]
        for position, number in enumerate([1, 0, 2, 3]):
            image, mask = dataset[position]
            assert np.array_equal(image.permute(1, 2, 0), RGB + number)
            assert np.array_equal(mask, CLASSES + number)
            assert (image.dtype, mask.dtype) == (torch.uint8, torch.uint8)

    def test_without_masks_are_images_alone(self, images):
        fill(images, None, "a")
        item = SegmentationFolder(images)[0]
        assert isinstance(item, torch.Tensor)
        assert item.shape == (3, 4, 6)

    def test_may_have_dots_in_their_names(self, images, masks):
        fill(images, masks, "a.b", "a.c")
        assert SegmentationFolder(images, masks).ids == ["a.b", "a.c"]

    def test_may_have_suffixes_in_capitals(self, images, masks):
        save(images / "a.PNG")
        save(images / "b.Jpeg", format="JPEG")
        save(masks / "a.TIF", CLASSES)
        save(masks / "b.png", CLASSES)
        dataset = SegmentationFolder(images, masks)
        assert dataset.ids == ["a", "b"]
        assert dataset[1][1].shape == (4, 6)

    def test_ignore_hidden_and_other_files(self, images, masks):
        fill(images, masks, "a")
        for name in ("._a.png", ".b.png", "readme.txt", "c.npy", "Thumbs.db", ".cache/d.png", "noextension"):
            (images / name).parent.mkdir(exist_ok=True)
            (images / name).write_text("nothing")
        with pytest.warns(DataWarning, match="3 files in"):
            assert SegmentationFolder(images, masks).ids == ["a"]

    def test_may_lie_behind_links(self, images, masks, tmp_path):
        fill(tmp_path / "elsewhere", tmp_path / "m", "a")
        images.mkdir()
        (images / "linked").symlink_to(tmp_path / "elsewhere")
        assert SegmentationFolder(images).ids == ["linked/a"]

    def test_are_ids_to_the_package(self, images):
        fill(images, None, "x/a", "b")
        assert Items(SegmentationFolder(images)).ids == ["b", "x/a"]

    def test_end(self, images):
        fill(images, None, "a", "b")
        dataset = SegmentationFolder(images)
        assert len(dataset) == 2
        assert len(list(dataset)) == 2
        with pytest.raises(IndexError):
            dataset[2]

    def test_of_one_size_go_through_a_loader_with_workers(self, images, masks):
        fill(images, masks, "a", "b")
        batch, _ = next(iter(DataLoader(SegmentationFolder(images, masks), batch_size=2, num_workers=1)))
        assert batch.shape == (2, 3, 4, 6)

    def test_survive_pickling(self, images, masks):
        fill(images, masks, "a", "b")
        dataset = SegmentationFolder(str(images), str(masks), ids=["b"])
        copy = pickle.loads(pickle.dumps(dataset))
        assert copy.ids == ["b"]
        assert torch.equal(copy[0][0], dataset[0][0])


class TestIds:
    def test_choose_and_order(self, images, masks):
        fill(images, masks, "a", "b", "c")
        save(images / "without.png")
        save(masks / "alone.png", CLASSES)
        assert SegmentationFolder(images, masks, ids=("c", "a")).ids == ["c", "a"]

    def test_from_a_file(self, images, tmp_path):
        fill(images, None, "a", "d/b", "c")
        (tmp_path / "ids.txt").write_text("d/b\r\na\r\n")
        assert SegmentationFolder(images, ids=read_ids(tmp_path / "ids.txt")).ids == ["d/b", "a"]

    @pytest.mark.parametrize("id", ["z", "", 7])
    def test_that_are_missing_are_named(self, images, id):
        fill(images, None, "a")
        with pytest.raises(DataError, match=f"no image with the id {id!r} in .*images$"):
            SegmentationFolder(images, ids=["a", id])

    def test_exclude_others(self, images, masks):
        fill(images, masks, "a", "b", "c")
        assert SegmentationFolder(images, exclude=["b"]).ids == ["a", "c"]
        assert SegmentationFolder(images, masks, exclude={"a", "c"}).ids == ["b"]
        assert SegmentationFolder(images, ids=["c", "b", "a"], exclude=["b"]).ids == ["c", "a"]
        assert SegmentationFolder(images, exclude=[]).ids == ["a", "b", "c"]

    def test_to_exclude_must_be_there(self, images):
        fill(images, None, "a", "b")
        with pytest.raises(DataError, match=r"no image with the id 'B' in .*; 'b' is there, which differs in letter"):
            SegmentationFolder(images, exclude=["a", "B"])
        with pytest.raises(DataError, match=r"exclude names every image of .*images"):
            SegmentationFolder(images, exclude=["a", "b"])

    @pytest.mark.parametrize("argument", ["ids", "exclude"])
    def test_are_not_the_data_set_itself(self, images, argument):
        fill(images, None, "a", "b")
        with pytest.raises(TypeError, match=rf"{argument} is a SegmentationFolder; .*: {argument}=dataset\.ids"):
            SegmentationFolder(images, **{argument: SegmentationFolder(images)})
        with pytest.raises(TypeError, match=f"{argument} is 'a'; expected a sequence of ids"):
            SegmentationFolder(images, **{argument: "a"})

    @pytest.mark.parametrize(
        ("there", "id", "message"),
        [
            ("Car_0", "car_0", "'Car_0' is there, which differs in letter case$"),
            ("Stra\u00dfe", "STRASSE", "'Stra\u00dfe' is there, which differs in letter case$"),
            (
                "cafe\u0301",
                "caf\u00e9",
                r"is there, which differs in Unicode form, which looks the same .*\('NFD', name\)",
            ),
            (
                "caf\u00e9",
                "cafe\u0301",
                r"is there, which differs in Unicode form, which looks the same .*\('NFC', name\)",
            ),
            ("Caf\u00e9", "cafe\u0301", "is there, which differs in letter case and Unicode form"),
            ("x/car_0", "car_0", "'x/car_0' is there, with the folder 'x/' in front$"),
            ("car_0", "images/car_0", "'car_0' is there, without the folder 'images/' in front$"),
            ("x/car_0", "y/car_0", "'x/car_0' is there, in another folder$"),
            ("carriage_17", "carriage_1", "the nearest name that is there is 'carriage_17'$"),
        ],
    )
    def test_that_are_near_are_told(self, images, there, id, message):
        fill(images, None, there, "something else")
        with pytest.raises(DataError, match=rf"no image with the id .* in .*images; .*{message}"):
            SegmentationFolder(images, ids=[id])

    def test_of_many_that_are_near_are_told_at_once(self, images):
        there = {f"scene_{number:06d}" for number in range(100_000)}
        assert nearest("scene_012345b", there) == "; the nearest name that is there is 'scene_012345'"

    def test_with_a_suffix_are_explained(self, images):
        fill(images, None, "d/a")
        with pytest.raises(DataError, match=r"id 'd/a\.jpg' .*did you mean 'd/a'\? Ids are without suffix"):
            SegmentationFolder(images, ids=["d/a.jpg"])

    def test_that_occur_twice_are_refused(self, images):
        fill(images, None, "a", "b")
        with pytest.raises(DataError, match="the id 'b' occurs more than once"):
            SegmentationFolder(images, ids=["b", "a", "b"])

    def test_none_at_all_are_refused(self, images):
        fill(images, None, "a")
        with pytest.raises(DataError, match="ids is empty"):
            SegmentationFolder(images, ids=[])

    @pytest.mark.parametrize("make", [str, Path])
    def test_a_path_is_no_sequence_of_ids(self, images, make):
        fill(images, None, "a")
        with pytest.raises(TypeError, match="read_ids reads a file of them"):
            SegmentationFolder(images, ids=make("a"))


class TestLabeledOnly:
    def test_takes_the_images_with_a_mask(self, images, masks):
        fill(images, masks, "a", "x/c")
        fill(images, None, "b", "x/d", "e")
        labeled = SegmentationFolder(images, masks, labeled_only=True)
        assert labeled.ids == ["a", "x/c"]
        assert labeled.without_mask == 3
        assert repr(labeled).endswith(": 2 items; left out: 3 without a mask)")
        unlabeled = SegmentationFolder(images, exclude=labeled.ids)
        assert unlabeled.ids == ["b", "e", "x/d"]
        assert unlabeled.without_mask == 0
        assert np.array_equal(labeled[1][1], CLASSES)

    def test_keeps_the_order_of_ids(self, images, masks):
        fill(images, masks, "a", "b")
        fill(images, None, "c")
        labeled = SegmentationFolder(images, masks, ids=["c", "b", "a"], labeled_only=True)
        assert (labeled.ids, labeled.without_mask) == (["b", "a"], 1)

    def test_is_named_where_a_mask_is_missing(self, images, masks):
        fill(images, masks, "a")
        fill(images, None, "b")
        with pytest.raises(DataError, match=r"image 'b' has no mask.*; labeled_only=True takes .*, ids=\.\.\. those"):
            SegmentationFolder(images, masks)

    def test_needs_masks(self, images):
        fill(images, None, "a")
        with pytest.raises(
            ValueError, match=r"labeled_only is True without masks; expected SegmentationFolder\(images, m"
        ):
            SegmentationFolder(images, labeled_only=True)

    def test_refuses_a_mask_without_image_and_tells_what_is_near(self, images, masks):
        fill(images, masks, "a")
        save(images / "b.png")
        save(masks / "B.png", CLASSES)
        with pytest.raises(
            DataError, match=r"masks/B\.png has no image 'B' in .*; 'b' is there, which differs in letter"
        ):
            SegmentationFolder(images, masks, labeled_only=True)

    @pytest.mark.parametrize("name", ["b.jpg", "b.npy", "b.pgm"])
    def test_does_not_leave_out_what_has_a_mask_of_another_format(self, images, masks, name):
        fill(images, masks, "a")
        fill(images, None, "b", "c")
        save(masks / "b.png", CLASSES).rename(masks / name)
        with pytest.raises(DataError, match=rf"image 'b' has no mask: .*masks/{name} .*; expected PNG, BMP or TIFF"):
            SegmentationFolder(images, masks, labeled_only=True)

    def test_refuses_masks_of_none(self, images, masks):
        fill(images, None, "a_0", "a_1")
        fill(masks, None, "a_0_mask", "a_1_mask")
        with pytest.raises(DataError, match=r"write mask_suffix=\"_mask\""):
            SegmentationFolder(images, masks, labeled_only=True)
        fill(images, masks, "b")
        with pytest.raises(DataError, match=r"a_0_mask\.png has no image 'a_0_mask' in .*write mask_suffix=\"_mask\""):
            SegmentationFolder(images, masks, labeled_only=True)


class TestSplitByMasks:
    def test_gives_what_two_folders_give(self, images, masks):
        fill(images, masks, "a", "c/d")
        fill(images, None, "b", "c/e", "f")
        labeled, unlabeled = split_by_masks(images, masks, mode="L", class_map={1: 0, 2: 1})
        expected = SegmentationFolder(images, masks, labeled_only=True, mode="L", class_map={1: 0, 2: 1})
        others = SegmentationFolder(images, exclude=expected.ids, mode="L")
        assert labeled.ids == expected.ids == ["a", "c/d"]
        assert unlabeled.ids == others.ids == ["b", "c/e", "f"]
        assert all(torch.equal(*pair) for i in range(2) for pair in zip(labeled[i], expected[i], strict=True))
        assert all(torch.equal(unlabeled[i], others[i]) for i in range(3))
        assert (repr(labeled), repr(unlabeled)) == (repr(expected), repr(others))
        assert (labeled.without_mask, unlabeled.without_mask) == (3, 0)

    def test_masks_may_be_among_the_images(self, images):
        save(images / "car_0.jpg")
        save(images / "car_1.jpg")
        save(images / "car_1_mask.png", CLASSES)
        labeled, unlabeled = split_by_masks(images, images, mask_suffix="_mask")
        assert (labeled.ids, unlabeled.ids) == (["car_1"], ["car_0"])
        assert unlabeled[0].shape == (3, 4, 6)

    def test_ids_and_exclude_are_of_both(self, images, masks):
        fill(images, masks, "a", "b", "val-1")
        fill(images, None, "c", "d", "val-2")
        options = {"exclude": ["p/val-1", "p/val-2"], "id_prefix": "p/"}
        labeled, unlabeled = split_by_masks(images, masks, **options)
        assert (labeled.ids, unlabeled.ids) == (["p/a", "p/b"], ["p/c", "p/d"])
        labeled, unlabeled = split_by_masks(
            images, masks, ids=["p/d", "p/b", "p/c", "p/val-1"], **(options | {"exclude": ["p/c"]})
        )
        assert (labeled.ids, unlabeled.ids) == (["p/b", "p/val-1"], ["p/d"])

    def test_a_mask_without_an_image_is_named(self, images, masks):
        fill(images, masks, "a")
        fill(images, None, "b")
        save(masks / "B.png", CLASSES)
        with pytest.raises(
            DataError, match=r"the mask .*B\.png has no image 'B' .*; 'b' is there, which differs in letter"
        ):
            split_by_masks(images, masks)

    def test_masks_for_all_images_are_refused_with_the_line_to_write(self, images, masks):
        fill(images, masks, "a", "b")
        with pytest.raises(
            DataError, match=r"every image of .* has a mask in .*; .* SegmentationFolder\(images, masks\)"
        ):
            split_by_masks(images, masks)

    def test_masks_for_no_image_are_refused(self, images, masks):
        fill(images, None, "a")
        masks.mkdir()
        with pytest.raises(DataError, match="the image 'a' has no mask"):
            split_by_masks(images, masks)

    def test_images_without_masks_are_named_as_such(self, images, masks):
        fill(images, masks, "a")
        with pytest.raises(DataError, match="there is no folder"):
            split_by_masks(images, masks / "none")

    def test_files_that_are_left_out_are_told_once_where_it_is_called(self, images, masks):
        fill(images, masks, "a")
        fill(images, None, "b")
        (images / "notes.txt").touch()
        with pytest.warns(DataWarning, match="1 file in .* was left out") as caught:
            labeled, unlabeled = split_by_masks(images, masks)
        assert [warning.filename for warning in caught] == [__file__]
        assert labeled.left_out == unlabeled.left_out == {".txt": 1}


class TestMaskSuffix:
    def test_pairs_two_folders(self, images, masks):
        for number, id in enumerate(["car_0", "x/car_1"]):
            save(images / f"{id}.jpg")
            save(masks / f"{id}_mask.png", CLASSES + number)
            save(masks / f"{id}_color.png")
        dataset = SegmentationFolder(images, masks, mask_suffix="_mask")
        assert dataset.ids == ["car_0", "x/car_1"]
        for number, (_, mask) in enumerate(dataset):
            assert np.array_equal(mask, CLASSES + number)

    def test_tells_masks_in_one_folder(self, images):
        fill(images, None, "car_0", "car_1", "x/car_2", "without")
        for id in ("car_0", "x/car_2", "car_1"):
            save(images / f"{id}_mask.tif", CLASSES)
        labeled = SegmentationFolder(images, images, mask_suffix="_mask", labeled_only=True)
        assert labeled.ids == ["car_0", "car_1", "x/car_2"]
        assert np.array_equal(labeled[2][1], CLASSES)
        assert SegmentationFolder(images, mask_suffix="_mask", exclude=labeled.ids).ids == ["without"]

    def test_may_be_the_suffix_of_the_image(self, images):
        save(images / "a.jpg")
        save(images / "a.jpg.png", CLASSES)
        assert np.array_equal(SegmentationFolder(images, images, mask_suffix=".jpg")[0][1], CLASSES)

    def test_that_was_forgotten_where_the_labeled_are_excluded_is_told(self, images):
        fill(images, None, "a", "b", "c", "a_mask", "b_mask")
        with pytest.warns(DataWarning, match=r"'a_mask' and 1 more .*: if they are masks, write mask_suffix=\"_mask\""):
            SegmentationFolder(images, exclude=["a", "b"])
        SegmentationFolder(images, exclude=["a", "c"])
        SegmentationFolder(images, exclude=["a", "b"], mask_suffix="_mask")

    def test_in_a_folder_of_images_alone_is_part_of_their_names(self, images, masks):
        fill(images, None, "a_mask")
        save(masks / "a_mask_mask.png", CLASSES)
        assert SegmentationFolder(images, masks, mask_suffix="_mask").ids == ["a_mask"]

    @pytest.mark.parametrize("given", ["", "_masks", "_mask.png"])
    def test_is_named_where_masks_are_missing(self, images, masks, given):
        for id in ("car_1", "car_10"):
            save(images / f"{id}.jpg")
            save(masks / f"{id}_mask.png", CLASSES)
        with pytest.raises(
            DataError, match=r"image 'car_1' has no mask: .*; 'car_1_mask' is there: write mask_suffix=\"_m"
        ):
            SegmentationFolder(images, masks, mask_suffix=given)

    def test_is_not_the_number_of_another_image(self, images, masks):
        fill(images, masks, "car_10")
        fill(images, None, "car_1")
        with pytest.raises(DataError, match="image 'car_1' has no mask") as caught:
            SegmentationFolder(images, masks)
        assert "mask_suffix" not in str(caught.value)

    def test_is_named_where_one_folder_has_both(self, images):
        fill(images, None, "car_0", "car_1", "car_0_seg", "car_1_seg")
        with pytest.raises(DataError, match=r"folders of their own.*: write mask_suffix=\"_seg\" .*ListedFiles pairs"):
            SegmentationFolder(images, images)

    @pytest.mark.parametrize("given", ["_nothing", "_1.png"])
    def test_that_matches_nothing(self, images, masks, given):
        fill(images, masks, "a", "b")
        with pytest.raises(DataError, match=rf"image 'a' has no mask: expected .*a{given} with one of the suffixes"):
            SegmentationFolder(images, masks, mask_suffix=given)
        with pytest.raises(DataError, match="image 'a' has no mask"):
            SegmentationFolder(images, images, mask_suffix=given)
        with pytest.raises(DataError, match=r"no file in .*images has a name that ends so; leave mask_suffix out"):
            SegmentationFolder(images, mask_suffix=given)

    @pytest.mark.parametrize("suffix", [".jpg", ".png"])
    def test_that_makes_an_image_a_mask(self, images, suffix):
        for id in ("car_0", "car_1"):
            save(images / f"{id}{suffix}")
            save(images / f"{id}_1.png", CLASSES)
        with pytest.raises(
            DataError, match=rf"car_1\{suffix} has no image 'car' in .*names end with mask_suffix, '_1', are"
        ):
            SegmentationFolder(images, images, mask_suffix="_1", labeled_only=True)

    @pytest.mark.parametrize("given", ["masks/", "x\\_mask"])
    def test_with_a_folder(self, images, masks, given):
        fill(images, masks, "a")
        with pytest.raises(ValueError, match=r"mask_suffix is .*; expected the end of a name, without folders"):
            SegmentationFolder(images, masks, mask_suffix=given)

    def test_that_is_no_string(self, images, masks):
        with pytest.raises(TypeError, match="mask_suffix is None; expected a string"):
            SegmentationFolder(images, masks, mask_suffix=None)


class TestMasksBesideTheirImages:
    """a.jpg and a.png in one folder."""

    @pytest.mark.parametrize("masks", [True, False])
    def test_name_a_line_that_works(self, images, masks):
        for number, id in enumerate(["a", "x/b.c"]):
            save(images / f"{id}.jpg")
            save(images / f"{id}.png", CLASSES + number)
        with pytest.raises(DataError) as caught:
            SegmentationFolder(images, images if masks else None)
        root, line = re.search(r"root = (.*?); (stseg\.data\.ListedFiles\(.*\))$", str(caught.value)).groups()
        dataset = eval(line, {"stseg": stseg, "root": eval(root, {"Path": Path})})
        assert dataset.ids == ["a", "x/b.c"]
        assert np.array_equal(dataset[1][1], CLASSES + 1)


class TestIdPrefix:
    def test_is_before_all_ids(self, images, masks):
        fill(images, masks, "a", "x/b", "c")
        dataset = SegmentationFolder(images, masks, id_prefix="new/")
        assert dataset.ids == ["new/a", "new/c", "new/x/b"]
        assert dataset[2][1].shape == (4, 6)
        assert pickle.loads(pickle.dumps(dataset))[2][1].shape == (4, 6)
        assert SegmentationFolder(images, masks, id_prefix="").ids == ["a", "c", "x/b"]

    def test_belongs_to_the_ids_that_are_chosen(self, images):
        fill(images, None, "a", "b", "c")
        chosen = SegmentationFolder(images, id_prefix="new_", ids=["new_c", "new_b"], exclude=["new_b"])
        assert chosen.ids == ["new_c"]
        assert chosen[0].shape == (3, 4, 6)
        with pytest.raises(
            DataError, match=r"no image with the id 'a' .*; did you mean 'new/a'\? .* id_prefix, 'new/'"
        ):
            SegmentationFolder(images, id_prefix="new/", ids=["a"])
        with pytest.raises(DataError, match=r"'new/A' .*; 'new/a' is there, which differs in letter case"):
            SegmentationFolder(images, id_prefix="new/", exclude=["new/A"])

    def test_is_in_messages(self, images, masks):
        fill(images, masks, "a")
        fill(images, None, "b")
        with pytest.raises(DataError, match="the image 'new/b' has no mask"):
            SegmentationFolder(images, masks, id_prefix="new/")
        (images / "a.png").write_bytes(b"")
        with pytest.raises(UnreadableImageError, match=r"images/a\.png cannot be read"):
            SegmentationFolder(images, id_prefix="new/")[0]

    @pytest.mark.parametrize("prefix", ["new\\", "/", "/new/", "../", "a/../", "a//", "./"])
    def test_must_be_a_path(self, images, prefix):
        fill(images, None, "a")
        with pytest.raises(ValueError, match=r"id_prefix is .*; expected a relative path with '/'"):
            SegmentationFolder(images, id_prefix=prefix)

    def test_with_a_backslash_says_what_to_write(self, images):
        with pytest.raises(ValueError, match=r"such as 'old/new/'$"):
            SegmentationFolder(images, id_prefix="old\\new\\")

    def test_that_is_no_string(self, images):
        with pytest.raises(TypeError, match="id_prefix is None; expected a string"):
            SegmentationFolder(images, id_prefix=None)


class TestCommonIds:
    def refuse(self, *datasets):
        refuse_common_ids(dict(zip(("labeled", "unlabeled"), map(Items.of, datasets), strict=True)))

    def test_name_the_prefix(self, images, masks):
        fill(images, masks, "a", "b")
        with pytest.raises(DataError, match=r"'a' is in both .*SegmentationFolder\(\.\.\., id_prefix='unlabeled/'\)"):
            self.refuse(SegmentationFolder(images), Subset(SegmentationFolder(masks), [1, 0]))
        self.refuse(SegmentationFolder(images), SegmentationFolder(masks, id_prefix="unlabeled/"))

    def test_of_one_folder_name_exclude(self, images):
        fill(images, None, "a", "b")
        labeled = SegmentationFolder(images, ids=["b"])
        with pytest.raises(DataError, match=r"'b' is in both .*: SegmentationFolder\(images, exclude=labeled\.ids\)"):
            self.refuse(labeled, SegmentationFolder(images / ".." / "images"))
        self.refuse(labeled, SegmentationFolder(images, exclude=labeled.ids))

    def test_of_lists_name_the_root(self, images, masks):
        fill(images, masks, "a")
        with pytest.raises(DataError, match="give ListedFiles a root above both"):
            self.refuse(*(ListedFiles(root, ["a.png"], masks=False) for root in (images, masks)))

    def test_of_other_data_sets_name_their_attribute(self):
        class Named(list):
            ids = ("a",)

        with pytest.raises(DataError, match=r"dataset\.ids = \[f'unlabeled/\{id\}' for id in dataset\.ids\]"):
            self.refuse(Named([RGB]), Named([RGB]))


class TestLinks:
    def test_of_a_folder_to_one_above_add_nothing(self, images, tmp_path):
        fill(images, None, "a", "x/b")
        (images / "x" / "self").symlink_to(".")
        (images / "x" / "up").symlink_to("..")
        (images / "x" / "over").symlink_to(tmp_path)
        (images / "all").symlink_to(images)
        assert SegmentationFolder(images).ids == ["a", "x/b"]

    def test_to_a_folder_inside_add_nothing(self, images):
        fill(images, None, "x/y/a", "z/b")
        (images / "again").symlink_to("x")
        (images / "aagain").symlink_to("x/y")
        assert SegmentationFolder(images).ids == ["x/y/a", "z/b"]
        with pytest.raises(DataError, match=r"no image with the id 'again/y/a' .*did you mean 'x/y/a'\? A link leads"):
            SegmentationFolder(images, ids=["again/y/a"])

    def test_to_one_folder_outside_count_once(self, images, tmp_path):
        fill(tmp_path / "other", None, "x/a", "b")
        (tmp_path / "other" / "back").symlink_to(images)
        fill(images, None, "c")
        (images / "two").symlink_to(tmp_path / "other")
        (images / "one").symlink_to(tmp_path / "other")
        (images / "zero").symlink_to(tmp_path / "other" / "x")
        assert SegmentationFolder(images).ids == ["c", "one/b", "one/x/a"]

    def test_of_masks_may_lead_to_one_folder(self, images, masks, tmp_path):
        fill(images, None, "left/a", "left/x/b", "right/a", "right/x/b")
        fill(tmp_path / "m", None, "x")
        save(tmp_path / "m" / "a.png", CLASSES)
        save(tmp_path / "m" / "x" / "b.png", CLASSES + 1)
        (tmp_path / "m" / "x.png").unlink()
        masks.mkdir()
        for side in ("left", "right"):
            (masks / side).symlink_to(tmp_path / "m")
        dataset = SegmentationFolder(images, masks)
        assert dataset.ids == ["left/a", "left/x/b", "right/a", "right/x/b"]
        for number, (_, mask) in enumerate(dataset):
            assert np.array_equal(mask, CLASSES + number % 2)

    def test_in_both_folders_pair(self, images, masks):
        fill(images, masks, "real/a")
        (images / "link").symlink_to("real")
        assert SegmentationFolder(images, masks).ids == ["real/a"]
        (masks / "link").symlink_to("real")
        assert SegmentationFolder(images, masks).ids == ["real/a"]
        (masks / "link").unlink()
        save(masks / "link" / "a.png", CLASSES)
        assert SegmentationFolder(images, masks).ids == ["real/a"]

    def test_may_be_the_root(self, images, masks, tmp_path):
        fill(images, masks, "x/a")
        (tmp_path / "i").symlink_to(images)
        (tmp_path / "m").symlink_to("masks")
        assert SegmentationFolder(tmp_path / "i", tmp_path / "m").ids == ["x/a"]
        with pytest.raises(DataError, match="folders of their own"):
            SegmentationFolder(tmp_path / "i", images)

    def test_of_files_that_are_broken_are_named_when_read(self, images):
        fill(images, None, "a")
        (images / "b.png").symlink_to("nowhere.png")
        dataset = SegmentationFolder(images)
        assert dataset.ids == ["a", "b"]
        with pytest.raises(UnreadableImageError, match=r"images/b\.png cannot be read"):
            dataset[1]


class TestFileKinds:
    @pytest.mark.parametrize("suffix", ["jfif", "jpe", "jp2", "ppm", "pgm", "pnm", "gif", "avif", "PGM"])
    def test_that_pillow_reads_are_images(self, images, suffix):
        if f".{suffix.lower()}" not in image_suffixes():
            pytest.skip("this Pillow does not read it")
        save(images / f"a.{suffix}", CLASSES if suffix.lower() == "pgm" else RGB)
        assert SegmentationFolder(images)[0].shape == (3, 4, 6)

    def test_that_are_none_are_counted_and_told(self, images):
        fill(images, None, "a")
        for name in ("b.npy", "x/c.NPY", "d.heic", ".e.heic", "Desktop.ini", "Thumbs.db", ".git/f.heic"):
            (images / name).parent.mkdir(exist_ok=True)
            (images / name).write_text("")
        with pytest.warns(DataWarning) as caught:
            dataset = SegmentationFolder(images)
        assert [str(warning.message).partition(". ")[0] for warning in caught] == [
            f"3 files in {images} were left out, as they are not images that SegmentationFolder reads: 2 .npy, 1 .heic"
        ]
        assert caught[0].filename == __file__
        assert dataset.left_out == {".npy": 2, ".heic": 1}
        assert repr(dataset).endswith(": 1 items; left out: 2 .npy, 1 .heic)")

    def test_that_are_none_do_not_count_among_masks(self, images, masks):
        fill(images, masks, "a")
        (masks / "classes.txt").write_text("")
        assert SegmentationFolder(images, masks).left_out == {}

    def test_without_any_image_are_told(self, images):
        images.mkdir()
        (images / "a.npy").write_text("")
        (images / "b").write_text("")
        with pytest.raises(
            DataError, match=r"images holds no images; expected files in .*; it holds 1 without suffix, 1 \.npy$"
        ):
            SegmentationFolder(images)

    @pytest.mark.parametrize("name", ["a.", "a", "a.b.", "..a.png", "a .png", "a.b.png", "a..png", ".png"])
    def test_are_told_as_python_tells_them(self, images, name):
        fill(images, None, "other")
        (images / name).write_text("")
        stem, suffix = os.path.splitext(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert (stem in SegmentationFolder(images).ids) == (suffix == ".png" and name[0] != ".")


class TestRefuses:
    def test_an_image_without_mask(self, images, masks):
        fill(images, masks, "a", "b")
        save(images / "c" / "d.png")
        with pytest.raises(DataError, match=r"image 'c/d' has no mask: expected .*masks/c/d .*1 of 3 images"):
            SegmentationFolder(images, masks)

    def test_an_image_without_mask_and_names_no_mask_of_another_image(self, images, masks):
        fill(images, masks, "monday/0001", "tuesday/0002")
        fill(images, None, "monday/0002")
        with pytest.raises(DataError, match=r"image 'monday/0002' has no mask: .* have none\); labeled_only=True"):
            SegmentationFolder(images, masks)

    @pytest.mark.parametrize("suffix", [".jpg", ".JPG", ".webp", ".gif"])
    def test_a_mask_of_a_lossy_format(self, images, masks, suffix):
        save(images / "a.png")
        save(masks / f"a{suffix}", CLASSES)
        with pytest.raises(DataError, match=rf"masks/a\{suffix} has a format that may not preserve class indices"):
            SegmentationFolder(images, masks)

    def test_no_picture_of_a_mask_beside_the_mask(self, images, masks):
        fill(images, masks, "a")
        save(masks / "a.jpg", CLASSES)
        assert np.array_equal(SegmentationFolder(images, masks)[0][1], CLASSES)

    def test_a_mask_without_image(self, images, masks):
        fill(images, masks, "a")
        save(masks / "c" / "d.png", CLASSES)
        with pytest.raises(DataError, match=r"the mask .*masks/c/d\.png has no image 'c/d' in .*images"):
            SegmentationFolder(images, masks)

    def test_two_images_of_one_id(self, images):
        save(images / "x" / "a.png")
        save(images / "x" / "a.jpg")
        with pytest.raises(DataError, match="same id 'x/a'") as caught:
            SegmentationFolder(images)
        assert str(images / "x" / "a.png") in str(caught.value)
        assert str(images / "x" / "a.jpg") in str(caught.value)

    def test_two_masks_of_one_id(self, images, masks):
        fill(images, masks, "a")
        save(masks / "a.tif", CLASSES)
        with pytest.raises(DataError, match="same id 'a'") as caught:
            SegmentationFolder(images, masks)
        assert str(masks / "a.png") in str(caught.value)
        assert str(masks / "a.tif") in str(caught.value)

    def test_one_folder_for_both(self, images):
        fill(images, None, "a")
        with pytest.raises(DataError, match="folders of their own"):
            SegmentationFolder(images, images / ".." / "images")

    @pytest.mark.parametrize(("a", "b"), [("data", "data/masks"), ("data/images", "data")])
    def test_a_folder_inside_the_other(self, tmp_path, a, b):
        save(tmp_path / a / "a.png")
        save(tmp_path / b / "a.png", CLASSES)
        with pytest.raises(DataError, match="neither inside the other"):
            SegmentationFolder(tmp_path / a, tmp_path / b)

    def test_a_folder_that_is_missing(self, images, masks):
        with pytest.raises(DataError, match=r"there is no folder .*images"):
            SegmentationFolder(images)
        fill(images, None, "a")
        with pytest.raises(DataError, match=r"there is no folder .*masks"):
            SegmentationFolder(images, masks)

    def test_a_file_in_place_of_a_folder(self, images):
        path = save(images / "a.png")
        with pytest.raises(DataError, match=r"a\.png is not a folder"):
            SegmentationFolder(path)

    def test_a_folder_without_images(self, images):
        images.mkdir()
        (images / "a.txt").write_text("")
        with pytest.raises(DataError, match=r"images holds no images; expected files in .*\.jpg"):
            SegmentationFolder(images)

    def test_an_unknown_mode(self, images):
        fill(images, None, "a")
        with pytest.raises(ValueError, match="mode is 'BGR'"):
            SegmentationFolder(images, mode="BGR")

    def test_a_mask_of_another_size(self, images, masks):
        save(images / "a.png")
        save(masks / "a.png", CLASSES[:, :5])
        with pytest.raises(DataError, match="'a' differ in size: image 4 x 6, mask 4 x 5"):
            SegmentationFolder(images, masks)[0]

    def test_a_mask_in_color(self, images, masks):
        save(images / "a.png")
        save(masks / "a.png", RGB)
        with pytest.raises(DataError, match=r"mask of 'a' is in color; .*class_map="):
            SegmentationFolder(images, masks)[0]


class TestBrokenFiles:
    @pytest.mark.filterwarnings("ignore::UserWarning:PIL")
    @pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "tif", "webp"])
    def test_are_named_wherever_they_end(self, images, suffix):
        if suffix == "tif":
            pytest.importorskip("tifffile")
        noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
        path = save(images / "deep" / f"a.{suffix}", noise)
        whole = path.read_bytes()
        dataset = SegmentationFolder(images)
        assert dataset[0].shape == (3, 24, 24)
        for length in range(0, len(whole) // 2, 1 + len(whole) // 60):
            path.write_bytes(whole[:length])
            with pytest.raises(UnreadableImageError, match=rf"deep/a\.{suffix} cannot be read as an image: ."):
                dataset[0]

    def test_that_are_text_are_named(self, images, masks):
        fill(images, masks, "a")
        (masks / "a.png").write_text("version https://git-lfs.github.com/spec/v1")
        with pytest.raises(UnreadableImageError, match=r"masks/a\.png cannot be read as an image"):
            SegmentationFolder(images, masks)[0]

    def test_that_vanished_are_named(self, images):
        fill(images, None, "a")
        dataset = SegmentationFolder(images)
        (images / "a.png").unlink()
        with pytest.raises(UnreadableImageError, match=r"images/a\.png cannot be read"):
            dataset[0]

    def test_that_pil_takes_for_bombs_are_named(self, images, monkeypatch):
        fill(images, None, "a")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)
        with pytest.raises(DataError, match=r"a\.png has more pixels .*PIL\.Image\.MAX_IMAGE_PIXELS = None") as error:
            SegmentationFolder(images)[0]
        assert not isinstance(error.value, UnreadableImageError)  # which skip_unreadable would swallow


def gray_16(values=(0, 128, 129, 32896, 65535)):
    return Image.fromarray(np.array([values], dtype=np.uint16))


def paletted(transparency=None):
    image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8))
    image.putpalette([10, 20, 30, 40, 50, 60])
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


class TestImagesOf:
    MODES = ("1", "L", "LA", "P", "RGB", "RGBA")

    @pytest.mark.parametrize("file_mode", MODES)
    @pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1), ("RGBA", 4)])
    def test_every_mode_become_the_one_asked_for(self, images, file_mode, mode, channels):
        save(images / "a.png", Image.new(file_mode, (6, 4)))
        image = SegmentationFolder(images, mode=mode)[0]
        assert image.shape == (channels, 4, 6)
        assert image.dtype == torch.uint8

    @pytest.mark.parametrize(("file_mode", "channels"), list(zip(MODES, (1, 1, 2, 3, 3, 4), strict=True)))
    def test_every_mode_keep_their_channels_without_one(self, images, file_mode, channels):
        save(images / "a.png", Image.new(file_mode, (6, 4)))
        assert SegmentationFolder(images, mode=None)[0].shape == (channels, 4, 6)

    @pytest.mark.parametrize("suffix", ["png", "tif"])
    @pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1), (None, 1)])
    def test_16_bits_keep_their_depth(self, images, suffix, mode, channels):
        save(images / f"a.{suffix}", gray_16())
        image = SegmentationFolder(images, mode=mode)[0]
        assert image.dtype == torch.float32
        assert image.shape == (channels, 1, 5)
        assert image[0, 0].tolist() == pytest.approx([value / 65535 for value in (0, 128, 129, 32896, 65535)])
        assert (image == image[:1]).all()

    def test_16_bits_in_big_endian_are_scaled(self, images):
        image = Image.frombytes("I;16B", (2, 1), bytes([255, 255, 128, 128]))
        save(images / "a.tif", image)
        assert (SegmentationFolder(images)[0] * 255).tolist() == [[[255, 128]]] * 3

    @pytest.mark.parametrize("transparency", [None, 1, bytes([255, 0])])
    def test_palettes_become_their_colors(self, images, transparency):
        save(images / "a.png", paletted(transparency))
        assert SegmentationFolder(images)[0][:, 0].T.tolist() == [[10, 20, 30], [40, 50, 60]]

    def test_transparency_is_kept_where_asked_for(self, images):
        save(images / "a.png", paletted(bytes([255, 7])))
        assert SegmentationFolder(images, mode="RGBA")[0][3].tolist() == [[255, 7]]

    def test_gray_becomes_three_equal_channels(self, images):
        save(images / "a.png", CLASSES)
        assert np.array_equal(SegmentationFolder(images)[0], np.stack([CLASSES] * 3))

    def test_cmyk_jpegs_become_rgb(self, images):
        save(images / "a.jpg", Image.new("CMYK", (6, 4)), quality=95)
        assert SegmentationFolder(images)[0].min() >= 250

    def test_floats_are_refused_by_id(self, images):
        save(images / "a.tif", np.full((4, 6), 7, dtype=np.float32))
        with pytest.raises(DataError, match=r"image 'a' holds 32-bit floats from 7 to 7.*value_range=\(0, "):
            SegmentationFolder(images)[0]


class TestOrientation:
    def upright(self, pixels, orientation):
        """What each EXIF orientation stands for, with numpy alone."""
        return {
            1: pixels,
            2: pixels[:, ::-1],
            3: pixels[::-1, ::-1],
            4: pixels[::-1],
            5: pixels.swapaxes(0, 1),
            6: pixels[::-1].swapaxes(0, 1),
            7: pixels[::-1, ::-1].swapaxes(0, 1),
            8: pixels[:, ::-1].swapaxes(0, 1),
        }[orientation]

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
    def test_of_images_is_followed(self, images, orientation, suffix):
        settings = {"lossless": True} if suffix == "webp" else {}
        save(images / f"a.{suffix}", RGB, exif=oriented(orientation), **settings)
        image = SegmentationFolder(images)[0].permute(1, 2, 0)
        assert np.array_equal(image, self.upright(RGB, orientation))

    @pytest.mark.parametrize("orientation", [3, 6])
    def test_of_jpegs_is_followed(self, images, orientation):
        path = save(images / "a.jpg", RGB, exif=oriented(orientation), quality=95)
        with Image.open(path) as image:
            stored = np.array(image)
        assert np.array_equal(SegmentationFolder(images)[0].permute(1, 2, 0), self.upright(stored, orientation))

    def test_of_images_leaves_masks_as_drawn(self, images, masks):
        save(images / "a.png", RGB, exif=oriented(6))
        save(masks / "a.png", self.upright(CLASSES, 6).copy())
        image, mask = SegmentationFolder(images, masks)[0]
        assert np.array_equal(image.permute(1, 2, 0), self.upright(RGB, 6))
        assert np.array_equal(mask, self.upright(CLASSES, 6))

    def test_of_masks_is_followed_too(self, images, masks):
        save(images / "a.png", RGB, exif=oriented(8))
        save(masks / "a.png", CLASSES, exif=oriented(8))
        assert np.array_equal(SegmentationFolder(images, masks)[0][1], self.upright(CLASSES, 8))

    def test_of_masks_with_a_palette_keeps_the_indices(self, images, masks):
        palette = Image.fromarray(CLASSES)
        palette.putpalette([9, 9, 9] * 256)
        save(images / "a.png", RGB, exif=oriented(5))
        save(masks / "a.png", palette, exif=oriented(5))
        assert np.array_equal(SegmentationFolder(images, masks)[0][1], CLASSES.T)


class TestMasksOf:
    @pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "tiff"])
    def test_8_bits_keep_every_value(self, images, masks, suffix):
        values = np.arange(256, dtype=np.uint8).reshape(16, 16)
        save(images / "a.png", values)
        save(masks / f"a.{suffix}", values)
        mask = SegmentationFolder(images, masks)[0][1]
        assert mask.dtype == torch.uint8
        assert np.array_equal(mask, values)

    @pytest.mark.parametrize("suffix", ["png", "tif"])
    def test_16_bits_keep_every_value(self, images, masks, suffix):
        values = np.array([[0, 255, 256, 34000, 65535]], dtype=np.uint16)
        save(images / "a.png", np.zeros((1, 5), dtype=np.uint8))
        save(masks / f"a.{suffix}", values)
        mask = SegmentationFolder(images, masks)[0][1]
        assert mask.dtype == torch.int32
        assert mask.tolist() == values.tolist()

    @pytest.mark.parametrize("colors", [2, 4, 16, 256])
    def test_palettes_of_any_depth_are_indices(self, images, masks, colors):
        values = np.array([[0, 1, colors - 1]], dtype=np.uint8)
        image = Image.fromarray(values)
        image.putpalette(list(range(3 * colors))[:768] if colors < 256 else [7, 8, 9] * 256)
        save(images / "a.png", values)
        save(masks / "a.png", image, bits=(colors - 1).bit_length())
        assert SegmentationFolder(images, masks)[0][1].tolist() == values.tolist()

    @pytest.mark.parametrize("bits", [2, 4])
    def test_gray_of_few_bits_is_scaled_as_pil_and_opencv_show_it(self, images, masks, bits):
        values = np.arange(2**bits, dtype=np.uint8).reshape(2, -1)
        save(images / "a.png", np.zeros(values.shape, dtype=np.uint8))
        packed = np.packbits(np.unpackbits(values[..., None], axis=-1)[..., 8 - bits :].reshape(2, -1), axis=1)
        rows = b"".join(b"\0" + row.tobytes() for row in packed)
        header = struct.pack(">IIBBBBB", values.shape[1], 2, bits, 0, 0, 0, 0)
        chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
        masks.mkdir()
        (masks / "a.png").write_bytes(
            b"\x89PNG\r\n\x1a\n"
            + b"".join(
                struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
                for kind, data in chunks
            )
        )
        assert SegmentationFolder(images, masks)[0][1].tolist() == (values * {2: 85, 4: 17}[bits]).tolist()

    @pytest.mark.parametrize("suffix", ["png", "bmp"])
    def test_black_and_white_are_0_and_255(self, images, masks, suffix):
        save(images / "a.png", np.zeros((1, 2), dtype=np.uint8))
        save(masks / f"a.{suffix}", np.array([[False, True]]))
        assert SegmentationFolder(images, masks)[0][1].tolist() == [[0, 255]]
        assert SegmentationFolder(images, masks, class_map={0: 0, 255: 1})[0][1].tolist() == [[0, 1]]

    def test_get_the_classes_of_a_map(self, images, masks):
        save(images / "a.png", np.zeros((1, 3), dtype=np.uint8))
        save(masks / "a.png", np.array([[0, 255, 7]], dtype=np.uint8))
        assert SegmentationFolder(images, masks, class_map={0: 0, 255: 1})[0][1].tolist() == [[0, 1, 255]]
        assert SegmentationFolder(images, masks, class_map={7: 1}, unmapped=0)[0][1].tolist() == [[0, 0, 1]]
        strict = SegmentationFolder(images, masks, class_map={0: 0, 255: 1}, unmapped=None)
        with pytest.raises(DataError, match="mask of 'a' holds the value 7, which class_map does not have"):
            strict[0]


def test_repr_tells_folders_and_size(images, masks):
    fill(images, masks, "a", "b")
    text = repr(SegmentationFolder(images, masks))
    assert str(images) in text
    assert str(masks) in text
    assert "2 items" in text


@pytest.mark.skipif(not CAMVID.is_dir(), reason=f"CamVid is not at {CAMVID}; STSEG_CAMVID says where it is")
class TestCamVid:
    def test_has_all_its_pairs(self):
        for part, count in (("train", 367), ("val", 101)):
            assert len(SegmentationFolder(CAMVID / part / "images", CAMVID / part / "masks")) == count

    def test_items_are_what_pil_reads(self):
        dataset = SegmentationFolder(CAMVID / "val" / "images", CAMVID / "val" / "masks")
        image, mask = dataset[5]
        with Image.open(CAMVID / "val" / "images" / f"{dataset.ids[5]}.jpg") as jpeg:
            assert np.array_equal(image.permute(1, 2, 0), ImageOps.exif_transpose(jpeg).convert("RGB"))
        with Image.open(CAMVID / "val" / "masks" / f"{dataset.ids[5]}.png") as png:
            assert np.array_equal(mask, np.array(png))
        assert set(mask.unique().tolist()) <= {*range(11), 255}

    def test_splits_divide_the_training_images(self):
        folder = CAMVID / "splits" / "1_8" / "seed_0"
        labeled, unlabeled = (read_ids(folder / f"{name}.txt") for name in ("labeled", "unlabeled"))
        images, masks = CAMVID / "train" / "images", CAMVID / "train" / "masks"
        assert SegmentationFolder(images, masks, ids=labeled).ids == labeled
        assert sorted(labeled + unlabeled) == SegmentationFolder(images).ids
