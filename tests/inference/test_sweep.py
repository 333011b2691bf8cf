from __future__ import annotations

import math
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small import Named, Pooled
from torch import nn
from torch.utils.data import ConcatDataset, Subset

from stseg import DataError, NetworkError, Segmenter, UnreadableImageError, evaluate
from stseg.data.items import Items
from stseg.inference.reading import read_ahead, read_items
from stseg.inference.sweep import Sweep, batch_by_size, predictor
from stseg.models.batching import images_per_pass

CPU = torch.device("cpu")


def mixed_sizes(count, seed=0, classes=4):
    """Images of three sizes, in no order, with masks."""
    generator = np.random.default_rng(seed)
    items = []
    for size in generator.permutation([(9, 12), (12, 9), (7, 7)] * math.ceil(count / 3))[:count]:
        mask = generator.integers(0, classes, size).astype(np.uint8)
        mask[generator.random(mask.shape) < 0.1] = 255
        items.append((torch.from_numpy(generator.random((3, *size), dtype=np.float32)), torch.from_numpy(mask)))
    return Named(items)


def means(batch):
    return [float(image.mean()) for image in batch]


class TestEqualBatches:
    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.integers(1, 5), max_size=40), st.integers(1, 5), st.none() | st.integers(0, 12))
    def test_give_results_in_order_out_of_batches_of_one_size(self, widths, batch_size, longest_wait):
        batches = []

        def function(batch):
            batches.append(batch.shape)
            return means(batch)

        images = [(7 * i, torch.full((1, 2, width), float(i))) for i, width in enumerate(widths)]
        found = list(
            batch_by_size(function, iter(images), batch_size=batch_size, device=CPU, longest_wait=longest_wait)
        )
        assert found == [(7 * i, float(i)) for i in range(len(widths))]
        assert all(1 <= shape[0] <= batch_size for shape in batches)
        assert sum(shape[0] for shape in batches) == len(widths)

    def test_are_as_large_as_can_be(self):
        batches = []

        def function(batch):
            batches.append(tuple(batch.shape))
            return means(batch)

        images = [(i, torch.zeros(1, 2, 3 + i % 2)) for i in range(10)]
        list(batch_by_size(function, images, batch_size=4, device=CPU))
        assert sorted(batches) == [(1, 1, 2, 3), (1, 1, 2, 4), (4, 1, 2, 3), (4, 1, 2, 4)]

    def test_never_mix_types_of_equal_size(self):
        images = [(0, torch.zeros(3, 2, 2)), (1, torch.zeros(3, 2, 2, dtype=torch.uint8)), (2, torch.zeros(1, 2, 2))]
        kinds = list(batch_by_size(lambda b: [b.dtype] * len(b), images, batch_size=2, device=CPU))
        assert kinds == [(0, torch.float32), (1, torch.uint8), (2, torch.float32)]

    @pytest.mark.parametrize(("batch_size", "longest_wait", "bound"), [(2, None, 17), (4, None, 33), (4, 5, 6)])
    def test_hold_a_bounded_number_of_images_however_many_sizes_there_are(self, batch_size, longest_wait, bound):
        taken = 0

        def images():
            nonlocal taken
            for i in range(400):
                taken += 1
                yield i, torch.zeros(1, 1, 1 + i)

        ahead = []
        results = batch_by_size(means, images(), batch_size=batch_size, device=CPU, longest_wait=longest_wait)
        for given_back, (index, _) in enumerate(results):
            assert index == given_back
            ahead.append(taken - given_back)
        assert len(ahead) == 400
        assert max(ahead) == bound

    def test_hold_no_more_when_one_odd_image_waits_behind_many_equal_ones(self):
        taken = 0

        def images():
            nonlocal taken
            for i in range(400):
                taken += 1
                yield i, torch.zeros(1, 1, 2 if i % 100 else 1)

        ahead = [taken - n for n, _ in enumerate(batch_by_size(means, images(), batch_size=4, device=CPU))]
        assert len(ahead) == 400
        assert max(ahead) == 33

    def test_refuse_a_function_that_loses_images(self):
        with pytest.raises(ValueError, match="zip"):
            list(batch_by_size(lambda b: [0], [(i, torch.zeros(1, 1, 1)) for i in range(2)], batch_size=2, device=CPU))


