"""Delivered predictions. This file is also the program that two processes run, and the one that is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.utils.data import ConcatDataset, Subset

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from small import SIZES, Named, Pooled

import stseg
from stseg import (
    DamagedFileError,
    DataError,
    MultiScaleFlip,
    NetworkError,
    Segmenter,
    UnreadableImageError,
    WorkdirMismatchError,
    predict,
    predict_mask,
)
from stseg.data import SegmentationFolder

QUIET = {"progress": False}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(stseg.__file__).parents[1])}


def write_images(folder, count=7, seed=0, suffixes=(".png", ".bmp", ".ppm")):
    """Write images of three sizes in nested folders; return them by id."""
    generator = np.random.default_rng(seed)
    found = {}
    for i in range(count):
        pixels = generator.integers(0, 256, (*SIZES[i % 3], 3)).astype(np.uint8)
        id = f"day {i % 2}/img_{i:02}" if i % 3 else f"img_{i:02}"
        path = folder / f"{id}{suffixes[i % len(suffixes)]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        found[id] = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
    return found


def probabilities(network, image):
    """Of one image, by the wrapper alone."""
    model = Segmenter(network).eval()
    with torch.no_grad():
        return model(image[None])[0].softmax(0).numpy()


def files(folder):
    """Path in the folder and content of all files, hidden ones as well."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read(path):
    """The numbers of a file, as OpenCV reads them; Pillow has to read the same."""
    pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    with Image.open(path) as image:
        assert image.mode == ("L" if pixels.dtype == np.uint8 else "I;16")
        assert np.array_equal(np.array(image), pixels)
    assert pixels.ndim == 2
    return pixels


@pytest.fixture
def images(tmp_path):
    return tmp_path / "images", write_images(tmp_path / "images")


