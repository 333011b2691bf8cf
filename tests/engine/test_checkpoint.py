from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from stseg import DataError, Segmenter
from stseg.engine.checkpoint import StageCheckpoint, StageState, copy_on_cpu, load_weights, save_weights


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


def states_equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


class TestWeights:
    def test_come_back_into_bare_and_wrapped_networks(self, tmp_path):
        written = network()
        save_weights(Segmenter(written), tmp_path / "deep" / "a.safetensors")
        for read in (network(), Segmenter(network())):
            load_weights(read, tmp_path / "deep" / "a.safetensors")
            assert states_equal(getattr(read, "network", read), written)

    def test_that_are_shared_within_a_network_survive(self, tmp_path):
        tied = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
        tied[1].weight = tied[0].weight
        save_weights(tied, tmp_path / "a.safetensors")
        read = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
        load_weights(read, tmp_path / "a.safetensors")
        assert states_equal(read, tied)

    def test_of_another_architecture_are_refused(self, tmp_path):
        save_weights(network(), tmp_path / "a.safetensors")
        with pytest.raises(DataError, match=r"a\.safetensors cannot be loaded into a Conv2d"):
            load_weights(nn.Conv2d(3, 4, 1), tmp_path / "a.safetensors")

    def test_in_a_broken_file_are_refused(self, tmp_path):
        save_weights(network(), tmp_path / "a.safetensors")
        content = (tmp_path / "a.safetensors").read_bytes()
        (tmp_path / "a.safetensors").write_bytes(content[:-7])
        with pytest.raises(DataError, match=r"a\.safetensors cannot be loaded"):
            load_weights(network(), tmp_path / "a.safetensors")


def test_copies_share_nothing():
    model = network()
    copied = copy_on_cpu(model)
    model[0].weight.data.zero_()
    assert copied[0].weight.abs().sum() > 0
    assert not copied.training
    assert model.training


class TestProgress:
    def test_closes_a_part_with_the_mean_of_its_losses(self):
        progress = StageState(step=4, losses=[1.0, 2.0, 6.0])
        progress.add_row(epoch=2, lr=0.1, miou=None, seconds=3.0)
        assert progress.history == [{"epoch": 2, "step": 4, "lr": 0.1, "loss": 3.0, "seconds": 3.0}]
        assert progress.losses == []

    def test_shows_loss_and_last_miou(self):
        progress = StageState(step=1, losses=[1.0])
        assert progress.shown(0.12345) == {"loss": "0.123"}
        progress.add_row(epoch=1, lr=0.1, miou=0.4567, seconds=1.0)
        assert progress.shown(2) == {"loss": "2.000", "mIoU": "45.7"}


class TestStageFolder:
    def test_resumes_model_optimizer_and_progress(self, tmp_path):
        model, again = network(), network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        model(torch.rand(2, 3, 4, 4)).sum().backward()
        optimizer.step()
        progress = StageState(step=7, seconds=1.5, best=-math.inf, losses=[0.5], history=[{"step": 5.0}])
        StageCheckpoint(tmp_path, {"a": 1}).save(model, optimizer, progress)
        other = torch.optim.AdamW(again.parameters(), lr=0.1)
        assert StageCheckpoint(tmp_path, {"a": 1}).resume(again, other) == progress
        assert states_equal(again, model)
        for one, two in zip(optimizer.state.values(), other.state.values(), strict=True):
            assert torch.equal(one["exp_avg_sq"], two["exp_avg_sq"])

    def test_begins_at_the_beginning_where_there_is_nothing(self, tmp_path):
        model = network()
        for folder in (None, tmp_path):
            stage = StageCheckpoint(folder, {})
            assert stage.finished(model) is None
            assert stage.resume(model, torch.optim.SGD(model.parameters(), lr=1)) == StageState()

    @pytest.mark.parametrize("on_disk", [False, True])
    def test_gives_the_best_weights_back(self, tmp_path, on_disk):
        stage, model = StageCheckpoint(tmp_path if on_disk else None, {}), network()
        best = copy_on_cpu(model)
        stage.keep_best(model)
        model[0].weight.data.zero_()
        stage.load_best(model)
        assert states_equal(model, best)
