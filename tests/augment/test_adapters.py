"""Augmentations of other libraries."""

from __future__ import annotations

import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import kornia.augmentation as K
import numpy as np
import pytest
import torch
import torchvision.transforms as v1
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2

import stseg
from stseg.augment import (
    as_batch_augmentation,
    as_pair_transform,
    from_albumentations,
    from_kornia,
    from_torchvision,
)
from stseg.seeds import fixed_seed


def sample(height=12, width=17, dtype=torch.uint8):
    """An image whose first channel is the mask: what moves one must move the other."""
    mask = torch.arange(height * width).reshape(height, width) % 200
    image = torch.stack([mask, mask.flip(0), mask.flip(1)]).byte()
    return image, mask.to(dtype)


def batch(size=4, height=16, width=20, dtype=torch.int64):
    mask = torch.randint(0, 5, (size, height, width), dtype=dtype)
    images = torch.stack([mask / 8 + 0.25, torch.rand(mask.shape), torch.rand(mask.shape)], 1)
    return images, mask


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


class TestTorchvision:
    @pytest.mark.parametrize(
        "transform",
        [
            v2.RandomHorizontalFlip(p=1),
            v2.RandomVerticalFlip(p=1),
            v2.RandomCrop((7, 9)),
            v2.Compose([v2.RandomHorizontalFlip(), v2.RandomCrop(8)]),
            nn.Sequential(v2.RandomVerticalFlip(), v2.RandomCrop(8)),
            v2.RandomRotation((90, 90), expand=True),
        ],
        ids=["mirror", "upside down", "crop", "composed", "in sequence", "turn"],
    )
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
    def test_geometry_moves_both(self, transform, dtype):
        image, mask = sample(dtype=dtype)
        new, moved = from_torchvision(transform)(image, mask)
        assert type(new) is type(moved) is torch.Tensor
        assert torch.equal(new[0].int(), moved.int())
        assert moved.dtype == dtype
        assert not torch.equal(moved, mask)

    def test_masks_are_resized_by_nearest_neighbor(self):
        image, mask = sample()
        _, moved = from_torchvision(v2.Resize((31, 45)))(image, 100 * (mask > 100).byte())
        assert set(moved.unique().tolist()) == {0, 100}

    def test_what_comes_from_outside_is_ignored_where_told_so(self):
        image, mask = sample()
        turned = from_torchvision(v2.RandomRotation((30, 30), fill={tv_tensors.Image: 0, tv_tensors.Mask: 255}))
        new, moved = turned(image + 1, mask)
        assert ((moved == 255) == (new.sum(0) == 0)).all()
        assert (moved == 255).any()

    def test_colors_change_in_the_image_alone(self):
        image, mask = sample()
        new, moved = from_torchvision(v2.ColorJitter(0.5, 0.5))(image, mask)
        assert torch.equal(moved, mask)
        assert not torch.equal(new, image)

    def test_draws_from_the_seed_and_changes_no_input(self):
        image, mask = sample()
        before = image.clone(), mask.clone()
        transform = from_torchvision(v2.Compose([v2.RandomCrop(5), v2.ColorJitter(0.5)]))
        results = []
        for seed in (3, 3, 4):
            with fixed_seed(seed):
                results.append(transform(image, mask))
        assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
        assert not torch.equal(results[0][0], results[2][0])
        assert torch.equal(image, before[0])
        assert torch.equal(mask, before[1])

    @pytest.mark.parametrize("thing", [v1.RandomCrop(5), nn.Sequential(), nn.Sequential(nn.ReLU()), None, 3])
    def test_refuses_what_is_none_of_it(self, thing):
        with pytest.raises(TypeError, match=r"expected one of torchvision\.transforms\.v2"):
            from_torchvision(thing)