class TestMasks:
    @pytest.mark.parametrize("values", [None, (7, 0, 255, 9), (0, 300, 65535, 1)])
    def test_are_those_of_one_image_at_a_time(self, images, tmp_path, values):
        folder, pixels = images
        network = Pooled()
        masks = predict(network, folder, tmp_path / "out", values=values, batch_size=3, **QUIET)
        assert masks.ids == tuple(sorted(pixels))
        assert len(masks) == len(pixels) == len(list(masks))
        assert set(files(tmp_path / "out")) == {f"{id}.png" for id in pixels}
        numbers = np.array(values or range(4))
        for position, (id, image) in enumerate(sorted(pixels.items())):
            expected = probabilities(network, image).argmax(0)
            written = read(tmp_path / "out" / f"{id}.png")
            assert written.dtype == (np.uint16 if values and max(values) > 255 else np.uint8)
            assert np.array_equal(written, numbers[expected])
            assert masks[position].dtype == torch.uint8
            assert np.array_equal(masks[position].numpy(), expected)
        assert torch.equal(masks[-1], masks[len(masks) - 1])
        assert (masks.folder, masks.values, masks.skipped) == (tmp_path / "out", values, ())
        assert repr(masks) == f"Predictions({str(tmp_path / 'out')!r}: 7 masks)"

    def test_of_a_network_with_one_logit_and_0_and_255(self, images, tmp_path):
        folder, pixels = images
        network = nn.Conv2d(3, 1, 1)
        predict(network, folder, tmp_path / "out", values=[0, 255], **QUIET)
        for id, image in pixels.items():
            with torch.no_grad():
                foreground = Segmenter(network)(image[None])[0, 1] > 0
            assert np.array_equal(read(tmp_path / "out" / f"{id}.png") == 255, foreground.numpy())

    def test_of_many_classes_have_16_bits(self, tmp_path):
        data = Named([torch.rand(3, 9, 12), torch.rand(3, 1, 1)], ["a", "b"])
        network = nn.Conv2d(3, 300, 1)
        masks = predict(network, data, tmp_path / "out", **QUIET)
        assert read(tmp_path / "out" / "a.png").dtype == np.uint16
        assert masks[0].dtype == torch.int32
        assert np.array_equal(masks[0].numpy(), probabilities(network, data[0]).argmax(0))
        assert masks[1].shape == (1, 1)
        other = predict(network, data, tmp_path / "other", values=range(1000, 1300), **QUIET)
        assert torch.equal(masks[0], other[0])

    def test_are_those_of_other_functions(self, images, tmp_path):
        folder, _ = images
        network = Pooled()
        data = SegmentationFolder(folder)
        masks = predict(network, data, tmp_path / "out", **QUIET)
        labeled = stseg.PseudoLabeler(network, num_classes=4, **QUIET).label(data)
        for position, (image, mask) in enumerate(labeled):
            assert torch.equal(mask, masks[position])
            assert torch.equal(mask, predict_mask(network, image))

    @pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (64, 0), (3, 2)])
    def test_do_not_depend_on_batches_and_workers(self, images, tmp_path, batch_size, num_workers):
        folder, _ = images
        predict(Pooled(), folder, tmp_path / "one", **QUIET)
        predict(Pooled(), folder, tmp_path / "two", batch_size=batch_size, num_workers=num_workers, **QUIET)
        assert files(tmp_path / "one") == files(tmp_path / "two")

    @given(sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6))
    @settings(max_examples=8, deadline=None)
    def test_have_the_sizes_of_the_images(self, tmp_path_factory, sizes):
        data = Named([torch.rand(3, *size) for size in sizes])
        masks = predict(nn.Conv2d(3, 2, 1), data, tmp_path_factory.mktemp("out"), values=(9, 4), **QUIET)
        assert [tuple(mask.shape) for mask in masks] == sizes

    def test_of_data_without_ids_are_numbered(self, tmp_path):
        data = [torch.rand(3, 4, 5), (torch.rand(3, 4, 5), "a mask, which is not read")]
        assert predict(nn.Conv2d(3, 2, 1), data, tmp_path / "out", **QUIET).ids == ("0", "1")
        assert set(files(tmp_path / "out")) == {"0.png", "1.png"}

    def test_lose_the_ending_of_an_image_file(self, tmp_path):
        data = Named([torch.rand(3, 4, 5)] * 3, ["a/1.JPG", "v1.2", "b.confidence"])
        masks = predict(nn.Conv2d(3, 2, 1), data, tmp_path / "out", **QUIET)
        assert masks.ids == tuple(data.ids)
        assert set(files(tmp_path / "out")) == {"a/1.png", "v1.2.png", "b.confidence.png"}
        assert [tuple(mask.shape) for mask in masks] == [(4, 5)] * 3

    def test_with_test_time_augmentation(self, images, tmp_path):
        folder, pixels = images
        network = Pooled()
        masks = predict(network, folder, tmp_path / "out", tta=MultiScaleFlip, **QUIET)
        for position, (_, image) in enumerate(sorted(pixels.items())):
            assert torch.equal(masks[position], predict_mask(MultiScaleFlip(network), image))

    @pytest.mark.skipif(not hasattr(stseg.models, "Tiled"), reason="needs stseg.models.Tiled")
    @pytest.mark.parametrize("tta", [None, MultiScaleFlip])
    def test_by_tiles(self, images, tmp_path, tta):
        folder, pixels = images
        network = Pooled()
        masks = predict(network, folder, tmp_path / "out", tile=(6, 8), overlap=0.5, tta=tta, **QUIET)
        inner = network if tta is None else tta(network)
        for position, (_, image) in enumerate(sorted(pixels.items())):
            assert torch.equal(masks[position], predict_mask(stseg.models.Tiled(inner, (6, 8), 0.5), image))
        same = predict(network, folder, tmp_path / "out", tile=(6, 8), overlap=0.5, tta=tta, **QUIET)
        assert len(same) == len(masks)
        with pytest.raises(WorkdirMismatchError, match=r"tile is \[6, 8\] there and \[8, 8\] now"):
            predict(network, folder, tmp_path / "out", tile=8, overlap=0.5, tta=tta, **QUIET)

    def test_with_confidence(self, images, tmp_path):
        folder, pixels = images
        network = Pooled()
        masks = predict(network, folder, tmp_path / "out", confidence=True, **QUIET)
        assert set(files(tmp_path / "out-confidence")) == set(files(tmp_path / "out")) == {f"{id}.png" for id in pixels}
        for position, (id, image) in enumerate(sorted(pixels.items())):
            expected = probabilities(network, image)
            written = read(tmp_path / "out-confidence" / f"{id}.png")
            assert written.dtype == np.uint8
            assert np.abs(written / 255 - expected.max(0)).max() <= 0.5 / 255 + 1e-6
            assert np.array_equal(masks[position].numpy(), expected.argmax(0))

    def test_of_a_run_that_was_loaded(self, images, tmp_path):
        folder, _ = images
        data = [(torch.rand(3, 16, 16), torch.randint(2, (16, 16)).byte()) for _ in range(2)]
        config = stseg.TrainConfig(steps=2, batch_size=2, weak=None, precision="fp32")
        result = stseg.fit(nn.Conv2d(3, 2, 1), data, config, workdir=tmp_path / "run", **QUIET)
        predict(result.model, folder, tmp_path / "out", **QUIET)
        before = stamps(tmp_path / "out")
        predict(stseg.load(tmp_path / "run", nn.Conv2d(3, 2, 1)), folder, tmp_path / "out", **QUIET)
        assert stamps(tmp_path / "out") == before