class TestReadAhead:
    def counted(self, taken, stop=None):
        for number in range(20):
            if number == stop:
                raise OSError("disk on fire")
            taken.append(threading.get_ident())
            yield number

    def test_gives_the_values_in_order_out_of_one_other_thread(self):
        taken = []
        assert list(read_ahead(self.counted(taken), 3)) == list(range(20))
        assert len(set(taken)) == 1
        assert threading.get_ident() not in taken

    def test_is_no_more_than_a_few_ahead_and_ends_with_its_reader(self):
        taken = []
        values = read_ahead(self.counted(taken), 3)
        assert [next(values), next(values)] == [0, 1]
        values.close()
        assert len(taken) <= 5

    def test_raises_an_error_where_it_belongs(self):
        with pytest.raises(OSError, match="disk on fire"):
            list(read_ahead(self.counted([], stop=7), 3))
        found = []
        values = read_ahead(self.counted([], stop=7), 3)
        with pytest.raises(OSError, match="disk on fire"):
            found.extend(value for value in values if found.append(value))
        assert found == list(range(7))

    @pytest.mark.parametrize("concurrent", [True, False])
    def test_is_for_data_sets_that_say_so(self, concurrent):
        threads = set()

        class Plain(Named):
            def __getitem__(self, index):
                threads.add(threading.get_ident())
                return super().__getitem__(index)

        class Concurrent(Plain):
            pass

        Concurrent.concurrent = concurrent
        data = Concurrent(mixed_sizes(7))
        found = list(Sweep(Items(data), "read", progress=False, with_mask=True).read())
        assert [index for index, _ in found] == list(range(7))
        assert all(torch.equal(image, data[index][0]) for index, (image, _) in found)
        assert (len(threads) == 2) is concurrent

    def test_knows_the_data_set_below(self):
        class Concurrent(Named):
            concurrent = True

        class Own(Concurrent):
            """Which may do anything."""

        data = Concurrent(mixed_sizes(4))
        assert Items(data).concurrent
        assert Items(Subset(data, [2, 0])).subset([1]).concurrent
        assert Items(ConcatDataset([data, Subset(Concurrent(mixed_sizes(2)), [0])])).concurrent
        assert not Items(ConcatDataset([data, Named(mixed_sizes(2))])).concurrent
        assert not Items(Own(mixed_sizes(2))).concurrent


class TestImagesPerPass:
    def test_on_a_cpu_is_limited_by_pixels(self):
        assert [images_per_pass(CPU, side, side, 8) for side in (1, 128, 256, 320, 512, 4000)] == [8, 8, 3, 1, 1, 1]
        assert images_per_pass(torch.device("cuda"), 4000, 4000, 8) == 8

    def test_is_kept_by_a_sweep_and_changes_no_result(self):
        seen = []

        def function(batch):
            seen.append(tuple(batch.shape))
            return means(batch)

        images = [(i, torch.rand(1, 256, 256 if i % 2 else 8)) for i in range(12)]
        found = list(batch_by_size(function, iter(images), batch_size=6, device=CPU))
        assert [index for index, _ in found] == list(range(12))
        assert [value for _, value in found] == pytest.approx([float(image.mean()) for _, image in images])
        assert seen.count((3, 1, 256, 256)) == 2
        assert seen.count((6, 1, 256, 8)) == 1