class Pipeline:
    """As albumentations is called; draws from the global generators, as its first versions did."""

    def __init__(self, to_tensor=False, keys=("image", "mask")):
        self.to_tensor, self.keys, self.seen = to_tensor, keys, []

    def __call__(self, *, image, mask):
        self.seen.append((image.dtype, image.shape, mask.dtype, mask.shape))
        image[:] = image[:]  # it may write into its arrays
        mask += 0
        left = random.randrange(5)
        top = np.random.randint(4)  # noqa: NPY002
        image, mask = image[top:, left:][:, ::-1], mask[top:, left:][:, ::-1]
        if self.to_tensor:
            image, mask = torch.from_numpy(image.transpose(2, 0, 1).copy()), torch.from_numpy(mask.copy())
        return {key: value for key, value in {"image": image, "mask": mask, "extra": 1}.items() if key in self.keys}


class Seeded(Pipeline):
    """With generators of its own, as the second versions have."""

    def set_random_seed(self, seed):
        self.generator = np.random.default_rng(seed)

    def __call__(self, *, image, mask):
        left = self.generator.integers(5)
        return {"image": image[:, left:], "mask": mask[:, left:]}


class TestAlbumentations:
    @pytest.mark.parametrize("to_tensor", [False, True])
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
    def test_gets_arrays_and_gives_tensors(self, to_tensor, dtype):
        image, mask = sample(dtype=dtype)
        pipeline = Pipeline(to_tensor)
        new, moved = from_albumentations(pipeline)(image, mask)
        wanted = np.uint8 if dtype == torch.uint8 else np.float32
        assert pipeline.seen == [(np.uint8, (12, 17, 3), wanted, (12, 17))]
        assert torch.equal(new[0].int(), moved.int())
        assert (new.dtype, moved.dtype) == (torch.uint8, dtype)
        assert new.shape[0] == 3

    def test_keeps_float_images_and_negative_classes(self):
        image, mask = sample(dtype=torch.int32)
        mask[mask == 7] = -100
        new, moved = from_albumentations(Seeded())(image / 255, mask)
        assert new.dtype == torch.float32
        assert (moved == -100).any()

    def test_gives_a_channel_to_images_that_lost_it(self):
        image, mask = sample()
        new, _ = from_albumentations(lambda image, mask: {"image": image[:, :, 0], "mask": mask})(image, mask)
        assert torch.equal(new, image[:1])

    @pytest.mark.parametrize("pipeline", [Pipeline(), Seeded()], ids=["global generators", "its own"])
    def test_draws_from_the_seed_and_changes_no_input(self, pipeline):
        image, mask = sample()
        before = image.clone(), mask.clone()
        transform, results = from_albumentations(pipeline), []
        for seed in (3, 3, *range(4, 10)):
            with fixed_seed(seed):
                results.append(transform(image, mask)[0])
        assert torch.equal(results[0], results[1])
        assert len({result.shape for result in results}) > 1
        assert torch.equal(image, before[0])
        assert torch.equal(mask, before[1])

    def test_names_what_is_missing(self):
        with pytest.raises(TypeError, match=r"Pipeline.*returned \['image'\]; expected 'image' and 'mask'"):
            from_albumentations(Pipeline(keys=("image",)))(*sample())
        with pytest.raises(TypeError, match=r"returned tuple; expected 'image' and 'mask'"):
            from_albumentations(lambda image, mask: (image, mask))(*sample())

    @pytest.mark.parametrize("thing", [None, "flip", Pipeline])
    def test_refuses_what_is_no_pipeline(self, thing):
        with pytest.raises(TypeError, match="expected an albumentations pipeline"):
            from_albumentations(thing)

    def test_works_with_the_real_package(self):
        A = pytest.importorskip("albumentations")
        pipeline = A.Compose(
            [
                A.HorizontalFlip(),
                A.RandomRotate90(),
                A.Affine(scale=(0.5, 1.5), interpolation=0, fill=255, fill_mask=255, p=1),
                A.RandomCrop(8, 8),
            ]
        )
        transform = from_albumentations(pipeline)
        for dtype in (torch.uint8, torch.int32):
            image, mask = sample(16, 20, dtype)
            results = []
            for seed in (3, 3, *range(4, 8)):
                with fixed_seed(seed):
                    results.append(transform(image, mask))
                new, moved = results[-1]
                assert torch.equal(new[0].int(), moved.int())
                assert (new.shape, new.dtype, moved.dtype) == ((3, 8, 8), torch.uint8, dtype)
            assert torch.equal(results[0][0], results[1][0])
            assert any(not torch.equal(results[0][0], new) for new, _ in results[2:])
        assert repr(transform).startswith("from_albumentations(Compose([")
        for thing in (pipeline, A.HorizontalFlip()):
            with pytest.raises(TypeError, match=r"weak=stseg\.augment\.from_albumentations\(pipeline\)"):
                as_pair_transform(thing)