class TestModel:
    def test_is_left_as_it_was(self, images, tmp_path):
        network = Pooled()
        network.norm.eval()
        before = {name: value.clone() for name, value in network.state_dict().items()}
        predict(network, images[0], tmp_path / "out", confidence=True, **QUIET)
        predict_mask(network, torch.rand(3, 5, 6))
        assert (network.training, network.drop.training, network.norm.training) == (True, True, False)
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
        assert all(parameter.grad is None and parameter.requires_grad for parameter in network.parameters())
        assert torch.is_grad_enabled()

    def test_is_called_without_gradients(self, images, tmp_path):
        class Asks(nn.Conv2d):
            def forward(self, x):
                assert not torch.is_grad_enabled()
                assert not self.training
                return super().forward(x)

        predict(Asks(3, 2, 1), images[0], tmp_path / "out", **QUIET)
        predict_mask(Asks(3, 2, 1), torch.rand(3, 5, 6))

    def test_with_logits_that_are_not_finite_is_refused(self, images, tmp_path):
        network = nn.Conv2d(3, 2, 1)
        nn.init.constant_(network.bias, float("nan"))
        with pytest.raises(NetworkError, match="NaN or infinite logits for image 'day"):
            predict(network, images[0], tmp_path / "out", **QUIET)
        with pytest.raises(NetworkError, match="NaN or infinite logits for the image"):
            predict_mask(network, torch.rand(3, 5, 6))


def stamps(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.rglob("*") if path.is_file()}


class Never(Pooled):
    """The same network, which must not be called for images."""

    def forward(self, x):
        assert tuple(x.shape[2:]) not in SIZES, "time was spent"
        return super().forward(x)


Never.__name__ = Never.__qualname__ = "Pooled"  # the same architecture


