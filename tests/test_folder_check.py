"""Check of folders before a training: what it finds, and the line that it proposes."""

from __future__ import annotations

import numpy as np
import pytest
from folders import picture, save, write_folders
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import stseg
from stseg.folder_check import check_folders, class_map_option, propose_class_map
from stseg.folders import Folders, Training


@pytest.fixture
def root(tmp_path):
    return write_folders(tmp_path)


def check(root, training=None, **given):
    folders = Folders(images=root / "images", masks=root / "masks", **given)
    return check_folders(folders, training, progress=False)


def test_what_is_there(root):
    found = check(root, class_map={0: 0, 255: 1}, val=1)
    assert found.is_fine
    assert found.counts == {"labeled": 3, "unlabeled": 6, "validation": 1}
    assert (found.sizes, found.channels) == ({(40, 48): 10}, {3: 10})
    assert found.values == {0: 4 * (40 * 48 - 256), 255: 4 * 256}
    assert found.classes.pixels.tolist() == [3 * (40 * 48 - 256), 3 * 256]
    text = str(found)
    for part in ("3 labeled, 6 unlabeled, 1 validation", "40 x 48 (all)", "255 (13.3 %)", "no problem was found"):
        assert part in text


def test_masks_of_0_and_255_get_the_option_to_write(root):
    found = check(root)
    assert (found.is_fine, found.class_map, found.classes) == (False, {0: 0, 255: 1}, None)
    assert "which are not class indices 0, 1, ...; is it --class-map 0:0 255:1?" in str(found)


def test_colors_get_the_option_to_write(root):
    for path in (root / "masks").iterdir():
        save(np.zeros((40, 48, 3), np.uint8) + np.uint8([0, 0, 9]), path)
    colors = np.zeros((40, 48, 3), np.uint8)
    colors[3:, 4:] = (128, 0, 0)
    save(colors, root / "masks/00.png")
    found = check(root)
    assert found.class_map == {(0, 0, 0): 0, (0, 0, 9): 1, (128, 0, 0): 2}
    assert "--class-map 0,0,0:0 0,0,9:1 128,0,0:2" in str(found)
    assert check(root, class_map=found.class_map).classes.pixels.sum() == 4 * 40 * 48


def test_every_broken_file_is_named(root):
    (root / "images/02.png").write_bytes((root / "images/02.png").read_bytes()[:200])
    (root / "images/07.png").write_bytes(b"no image")
    (root / "masks/01.png").write_bytes((root / "masks/01.png").read_bytes()[:60])
    save(np.zeros((40, 47), np.uint8), root / "masks/03.png")
    found = check(root, class_map={0: 0, 255: 1})
    names = [skipped.id for skipped in found.unreadable]
    assert names == ["mask of labeled: 01", "labeled: 02", "mask of labeled: 03", "unlabeled: 07"]
    assert len(found.problems) == 4
    assert "03.png is 40 x 47, its image 40 x 48 (height x width); expected equal sizes" in str(found)


def test_validation_images_among_those_of_the_training(root):
    save(picture(5), root / "val/images/a.png")  # an unlabeled image
    save(picture(1), root / "val/images/b.png")  # a labeled one
    save(picture(50), root / "val/images/c.png")
    for name in "abc":
        save(np.eye(40, 48, dtype=np.uint8), root / f"val/masks/{name}.png")
    found = check(root, class_map={0: 0, 255: 1, 1: 1}, val_images=root / "val/images", val_masks=root / "val/masks")
    assert found.same == [("labeled: 01", "validation: b"), ("unlabeled: 05", "validation: a")]
    (problem,) = found.problems
    assert problem.startswith("2 validation images are among those of the training: labeled: 01 = validation: b")


def test_equal_images_in_one_part_are_no_problem(root):
    save(picture(5), root / "images/double.png")
    found = check(root, class_map={0: 0, 255: 1})
    assert (found.same, found.is_fine) == ([("unlabeled: 05", "unlabeled: double")], True)
    assert "there twice: unlabeled: 05 = unlabeled: double" in str(found)


def test_images_in_both_folders_are_noted(root):
    (root / "more").mkdir()
    for name in ("00.png", "07.png"):
        (root / "more" / name).write_bytes((root / "images" / name).read_bytes())
    save(picture(90), root / "more/90.png")
    found = check(root, class_map={0: 0, 255: 1}, unlabeled=root / "more")
    assert found.counts == {"labeled": 4, "unlabeled": 7}
    assert "in both --images and --unlabeled, counted once: 00, 07" in str(found)


@pytest.mark.parametrize("values", [(0, 255), ((0, 0, 0), (255, 255, 255))])
def test_every_mask_with_a_value_that_the_map_lacks_is_named(root, values):
    for name in ("00", "02"):
        mask = np.array(Image.open(root / f"masks/{name}.png"))
        mask[:2, :3] = 7
        save(mask if values[0] == 0 else np.stack([mask] * 3, -1), root / f"masks/{name}.png")
    for name in ("01", "03") if values[0] != 0 else ():
        save(np.stack([np.array(Image.open(root / f"masks/{name}.png"))] * 3, -1), root / f"masks/{name}.png")
    found = check(root, class_map={values[0]: 0, values[1]: 1})
    assert not found.is_fine
    for name in ("00", "02"):
        (problem,) = [each for each in found.problems if f"labeled: {name}" in each]
        assert "which class_map does not have" in problem
        assert "(unmapped=255 ignores all others)" in problem
    assert check(root, class_map={values[0]: 0, values[1]: 1}, unmapped=255).is_fine


