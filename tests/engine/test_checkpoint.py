from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from stseg import Batch, DamagedFileError, DataError, Losses, Method, Segmenter
from stseg.engine.checkpoint import StageCheckpoint, StageState, copy_to_cpu, load_weights, save_weights


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

    def test_of_another_architecture_leave_the_network_as_it_was(self, tmp_path):
        save_weights(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(5)), tmp_path / "a.safetensors")
        model = network()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(DataError, match="cannot be loaded"):
            load_weights(model, tmp_path / "a.safetensors")
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_in_a_broken_file_are_refused(self, tmp_path):
        save_weights(network(), tmp_path / "a.safetensors")
        content = (tmp_path / "a.safetensors").read_bytes()
        (tmp_path / "a.safetensors").write_bytes(content[:-7])
        with pytest.raises(DataError, match=r"a\.safetensors cannot be read as weights"):
            load_weights(network(), tmp_path / "a.safetensors")


def test_copies_share_nothing():
    model = network()
    copied = copy_to_cpu(model)
    model[0].weight.data.zero_()
    assert copied[0].weight.abs().sum() > 0
    assert not copied.training
    assert model.training


class TestProgress:
    def test_closes_a_part_with_the_mean_of_what_was_logged(self):
        state = StageState(step=1)
        for loss in (1.0, 2.0, 6.0):
            state.record({"loss": loss, "entropy": loss / 2})
        row = state.add_row(epoch=2, lr=0.1, validation={}, seconds=3.0)
        assert row == {"epoch": 2, "step": 4, "lr": 0.1, "loss": 3.0, "entropy": 1.5, "seconds": 3.0}
        assert state.history == [row]
        assert state.logged == {}

    def test_means_only_the_steps_in_which_a_name_was_logged(self):
        state = StageState()
        for numbers in ({"loss": 1.0}, {"loss": 2.0, "rare": 5.0}, {"loss": 3.0}):
            state.record(numbers)
        assert state.add_row(epoch=1, lr=0.1, validation={"miou": 0.5, "iou/0": math.nan}, seconds=1.0) == {
            **{
                "epoch": 1,
                "step": 3,
                "lr": 0.1,
                "loss": 2.0,
                "rare": 5.0,
                "miou": 0.5,
                "iou/0": math.nan,
                "seconds": 1.0,
            }
        }

    def test_shows_the_last_numbers_and_the_last_miou(self):
        state = StageState()
        state.record({"loss": 1.0})
        assert state.shown({"loss": 0.12345, "entropy": 2.0}) == {"loss": "0.123", "entropy": "2.000"}
        state.add_row(epoch=1, lr=0.1, validation={"miou": 0.4567, "iou/0": 0.1}, seconds=1.0)
        assert state.shown({"loss": 2}) == {"loss": "2.000", "mIoU": "45.7"}


class Critical(Method):
    """With a network, a critic, an average in a buffer, and an optimizer for each of the two."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.critic = Segmenter(network()), nn.Conv2d(4, 1, 1)
        self.register_buffer("average", torch.zeros(()))

    def forward(self, batch: Batch) -> Losses:
        logits = self.model(batch.images)
        return Losses(logits.square().mean() + self.critic(logits.detach()).square().mean())

    def after_step(self, batch: Batch) -> None:
        self.average += 1

    def optimizers(self, config):
        return [torch.optim.AdamW(part.parameters(), lr=0.1) for part in (self.model, self.critic)]


class TestStageFolder:
    def test_resumes_method_optimizers_and_progress(self, tmp_path):
        method, again = Critical(), Critical()
        optimizers, others = (m.optimizers(None) for m in (method, again))
        batch = Batch(torch.rand(2, 3, 4, 4), torch.zeros(2, 4, 4), torch.zeros(2, dtype=torch.bool))
        method(batch).total.backward()
        for optimizer in optimizers:
            optimizer.step()
        method.after_step(batch)
        state = StageState(step=7, seconds=1.5, best=None, logged={"loss": [0.5]}, history=[{"step": 5.0}])
        StageCheckpoint(tmp_path, {"a": 1}, method).save(method, optimizers, state)
        assert set(torch.load(tmp_path / "state" / "latest.pt", weights_only=True)) == {
            *("method", "optimizers", "progress")
        }
        assert StageCheckpoint(tmp_path, {"a": 1}, method).resume(again, others) == state
        assert states_equal(again, method)
        assert again.average == 1
        for optimizer, other in zip(optimizers, others, strict=True):
            assert len(optimizer.state) > 0
            for one, two in zip(optimizer.state.values(), other.state.values(), strict=True):
                assert torch.equal(one["exp_avg_sq"], two["exp_avg_sq"])

    @pytest.mark.parametrize("change", ["fewer optimizers", "a key is missing", "another architecture"])
    def test_of_another_content_is_refused(self, tmp_path, change):
        method = Critical()
        StageCheckpoint(tmp_path, {}, method).save(method, method.optimizers(None), StageState(step=3))
        path = tmp_path / "state" / "latest.pt"
        saved = torch.load(path, weights_only=True)
        if change == "fewer optimizers":
            saved["optimizers"].pop()
        elif change == "a key is missing":
            del saved["progress"]
        else:
            saved["method"]["critic.weight"] = torch.zeros(1, 5, 1, 1)
        torch.save(saved, path)
        message = r"latest\.pt is damaged.*; delete .*latest\.pt to start this stage from its beginning"
        with pytest.raises(DamagedFileError, match=message):
            StageCheckpoint(tmp_path, {}, method).resume(method, method.optimizers(None))

    def test_begins_at_the_beginning_where_there_is_nothing(self, tmp_path):
        model = network()
        for folder in (None, tmp_path):
            stage = StageCheckpoint(folder, {}, Critical())
            assert stage.finished(model) is None
            assert stage.resume(Critical(), []) == StageState()

    @pytest.mark.parametrize("on_disk", [False, True])
    def test_gives_the_best_weights_back(self, tmp_path, on_disk):
        stage, model = StageCheckpoint(tmp_path if on_disk else None, {}, Critical()), network()
        best, state = copy_to_cpu(model), StageState(step=3)
        stage.keep_best(model, state)
        model[0].weight.data.zero_()
        stage.load_best(model, state)
        assert states_equal(model, best)