class TestRunAgain:
    def test_makes_nothing_again(self, images, tmp_path):
        first = predict(Pooled(), images[0], tmp_path / "out", values=(1, 2, 3, 4), **QUIET)
        before = stamps(tmp_path / "out")
        again = predict(Never(), images[0], tmp_path / "out", values=(1, 2, 3, 4), batch_size=1, **QUIET)
        assert again == first
        assert stamps(tmp_path / "out") == before

    def test_makes_what_is_missing_or_cut_off(self, images, tmp_path):
        out = tmp_path / "out"
        predict(Pooled(), images[0], out, **QUIET)
        expected, before = files(out), stamps(out)
        lost, empty, cut, short = sorted(expected)[:4]
        (out / lost).unlink()
        (out / empty).write_bytes(b"")
        (out / cut).write_bytes(expected[cut][: expected[cut].index(b"IDAT") + 12])
        (out / short).write_bytes(expected[short][:-5])
        (out / ".0123456789abcdef.part").write_bytes(b"half")
        network = Pooled()
        predict(network, images[0], out, **QUIET)
        assert files(out) == expected
        assert network.images_seen() == 4
        after = stamps(out)
        assert {path for path in before if before[path] == after[path]} == {out / name for name in sorted(expected)[4:]}

    def test_makes_the_masks_of_images_that_changed_again(self, images, tmp_path):
        folder, pixels = images
        out = tmp_path / "out"
        predict(Pooled(), folder, out, **QUIET)
        id = "img_03"
        changed = 255 - pixels[id]
        Image.fromarray(changed.permute(1, 2, 0).numpy()).save(folder / f"{id}.png")
        network = Pooled()
        predict(network, folder, out, **QUIET)
        assert network.images_seen() == 1
        assert np.array_equal(read(out / f"{id}.png"), probabilities(network, changed).argmax(0))

    def test_adds_the_masks_of_new_images_and_the_confidence(self, images, tmp_path):
        folder, _ = images
        out = tmp_path / "out"
        data = SegmentationFolder(folder)
        predict(Pooled(), Subset(data, [4, 1]), out, **QUIET)
        network = Pooled()
        predict(network, data, out, **QUIET)
        assert network.images_seen() == 5
        network = Pooled()
        predict(network, data, out, confidence=True, **QUIET)
        assert network.images_seen() == 7
        expected = files(tmp_path / "out-confidence")
        sorted((tmp_path / "out-confidence").rglob("*.png"))[0].unlink()
        network = Pooled()
        predict(network, data, out, confidence=True, **QUIET)
        assert network.images_seen() == 1
        assert files(tmp_path / "out-confidence") == expected
        predict(Never(), Subset(data, [0]), out, confidence=True, **QUIET)

    def test_in_a_folder_that_cannot_be_written(self, images, tmp_path, monkeypatch):
        out = tmp_path / "out"
        predict(Pooled(), images[0], out, **QUIET)
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        predict(Never(), images[0], out, **QUIET)
        (out / "img_00.png").unlink()
        with pytest.raises(PermissionError, match=f"{out} cannot be written"):
            predict(Never(), images[0], out, **QUIET)

    def test_with_an_image_that_has_become_unreadable(self, images, tmp_path):
        folder, _ = images
        predict(Pooled(), folder, tmp_path / "out", **QUIET)
        (folder / "img_03.png").write_bytes(b"broken")
        with pytest.raises(UnreadableImageError, match="img_03"):
            predict(Never(), folder, tmp_path / "out", **QUIET)
        masks = predict(Never(), folder, tmp_path / "out", skip_unreadable=True, **QUIET)
        assert [each.id for each in masks.skipped] == ["img_03"]
        assert len(masks) == 6


def edited(path):
    """Change a pixel with Pillow, which keeps the text only if asked."""
    with Image.open(path) as image:
        pixels, text = np.array(image), dict(image.text)
    pixels[0, 0] += 1
    return pixels, text


def saved_with_text(path):
    pixels, text = edited(path)
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, value)
    Image.fromarray(pixels).save(path, pnginfo=info)


