from __future__ import annotations

import math
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small import SIZES, Named, Pooled
from torch import nn
from torch.utils.data import ConcatDataset, Subset

from stseg import (
    DamagedFileError,
    DataError,
    MaskStore,
    MultiScaleFlip,
    NetworkError,
    PseudoLabeler,
    Segmenter,
    UnreadableImageError,
    WorkdirMismatchError,
)


def pictures(count=13, seed=0):
    """Images of three sizes, in no order; some float, some 8 bits."""
    generator = np.random.default_rng(seed)
    items = []
    for i, size in enumerate(generator.permutation(SIZES * math.ceil(count / 3))[:count]):
        image = generator.integers(0, 256, (3, *size)).astype(np.uint8)
        items.append(torch.from_numpy(image if i % 3 else image.astype(np.float32) / 255))
    return Named(items)


def labeler(network=None, **options):
    options = {"num_classes": 4, "progress": False} | options
    return PseudoLabeler(Pooled() if network is None else network, **options)


def one_at_a_time(data, network=None):
    """Arg max and its probability, image by image."""
    model = Segmenter(Pooled() if network is None else network).eval()
    with torch.no_grad():
        probabilities = [model(image[None])[0].softmax(0) for image in data]
    return [(p.argmax(0).to(torch.uint8), p.amax(0)) for p in probabilities]


def same_masks(found, expected):
    return len(found) == len(expected) and all(
        torch.equal(mask, other) for (_, mask), (other, _) in zip(found, expected, strict=True)
    )


