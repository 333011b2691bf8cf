"""The whole of it on a GPU: what the CPU computes, and nothing left on the wrong device."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import stseg
from stseg.models.state import device_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 1))


def images(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, 20 + 4 * (i % 2), 24, generator=generator) for i in range(count)]


@pytest.fixture(autouse=True)
def exact():
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def test_labels_and_ranking_are_those_of_the_cpu():
    data = images(7)
    options = {"num_classes": 3, "batch_size": 3, "progress": False}
    on_cpu, on_gpu = network().eval(), network().eval().cuda()
    for model in (on_cpu, on_gpu):
        assert stseg.PseudoLabeler(model, **options)(data[0][None].to(device_of(model))).mask.device == device_of(model)
    one, other = (stseg.PseudoLabeler(stseg.MultiScaleFlip(m), **options).label(data) for m in (on_cpu, on_gpu))
    for (_, mask), (_, same) in zip(one, other, strict=True):
        assert same.device.type == "cpu"
        assert (mask == same).float().mean() > 0.999
    checkpoints = [network().eval(), nn.Conv2d(3, 3, 1), on_cpu]
    first = stseg.StabilityRanker(checkpoints, **options).rank(data)
    second = stseg.StabilityRanker(checkpoints, device="cuda", **options).rank(data)
    assert second.scores == pytest.approx(first.scores, abs=1e-2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_whole_run_ends_on_the_gpu_and_leaves_the_earlier_stages_on_the_cpu(tmp_path, precision):
    pairs = [(image, (image[0] > 0.5).byte()) for image in images(3)]
    config = stseg.TrainConfig(steps=6, batch_size=2, crop_size=16, precision=precision, num_workers=1)
    trainer = stseg.SelfTrainer(network, num_classes=3, config=config, workdir=tmp_path, progress=False)
    result = trainer.fit(pairs, images(6), pairs)
    assert device_of(result.model).type == "cuda"
    assert {device_of(result.stages[name].model).type for name in ("teacher", "student-1")} == {"cpu"}
    again = trainer.fit(pairs, images(6), pairs)
    assert again.ranking == result.ranking
    assert 0 <= stseg.evaluate(again.model, pairs, num_classes=3, progress=False).compute() <= 1


def test_strong_augmentation_keeps_its_rows_and_its_device():
    x, masks = torch.rand(4, 3, 32, 32, device="cuda"), torch.zeros(4, 32, 32, dtype=torch.uint8, device="cuda")
    where = torch.tensor([True, False, True, False], device="cuda")
    new, cut = stseg.StrongAugment()(x, masks, where)
    assert (new.device, cut.device) == (x.device, x.device)
    assert torch.equal(new[~where], x[~where])