class TestFilesOfOthers:
    @pytest.mark.parametrize(
        ("damage", "error", "message"),
        [
            (lambda path: cv2.imwrite(str(path), edited(path)[0]), WorkdirMismatchError, "was not written there by"),
            (saved_with_text, DamagedFileError, "was changed after it was written"),
            (lambda path: path.write_bytes(b"no image"), WorkdirMismatchError, "was not written there by"),
            (lambda path: path.unlink() or path.mkdir(), WorkdirMismatchError, "was not written there by"),
            (
                lambda path: path.write_bytes((path.parent / "img_03.png").read_bytes()),
                WorkdirMismatchError,
                "was not written there by",
            ),
        ],
        ids=["another program", "edited", "no image", "a folder", "another name"],
    )
    def test_are_refused_before_time_is_spent(self, images, tmp_path, damage, error, message):
        out = tmp_path / "out"
        masks = predict(Pooled(), images[0], out, **QUIET)
        (out / "img_06.png").unlink()
        path = out / "img_00.png"
        damage(path)
        content = path.read_bytes() if path.is_file() else None
        with pytest.raises(error, match=f"{path} {message}.*; use another folder, or delete {path} to predict again"):
            predict(Never(), images[0], out, **QUIET)
        with pytest.raises(error, match=message):
            masks[masks.ids.index("img_00")]
        assert content is None or path.read_bytes() == content
        assert not (out / "img_06.png").exists()

    def test_that_lie_beside_are_refused_too(self, images, tmp_path):
        out = tmp_path / "out"
        (out / "old").mkdir(parents=True)
        Image.new("L", (3, 3)).save(out / "old/mine.png")
        (out / "notes.txt").write_text("mine")
        with pytest.raises(WorkdirMismatchError, match=f"{out / 'old/mine.png'} was not written there"):
            predict(Never(), images[0], out, **QUIET)
        assert set(files(out)) == {"old/mine.png", "notes.txt"}
        (out / "old/mine.png").rename(out / "old/.mine.png")
        predict(Pooled(), images[0], out, **QUIET)
        assert {"old/.mine.png", "notes.txt"} < set(files(out))
        beside = tmp_path / "out-confidence"
        beside.mkdir()
        Image.new("L", (3, 3)).save(beside / "img_00.png")
        with pytest.raises(WorkdirMismatchError, match=f"{beside / 'img_00.png'} was not written there"):
            predict(Never(), images[0], out, confidence=True, **QUIET)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"model": Pooled(seed=1)}, "model is '.*' there and '.*' now"),
            ({"values": (0, 1, 2, 4)}, r"values is None there and \[0, 1, 2, 4\] now"),
            ({"tta": MultiScaleFlip}, "tta is None there and 'stseg.*MultiScaleFlip' now"),
            ({"precision": "bf16"}, r"precision is 'fp32' there and 'bf16' now \(precision=\"fp32\" goes on with it\)"),
        ],
        ids=lambda value: None if isinstance(value, str) else next(iter(value)),
    )
    def test_of_other_settings_are_refused_with_the_difference(self, images, tmp_path, options, message):
        out = tmp_path / "out"
        predict(Pooled(), images[0], out, **QUIET)
        before = files(out)
        with pytest.raises(WorkdirMismatchError, match=f"{message}; use another folder, or delete all 7 files"):
            predict(**{"model": Never(), "images": images[0], "out": out, **QUIET, **options})
        assert files(out) == before