class TestKornia:
    @pytest.mark.parametrize(
        "augmentation",
        [
            K.RandomHorizontalFlip(p=0.7),
            K.AugmentationSequential(K.RandomVerticalFlip(p=0.7), data_keys=["input"]),
            K.AugmentationSequential(K.AugmentationSequential(K.RandomVerticalFlip(p=0.7)), K.RandomHorizontalFlip()),
        ],
        ids=["single", "sequence", "nested"],
    )
    @pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.int32])
    def test_geometry_moves_both(self, augmentation, dtype):
        images, masks = batch(dtype=dtype)
        new, moved = from_kornia(augmentation)(images, masks)
        assert moved.dtype == dtype
        torch.testing.assert_close(new[:, 0], moved / 8 + 0.25)
        assert not torch.equal(moved, masks)

    @pytest.mark.parametrize("ignore_index", [255, -100, -1])
    @pytest.mark.parametrize(
        "augmentation",
        [
            K.RandomRotation(45.0, p=1),
            K.RandomAffine(0, translate=(0.3, 0.3), p=1),
            K.AugmentationSequential(
                K.RandomRotation(45.0, p=1), extra_args={K.container.augment.DataKey.MASK: {"resample": "bilinear"}}
            ),
        ],
        ids=["turned", "moved", "in a sequence that says bilinear"],
    )
    def test_what_comes_from_outside_is_ignored_and_never_a_class(self, augmentation, ignore_index):
        images, masks = batch()
        masks[:] = torch.where(masks > 2, 4, 0)
        masks[:, 5] = ignore_index
        images = torch.ones_like(images)
        new, moved = from_kornia(augmentation, ignore_index=ignore_index)(images, masks)
        assert set(moved.unique().tolist()) == {0, 4, ignore_index}
        outside = new[:, 0] == 0
        assert outside.any()
        assert (moved[outside] == ignore_index).all()
        inside = new[:, 0] == 1
        assert (moved[inside] == 0).any()

    def test_erased_rectangles_are_ignored(self):
        images, masks = batch()
        new, moved = from_kornia(K.RandomErasing(p=1, value=0.0))(images, masks)
        erased = (new == 0).all(1)
        assert erased.any()
        assert torch.equal(moved, masks.masked_fill(erased, 255))

    def test_rows_left_out_come_back_bit_for_bit(self):
        images, masks = batch()
        where = torch.tensor([True, False, True, False])
        new, moved = from_kornia(
            K.AugmentationSequential(K.ColorJitter(0.5, 0.5, 0.5, 0.2, p=1), K.RandomRotation(30.0, p=1))
        )(images, masks, where)
        assert torch.equal(new[~where], images[~where])
        assert torch.equal(moved[~where], masks[~where])
        assert (new[where] != images[where]).any((1, 2, 3)).all()

    def test_computes_in_float32_without_gradients(self):
        images, masks = batch()
        strong = from_kornia(K.ColorJitter(0.5, 0.5, p=1))
        torch.manual_seed(3)
        wanted, _ = strong(images, masks)
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found, _ = strong(images.requires_grad_(), masks)
        assert torch.equal(found, wanted)
        assert not found.requires_grad
        for dtype in (torch.bfloat16, torch.float64):
            new, moved = from_kornia(K.RandomRotation(30.0, p=1))(images.detach().to(dtype), masks)
            assert (new.dtype, moved.dtype) == (dtype, torch.int64)

    def test_draws_from_the_seed_and_changes_no_input(self):
        images, masks = batch()
        before = images.clone(), masks.clone()
        strong, results = from_kornia(K.RandomRotation(30.0)), []
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            results.append(strong(images, masks)[1])
        assert torch.equal(results[0], results[1])
        assert not torch.equal(results[0], results[2])
        assert torch.equal(images, before[0])
        assert torch.equal(masks, before[1])

    def test_refuses_another_size_and_masks_too_small_for_the_ignore_index(self):
        images, masks = batch()
        with pytest.raises(ValueError, match=r"RandomCrop made images of shape \(4, 3, 8, 8\).*keeps the size"):
            from_kornia(K.RandomCrop((8, 8)))(images, masks)
        with pytest.raises(ValueError, match=r"ignore_index -100 does not fit into masks of torch\.uint8"):
            from_kornia(K.RandomErasing(), ignore_index=-100)(images, masks.byte())
        with pytest.raises(TypeError, match="expected float in"):
            from_kornia(K.RandomErasing())((images * 255).byte(), masks)

    @pytest.mark.parametrize("thing", [None, nn.ReLU(), v2.RandomHorizontalFlip(), K.RandomErasing])
    def test_refuses_what_is_none_of_it(self, thing):
        with pytest.raises(TypeError, match=r"expected one of kornia\.augmentation"):
            from_kornia(thing)