def test_weights_that_cannot_be_had_are_a_problem_beside_the_rest(root, monkeypatch):
    def unreachable(*arguments, **options):
        raise stseg.NetworkError("no network")

    monkeypatch.setattr("stseg.folders.create_network", unreachable)
    found = check(root, Training(crop=32), class_map={0: 0, 255: 1})
    assert (found.problems, found.counts["labeled"]) == (["no network"], 4)


def test_several_numbers_of_channels(root):
    save(picture(20)[..., 0], root / "images/gray.png")
    assert check(root, class_map={0: 0, 255: 1}).is_fine
    found = check(root, class_map={0: 0, 255: 1}, mode=None)
    assert "images have 3 (10), 1 (1) channels; expected one number: --mode RGB converts all" in found.problems


def test_values_above_the_classes(tmp_path):
    root = write_folders(tmp_path, values=(0, 3))
    assert check(root).class_map == {0: 0, 3: 1}
    found = check(root, class_map={0: 0, 3: 1}, classes=["one", "two"])
    assert found.is_fine
    two = write_folders(tmp_path / "two", values=(0, 1))
    save(np.full((40, 48), 2, np.uint8), two / "masks/00.png")
    found = check(two, classes=["a", "b"])
    assert "mask of '00' holds the value 2; expected 0..1 or 255" in found.problems[0]
    assert check(two).classes.num_classes == 3


def test_classes_that_no_mask_holds_need_no_map(tmp_path):
    root = write_folders(tmp_path, values=(0, 3))
    assert "Where they are, and some classes are in no mask: --classes" in check(root).problems[0]
    for classes in (["a", "b", "c", "d"], 4):
        found = check(root, classes=classes)
        assert (found.is_fine, found.class_map, found.classes.num_classes) == (True, None, 4)


def test_shades_and_numbers_of_objects_are_no_number_of_classes(root):
    for path in (root / "masks").iterdir():
        save(np.arange(40 * 48).reshape(40, 48).astype(np.uint8) % 100, path)
    found = check(root)
    assert (
        "values up to 99, as shades of gray do, or numbers of objects; if they are 100 classes: --classes 100"
        in str(found)
    )
    assert check(root, classes=100).is_fine


def test_values_of_validation_masks(root):
    save(picture(50), root / "val/images/c.png")
    save(np.eye(40, 48, dtype=np.uint8) * 2, root / "val/masks/c.png")
    for path in (root / "masks").iterdir():
        save((np.array(Image.open(path)) > 0).astype(np.uint8), path)
    found = check(root, classes=2, val_images=root / "val/images", val_masks=root / "val/masks")
    assert "mask of 'c' holds the value 2; expected 0..1 or 255" in found.problems[0]


def test_unlabeled_images_can_be_left_out(root):
    folders = Folders(images=root / "images", masks=root / "masks", class_map={0: 0, 255: 1})
    found = check_folders(folders, unlabeled=False, progress=False)
    assert (found.counts, list(found.notes)) == ({"labeled": 4}, [])


def test_no_estimate_of_epochs(root):
    found = check(root, Training(weights=None, settings={"epochs": 3}), class_map={0: 0, 255: 1})
    assert (found.estimate, found.is_fine) == (None, True)
    assert "estimated for a length in steps" in str(found)


def test_a_single_class_is_a_problem(tmp_path):
    found = check(write_folders(tmp_path, values=(1, 1)))
    assert not found.is_fine
    assert "1" in str(found)


def test_no_unlabeled_images_are_noted(tmp_path):
    found = check(write_folders(tmp_path, plain=0), class_map={0: 0, 255: 1})
    assert found.is_fine
    assert "there are no unlabeled images" in str(found)


@pytest.mark.parametrize("method", ["fixmatch", "st", "supervised"])
def test_an_estimate(root, method):
    tiny = {"network": "FPN", "encoder": "tu-test_resnet", "weights": None, "crop": 32}
    training = Training(method=method, **tiny, settings={"batch_size": 2, "steps": 1000})
    found = check(root, training, class_map={0: 0, 255: 1})
    trainings = 2 if method == "st" else 1
    assert found.estimate.seconds >= 1000 * trainings * found.estimate.step_seconds > 0
    assert found.estimate.memory > 2**20
    assert "training     about " in str(found)


def test_no_estimate_of_data_with_a_problem(root):
    assert check(root, Training(weights=None)).estimate is None


@given(st.sets(st.integers(0, 300), max_size=8))
def test_a_proposed_map_takes_each_value_to_a_class_of_its_own(values):
    proposed = propose_class_map(values)
    plain = values - {255}
    if proposed is None:
        assert len(values) < 2 or plain == set(range(len(plain)))
    else:
        assert set(proposed) == values
        assert sorted(proposed.values()) == list(range(len(values)))
        assert [proposed[value] for value in sorted(values)] == list(range(len(values)))


def test_values_that_are_classes_need_no_map():
    assert propose_class_map([]) is None
    assert propose_class_map([0, 1]) is None
    assert propose_class_map([0, 1, 255]) is None
    assert propose_class_map([0]) is None
    assert propose_class_map([1, 2]) == {1: 0, 2: 1}
    assert class_map_option({1: 0, 2: 1}) == "--class-map 1:0 2:1"


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(stseg.DataError, match=r"there is no folder .*images"):
        check(tmp_path)