class TestArguments:
    @pytest.mark.parametrize(
        ("values", "error", "message"),
        [
            ((0, 255), NetworkError, r"gives 4 classes, but values has 2 numbers, \(0, 255\)"),
            ((0, 1, 2, 3, 4), NetworkError, "gives 4 classes, but values has 5 numbers"),
            ((0, 1, 2, 65536), ValueError, r"values holds 65536; expected 0\.\.65535"),
            ((0, 1, 2, -1), ValueError, "values holds -1"),
            ((0, 1, 1, 3), ValueError, "1 is there more than once"),
            ((0, 1, 2.0, 3), TypeError, r"values holds 2\.0"),
            ((False, True), TypeError, "values holds False"),
            ((0,), ValueError, r"values is \(0,\)"),
            ((), ValueError, "expected one integer for each class"),
            ("0123", TypeError, "values is '0123'"),
            ({0: 0, 1: 255}, TypeError, "expected one integer for each class"),
            (255, TypeError, "values is 255"),
        ],
    )
    def test_values_are_checked(self, images, tmp_path, values, error, message):
        with pytest.raises(error, match=message):
            predict(Pooled(), images[0], tmp_path / "out", values=values, **QUIET)
        assert not (tmp_path / "out").exists() or not files(tmp_path / "out")

    def test_values_may_be_of_numpy(self, images, tmp_path):
        masks = predict(Pooled(), images[0], tmp_path / "out", values=np.array([3, 2, 1, 0]), **QUIET)
        assert masks.values == (3, 2, 1, 0)

    @pytest.mark.parametrize(
        ("out", "message"),
        [
            ("images", "which is the folder of images"),
            (".", "which contains the folder of images"),
            ("images/masks", "which is in the folder of images"),
            ("link", "which is the folder of images"),
            ("truth", "which is the folder of masks"),
        ],
    )
    def test_a_folder_of_images_is_no_folder_for_masks(self, images, tmp_path, out, message):
        folder, pixels = images
        (tmp_path / "link").symlink_to(folder)
        for id, image in pixels.items():
            (tmp_path / "truth" / id).parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (image.shape[2], image.shape[1])).save(tmp_path / "truth" / f"{id}.png")
        data = SegmentationFolder(folder, tmp_path / "truth")
        before = files(tmp_path)
        forms = [data, Subset(data, [0]), ConcatDataset([Subset(data, [1])])] + [folder] * (out != "truth")
        for form in forms:
            with pytest.raises(DataError, match=f"{message}.*; expected a folder of its own, such as .*-predicted"):
                predict(Never(), form, tmp_path / out, **QUIET)
        assert files(tmp_path) == before

    def test_the_folder_of_confidence_is_not_that_of_the_images(self, tmp_path):
        write_images(tmp_path / "out-confidence")
        with pytest.raises(DataError, match="which is the folder of images"):
            predict(Never(), tmp_path / "out-confidence", tmp_path / "out", confidence=True, **QUIET)

    def test_two_images_of_the_same_name_are_refused(self, tmp_path):
        image = torch.rand(3, 4, 4)
        with pytest.raises(DataError, match=r"masks of 'a\.jpg' and 'a\.png' would both be .*/out/a\.png"):
            predict(Never(), Named([image, image], ["a.jpg", "a.png"]), tmp_path / "out", **QUIET)
        write_images(tmp_path / "images", 1)
        Image.new("RGB", (4, 4)).save(tmp_path / "images/img_00.jpg")
        with pytest.raises(DataError, match=r"img_00\.(jpg|png) and .*img_00\.(jpg|png) have the same id"):
            predict(Never(), tmp_path / "images", tmp_path / "out", **QUIET)
        with pytest.raises(DataError, match="some systems take the id 'A' for that of another image"):
            predict(Never(), Named([image, image], ["a", "A"]), tmp_path / "out", **QUIET)

    @pytest.mark.parametrize("id", ["../a", "/a", "a//b", "", "nul", "a\0b", "a\\b"])
    def test_a_name_that_is_no_file_is_refused(self, tmp_path, id):
        with pytest.raises(DataError, match="cannot name a file in a folder"):
            predict(Never(), Named([torch.rand(3, 4, 4)], [id]), tmp_path / "out", **QUIET)

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"images": []}, DataError, "the data set to predict is empty"),
            ({"images": ["a.png"]}, TypeError, "expected"),
            ({"images": None}, TypeError, "expected"),
            ({"images": "nowhere"}, DataError, "there is no folder nowhere"),
            ({"out": ""}, TypeError, "out is ''; expected a folder"),
            ({"out": None}, TypeError, "out is None; expected a folder"),
            ({"out": __file__}, NotADirectoryError, "is a file; expected a folder"),
            ({"model": "weights.pt"}, TypeError, "expected a network"),
            ({"batch_size": 0}, ValueError, "batch_size is 0"),
            ({"precision": "half"}, ValueError, "precision is 'half'"),
            ({"tta": True}, TypeError, "tta is True; expected a function"),
            ({"tta": nn.Identity()}, TypeError, "tta is Identity; expected a function"),
            ({"tta": lambda model: None}, TypeError, "tta returned NoneType; expected a module"),
            ({"tta": nn.Sequential}, TypeError, "tta returned Sequential; expected a module that takes images"),
            ({"overlap": 0.5}, ValueError, "overlap is 0.5 without a tile; expected both"),
        ],
    )
    def test_are_checked(self, images, tmp_path, options, error, message):
        with pytest.raises(error, match=message):
            predict(**{"model": Never(), "images": images[0], "out": tmp_path / "out", **QUIET, **options})
        assert not (tmp_path / "out").exists()

    def test_data_that_change_are_refused(self, tmp_path):
        class Random(Named):
            def __getitem__(self, index):
                return torch.rand(3, 4, 4)

        with pytest.raises(DataError, match="of the image data set changes from one reading to the next"):
            predict(Never(), Random([0, 1]), tmp_path / "out", **QUIET)

    def test_unreadable_images(self, images, tmp_path):
        folder, _ = images
        (folder / "img_03.png").write_bytes(b"broken")
        with pytest.raises(UnreadableImageError, match="img_03"):
            predict(Pooled(), folder, tmp_path / "out", **QUIET)
        masks = predict(Pooled(), folder, tmp_path / "out", skip_unreadable=True, **QUIET)
        assert [each.id for each in masks.skipped] == ["img_03"]
        assert "img_03" not in masks.ids
        assert set(files(tmp_path / "out")) == {f"{id}.png" for id in masks.ids}

    def test_a_mask_that_vanished_or_was_cut_off_is_named(self, images, tmp_path):
        masks = predict(Pooled(), images[0], tmp_path / "out", **QUIET)
        path = tmp_path / "out" / "img_00.png"
        path.write_bytes(path.read_bytes()[:-5])
        with pytest.raises(DamagedFileError, match=f"{path} is cut off or broken"):
            masks[masks.ids.index("img_00")]
        path.unlink()
        with pytest.raises(DataError, match=f"{path} is missing"):
            masks[masks.ids.index("img_00")]
        with pytest.raises(IndexError):
            masks[7]