class TestLabels:
    @pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (2, 0), (5, 0), (64, 0), (3, 2)])
    def test_are_those_of_one_image_at_a_time_in_the_order_of_the_data_set(self, batch_size, num_workers):
        data, network = pictures(), Pooled()
        found = labeler(network, batch_size=batch_size, num_workers=num_workers).label(data, confidence=True)
        expected = one_at_a_time(data)
        assert len({mask.unique().numel() for mask, _ in expected}) > 1, "the network sees no difference"
        assert same_masks(found, expected)
        assert found.ids == data.ids
        assert found.indices == list(range(13))
        assert found.skipped == ()
        for position, (image, mask) in enumerate(found):
            assert torch.equal(image, data[position])
            assert mask.dtype == torch.uint8
            torch.testing.assert_close(found.confidence(position), expected[position][1], rtol=1e-5, atol=0)
        assert network.images_seen() == 13

    def test_would_be_others_if_images_were_padded(self):
        image = pictures()[1]
        padded = torch.nn.functional.pad(image, (0, 5, 0, 5))
        alone, within = one_at_a_time([image, padded])
        height, width = image.shape[1:]
        assert not torch.equal(alone[0][:-1, :-1], within[0][: height - 1, : width - 1])

    def test_of_a_batch_are_those_of_the_data_set(self):
        images = torch.rand(3, 3, 9, 12, generator=torch.Generator().manual_seed(0))
        labels = labeler()(images)
        for mask, confidence, (expected, certainty) in zip(*labels, one_at_a_time(images), strict=True):
            assert torch.equal(mask, expected)
            torch.testing.assert_close(confidence, certainty, rtol=1e-5, atol=0)

    def test_of_ten_views_are_those_of_ten_views(self):
        data = pictures(4)
        found = labeler(MultiScaleFlip(Pooled()), batch_size=2).label(data)
        with torch.no_grad():
            expected = [(MultiScaleFlip(Pooled()).eval()(image[None])[0].argmax(0).byte(), None) for image in data]
        assert same_masks(found, expected)
        assert not same_masks(found, one_at_a_time(data))

    def test_below_the_threshold_are_ignored(self):
        data = pictures(5)
        found = labeler(threshold=0.6, ignore_index=9).label(data)
        for (_, mask), (expected, confidence) in zip(found, one_at_a_time(data), strict=True):
            assert torch.equal(mask, expected.masked_fill(confidence < 0.6, 9))
        assert {9} < set(torch.cat([mask.flatten() for _, mask in found]).tolist())

    def test_are_single_precision_whatever_goes_on_around_them(self):
        data = pictures()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = labeler().label(data, confidence=True)
            batch = labeler()(data[0][None])
        expected = one_at_a_time(data)
        assert same_masks(found, expected)
        torch.testing.assert_close(found.confidence(0), expected[0][1], rtol=1e-5, atol=0)
        torch.testing.assert_close(batch.confidence[0], expected[0][1], rtol=1e-5, atol=0)

    def test_are_of_half_precision_by_choice(self):
        data = pictures()
        found = labeler(precision="bf16").label(data, confidence=True)
        expected = one_at_a_time(data)
        errors = [float((found.confidence(i) - c).abs().max()) for i, (_, c) in enumerate(expected)]
        assert 1e-4 < max(errors) < 0.2
        assert found.confidence(0).dtype == torch.float32

    @pytest.mark.parametrize("on_disk", [False, True])
    def test_of_more_than_256_classes_have_room(self, on_disk, tmp_path):
        network = nn.Conv2d(3, 300, 1)
        nn.init.zeros_(network.weight)
        nn.init.zeros_(network.bias)
        with torch.no_grad():
            network.bias[299] = 20.0
        store = tmp_path / "masks" if on_disk else None
        found = labeler(network, num_classes=300, ignore_index=65535).label(pictures(2), store)
        assert all(mask.dtype == torch.int32 and mask.unique().tolist() == [299] for _, mask in found)
        if on_disk:
            with Image.open(tmp_path / "masks" / "city" / "img_00.png") as image:
                assert image.mode.startswith("I")
                assert set(np.array(image).flatten().tolist()) == {299}

    @pytest.mark.parametrize(
        "make",
        [
            lambda image: (image,),
            lambda image: [image, "no mask"],
            lambda image: (image, None, {"camera": 3}),
            lambda image: (image, torch.zeros(2, 2), object()),
        ],
    )
    def test_need_images_alone_and_ignore_what_comes_after(self, make):
        data = pictures(4)
        found = labeler().label([make(image) for image in data])
        assert same_masks(found, one_at_a_time(data))
        assert torch.equal(found[2][0], data[2])
        assert found.ids == ["0", "1", "2", "3"]

    def test_of_pil_images_are_those_of_their_pixels(self):
        data = [image for image in pictures() if image.dtype == torch.uint8]
        drawn = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in data]
        assert same_masks(labeler().label(drawn), one_at_a_time(data))

    def test_go_by_the_ids_of_parts(self):
        data = ConcatDataset([pictures(3), Subset(Named(pictures(4), ["a", "b", "c", "d"]), [3, 1])])
        found = labeler().label(data)
        assert found.ids == ["city/img_00", "city/img_01", "city/img_02", "d", "b"]
        assert torch.equal(found.store["b"], one_at_a_time([pictures(4)[1]])[0][0])

    def test_can_be_looked_up_by_position(self):
        found = labeler().label(pictures(4))
        assert torch.equal(found[-1][1], found[3][1])
        with pytest.raises(IndexError):
            found[4]
        with pytest.raises(KeyError):
            found.confidence(0)

    def test_of_an_image_that_has_changed_its_size_since_are_not_handed_out(self):
        data = pictures(3)
        found = labeler().label(data)
        data[1] = torch.zeros(3, 20, 21)
        with pytest.raises(DataError, match=r"pseudo-mask of 'city/img_01' is .* but its image \(20, 21\)"):
            found[1]


def confidences_by_class(data, network=None):
    values = [[] for _ in range(4)]
    for mask, confidence in one_at_a_time(data, network):
        for value, of_class in zip(confidence.flatten().tolist(), mask.flatten().tolist(), strict=True):
            values[of_class].append(value)
    return values


