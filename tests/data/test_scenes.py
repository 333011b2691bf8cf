from __future__ import annotations

import numpy as np
import pytest
import torch

from stseg.data import SyntheticScenes


def test_are_images_and_masks_of_the_size_asked_for():
    for size, shape in ((32, (32, 32)), ((24, 40), (24, 40))):
        image, mask = SyntheticScenes(1, size=size)[0]
        assert (image.shape, image.dtype) == ((3, *shape), torch.uint8)
        assert (mask.shape, mask.dtype) == (shape, torch.uint8)


def test_of_a_seed_are_the_same_however_many_there_are():
    few, many = SyntheticScenes(2, size=32, seed=4), SyntheticScenes(30, size=32, seed=4)
    for index in range(2):
        assert all(torch.equal(a, b) for a, b in zip(few[index], many[index], strict=True))
    assert many.ids[:2] == few.ids == ["scene_4_00000", "scene_4_00001"]


def test_differ_from_each_other_and_from_those_of_other_seeds():
    scenes = [SyntheticScenes(5, size=32, seed=seed)[index] for seed in (0, 1) for index in range(5)]
    assert len({image.numpy().tobytes() for image, _ in scenes}) == 10
    assert not set(SyntheticScenes(9, seed=1).ids) & set(SyntheticScenes(9, seed=11).ids)


def test_hold_all_classes_and_no_other():
    masks = torch.stack([mask for _, mask in (SyntheticScenes(40, size=64, seed=2)[i] for i in range(40))])
    counts = torch.bincount(masks.flatten().long(), minlength=7)
    assert len(counts) == len(SyntheticScenes.classes) == 7
    assert (counts > 0.02 * counts.sum()).all()


def test_cannot_be_told_apart_by_color():
    """A pixel's color alone gives a class far less often than the network of the demo finds it."""
    pixels, classes = [], []
    scenes = SyntheticScenes(60, size=48, seed=5)
    for index in range(60):
        image, mask = scenes[index]
        pixels.append(image.flatten(1).T.double().numpy())
        classes.append(mask.flatten().numpy())
    train, test = np.concatenate(pixels[:40]), np.concatenate(pixels[40:])
    means = np.stack([train[np.concatenate(classes[:40]) == k].mean(0) for k in range(7)])
    guess = ((test[:, None] - means) ** 2).sum(2).argmin(1)
    assert (guess == np.concatenate(classes[40:])).mean() < 0.4


def test_items_can_be_changed_without_harm():
    scenes = SyntheticScenes(1, size=32)
    image, mask = scenes[0]
    image.zero_()
    mask.zero_()
    assert scenes[0][0].any()
    assert scenes[-1][1].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n is 0; expected 1 or more"),
        ({"n": 1, "size": 8}, "size is 8; expected sides of 16"),
        ({"n": 1, "seed": -1}, "seed is -1; expected 0 or more"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SyntheticScenes(**options)


def test_outside_the_set_are_refused():
    with pytest.raises(IndexError, match="scene 3 of 3"):
        SyntheticScenes(3)[3]
    assert len(list(SyntheticScenes(3, size=16))) == 3