class TestOneImage:
    def test_in_any_form(self, images):
        folder, pixels = images
        network = Pooled()
        image = pixels["img_00"]
        path = folder / "img_00.png"
        array = image.permute(1, 2, 0).numpy()
        expected = torch.from_numpy(probabilities(network, image).argmax(0)).byte()
        for form in (path, str(path), Image.open(path), image, array, array[:, ::-1][:, ::-1], image.float() / 255):
            mask = predict_mask(network, form)
            assert mask.dtype == torch.uint8
            assert torch.equal(mask, expected)
        assert torch.equal(predict_mask(network, (array / 255).astype(np.float64)), expected)

    def test_of_one_channel(self):
        network = nn.Conv2d(1, 3, 1)
        gray = np.arange(20, dtype=np.uint8).reshape(4, 5)
        masks = [predict_mask(network, form) for form in (gray, gray[..., None], Image.fromarray(gray))]
        assert all(torch.equal(mask, masks[0]) for mask in masks)
        assert masks[0].shape == (4, 5)

    @pytest.mark.parametrize(
        ("image", "error", "message"),
        [
            (torch.rand(1, 3, 4, 4), DataError, r"shape \(1, 3, 4, 4\); expected \(C, H, W\)"),
            (torch.rand(3, 4, 4) * 255, DataError, r"expected floats in \[0, 1\]"),
            (torch.zeros(3, 4, 4, dtype=torch.int64), TypeError, "expected uint8, or float"),
            (np.zeros((3, 40, 40), np.uint8), DataError, r"torch\.from_numpy\(image\) is an image"),
            (np.zeros((4, 4, 3), np.int64), TypeError, "array int64"),
            (np.zeros((4, 4, 3), np.uint16), TypeError, "uint16; expected uint8"),
            (np.zeros((1, 4, 4, 3), np.uint8), TypeError, r"shape \(1, 4, 4, 3\)"),
            (np.full((4, 4, 3), np.nan), DataError, "nan"),
            (np.zeros((0, 4, 3), np.uint8), DataError, "no pixels"),
            ([[0, 1]], TypeError, "image 'image' is list; expected a PIL image"),
            (None, TypeError, "NoneType"),
            ("nowhere.png", UnreadableImageError, "nowhere.png"),
        ],
    )
    def test_that_is_none_is_refused(self, image, error, message):
        with pytest.raises(error, match=message):
            predict_mask(nn.Conv2d(3, 2, 1), image)

    def test_of_many_classes(self):
        assert predict_mask(nn.Conv2d(3, 300, 1), torch.rand(3, 4, 4)).dtype == torch.int32


