"""The whole of it on a GPU: what the CPU computes, and nothing left on the wrong device."""

from __future__ import annotations

import pytest
import torch
from small import Entropic, Stopped
from torch import nn

import stseg
from stseg.methods import Supervised
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
    config = stseg.TrainConfig(steps=6, batch_size=2, weak=stseg.WeakAugment(16), precision=precision, num_workers=1)
    trainer = stseg.SelfTrainer(network, num_classes=3, config=config, workdir=tmp_path, progress=False)
    result = trainer.fit(pairs, images(6), pairs)
    assert device_of(result.model).type == "cuda"
    assert {device_of(result.stages[name].model).type for name in ("teacher", "student-1")} == {"cpu"}
    again = trainer.fit(pairs, images(6), pairs)
    assert again.ranking == result.ranking
    assert 0 <= stseg.evaluate(again.model, pairs, num_classes=3, progress=False).compute() <= 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_method_of_two_streams_trains_on_the_gpu(precision):
    pairs = [(image, (image[0] > 0.5).byte()) for image in images(3)]
    config = stseg.TrainConfig(steps=4, batch_size=2, weak=stseg.WeakAugment(16), precision=precision)
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]), ignore_index=255)
    weighted = stseg.fit(Supervised(network(), loss=loss), pairs, config, progress=False)
    result = stseg.fit(Entropic(network()), pairs, config, unlabeled=images(5), progress=False)
    for each in (weighted, result):
        assert device_of(each.model).type == "cuda"
        assert all(value.isfinite().all() for value in each.model.state_dict().values())


def test_a_stage_stopped_on_the_gpu_goes_on_to_about_the_same_weights(tmp_path):
    pairs = [(image, (image[0] > 0.5).byte()) for image in images(3)]
    config = stseg.TrainConfig(steps=6, batch_size=2, weak=stseg.WeakAugment(16), optimizer="adamw", save_every=0)
    whole = stseg.fit(Stopped(network()), pairs, config, progress=False)
    with pytest.raises(KeyboardInterrupt):
        stseg.fit(Stopped(network(), after=3), pairs, config, workdir=tmp_path, progress=False)
    rest = stseg.fit(Stopped(network()), pairs, config, workdir=tmp_path, progress=False)
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(rest.model.state_dict()[name], value, rtol=1e-3, atol=1e-4)


def test_strong_augmentation_keeps_its_rows_and_its_device():
    x, masks = torch.rand(4, 3, 32, 32, device="cuda"), torch.zeros(4, 32, 32, dtype=torch.uint8, device="cuda")
    where = torch.tensor([True, False, True, False], device="cuda")
    new, cut = stseg.StrongAugment()(x, masks, where)
    assert (new.device, cut.device) == (x.device, x.device)
    assert torch.equal(new[~where], x[~where])
