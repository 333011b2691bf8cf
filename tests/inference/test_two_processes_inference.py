"""Two processes share the work and get what a single one gets. This file is also the program that they run."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from stseg import BoundaryIoU, MaskStore, PseudoLabeler, Ranking, StabilityRanker, evaluate

SIZES = [(9, 12), (12, 9), (7, 7)]
BROKEN = 4


class Pooled(nn.Module):
    """A small network with a branch that sees the whole image; remembers what it was called for."""

    def __init__(self, seed):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.near, self.far = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.seen = []

    def forward(self, x):
        self.seen.append(tuple(x.shape))
        return 8 * self.near(x) + 16 * self.far(x.mean((2, 3), keepdim=True))

    def images_seen(self):
        return sum(shape[0] for shape in self.seen if shape[2:] in set(SIZES))


class Scenes:
    """Images of three sizes with masks; one of them cannot be read where that is wanted."""

    def __init__(self, count, broken=None):
        generator = np.random.default_rng(0)
        self.ids, self.broken, self.items = [f"city/{i}" for i in range(count)], broken, []
        for size in generator.permutation(SIZES * math.ceil(count / 3))[:count]:
            image = torch.from_numpy(generator.random((3, *size), dtype=np.float32))
            self.items.append((image, torch.from_numpy(generator.integers(0, 4, size).astype(np.uint8))))

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        if index == self.broken:
            raise OSError("disk on fire")
        return self.items[index]


def networks():
    return [Pooled(seed=0), Pooled(seed=1), Pooled(seed=2)]


def extra_metrics():
    metrics = {"boundary": BoundaryIoU(4)}
    with suppress(ImportError):
        from torchmetrics.classification import MulticlassJaccardIndex

        metrics["jaccard"] = MulticlassJaccardIndex(4, average=None)
    return metrics


def everything(folder):
    """What the package does in one process or in several, and how many images the networks saw in this one."""
    options = {"num_classes": 4, "batch_size": 3, "precision": "fp32", "progress": False}
    data, broken = Scenes(11), Scenes(11, BROKEN)
    result, seen = {}, {}

    def labels(found):
        masks = [(mask, found.confidence(i)) for i, (_, mask) in enumerate(found)]
        return found.ids, found.indices, [(s.index, s.id, s.reason) for s in found.skipped], masks

    for name, dataset, store in [
        ("in memory", data, None),
        ("in the caller's memory", data, MaskStore()),
        ("on disk", data, folder / "masks"),
        ("on disk again", data, folder / "masks"),
        ("broken", broken, None),
        ("fewer than processes", Scenes(1), None),
    ]:
        network = Pooled(seed=2)
        labeler = PseudoLabeler(network, threshold=0.4, **options)
        result[name] = labels(labeler.label(dataset, store, confidence=True, skip_unreadable=dataset is broken))
        seen[name] = network.images_seen()

    for name, dataset in [("ranking", data), ("ranking again", data), ("broken ranking", broken)]:
        used = networks()
        store = folder / "scores" if dataset is data else None
        ranking = StabilityRanker(used, **options).rank(dataset, store=store, skip_unreadable=dataset is broken)
        result[name] = ranking.indices, ranking.scores, ranking.ids, [s.index for s in ranking.skipped]
        seen[name] = used[0].images_seen()

    network = Pooled(seed=2)
    result["thresholds"] = torch.tensor(PseudoLabeler(network, **options).class_thresholds(data, 0.6))
    seen["thresholds"] = network.images_seen()

    network = Pooled(seed=2)
    metric = evaluate(network, data, per_image=True, metrics=(extra := extra_metrics()), **options)
    result["evaluation"] = metric.matrix
    result["images"] = list(metric.miou_per_image().items())
    result["extra"] = [torch.as_tensor(each.compute(), dtype=torch.float64) for each in extra.values()]
    seen["evaluation"] = network.images_seen()
    return result, seen


def equal(a, b):
    if isinstance(a, torch.Tensor):
        if a.dtype == torch.float32:  # a confidence; other batches round otherwise, the store keeps steps of 1/65535
            return torch.allclose(a, b, rtol=0, atol=1.1 / 65535)
        return torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return everything(tmp_path_factory.mktemp("single"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where two processes have left what they did."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("needs gloo")
    folder = tmp_path_factory.mktemp("two")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    program = [sys.executable, __file__, str(folder)]
    processes = [
        subprocess.Popen([*program, str(rank)], stderr=subprocess.PIPE, text=True, env=environment) for rank in range(2)
    ]
    errors = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(e[-2000:] for e in errors)
    return folder


@pytest.fixture(scope="module")
def both(folder):
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


CASES = [
    "in memory",
    "in the caller's memory",
    "on disk",
    "on disk again",
    "broken",
    "fewer than processes",
    "ranking",
    "ranking again",
    "broken ranking",
    "thresholds",
    "evaluation",
]
OF_EVALUATION = ["images", "extra"]  # fmt: skip


@pytest.mark.parametrize("case", [*CASES, *OF_EVALUATION])
def test_each_process_has_the_result_of_a_single_one(both, single, case):
    (expected, _) = single
    for result, _ in both:
        assert equal(result[case], expected[case])


@pytest.mark.parametrize("case", CASES)
def test_the_work_is_shared_and_done_once(both, single, case):
    (_, alone), shares = single, [seen[case] for _, seen in both]
    assert sum(shares) == alone[case]
    assert max(shares) - min(shares) <= 1 + case.startswith("broken")


def test_results_are_worth_comparing(single):
    result, seen = single
    assert seen["in memory"] == seen["ranking"] == seen["evaluation"] == 11
    assert [id for id, _ in result["images"]] == [f"city/{i}" for i in range(11)]
    assert len({miou for _, miou in result["images"]}) == 11
    assert seen["on disk again"] == seen["ranking again"] == 0
    assert len(set(result["thresholds"].tolist())) == 4
    assert result["broken"][2] == [(BROKEN, "city/4", "item 'city/4': disk on fire")]
    assert len({round(score, 6) for score in result["ranking"][1]}) == 11
    assert {255} < set(torch.cat([mask.flatten() for mask, _ in result["in memory"][3]]).tolist())


def test_a_single_process_goes_on_where_several_have_stopped(folder, single):
    expected, _ = single
    used = networks()
    ranking = StabilityRanker(used, num_classes=4, progress=False).rank(Scenes(11), store=folder / "scores")
    assert (ranking.indices, ranking.scores) == expected["ranking"][:2]
    (folder / "scores.1").unlink()
    again = StabilityRanker(used, num_classes=4, progress=False).rank(Scenes(11), store=folder / "scores")
    assert isinstance(again, Ranking)
    assert again == ranking
    assert used[0].images_seen() == 5  # those with an odd number


if __name__ == "__main__":
    here, number = Path(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group(
        "gloo", init_method=f"file://{here / 'meeting'}", rank=number, world_size=2, timeout=timedelta(seconds=60)
    )
    torch.save(everything(here), here / f"{number}.pt")
    dist.destroy_process_group()