class Slow(Named):
    """Images that take a while."""

    def __getitem__(self, index):
        time.sleep(0.02)
        return super().__getitem__(index)


def many(kind=Named):
    generator = torch.Generator().manual_seed(0)
    return kind([torch.rand(3, *SIZES[i % 3], generator=generator) for i in range(60)])


def test_killed_and_run_again_it_ends_as_the_whole_run(tmp_path):
    out = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, __file__, "slow", str(out)], env=ENVIRONMENT)
    until = time.monotonic() + 120
    while process.poll() is None and len(list(out.rglob("*.png"))) < 5 and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    made = {path.name for path in out.rglob("*.png")}
    before = stamps(out)
    assert 5 <= len(made) < 60
    network = Pooled()
    predict(network, many(), out, values=(0, 85, 170, 255), confidence=True, **QUIET)
    assert 60 - len(made) <= network.images_seen() <= 60 - len(made) + 1
    kept = [path for path, stamp in before.items() if path.suffix == ".png" and stamps(out).get(path) == stamp]
    assert len(kept) >= len(made) - 1
    predict(Pooled(), many(), tmp_path / "whole", values=(0, 85, 170, 255), confidence=True, **QUIET)
    assert files(out) == files(tmp_path / "whole")
    assert files(tmp_path / "killed-confidence") == files(tmp_path / "whole-confidence")


def in_two_processes(folder):
    """What one of two processes does: how many images its networks saw, and what is refused."""
    seen = []
    data = many()
    broken = Subset(data, range(10))
    for out, images in (("first", data), ("first", data), ("other", broken)):
        network = Pooled()
        masks = predict(network, images, folder / out, confidence=True, **QUIET)
        seen.append((network.images_seen(), len(masks), masks[3].sum().item()))
    errors = []
    for images in (data, broken):
        with pytest.raises(WorkdirMismatchError) as caught:
            predict(Pooled(seed=1), images, folder / "first", **QUIET)
        errors.append(str(caught.value))
    return seen, errors


def test_two_processes_share_the_work(tmp_path):
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("needs gloo")
    program = [sys.executable, __file__, "two", str(tmp_path)]
    processes = [
        subprocess.Popen([*program, str(rank)], stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) for rank in range(2)
    ]
    errors = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(e[-2000:] for e in errors)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    assert [seen for seen, *_ in one[0]] == [seen for seen, *_ in two[0]] == [30, 0, 5]
    assert [rest for _, *rest in one[0]] == [rest for _, *rest in two[0]]
    assert one[1] == two[1]
    assert len(one[1]) == 2
    assert "model is" in one[1][0]
    assert "all 60 files" in one[1][0]
    predict(Pooled(), many(), tmp_path / "alone", confidence=True, **QUIET)
    for end in ("", "-confidence"):
        ours, alone = files(tmp_path / f"first{end}"), files(tmp_path / f"alone{end}")
        assert ours.keys() == alone.keys()
        for name in ours:
            one, two = (read(tmp_path / f"{folder}{end}" / name).astype(int) for folder in ("first", "alone"))
            assert np.abs(one - two).max() <= bool(end)  # other batches round otherwise


if __name__ == "__main__":
    what, here = sys.argv[1], Path(sys.argv[2])
    if what == "slow":
        options = {"values": (0, 85, 170, 255), "confidence": True, "precision": "fp32", "batch_size": 2}
        predict(Pooled(), many(Slow), here, **options, **QUIET)
    else:
        number = int(sys.argv[3])
        dist.init_process_group(
            "gloo", init_method=f"file://{here / 'meeting'}", rank=number, world_size=2, timeout=timedelta(seconds=120)
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("stseg.models.precision.computes_bfloat16", lambda device: False)
            torch.save(in_two_processes(here), here / f"{number}.pt")
        dist.destroy_process_group()