class TestLoad:
    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_gives_the_chosen_items_in_order(self, num_workers):
        data = mixed_sizes(7)
        chosen = [5, 0, 6, 2]
        found = list(read_items(Items(data), chosen, batch_size=2, num_workers=num_workers))
        assert [index for index, _ in found] == chosen
        assert all(torch.equal(image, data[index][0]) for index, image in found)
        pairs = list(read_items(Items(data), chosen, batch_size=2, num_workers=num_workers, with_mask=True))
        assert all(torch.equal(image, data[i][0]) and torch.equal(mask, data[i][1]) for i, (image, mask) in pairs)

    @pytest.mark.parametrize("num_workers", [0, 1])
    def test_names_what_cannot_be_read(self, num_workers, tmp_path):
        class Broken(Named):
            def __getitem__(self, index):
                if index == 1:
                    return Image.open(tmp_path / "there is none.png")
                return super().__getitem__(index)

        data = Broken(mixed_sizes(3))
        with pytest.raises(UnreadableImageError, match=r"item 'city/img_01': .*there is none\.png"):
            list(read_items(Items(data), range(3), batch_size=1, num_workers=num_workers))
        skipped = []
        found = list(read_items(Items(data), range(3), batch_size=1, num_workers=num_workers, skip=skipped.append))
        assert [index for index, _ in found] == [0, 2]
        assert [(s.index, s.id) for s in skipped] == [(1, "city/img_01")]
        assert "there is none.png" in skipped[0].reason

    def test_draws_no_random_numbers(self):
        torch.manual_seed(0)
        expected = torch.rand(3)
        torch.manual_seed(0)
        list(read_items(Items(mixed_sizes(4)), range(4), batch_size=2, num_workers=1))
        assert torch.equal(torch.rand(3), expected)

    @pytest.mark.skipif(os.name != "posix", reason="needs a limit on open files")
    def test_from_workers_leaves_no_file_open_for_each_image(self):
        program = """
import resource, torch
from stseg.data.items import Items
from stseg.inference.reading import read_items

class Images(list):
    def __len__(self): return 300
    def __getitem__(self, i): return torch.zeros(3, 4, 5 + i), torch.zeros(4, 5 + i, dtype=torch.uint8)

resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
print(len(list(read_items(Items(Images()), range(300), batch_size=32, num_workers=2, with_mask=True))))
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=False)
        assert done.stdout == "300\n", done.stderr[-2000:]


class TestPredictor:
    def test_takes_no_part_in_the_autocast_around_it_unless_asked(self):
        class Says(nn.Module):
            takes_images = True

            def forward(self, x):
                self.dtype = nn.functional.conv2d(x, torch.ones(2, 3, 1, 1)).dtype
                return torch.zeros(len(x), 2, *x.shape[2:])

        network = Says()
        for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            predictor(network, 2, precision)(torch.rand(1, 3, 4, 4))
            assert network.dtype == dtype
            with torch.autocast("cpu", dtype=torch.bfloat16):
                predictor(network, 2, precision)(torch.rand(1, 3, 4, 4))
            assert network.dtype == dtype

    def test_refuses_other_precisions_at_once(self):
        with pytest.raises(ValueError, match="precision is 'fp16'; expected 'auto', 'fp32' or 'bf16'"):
            predictor(nn.Conv2d(3, 2, 1), 2, "fp16")

    @pytest.mark.parametrize("expected", [3, 5])
    def test_refuses_another_number_of_classes(self, expected):
        predict = predictor(Segmenter(nn.Conv2d(3, 4, 1)), expected, "fp32")
        with pytest.raises(NetworkError, match=f"gives 4 classes; num_classes is {expected}"):
            predict(torch.rand(1, 3, 4, 4))


def matrix_by_loops(model, data, classes):
    """One confusion matrix, one image at a time."""
    matrix = np.zeros((classes, classes), dtype=np.int64)
    for image, mask in data:
        with torch.no_grad():
            prediction = model(image[None])[0].argmax(0)
        for p, t in zip(prediction.flatten().tolist(), mask.flatten().tolist(), strict=True):
            if t != 255:
                matrix[t, p] += 1
    return matrix


class TestEvaluate:
    @pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (3, 0), (100, 0), (2, 2)])
    def test_counts_every_pixel_of_a_data_set_of_mixed_sizes(self, batch_size, num_workers):
        data, network = mixed_sizes(11), Pooled()
        metric = evaluate(network, data, num_classes=4, batch_size=batch_size, num_workers=num_workers, progress=False)
        expected = matrix_by_loops(Segmenter(Pooled()).eval(), data, 4)
        assert np.array_equal(metric.matrix.numpy(), expected)
        union = expected.sum(0) + expected.sum(1) - expected.diagonal()
        assert metric.compute() == pytest.approx(float((expected.diagonal() / union).mean()), abs=1e-12)
        images = [shape for shape in network.seen if shape[2:] in {(9, 12), (12, 9), (7, 7)}]
        assert sum(shape[0] for shape in images) == 11
        assert max(shape[0] for shape in images) <= batch_size

    def test_leaves_mode_gradients_and_random_numbers_alone(self):
        network = Pooled().train()
        network.norm.eval()
        statistics = network.norm.running_mean.clone()
        torch.manual_seed(0)
        expected = torch.rand(3)
        torch.manual_seed(0)
        evaluate(network, mixed_sizes(4), num_classes=4, progress=False)
        assert torch.equal(torch.rand(3), expected)
        assert [network.training, network.norm.training, network.drop.training] == [True, False, True]
        assert torch.equal(network.norm.running_mean, statistics)
        assert network.head.weight.grad is None
        assert torch.is_grad_enabled()

    def test_has_another_result_in_half_precision(self):
        data = mixed_sizes(12)
        single, half = (
            evaluate(Pooled(), data, num_classes=4, precision=p, progress=False).matrix for p in ("fp32", "bf16")
        )
        assert single.sum() == half.sum()
        assert not torch.equal(single, half)

    @pytest.mark.parametrize(
        ("item", "message"),
        [
            (
                (torch.zeros(3, 4, 4), torch.full((4, 4), 34)),
                r"mask of 'b' holds the value 34; expected 0\.\.3 or 255",
            ),
            (
                (torch.zeros(3, 4, 4), torch.full((4, 4), -1)),
                r"mask of 'b' holds the value -1; expected 0\.\.3 or 255",
            ),
            ((torch.zeros(3, 4, 4), torch.zeros(4, 5).int()), "image and mask of 'b' differ in size"),
            ((torch.zeros(3, 4, 4),), "item 'b' has no mask"),
            (torch.zeros(3, 4, 4), "item 'b' has no mask"),
            ((torch.full((3, 4, 4), 7.0), torch.zeros(4, 4).int()), r"'b' holds values from 7 to 7; expected floats"),
        ],
    )
    def test_names_the_item_that_is_wrong(self, item, message):
        data = Named([(torch.zeros(3, 4, 4), torch.zeros(4, 4).int()), item], ids=["a", "b"])
        with pytest.raises(DataError, match=message):
            evaluate(Pooled(), data, num_classes=4, progress=False)

    def test_refuses_float_masks(self):
        data = Named([(torch.zeros(3, 4, 4), torch.zeros(4, 4))], ids=["a"])
        with pytest.raises(TypeError, match=r"mask of 'a' is torch\.float32"):
            evaluate(Pooled(), data, num_classes=4, progress=False)

    def test_refuses_nothing_to_evaluate_on(self):
        with pytest.raises(DataError, match="the data set to evaluate is empty"):
            evaluate(Pooled(), [], num_classes=4, progress=False)

    @pytest.mark.parametrize("num_classes", [3, 5])
    def test_refuses_a_network_of_other_classes_and_restores_it(self, num_classes):
        network = Pooled().train()
        data = [(torch.zeros(3, 4, 4), torch.zeros(4, 4).int())]
        with pytest.raises(NetworkError, match=f"gives 4 classes; num_classes is {num_classes}"):
            evaluate(network, data, num_classes=num_classes, progress=False)
        assert all(module.training for module in network.modules())
