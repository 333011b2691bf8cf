"""Pixels of each class, and what is said of masks that cannot have been meant."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.utils.data import ConcatDataset, Subset

import stseg
from stseg.data import ClassMap, ListedFiles, SegmentationFolder
from stseg.errors import DataError, DataWarning
from stseg.inference.class_counts import ClassCounts

CONFIG = stseg.TrainConfig(steps=2, batch_size=2, weak=stseg.WeakAugment(16))


def fit(labeled, classes=2, **options):
    return stseg.fit(nn.Conv2d(3, classes, 1), labeled, CONFIG, progress=False, **options)


def squares(values, count=4, dtype=torch.uint8):
    """Masks of equal stripes of some values, beside images."""
    dtype = torch.int32 if min(values) < 0 else dtype
    mask = torch.tensor(values, dtype=dtype).repeat_interleave(4)[None].expand(20, -1).contiguous()
    return [(torch.rand(3, *mask.shape), mask)] * count


@settings(deadline=None, derandomize=True)
@given(st.lists(st.lists(st.sampled_from([0, 1, 2, 3, 255]), min_size=1, max_size=9), min_size=1, max_size=4))
def test_counts_are_those_of_a_loop(masks):
    counts = ClassCounts(4)
    for mask in masks:
        counts.add(torch.tensor([mask], dtype=torch.uint8))
    values = [value for mask in masks for value in mask]
    assert counts.pixels.tolist() == [values.count(index) for index in range(4)]
    assert counts.masks.tolist() == [sum(index in mask for mask in masks) for index in range(4)]
    assert counts.ignored == values.count(255)


@pytest.mark.parametrize(("ignore_index", "dtype"), [(255, torch.uint8), (300, torch.int32), (-1, torch.int32)])
def test_the_ignore_index_may_be_any_other_value(ignore_index, dtype):
    counts = ClassCounts(2, ignore_index)
    counts.add(torch.tensor([[0, 1, 1, ignore_index]], dtype=dtype))
    assert (counts.pixels.tolist(), counts.ignored) == ([1, 2], 1)
    counts = ClassCounts(256, -1)
    counts.add(torch.tensor([[0, 255]], dtype=torch.uint8))
    assert counts.pixels[255] == 1


@pytest.mark.parametrize("classes", [2, 5, 21])
@pytest.mark.parametrize("as_validation", [False, True])
def test_masks_of_0_and_255_are_refused_with_the_line_to_write(classes, as_validation):
    bad, good = squares([0, 255]), squares([0, 1, 255])
    name = "validation" if as_validation else "labeled"
    with pytest.raises(DataError, match=rf"masks of the {name} data set hold the values 0 and 255 alone") as error:
        fit(good if as_validation else bad, classes, val=bad if as_validation else None)
    assert "class_map={0: 0, 255: 1}" in str(error.value)
    with pytest.raises(DataError, match=r"class_map=\{0: 0, 255: 1\}"):
        stseg.SelfTrainer(
            lambda: nn.Conv2d(3, classes, 1), num_classes=classes, config=CONFIG, method="supervised", progress=False
        ).fit(good if as_validation else bad, val=bad)
    with pytest.raises(DataError, match=r"class_map=\{0: 0, 255: 1\}"):
        stseg.evaluate(nn.Conv2d(3, classes, 1), bad, num_classes=classes, progress=False)


@pytest.mark.parametrize("values", [[0], [1], [1, 255], [0, 0]])
def test_masks_of_one_class_are_refused(values):
    with pytest.raises(DataError, match=r"(have the class [01]; expected two of the 3 classes|0 and 255 alone)"):
        fit(squares(values), 3)


def test_masks_of_nothing_but_the_ignore_index_are_refused():
    with pytest.raises(DataError, match="hold nothing but the ignore index 255"):
        fit(squares([255]))


def test_classes_that_no_mask_holds_are_named():
    with pytest.warns(
        DataWarning, match=r"no mask of the labeled data set holds the classes 2, 4 \(2 of 5; the network"
    ):
        fit(squares([0, 1, 3]), 5)
    with pytest.warns(DataWarning, match=r"validation data set holds the class 1 \(1 of 2; the mIoU leaves"):
        fit(squares([0, 1]), val=squares([0]))
    with pytest.warns(DataWarning, match=r"the classes 2, 3, 4, 5, 6, 7, 8, 9, \.\.\. \(19 of 21;"):
        fit(squares([0, 1]), 21)


@pytest.mark.parametrize(
    ("values", "classes", "line"),
    [
        ([0, 255, 128], 2, "class_map={0: 0, 128: 1, 255: 2}"),
        ([0, 128], 2, "class_map={0: 0, 128: 1}"),
        ([-100, 0, 1, -1], 2, "class_map={0: 0, 1: 1}"),
        ([1, 2], 2, "class_map={i: i - 1 for i in range(1, 3)}"),
        ([0, 1, 2, 3, 4], 4, "class_map={i: i - 1 for i in range(1, 5)}"),
        ([0, 7, 26, 255], 19, "class_map={0: 0, 7: 1, 26: 2, 255: 3}"),
    ],
)
def test_values_that_are_no_classes_are_refused_with_the_line_to_write(values, classes, line):
    with pytest.raises(DataError, match=r"expected 0\.\.") as error:
        fit(squares(values), classes)
    assert line in str(error.value)
    assert "stseg.data.ClassMap" in str(error.value)


def test_minus_one_is_no_class():
    with pytest.raises(DataError, match=r"holds the value -1; expected 0\.\.1 or 255"):
        fit(squares([0, 1, -1], dtype=torch.int64))


class TestClassMaps:
    """Keys of a class_map that no mask holds."""

    @pytest.fixture
    def folders(self, tmp_path):
        for index in range(4):
            mask = np.zeros((20, 20), np.uint8)
            mask[index : index + 9] = 255
            mask[-1] = 128 if index == 3 else 0
            for name, array in (("images", mask), ("masks", mask)):
                (tmp_path / name).mkdir(exist_ok=True)
                Image.fromarray(array).save(tmp_path / name / f"{index}.png")
        return tmp_path / "images", tmp_path / "masks"

    @pytest.mark.parametrize("workers", [0, 1])
    def test_are_warned_of(self, folders, workers):
        config = stseg.TrainConfig(steps=2, batch_size=2, weak=stseg.WeakAugment(16), num_workers=workers)
        data = SegmentationFolder(*folders, class_map={0: 0, 255: 1, 128: 1, 7: 1, 9: 0})
        with pytest.warns(
            DataWarning, match=r"no mask of the labeled data set holds 7, 9, which class_map names"
        ) as caught:
            stseg.fit(nn.Conv2d(3, 2, 1), data, config, progress=False)
        assert len(caught) == 1

    def test_met_in_a_single_mask_are_met(self, folders):
        data = SegmentationFolder(*folders, class_map={0: 0, 255: 1, 128: 1})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fit(ConcatDataset([Subset(data, [0, 1]), Subset(data, [2, 3])]))
        with pytest.warns(DataWarning, match="holds 128, which class_map names"):
            fit(Subset(data, [0, 1, 2]))

    def test_that_name_only_the_foreground_are_refused(self, folders):
        with (
            pytest.warns(DataWarning, match="class_map names"),
            pytest.raises(DataError, match=r"have the class 1;.*ignored"),
        ):
            fit(SegmentationFolder(*folders, class_map={255: 1, 254: 1}))

    def test_of_a_1_bit_png_are_those_of_8_bits(self, folders):
        for path in folders[1].iterdir():
            with Image.open(path) as image:
                image.convert("L").point(lambda value: 255 * (value > 200)).convert("1").save(path)
        fit(SegmentationFolder(*folders, class_map={0: 0, 255: 1}))
        with pytest.raises(DataError, match=r"class_map=\{0: 0, 255: 1\}"):
            fit(SegmentationFolder(*folders))

    def test_in_a_data_set_of_ones_own(self, folders):
        classes = ClassMap({0: 0, 255: 1, 128: 1, 5: 1})
        names = sorted(folders[0].iterdir())
        pairs = [(Image.open(path), classes(Image.open(folders[1] / path.name))) for path in names]
        assert set(torch.cat([mask.unique() for _, mask in pairs]).tolist()) == {0, 1}

        class Own(torch.utils.data.Dataset):
            def __len__(self):
                return len(names)

            def __getitem__(self, index):
                return Image.open(names[index]).convert("RGB"), classes(Image.open(folders[1] / names[index].name))

        with pytest.warns(DataWarning, match="holds 5, which class_map names"):
            fit(Own())

    def test_of_colors_too(self, folders):
        for path in folders[1].iterdir():
            with Image.open(path) as image:
                image.convert("RGB").save(path)
        data = ListedFiles(
            folders[0].parent,
            [(f"images/{i}.png", f"masks/{i}.png") for i in range(4)],
            class_map={(0, 0, 0): 0, (255, 255, 255): 1, (1, 2, 3): 1},
        )
        with pytest.warns(DataWarning, match=r"holds \(1, 2, 3\), which class_map names"):
            fit(data)


def test_the_table_is_shown_and_kept(tmp_path, capsys):
    data = squares([0, 0, 1, 255])
    trainer = stseg.SelfTrainer(
        lambda: nn.Conv2d(3, 2, 1), num_classes=2, config=CONFIG, method="supervised", workdir=tmp_path, progress=True
    )
    trainer.fit(data, val=squares([0, 1]))
    shown = capsys.readouterr().err
    assert "labeled: 4 masks" in shown
    assert "50.00 %" in shown
    assert "validation: 4 masks" in shown
    record = json.loads((tmp_path / "run.json").read_text())["data"]
    assert record["labeled classes"] == {"pixels": [640, 320], "masks": [4, 4], "ignored": 320}
    report = (tmp_path / "report.html").read_text()
    assert "<h2>Classes</h2>" in report
    assert "50.00 %" in report


def test_masks_that_were_resized_with_interpolation_are_warned_of(tmp_path):
    for index in range(4):
        mask = np.zeros((10, 10), np.uint8)
        mask[index : index + 5, 2:7] = 255
        Image.fromarray(mask).resize((40, 40), Image.Resampling.BICUBIC).save(tmp_path / f"{index}_mask.png")
        Image.new("RGB", (40, 40)).save(tmp_path / f"{index}.png")
    data = SegmentationFolder(tmp_path, tmp_path, mask_suffix="_mask", class_map={0: 0, 255: 1})
    with pytest.warns(DataWarning, match=r"hold \d+ values that class_map does not name, such as \d+, .*unmapped=None"):
        fit(data)


def test_a_class_map_of_some_of_many_values_is_not(tmp_path):
    """As 19 of the 34 of Cityscapes."""
    for index in range(4):
        Image.fromarray(np.arange(34, dtype=np.uint8)[None].repeat(20, 0)).save(tmp_path / f"{index}_mask.png")
        Image.new("RGB", (34, 20)).save(tmp_path / f"{index}.png")
    class_map = {value: place for place, value in enumerate(range(7, 26))}
    data = SegmentationFolder(tmp_path, tmp_path, mask_suffix="_mask", class_map=class_map)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(data, 19)


@pytest.mark.parametrize("class_map", [None, {0: 0, 255: 1}, {0: 0, 1: 1}])
def test_masks_of_0_and_1_beside_masks_of_0_and_255_are_warned_of(tmp_path, class_map):
    for index in range(4):
        mask = np.zeros((20, 20), np.uint8)
        mask[5:15] = 255 if index % 2 else 1
        Image.fromarray(mask).save(tmp_path / f"{index}_mask.png")
        Image.new("RGB", (20, 20)).save(tmp_path / f"{index}.png")
    data = SegmentationFolder(tmp_path, tmp_path, mask_suffix="_mask", class_map=class_map)
    with pytest.warns(DataWarning, match=r"2 of the 4 masks .*class_map=\{0: 0, 1: 1, 255: 1\}"):
        fit(data)
    with pytest.warns(DataWarning, match=r"2 of the 4 masks"):
        stseg.evaluate(nn.Conv2d(3, 2, 1), data, num_classes=2, progress=False)
    both = SegmentationFolder(tmp_path, tmp_path, mask_suffix="_mask", class_map={0: 0, 1: 1, 255: 1})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(both)


def test_masks_with_ignored_borders_are_not():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(squares([0, 1, 255], 2) + squares([0, 255], 2))


def test_palettes_that_differ_are_warned_of(tmp_path):
    for index in range(4):
        mask = Image.fromarray(np.array([[0, 1]] * 20, np.uint8).repeat(10, 1))
        mask.putpalette([0, 0, 0, 255, 0, 0] if index % 2 else [255, 0, 0, 0, 0, 0])
        mask.save(tmp_path / f"{index}_mask.png")
        Image.new("RGB", (20, 20)).save(tmp_path / f"{index}.png")
    with pytest.warns(DataWarning, match=r"palettes .* differ: index 0 is \(0, 0, 0\) in one file and \(255, 0, 0\)"):
        fit(SegmentationFolder(tmp_path, tmp_path, mask_suffix="_mask"))
    colors = {(0, 0, 0): 0, (255, 0, 0): 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(SegmentationFolder(tmp_path, tmp_path, mask_suffix="_mask", class_map=colors))


def test_an_evaluation_of_nothing_is_refused():
    with pytest.raises(DataError, match="evaluated data set hold nothing but the ignore index 255"):
        stseg.evaluate(nn.Conv2d(3, 2, 1), squares([255]), num_classes=2, progress=False)