class Given(nn.Module):
    """Its logits are the channels of the image."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        return x * self.scale


def given_logits(scale=1.0):
    return Segmenter(Given(scale), mean=None, std=None)


class TestClassThresholds:
    @pytest.mark.parametrize("keep", [0.01, 0.5, 0.8, 0.97])
    def test_are_those_of_all_confidences_sorted(self, keep):
        data = pictures()
        found = labeler(batch_size=3).class_thresholds(data, keep)
        for threshold, values in zip(found, confidences_by_class(data), strict=True):
            exact = sorted(values, reverse=True)[math.ceil(keep * len(values)) - 1]
            assert threshold <= exact + 1e-6
            assert 1 - threshold <= (1 - exact) * (1 + 2**-9) + 1e-6 or threshold == 0

    @given(
        st.integers(0, 2**32 - 1), st.floats(0.01, 1), st.sampled_from([0.1, 1.0, 8.0, 40.0, 200.0]), st.integers(2, 6)
    )
    @settings(max_examples=40, deadline=None)
    def test_keep_the_share_and_at_most_one_step_more(self, seed, keep, scale, classes):
        generator = torch.Generator().manual_seed(seed)
        data = [torch.rand(classes, 6, 7, generator=generator) for _ in range(3)]
        options = {"num_classes": classes, "batch_size": 2}
        network = given_logits(scale)
        thresholds = labeler(network, **options).class_thresholds(data, keep)
        everything = labeler(network, **options).label(data, confidence=True)
        kept = labeler(network, threshold=thresholds, **options).label(data)
        masks = torch.stack([mask for _, mask in everything])
        confidence = torch.stack([everything.confidence(i) for i in range(3)])
        left = torch.stack([mask for _, mask in kept])
        assert torch.equal(left != 255, confidence >= torch.tensor(thresholds)[masks.long()])
        for of_class, threshold in enumerate(thresholds):
            own = confidence[masks == of_class].double()
            if len(own) == 0:
                assert threshold == 0
                continue
            count = int((left == of_class).sum())
            assert count >= keep * len(own) - 1e-9
            # What lies above the step of the threshold would not be enough.
            distance = 1 - own[own >= threshold].min() if count else 1.0
            above = int((1 - own < distance / (1 + 2**-9) - 2**-22).sum())
            assert above < keep * len(own) + 1e-9
            assert threshold > 0 or count == len(own)

    def test_of_one_keep_every_pixel(self):
        data = pictures()
        assert labeler().class_thresholds(data, 1.0) == labeler().class_thresholds(data, keep=1) == (0.0,) * 4
        assert same_masks(labeler(threshold=[0.0] * 4).label(data), one_at_a_time(data))

    def test_tell_confidences_apart_that_are_all_but_certain(self):
        logits = torch.zeros(2, 2, 100)
        logits[0] = torch.linspace(11, 16, 200).reshape(2, 100)  # 0.99998 to 0.9999999
        network = given_logits(16.0)
        thresholds = labeler(network, num_classes=2).class_thresholds([logits / 16], 0.5)
        ((_, mask),) = labeler(network, num_classes=2, threshold=thresholds).label([logits / 16])
        assert 100 <= int((mask == 0).sum()) <= 104

    def test_of_a_class_that_is_never_predicted_are_nothing(self):
        network = nn.Conv2d(3, 4, 1)
        with torch.no_grad():
            network.bias[2] = -100.0
        assert labeler(network).class_thresholds(pictures(4), 0.5)[2] == 0.0

    def test_of_certain_pixels_keep_them(self):
        network = given_logits(200.0)
        image = torch.zeros(2, 4, 5)
        image[0] = 1.0
        thresholds = labeler(network, num_classes=2).class_thresholds([image], 0.3)
        assert thresholds == (0.0, 0.0)
        image[:, 0, 0] = 0.5  # one that is not
        thresholds = labeler(network, num_classes=2).class_thresholds([image], 0.3)
        assert thresholds == (1.0, 0.0)
        assert int((labeler(network, num_classes=2, threshold=thresholds)(image[None]).mask == 255).sum()) == 1

    @pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (2, 0), (64, 0), (3, 1)])
    def test_do_not_depend_on_batches_or_workers(self, batch_size, num_workers):
        data = pictures()
        expected = labeler(batch_size=5).class_thresholds(data, 0.6)
        found = labeler(batch_size=batch_size, num_workers=num_workers).class_thresholds(data, 0.6)
        assert found == pytest.approx(expected, abs=1e-4)

    def test_have_nothing_to_do_with_the_threshold_of_the_labeler(self):
        data = pictures(5)
        expected = labeler().class_thresholds(data, 0.6)
        assert labeler(threshold=0.9).class_thresholds(data, 0.6) == expected
        assert labeler(threshold=expected).class_thresholds(data, 0.6) == expected

    def test_leave_the_network_and_the_random_numbers_alone(self):
        network = Pooled().train()
        network.norm.eval()
        torch.manual_seed(0)
        expected = torch.rand(3)
        torch.manual_seed(0)
        labeler(network).class_thresholds(pictures(4))
        assert torch.equal(torch.rand(3), expected)
        assert [m.training for m in (network, network.norm, network.drop)] == [True, False, True]
        assert torch.is_grad_enabled()

    @pytest.mark.parametrize("keep", [0, -0.1, 1.1, math.nan])
    def test_refuse_what_is_no_share(self, keep):
        network = Pooled()
        with pytest.raises(ValueError, match=rf"keep is {keep}; expected a share in \(0, 1\]"):
            labeler(network).class_thresholds(pictures(3), keep)
        assert network.seen == []

    def test_refuse_an_empty_data_set(self):
        with pytest.raises(DataError, match="the data set to find thresholds for is empty"):
            labeler().class_thresholds([])

    def test_of_images_that_cannot_be_read(self):
        class Failing(Named):
            def __getitem__(self, index):
                if index == 2:
                    raise OSError("disk on fire")
                return super().__getitem__(index)

        with pytest.raises(UnreadableImageError, match="item 'city/img_02': disk on fire"):
            labeler().class_thresholds(Failing(pictures(5)))
        rest = [image for index, image in enumerate(pictures(5)) if index != 2]
        found = labeler(batch_size=1).class_thresholds(Failing(pictures(5)), 0.5, skip_unreadable=True)
        assert found == labeler(batch_size=1).class_thresholds(rest, 0.5)

    def test_need_no_more_memory_for_more_images(self):
        alive, most = 0, 0

        def gone():
            nonlocal alive
            alive -= 1

        class Many(Named):
            def __getitem__(self, index):
                nonlocal alive, most
                alive += 1
                most = max(most, alive)
                image = torch.zeros(3, 2, 2 + index % 50)
                weakref.finalize(image, gone)
                return image

        labeler(nn.Conv2d(3, 4, 1), batch_size=4).class_thresholds(Many([None] * 400), 0.5)
        assert alive == 0
        assert most <= 8 * 4 + 1 + 4 + 1  # waiting, just loaded, and the one that was yielded last


class TestThresholdsOfClasses:
    THRESHOLDS = (0.4, 0.9, 0.0, 0.6)

    def test_hold_for_the_pixels_of_their_class(self):
        data = pictures(5)
        found = labeler(threshold=self.THRESHOLDS, ignore_index=9).label(data)
        for (_, mask), (expected, confidence) in zip(found, one_at_a_time(data), strict=True):
            for of_class, threshold in enumerate(self.THRESHOLDS):
                low = (expected == of_class) & (confidence < threshold)
                expected = expected.masked_fill(low, 9)
            assert torch.equal(mask, expected)

    def test_go_on_where_a_labeling_was_stopped_and_are_refused_where_they_differ(self, tmp_path):
        data, again = pictures(5), Pooled()
        first = labeler(threshold=self.THRESHOLDS).label(data, tmp_path)
        (tmp_path / f"{data.ids[3]}.png").unlink()
        second = labeler(again, threshold=torch.tensor(self.THRESHOLDS, dtype=torch.float64)).label(data, tmp_path)
        assert again.images_seen() == 1
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(first, second, strict=True))
        other = (0.4, 0.9, 0.1, 0.6)
        for threshold in (other, 0.4, 0.0):
            with pytest.raises(WorkdirMismatchError, match=r"threshold is \[0.4, 0.9, 0.0, 0.6\] there and"):
                labeler(threshold=threshold).label(data, tmp_path)

    @pytest.mark.parametrize("ignore_index", [-1, 65536])
    def test_need_an_ignore_index_that_a_png_can_hold(self, tmp_path, ignore_index):
        with pytest.raises(ValueError, match=rf"ignore_index is {ignore_index}; .* 0\.\.65535"):
            labeler(threshold=self.THRESHOLDS, ignore_index=ignore_index).label(pictures(3), tmp_path / "masks")
        labeler(threshold=[0.0] * 4, ignore_index=ignore_index).label(pictures(3), tmp_path / "masks")


class TestLeavesAlone:
    @pytest.mark.parametrize("wrapped", [False, True])
    def test_modes_gradients_statistics_and_random_numbers(self, wrapped):
        network = Pooled().train()
        network.norm.eval()
        model = Segmenter(network).train() if wrapped else network
        network.norm.eval()
        state = {name: value.clone() for name, value in network.state_dict().items()}
        torch.manual_seed(0)
        expected = torch.rand(3)
        torch.manual_seed(0)
        made = labeler(model)
        made.label(pictures(4))
        mask, confidence = made(torch.rand(1, 3, 9, 12, generator=torch.Generator()))
        assert torch.equal(torch.rand(3), expected)
        assert [m.training for m in (network, network.near, network.norm, network.drop)] == [True, True, False, True]
        assert torch.is_grad_enabled()
        assert not mask.requires_grad
        assert not confidence.requires_grad
        assert all(p.grad is None and p.requires_grad for p in network.parameters())
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())

    def test_modes_when_something_goes_wrong(self):
        network = Pooled().train()
        with pytest.raises(DataError):
            labeler(network).label([torch.rand(3, 4, 4), torch.full((3, 4, 4), 7.0)])
        assert all(module.training for module in network.modules())


class TestOnDisk:
    def test_each_mask_is_there_as_soon_as_it_is_made(self, tmp_path):
        there = []

        class Watching(Named):
            def __getitem__(self, index):
                there.append(len(MaskStore(tmp_path)))
                return super().__getitem__(index)

        data = Watching([torch.rand(3, 7, 7) for _ in range(200)])
        labeler(batch_size=2).label(data, tmp_path)
        # 32 + 8 images are read beforehand; 64 masks may wait for the writers, 4 of whom are at work.
        assert all(count >= number - 64 - 4 for number, count in enumerate(there[40:]))
        assert len(MaskStore(tmp_path)) == 200

    def test_masks_are_palette_pngs_named_by_id(self, tmp_path):
        data = pictures(2)
        labeler().label(data, str(tmp_path))
        with Image.open(tmp_path / "city" / "img_01.png") as image:
            assert image.mode == "P"
            assert np.array_equal(np.array(image), one_at_a_time(data)[1][0].numpy())

    @pytest.mark.parametrize("kept", [False, True])
    def test_a_second_time_nothing_is_done_again(self, tmp_path, kept):
        data, again = pictures(), Pooled()
        first = labeler().label(data, tmp_path, confidence=kept)
        second = labeler(again, batch_size=3).label(data, tmp_path, confidence=kept)
        assert again.seen == []
        assert second.ids == first.ids
        assert same_masks(second, one_at_a_time(data))
        if kept:
            assert torch.equal(first.confidence(3), second.confidence(3))

    def test_only_what_is_missing_or_broken_is_done_again(self, tmp_path):
        data, again = pictures(), Pooled()
        labeler().label(data, tmp_path)
        for id in (data.ids[2], data.ids[11]):
            (tmp_path / f"{id}.png").unlink()
        broken = tmp_path / f"{data.ids[5]}.png"
        broken.write_bytes(broken.read_bytes()[:-10])
        found = labeler(again).label(data, tmp_path)
        assert again.images_seen() == 3
        assert same_masks(found, one_at_a_time(data))

    def test_what_lacks_its_confidence_is_done_again_where_it_is_asked_for(self, tmp_path):
        data, again = pictures(4), Pooled()
        labeler().label(data, tmp_path)
        found = labeler(again).label(data, tmp_path, confidence=True)
        assert again.images_seen() == 4
        expected = one_at_a_time(data)[0][1]
        torch.testing.assert_close(found.confidence(0), expected, rtol=0, atol=1 / 65535)

    def test_what_was_made_before_an_unreadable_image_is_kept(self, tmp_path):
        class Failing(Named):
            def __getitem__(self, index):
                if index == 9:
                    raise OSError("disk on fire")
                return super().__getitem__(index)

        again = Pooled()
        with pytest.raises(UnreadableImageError, match="item 'city/img_09': disk on fire"):
            labeler(batch_size=1).label(Failing(pictures()), tmp_path)
        assert len(MaskStore(tmp_path)) == 9
        assert same_masks(labeler(again).label(pictures(), tmp_path), one_at_a_time(pictures()))
        assert again.images_seen() == 4

    @pytest.mark.parametrize(
        ("options", "difference"),
        [
            ({"network": Pooled(seed=1)}, "model"),
            ({"network": MultiScaleFlip(Pooled())}, "model"),
            ({"threshold": 0.5}, r"threshold\b.*0\.0.*0\.5"),
            ({"ignore_index": 9}, r"ignore_index\b.*255.*9"),
            ({"precision": "bf16"}, "precision is 'fp32' there and 'bf16' now .precision=\"fp32\" goes on with it"),
        ],
    )
    def test_masks_of_another_labeler_are_refused(self, tmp_path, options, difference):
        labeler().label(pictures(3), tmp_path)
        before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
        other = labeler(**options)
        with pytest.raises(WorkdirMismatchError, match=difference):
            other.label(pictures(3), tmp_path)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before

    def test_masks_of_other_images_under_the_same_ids_are_refused(self, tmp_path):
        labeler().label(pictures(9), tmp_path)
        labeler().label(Subset(pictures(9), [7, 2]), tmp_path)
        other = pictures(9)
        other[4] = other[4].flip(-1)
        with pytest.raises(WorkdirMismatchError, match="results of other images: the one called 'city/img_04' differs"):
            labeler().label(other, tmp_path)

    def test_masks_of_other_images_are_refused_where_numbers_are_their_names(self, tmp_path):
        labeler().label(list(pictures(3)), tmp_path)
        labeler().label(list(pictures(3)), tmp_path)
        with pytest.raises(WorkdirMismatchError, match="results of other images: the one called '0' differs"):
            labeler().label(list(pictures(3, seed=1)), tmp_path)

    @pytest.mark.parametrize("ignore_index", [-1, 65536])
    def test_an_ignore_index_that_no_png_can_hold_is_refused_before_it_is_needed(self, tmp_path, ignore_index):
        network = Pooled()
        with pytest.raises(ValueError, match=rf"ignore_index is {ignore_index}; .* 0\.\.65535"):
            labeler(network, threshold=0.5, ignore_index=ignore_index).label(pictures(3), tmp_path / "masks")
        assert network.seen == []
        found = labeler(threshold=1.0, ignore_index=ignore_index).label(pictures(3))
        assert ignore_index in found[0][1]


class TestRefuses:
    @pytest.mark.parametrize("on_disk", [False, True])
    @pytest.mark.parametrize("id", ["../a", "a/../../b", "/etc/a", "C:\\a", "a\\b", "", "."])
    def test_ids_that_would_leave_the_store_before_any_work(self, tmp_path, id, on_disk):
        network = Pooled()
        data = Named(pictures(3), ["fine", "too", id])
        with pytest.raises(DataError, match="cannot name a file in a store"):
            labeler(network).label(data, tmp_path / "masks" if on_disk else None)
        assert network.seen == []
        assert list(tmp_path.iterdir()) == []

    def test_ids_that_occur_twice(self):
        with pytest.raises(DataError, match="the id 'a' occurs more than once"):
            labeler().label(Named(pictures(3), ["a", "b", "a"]))

    def test_an_empty_data_set(self):
        with pytest.raises(DataError, match="the data set to label is empty"):
            labeler().label([])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_classes": 1}, "num_classes is 1"),
            ({"ignore_index": 3}, "ignore_index 3 is one of the 4 classes"),
            ({"threshold": 1.5}, "threshold is 1.5"),
            ({"threshold": math.nan}, "threshold is nan"),
            ({"threshold": [0.5, 0.5, 0.5]}, r"threshold is \[0.5, 0.5, 0.5\]; expected .* one for each of 4 classes"),
            ({"threshold": [0.5, 0.5, 2.0, 0.5]}, r"threshold of class 2 is 2.0; expected a probability"),
            ({"batch_size": 0}, "batch_size is 0"),
            ({"precision": "fp16"}, "precision is 'fp16'"),
        ],
    )
    def test_arguments_that_make_no_sense(self, options, message):
        with pytest.raises(ValueError, match=message):
            labeler(**options)

    @pytest.mark.parametrize("num_classes", [3, 5])
    def test_a_network_of_other_classes(self, num_classes):
        with pytest.raises(NetworkError, match=f"gives 4 classes; num_classes is {num_classes}"):
            labeler(num_classes=num_classes).label(pictures(3))

    def test_what_is_no_network(self):
        with pytest.raises(TypeError, match="expected a network"):
            labeler(lambda x: x)

    @pytest.mark.parametrize("image", [torch.full((3, 4, 4), 2.0), torch.full((3, 4, 4), math.nan), torch.zeros(4, 4)])
    def test_what_are_no_images_and_names_them(self, image):
        with pytest.raises(DataError, match="image 'b'"):
            labeler().label(Named([torch.zeros(3, 4, 4), image], ["a", "b"]))


class TestUnreadable:
    @pytest.fixture
    def folder(self, tmp_path):
        for number in range(5):
            image = np.random.default_rng(number).integers(0, 256, (9, 12, 3)).astype(np.uint8)
            Image.fromarray(image).save(tmp_path / f"{number}.png")
        (tmp_path / "1.png").write_bytes(b"no image")
        whole = (tmp_path / "3.png").read_bytes()
        (tmp_path / "3.png").write_bytes(whole[: len(whole) // 2])
        return tmp_path

    class Files(Named):
        def __getitem__(self, index):
            return Image.open(super().__getitem__(index))  # decodes nothing yet

    def data(self, folder, *numbers):
        return self.Files([folder / f"{n}.png" for n in numbers], [f"img_{n}" for n in numbers])

    @pytest.mark.parametrize("number", [1, 3])
    @pytest.mark.parametrize("num_workers", [0, 1])
    def test_images_are_named(self, folder, number, num_workers):
        with pytest.raises(UnreadableImageError, match=f"img_{number}"):
            labeler(num_workers=num_workers).label(self.data(folder, 0, number, 2))

    def test_images_are_left_out_and_listed_by_choice(self, folder, tmp_path):
        found = labeler().label(self.data(folder, 0, 1, 2, 3, 4), skip_unreadable=True)
        assert found.ids == ["img_0", "img_2", "img_4"]
        assert found.indices == [0, 2, 4]
        assert [(s.index, s.id) for s in found.skipped] == [(1, "img_1"), (3, "img_3")]
        assert "1.png" in found.skipped[0].reason
        expected = np.random.default_rng(4).integers(0, 256, (3 * 9 * 12)).reshape(9, 12, 3)
        assert np.array_equal(found[2][0].permute(1, 2, 0).numpy(), expected)

    def test_images_alone_are_an_error_even_so(self, folder):
        with pytest.raises(DataError, match=r"none of the 2 images could be read; the first: .*img_1"):
            labeler().label(self.data(folder, 1, 3), skip_unreadable=True)


class Poisoned(nn.Module):
    """Answers with a wrong number somewhere when the first pixel of an image is white."""

    def __init__(self, value):
        super().__init__()
        self.conv, self.value = nn.Conv2d(3, 4, 1), value

    def forward(self, x):
        logits = self.conv(x).clone()
        logits[x[:, 0, 0, 0] > 2, :, -1, -1] = self.value
        return logits


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
class TestNaN:
    def test_logits_are_an_error_that_names_the_image(self, tmp_path, value):
        data = Named([torch.zeros(3, 4, 5) for _ in range(8)])
        data[5] = torch.ones(3, 4, 5)
        with pytest.raises(NetworkError, match="NaN or infinite logits for image 'city/img_05'"):
            labeler(Poisoned(value)).label(data, tmp_path)
        assert sorted(MaskStore(tmp_path)) == data.ids[:5]

    def test_logits_of_a_batch_are_an_error(self, value):
        images = torch.zeros(2, 3, 4, 5)
        labeler(Poisoned(value))(images)
        images[1] = 1.0
        with pytest.raises(NetworkError, match=r"NaN or infinite logits for a batch of shape \(2, 3, 4, 5\)"):
            labeler(Poisoned(value))(images)


def test_a_network_that_was_moved_to_another_type_of_weights_still_labels():
    network = Pooled()
    made = labeler(network)
    network.double()
    found = made.label(pictures(3))
    assert same_masks(found, one_at_a_time(pictures(3), Pooled().double()))


def test_memory_stays_bounded_when_every_image_has_a_size_of_its_own():
    alive, most = set(), 0

    class Sizes(Named):
        def __getitem__(self, index):
            nonlocal most
            alive.add(index)
            most = max(most, len(alive))
            return torch.zeros(3, 2, 2 + index)

    class Store(MaskStore):
        def put(self, id, mask, confidence=None):
            alive.discard(int(id))
            super().put(id, mask[:1, :1])

    data = Sizes([None] * 400, [str(i) for i in range(400)])
    labeler(nn.Conv2d(3, 4, 1), batch_size=4).label(data, Store())
    assert alive == set()
    assert most <= 8 * 4 + 1 + 4 + 64  # waiting, just loaded, and with the writers


class TestImages:
    """Behind pseudo-masks on disk."""

    def test_that_changed_are_noticed_when_they_are_read_each_one(self, tmp_path):
        images = [torch.rand(3, 7, 7, generator=torch.Generator().manual_seed(k)) for k in range(40)]
        network = labeler(nn.Conv2d(3, 4, 1))
        network.label(images, tmp_path)
        changed = [*images[:17], images[17].flip(-1), *images[18:]]  # not one of the eight that are compared at first
        found = network.label(changed, tmp_path)
        assert len([found[k] for k in range(40) if k != 17]) == 39
        path = tmp_path / "17.png"
        with pytest.raises(
            DamagedFileError, match=f"{path} is the mask of another image: '17' has .*; delete {path} to"
        ):
            found[17]
        path.unlink()
        image, mask = network.label(changed, tmp_path)[17]
        assert torch.equal(image, changed[17])
        assert torch.equal(mask, network(changed[17][None]).mask[0])

    def test_are_noticed_without_the_record_too(self, tmp_path):
        network = labeler(nn.Conv2d(3, 4, 1))
        network.label([torch.zeros(3, 7, 7)], tmp_path)
        (tmp_path / "labels.json").unlink()
        with pytest.raises(DamagedFileError, match="is the mask of another image"):
            network.label([torch.ones(3, 7, 7)], tmp_path)[0]

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
    def test_that_are_the_same_are_taken_in_workers_too(self, tmp_path, dtype):
        images = [(torch.rand(3, 7, 7) * 255).to(dtype) / (1 if dtype == torch.uint8 else 255) for _ in range(5)]
        images = [image.to(dtype) for image in images]
        network = labeler(nn.Conv2d(3, 4, 1), num_workers=1)
        for _ in range(2):
            found = network.label(images, tmp_path)
            assert all(torch.equal(found[k][0], images[k]) for k in range(5))


def test_masks_are_the_same_with_and_without_their_confidence():
    data = pictures(9)
    plain, sure = labeler().label(data), labeler().label(data, confidence=True)
    assert all(torch.equal(one, other) for (_, one), (_, other) in zip(plain, sure, strict=True))
    for _, mask in plain:
        assert mask.dtype == torch.uint8


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("confidence", [True, False])
def test_logits_that_are_not_finite_are_noticed_without_a_softmax(value, confidence):
    class Broken(Pooled):
        def forward(self, x):
            return torch.where(x[:, :1, :1, :1] > 0.99, value, super().forward(x))

    data = Named([torch.full((3, 9, 12), 0.5), torch.ones(3, 9, 12), torch.full((3, 9, 12), 0.4)])
    model = Segmenter(Broken(), mean=None, std=None, stride=1)
    with pytest.raises(NetworkError, match="NaN or infinite logits for image 'city/img_01'"):
        labeler(model).label(data, confidence=confidence)


def test_an_error_while_masks_are_written_leaves_the_network_as_it_was():
    class Full(MaskStore):
        def put(self, id, mask, confidence=None, *, image=None):
            raise OSError("disk full")

    model = Pooled().requires_grad_(False)
    with pytest.raises(OSError, match="disk full") as error:
        labeler(model, batch_size=1).label(pictures(90), Full())
    assert error.value.__traceback__ is not None  # which keeps the frames of the loop
    assert all(each.is_contiguous() and not each.requires_grad for each in model.parameters())