class TestPixelsFromOutside:
    @pytest.mark.parametrize(
        ("fill", "expected"), [(0, 255), ({tv_tensors.Image: 0, tv_tensors.Mask: 255}, 255), ({tv_tensors.Mask: 1}, 1)]
    )
    def test_of_a_torchvision_transform_are_ignored_unless_it_says_otherwise(self, fill, expected):
        image, mask = torch.rand(3, 6, 4), torch.randint(0, 3, (6, 4), dtype=torch.uint8)
        padded, moved = from_torchvision(v2.Pad([2, 1, 0, 3], fill=fill))(image, mask)
        assert padded.shape == (3, 10, 6)
        inside = torch.zeros(10, 6, dtype=torch.bool)
        inside[1:7, 2:] = True
        assert torch.equal(moved[inside].reshape(6, 4), mask)
        assert (moved[~inside] == expected).all()

    def test_get_the_ignore_index_of_the_data(self):
        mask = torch.zeros(4, 4, dtype=torch.uint8)
        config = stseg.TrainConfig(steps=1, weak=v2.Pad(1), ignore_index=-1)
        _, moved = config.weak(torch.rand(3, 4, 4), mask)
        assert moved.dtype == torch.int32
        assert int((moved == -1).sum()) == 20


class TestAsPairTransform:
    def test_adapts_torchvision_and_leaves_functions_alone(self):
        assert as_pair_transform(None) is None
        weak = stseg.WeakAugment(8)
        assert as_pair_transform(weak) is weak
        assert as_pair_transform(sample) is sample
        image, mask = sample()
        assert torch.equal(as_pair_transform(v2.RandomHorizontalFlip(p=1))(image, mask)[1], mask.flip(-1))
        assert torch.equal(
            as_pair_transform(nn.Sequential(v2.RandomHorizontalFlip(p=1)))(image, mask)[0], image.flip(-1)
        )

    @pytest.mark.parametrize(
        ("thing", "message"),
        [
            (K.RandomErasing(), r"augments batches: expected strong=RandomErasing\(...\)"),
            (
                v1.RandomCrop(8),
                r"RandomCrop, which transforms the image without its mask; .*torchvision\.transforms\.v2",
            ),
            (v1.Compose([]), r"Compose, which transforms the image without its mask"),
            (stseg.WeakAugment, r"weak is the class WeakAugment; expected an object: weak=WeakAugment\(...\)"),
            ("flip", "weak is 'flip'; expected a WeakAugment, another function, or None"),
        ],
    )
    def test_names_the_way_out(self, thing, message):
        with pytest.raises(TypeError, match=message):
            as_pair_transform(thing)

    def test_refuses_albumentations_by_the_name_of_its_package(self):
        kind = type("Compose", (Pipeline,), {"__module__": "albumentations.core.composition"})
        for thing in (kind(), type("Mine", (kind,), {})()):
            for taken in (as_pair_transform, as_batch_augmentation):
                with pytest.raises(TypeError, match=r"expected weak=stseg\.augment\.from_albumentations\(pipeline\)"):
                    taken(thing)
        assert as_pair_transform(from_albumentations(kind()))(*sample())[0].ndim == 3


