"""Folders of images and masks: what is labeled, unlabeled and held out, and training on them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from folders import picture, save, write_folders
from PIL import Image

import stseg
from stseg.folders import Folders, Training, folders_of, train_folders

MAP = {0: 0, 255: 1}
NETWORK = {"network": "FPN", "encoder": "tu-test_resnet", "weights": None}
TINY = Training(**NETWORK, crop=32, settings={"steps": 3, "batch_size": 2})


@pytest.fixture
def root(tmp_path):
    return write_folders(tmp_path)


def folders(root, **given):
    return Folders(images=root / "images", masks=root / "masks", **{"class_map": MAP, **given})


class TestFolders:
    def test_images_without_a_mask_are_unlabeled(self, root):
        assert folders(root).labeled().ids == ["00", "01", "02", "03"]
        assert folders(root).images_only().ids == [f"{index:02d}" for index in range(4, 10)]
        assert folders(root).validation() is None

    def test_held_out_masks_are_in_one_part_alone(self, root):
        split = folders(root, val=1)
        labeled, val = split.labeled().ids, split.validation().ids
        assert (len(labeled), len(val)) == (3, 1)
        assert sorted(labeled + val) == folders(root).labeled().ids
        assert split.images_only().ids == folders(root).images_only().ids
        assert folders(root, val=0.5, seed=3).validation().ids == folders(root, val=2, seed=3).validation().ids

    def test_validation_of_its_own(self, root, tmp_path):
        other = write_folders(tmp_path / "other", masked=2, plain=1)
        held_out = folders(root, val_images=other / "images", val_masks=other / "masks").validation()
        assert held_out.ids == ["00", "01"]

    def test_further_images_of_the_same_name(self, root):
        """The same images count once; others of the same name get a prefix."""
        save(picture(0), root / "more" / "00.png")  # a labeled one
        save(picture(5), root / "more" / "05.png")  # an unlabeled one
        assert folders(root, unlabeled=root / "more").images_only().ids == folders(root).images_only().ids
        save(picture(77), root / "more" / "77.png")
        both = folders(root, unlabeled=root / "more").images_only()
        assert both.ids == [*folders(root).images_only().ids, "77"]
        save(picture(99), root / "more" / "01.png")
        both = folders(root, unlabeled=root / "more").images_only()
        assert both.ids == [*folders(root).images_only().ids, "unlabeled/01", "unlabeled/77"]
        assert len(both) == len(both.ids)
        assert torch.equal(both[len(both) - 2], torch.from_numpy(picture(99)).permute(2, 0, 1))
        (root / "more/01.png").write_bytes(b"broken")  # is named when it is read
        assert folders(root, unlabeled=root / "more").images_only().ids == both.ids

    def test_masks_beside_their_images(self, tmp_path):
        for index in range(3):
            save(picture(index), tmp_path / f"{index}.png")
        save(np.zeros((40, 48), np.uint8), tmp_path / "0_mask.png")
        beside = Folders(images=tmp_path, masks=tmp_path, mask_suffix="_mask")
        assert (beside.labeled().ids, beside.images_only().ids) == (["0"], ["1", "2"])
        assert beside.without_masks(beside.labeled()).ids == ["0"]

    def test_all_images_have_a_mask(self, tmp_path):
        assert folders(write_folders(tmp_path, plain=0)).images_only() is None

    def test_number_of_classes_and_values(self, root):
        assert (folders(root).num_classes(), folders(root).values()) == (2, (0, 255))
        assert folders(root, class_map=None, classes=["a", "b", "c"]).num_classes() == 3
        assert folders(root, class_map=None, classes=["a", "b"]).values() is None
        assert folders(root, class_map={7: 0, 8: 0, 9: 1, 3: 255}).num_classes() == 2
        assert folders(root, class_map={7: 0, 8: 0, 9: 1, 3: 255}).values() == (7, 9)
        assert folders(root, class_map={(0, 0, 0): 0, (9, 9, 9): 1}).values() is None
        assert folders(root, class_map=None, classes=150).num_classes() == 150
        with pytest.raises(stseg.DataError, match="number of classes is not known; expected classes=, names or a num"):
            folders(root, class_map=None).num_classes()

    def test_crops_are_multiples_of_32_in_the_short_side(self, root, tmp_path):
        assert folders(root).suggest_crop() == 64
        save(picture(0, (300, 200)), tmp_path / "large/images/0.png")
        save(np.zeros((300, 200), np.uint8), tmp_path / "large/masks/0.png")
        assert folders(tmp_path / "large").suggest_crop() == 192

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (
                {"classes": ["nucleus"], "class_map": {0: 0, 255: 1}},
                "class_map has the class 1, and classes has 1; expected 2, with the background",
            ),
            ({"val_images": "x"}, "val_images and val_masks go together"),
            ({"classes": 1}, "classes is 1; expected 2 or more"),
            ({"val": 2, "val_images": "x", "val_masks": "y"}, "val and val_images are both given"),
        ],
    )
    def test_mistakes(self, root, given, message):
        with pytest.raises(ValueError, match=message):
            folders(root, **given)


class TestTraining:
    def test_a_run_and_what_it_says_of_its_files(self, root, tmp_path):
        result = train_folders(folders(root, val=1), tmp_path / "run", TINY, progress=False)
        assert {"supervised", "consistency", "miou"} <= result.stages["train"].history[-1].keys()
        model = stseg.load(tmp_path / "run")
        for one, other in zip(model.parameters(), result.model.parameters(), strict=True):
            assert torch.equal(one, other)
        found = folders_of(tmp_path / "run")
        assert (found.class_map, found.values(), found.mode) == (MAP, (0, 255), "RGB")
        assert found.read(root / "images").ids == [f"{index:02d}" for index in range(10)]

    def test_colors_and_ranges_come_back(self, root, tmp_path):
        for path in (root / "masks").iterdir():
            foreground = np.array(Image.open(path)) > 0
            save(np.where(foreground[..., None], [200, 10, 10], [0, 0, 0]).astype(np.uint8), path)
        colors = {(0, 0, 0): 0, (200, 10, 10): 1}
        given = folders(root, class_map=colors, value_range=(0, 4095), mode=None, classes=["a", "b"])
        train_folders(given, tmp_path / "run", TINY, progress=False)
        found = folders_of(tmp_path / "run")
        assert (found.class_map, found.value_range, found.mode) == (colors, (0, 4095), None)
        assert found.classes == ["a", "b"]

    def test_the_same_call_goes_on_and_a_changed_one_is_refused(self, root, tmp_path):
        train_folders(folders(root), tmp_path / "run", TINY, progress=False)
        before = (tmp_path / "run/train/model.safetensors").stat().st_mtime_ns
        train_folders(folders(root), tmp_path / "run", TINY, progress=False)
        assert (tmp_path / "run/train/model.safetensors").stat().st_mtime_ns == before
        with pytest.raises(stseg.WorkdirMismatchError):
            train_folders(folders(root, class_map={0: 1, 255: 0}), tmp_path / "run", TINY, progress=False)

    def test_a_mistake_in_the_data_leaves_nothing_that_is_in_the_way(self, root, tmp_path):
        with pytest.raises(stseg.DataError):
            train_folders(folders(root, class_map={7: 0, 8: 1}), tmp_path / "run", TINY, progress=False)
        train_folders(folders(root), tmp_path / "run", TINY, progress=False)

    def test_supervised_needs_no_other_images(self, tmp_path):
        root = write_folders(tmp_path, plain=0)
        train_folders(folders(root), tmp_path / "run", replace(TINY, method="supervised"), progress=False)
        with pytest.raises(stseg.DataError, match=r"no unlabeled images for 'fixmatch': all images in .* have a mask"):
            train_folders(folders(root), tmp_path / "run2", TINY, progress=False)
        assert not (tmp_path / "run2").exists()

    def test_settings_reach_the_trainer(self, root, tmp_path):
        training = replace(TINY, method="cps", method_settings={"weight": 2.0}, any_orientation=True)
        trainer = training.trainer(folders(root), None)
        weak = trainer.config.weak
        assert (weak.crop_size, weak.vertical_flip, weak.quarter_turns) == ((32, 32), 0.5, True)
        assert trainer.recipe.method.settings == {"weight": 2.0}
        own = stseg.WeakAugment(321)  # the default of TrainConfig, but meant
        kept = replace(TINY, crop=None, settings={"steps": 3, "weak": own}).trainer(folders(root), None)
        assert kept.config.weak == own
        assert replace(TINY, crop=None).trainer(folders(root), None).config.weak.crop_size == (64, 64)
        assert (Training().config(crop=32).lr, Training().config(crop=32).head_lr_factor) == (3e-4, 10)
        assert (TINY.config(crop=32).lr, TINY.config(crop=32).head_lr_factor) == (1e-3, 1)
        assert replace(TINY, settings={"epochs": 7}).config(crop=32).epochs == 7
        with pytest.raises(ValueError, match="crop and the setting weak are both given"):
            replace(TINY, settings={"weak": own})

    def test_a_network_of_one_logit(self, root, tmp_path):
        training = replace(TINY, network_options={"classes": 1})
        result = train_folders(folders(root), tmp_path / "run", training, progress=False)
        assert result.model(torch.rand(1, 3, 40, 40)).shape == (1, 2, 40, 40)
        assert stseg.load(tmp_path / "run").network.segmentation_head[0].out_channels == 1

    def test_gray_images(self, root, tmp_path):
        result = train_folders(folders(root, mode="L"), tmp_path / "run", TINY, progress=False)
        assert result.model(torch.rand(1, 1, 40, 40)).shape == (1, 2, 40, 40)