class TestAsBatchAugmentation:
    def test_adapts_kornia_and_leaves_functions_alone(self):
        assert as_batch_augmentation(None) is None
        strong = stseg.StrongAugment()
        assert as_batch_augmentation(strong) is strong
        assert as_batch_augmentation(batch) is batch
        images, masks = batch()
        _, moved = as_batch_augmentation(K.RandomErasing(p=1), ignore_index=-7)(images, masks)
        assert (moved == -7).any()

    @pytest.mark.parametrize(
        ("thing", "message"),
        [
            (
                stseg.StrongAugment(),
                r"the cutout of strong writes 255 .* expected strong=StrongAugment\(cutout=Cutout\(ignore_index=0\)\)",
            ),
            (stseg.Cutout(), r"strong writes 255 .* is 0; expected strong=Cutout\(..., ignore_index=0\)"),
            (from_kornia(K.RandomErasing()), r"is 0; expected strong=from_kornia\(..., ignore_index=0\)"),
        ],
    )
    def test_wants_the_ignore_index_of_the_data(self, thing, message):
        with pytest.raises(ValueError, match=message):
            as_batch_augmentation(thing, ignore_index=0)
        assert as_batch_augmentation(thing) is thing

    @pytest.mark.parametrize(
        ("thing", "message"),
        [
            (v2.RandomHorizontalFlip(), r"augments one sample: expected weak=RandomHorizontalFlip\(...\)"),
            (v1.RandomCrop(8), "augments one sample"),
            (stseg.StrongAugment, r"strong is the class StrongAugment; expected an object"),
            (0.5, "strong is 0.5; expected a StrongAugment, another function, or None"),
        ],
    )
    def test_names_the_way_out(self, thing, message):
        with pytest.raises(TypeError, match=message):
            as_batch_augmentation(thing)


REPRS = """
import kornia.augmentation as K, torch
from torchvision.transforms import v2
from stseg.augment import from_albumentations, from_kornia, from_torchvision
class Own:
    def __call__(self, image, mask): ...
print(from_torchvision(v2.Compose([v2.RandomCrop(8), v2.ColorJitter(0.5), v2.Lambda(lambda x: x)])))
print(from_kornia(K.AugmentationSequential(K.RandomRotation(30.0), K.RandomErasing(), K.ColorJitter(0.5))))
print(from_albumentations(Own()))
"""


def test_reprs_show_what_is_wrapped_and_are_the_same_in_every_run():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    one, two = (
        subprocess.run(
            [sys.executable, "-c", REPRS], capture_output=True, text=True, check=True, env=environment
        ).stdout
        for _ in range(2)
    )
    assert one == two
    for text in ("RandomCrop(size=(8, 8)", "RandomRotation", "p=0.5", "ignore_index=255", "Own object"):
        assert text in one
    assert "0x" not in one


def test_adapters_travel_to_workers():
    for adapter, data in (
        (from_torchvision(v2.RandomCrop(8)), sample()),
        (from_albumentations(Pipeline()), sample()),
        (from_kornia(K.RandomErasing()), batch()),
    ):
        copied = pickle.loads(pickle.dumps(adapter))
        assert repr(copied) == repr(adapter)
        assert copied(*data)[0].dtype == data[0].dtype
