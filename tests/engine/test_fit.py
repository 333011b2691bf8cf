from __future__ import annotations

import copy
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import Stopped, network, pairs, same
from torch import nn

import stseg
from stseg import TrainConfig, TrainingDivergedError, WeakAugment, WorkdirMismatchError, fit
from stseg.data import MixedDataset
from stseg.errors import DataError, NetworkWarning
from stseg.functional import ohem_cross_entropy
from stseg.methods import Supervised


def config(**changes) -> TrainConfig:
    settings = {"steps": 6, "batch_size": 2, "weak": WeakAugment(16), "lr": 0.05, **changes}
    return TrainConfig(**({**settings, "steps": None} if "epochs" in changes else settings))


def run(dataset=None, **options):
    """Fit; what is not of ``fit`` is of the method."""
    options = {"config": config(), "progress": False, "model": network(), **options}
    own = {name: options.pop(name) for name in ("strong", "pseudo_weight", "loss") if name in options}
    method = options.pop("model")
    method = Supervised(method, **own) if own else method
    return fit(method, pairs(5) if dataset is None else dataset, options.pop("config"), **options)


class TestAgainstALoopByHand:
    """One batch is the whole data set, so the order does not matter and anybody's loop has to come to the same."""

    @pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
    def test_comes_to_the_same_weights(self, optimizer):
        items = pairs(4)
        settings = config(
            steps=7,
            batch_size=4,
            optimizer=optimizer,
            weight_decay=0.01,
            head_lr_factor=3.0,
            backbone="0",
            weak=None,
        )
        result = run(items, config=settings)

        model = network().train()
        rest = [p for name, p in model.named_parameters() if not name.startswith("0.")]
        groups = [{"params": model[0].parameters(), "lr": 0.05}, {"params": rest, "lr": 0.15}]
        if optimizer == "sgd":
            by_hand = torch.optim.SGD(groups, momentum=0.9, weight_decay=0.01)
        else:
            by_hand = torch.optim.AdamW(groups, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(by_hand, lambda t: (1 - t / 7) ** 0.9)
        images, masks = (torch.stack(column) for column in zip(*items, strict=True))
        mean, std = (torch.tensor(v)[:, None, None] for v in (stseg.IMAGENET_MEAN, stseg.IMAGENET_STD))
        losses = []
        for _ in range(7):
            loss = F.cross_entropy(model((images - mean) / std), masks.long(), ignore_index=255)
            by_hand.zero_grad()
            loss.backward()
            by_hand.step()
            schedule.step()
            losses.append(loss.item())
        for name, value in result.model.network.state_dict().items():
            torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-4, atol=1e-5)
        assert [row["loss"] for row in result.history] == pytest.approx(losses, rel=1e-4)
        assert [row["lr"] for row in result.history] == pytest.approx([0.05 * (1 - t / 7) ** 0.9 for t in range(7)])


class TestLength:
    def test_in_epochs_drops_the_incomplete_batch(self):
        result = run(pairs(5), config=config(epochs=3, batch_size=2))
        assert [(row["epoch"], row["step"]) for row in result.history] == [(1, 2), (2, 4), (3, 6)]

    def test_of_fewer_images_than_a_batch_trains_all_the_same(self):
        before = network()
        result = run(pairs(3), config=config(epochs=2, batch_size=16))
        assert [row["step"] for row in result.history] == [1, 2]
        assert not same(before, result.model.network)

    def test_in_steps_is_what_was_asked_for(self):
        result = run(pairs(5), config=config(steps=45))
        assert result.history[-1]["step"] == 45
        assert len(result.history) == 20

    def test_history_holds_seconds_and_losses(self):
        history = run().history
        assert all(math.isfinite(row["loss"]) and row["loss"] > 0 for row in history)
        assert [row["seconds"] for row in history] == sorted(row["seconds"] for row in history)
        assert "miou" not in history[0]


def test_learns_what_is_there_to_be_learned():
    held_out = pairs(10, seed=1)
    result = run(pairs(8), config=config(steps=150, lr=0.1), val=held_out)
    assert result.history[-1]["miou"] > 0.8 > 0.6 > result.history[0]["miou"]
    assert result.history[-1]["miou"] == stseg.evaluate(result.model, held_out, num_classes=2, progress=False).compute()


class TestChance:
    def test_is_the_seeds_alone(self):
        first = run()
        torch.rand(5)
        random.seed(1)
        assert same(first.model, run().model)
        assert not same(first.model, run(config=config(seed=1)).model)

    def test_does_not_depend_on_workers(self):
        assert same(run().model, run(config=config(num_workers=2)).model)

    def test_of_the_caller_is_left_as_it_was(self):
        torch.manual_seed(3)
        np.random.seed(3)  # noqa: NPY002
        random.seed(3)
        expected = torch.rand(4), np.random.rand(), random.random()  # noqa: NPY002
        torch.manual_seed(3)
        np.random.seed(3)  # noqa: NPY002
        random.seed(3)
        run(strong=stseg.StrongAugment())
        assert torch.equal(torch.rand(4), expected[0])
        assert (np.random.rand(), random.random()) == expected[1:]  # noqa: NPY002

    def test_makes_dropout_differ_from_step_to_step(self):
        seen = []

        class Noticed(nn.Dropout):
            def forward(self, x):
                out = super().forward(x)
                seen.append((out == 0).clone())
                return out

        run(model=nn.Sequential(nn.Conv2d(3, 8, 1), Noticed(0.5), nn.Conv2d(8, 2, 1)))
        masks = [mask for mask in seen if mask.shape[0] == 2]
        assert len(masks) == 1 + 6
        assert torch.equal(masks[0], masks[1])  # the trial is the first step
        assert not torch.equal(masks[1], masks[2])


class TestSnapshots:
    def test_after_epochs_or_steps_as_the_config_counts(self):
        for settings in (config(epochs=3, batch_size=2), config(steps=3)):
            result = run(config=settings, snapshots=[1, 3])
            assert len(result.snapshots) == 2
            assert same(result.snapshots[-1], result.model)
            assert not same(result.snapshots[0], result.model)

    def test_share_nothing_with_the_model_and_cannot_learn(self):
        snapshot = run(snapshots=[6]).snapshots[0]
        assert not snapshot.training
        assert not any(p.requires_grad for p in snapshot.parameters())

    @pytest.mark.parametrize("at", [0, 7])
    def test_outside_the_training_are_refused(self, at):
        with pytest.raises(ValueError, match=rf"snapshots are \[{at}\]; expected values in 1\.\.6"):
            run(snapshots=[at])


class TestKeep:
    def test_best_returns_the_weights_of_the_best_row(self):
        held_out = pairs(4, seed=2)
        # The learning rate is absurd, so the last weights are hardly the best ones.
        result = run(config=config(steps=40, lr=2.0), val=held_out, keep="best")
        best = max(row["miou"] for row in result.history)
        assert best > result.history[-1]["miou"]
        assert stseg.evaluate(result.model, held_out, num_classes=2, progress=False).compute() == best

    def test_best_on_disk_too(self, tmp_path):
        options = {"config": config(steps=40, lr=2.0), "val": pairs(4, seed=2), "keep": "best"}
        assert same(run(**options, workdir=tmp_path).model, run(**options).model)

    def test_best_needs_a_validation_set(self):
        with pytest.raises(ValueError, match="keep='best' needs a validation set"):
            run(keep="best")

    def test_knows_two_ways(self):
        with pytest.raises(ValueError, match="keep is 'last'; expected 'final' or 'best'"):
            run(keep="last")


class TestStrong:
    def test_is_told_which_masks_are_guesses(self):
        calls = []

        def strong(images, masks, where):
            calls.append((images.clone(), where.clone()))
            return images, masks

        mask = torch.zeros(16, 16, dtype=torch.uint8)
        mask[0] = 1
        true = [(torch.zeros(3, 16, 16), mask)] * 2
        guessed = [(torch.ones(3, 16, 16), torch.ones(16, 16, dtype=torch.uint8))] * 3
        run(MixedDataset(true, guessed), strong=strong, config=config(steps=9))
        assert len(calls) == 1 + 9  # with the trial
        for images, where in calls:
            assert torch.equal(images.amax((1, 2, 3)) == 1, where)
        assert {bool(w) for _, where in calls for w in where} == {True, False}

    def test_cutout_must_write_the_ignore_index(self):
        with pytest.raises(ValueError, match="cutout of strong writes 255 into masks, but ignore_index is 7"):
            Supervised(network(), strong=stseg.StrongAugment(), ignore_index=7)


class TestPseudoWeight:
    """Batches are the whole mixture, so its order does not matter."""

    def mixture(self):
        return MixedDataset(pairs(2), pairs(2, seed=1))

    def test_reaches_the_loss_of_the_pseudo_labeled_images(self):
        items = list(self.mixture())
        images, masks = (torch.stack(column) for column in zip(*[item[:2] for item in items], strict=True))
        mean, std = (torch.tensor(v)[:, None, None] for v in (stseg.IMAGENET_MEAN, stseg.IMAGENET_STD))
        logits = network().train()((images - mean) / std)
        losses = F.cross_entropy(logits, masks.long(), reduction="none").sum((1, 2)).tolist()
        true, guessed = (
            sum(v for v, item in zip(losses, items, strict=True) if item[2] is flag) for flag in (False, True)
        )
        for weight in (0.0, 0.25, 1.0, 3.0):
            result = run(self.mixture(), config=config(steps=1, batch_size=4, weak=None), pseudo_weight=weight)
            expected = (true + weight * guessed) / masks.numel()
            assert result.history[0]["loss"] == pytest.approx(expected, rel=1e-5)

    def test_of_zero_learns_from_the_labeled_alone(self):
        wrong = MixedDataset(pairs(2), [(image, 1 - mask) for image, mask in pairs(2, seed=1)])
        one, other = (run(d, pseudo_weight=0.0) for d in (MixedDataset(pairs(2), pairs(2, seed=1)), wrong))
        assert same(one.model, other.model)
        assert not same(run(wrong).model, other.model)

    def test_is_nothing_to_labeled_images(self):
        assert same(run(pseudo_weight=0.3).model, run().model)


def test_pseudo_masks_of_which_nothing_is_left_do_no_harm():
    nothing = [(image, torch.full_like(mask, 255)) for image, mask in pairs(6, seed=1)]
    result = run(MixedDataset(pairs(1), nothing, repeat=1), config=config(steps=12))  # batches of nothing, too
    assert all(value.isfinite().all() for value in result.model.state_dict().values())
    assert all(math.isfinite(row["loss"]) for row in result.history)
    assert 0.0 in [row["loss"] for row in result.history]


class Spoilt(nn.Module):
    """Goes wrong in the training step after so many good ones."""

    def __init__(self, good_steps: int) -> None:
        super().__init__()
        self.inner, self.left = network(), good_steps

    def forward(self, x):
        if self.training:
            self.left -= 1
        return self.inner(x) if self.left >= 0 else self.inner(x) * math.nan


class TestDivergence:
    def test_names_the_step_and_keeps_the_last_good_state(self, tmp_path):
        model = Spoilt(good_steps=4)
        with pytest.raises(TrainingDivergedError, match="loss is nan at step 5 of 6") as caught:
            run(model=model, workdir=tmp_path)
        assert caught.value.step == 5
        state = torch.load(tmp_path / "state" / "latest.pt", weights_only=True)
        assert state["progress"]["step"] == 4
        healthy = run(model=Spoilt(good_steps=99), snapshots=[4]).snapshots[0]
        assert same(model, healthy.network)
        method = {f"model.network.{name}": value for name, value in model.state_dict().items()}
        assert method.keys() == state["method"].keys()
        assert all(torch.equal(value, state["method"][name]) for name, value in method.items())

    def test_goes_on_from_there_once_the_cause_is_gone(self, tmp_path):
        with pytest.raises(TrainingDivergedError):
            run(model=Spoilt(good_steps=4), workdir=tmp_path)
        assert same(run(model=Spoilt(good_steps=99), workdir=tmp_path).model, run(model=Spoilt(good_steps=99)).model)

    def test_by_a_learning_rate_that_is_absurd(self):
        with pytest.raises(TrainingDivergedError, match=r"learning rate \d"):
            run(config=config(steps=50, lr=1e30), model=nn.Conv2d(3, 2, 1))


class TestWorkdir:
    def test_holds_the_result_and_nothing_of_the_way(self, tmp_path):
        result = run(workdir=tmp_path, snapshots=[2, 6])
        files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
        assert files == {
            *("stage.json", "model.safetensors", "progress.json", "history.jsonl", ".lock"),
            *("snapshots/2.safetensors", "snapshots/6.safetensors"),
        }
        rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
        assert rows == list(result.history)

    def test_of_a_stage_that_is_done_gives_the_result_without_training(self, tmp_path):
        first = run(workdir=tmp_path, snapshots=[2, 6])
        second = run(workdir=tmp_path, snapshots=[2, 6])
        assert same(first.model, second.model)
        assert all(same(a, b) for a, b in zip(first.snapshots, second.snapshots, strict=True))
        assert (first.history, first.seconds) == (second.history, second.seconds)

    def test_of_a_stage_that_is_done_is_not_that_of_other_initial_weights(self, tmp_path):
        first = run(workdir=tmp_path)
        message = (
            rf"{tmp_path} holds a finished training that started from other initial weights\. Use another folder, or "
            rf"delete {tmp_path} .*load_weights\(network, '{tmp_path}/model.safetensors'\)"
        )
        with pytest.raises(WorkdirMismatchError, match=message):
            run(workdir=tmp_path, model=network(seed=9))
        trained = network(seed=9)  # as in a notebook whose cell is run again
        stseg.load_weights(trained, tmp_path / "model.safetensors")
        assert same(run(workdir=tmp_path, model=trained).model, first.model)

    def test_that_holds_files_of_others_is_not_advised_to_be_deleted(self, tmp_path):
        (tmp_path / "train.py").write_text("mine")
        run(workdir=tmp_path)
        for options in ({"model": network(seed=9)}, {"config": config(steps=7)}):
            with pytest.raises(WorkdirMismatchError) as caught:
                run(workdir=tmp_path, **options)
            assert f"delete {tmp_path}/history.jsonl and {tmp_path}/model.safetensors and " in str(caught.value)
            assert "train.py" not in str(caught.value)
            assert f"delete {tmp_path} to" not in str(caught.value)

    def test_of_a_stage_under_way_goes_on_whatever_the_weights_and_says_so(self, tmp_path):
        expected = run(model=Stopped(network()))
        with pytest.raises(KeyboardInterrupt):
            run(model=Stopped(network(), after=3), config=config(save_every=0), workdir=tmp_path)
        message = f"other weights than those from which the training in {tmp_path} started; it goes on"
        with pytest.warns(NetworkWarning, match=message):
            found = run(model=Stopped(network(seed=9)), config=config(save_every=0), workdir=tmp_path)
        assert same(found.model, expected.model)

    def test_of_a_stage_without_a_saved_state_starts_from_the_weights_that_are_given(self, tmp_path, recwarn):
        with pytest.raises(KeyboardInterrupt):
            run(model=Stopped(network(), after=3), config=config(save_every=1000), workdir=tmp_path)
        assert not (tmp_path / "state" / "latest.pt").exists()
        found = run(model=Stopped(network(seed=9)), workdir=tmp_path)
        assert not [warning for warning in recwarn if warning.category is NetworkWarning]
        assert same(found.model, run(model=Stopped(network(seed=9))).model)
        assert same(run(model=Stopped(network(seed=9)), workdir=tmp_path).model, found.model)
        with pytest.raises(WorkdirMismatchError, match="other initial weights"):
            run(model=Stopped(network()), workdir=tmp_path)

    def test_weights_load_into_the_bare_network(self, tmp_path):
        from safetensors.torch import load_file

        result = run(workdir=tmp_path)
        bare = network(seed=9)
        bare.load_state_dict(load_file(tmp_path / "model.safetensors"))
        assert same(bare, result.model.network)

    def test_of_an_interrupted_stage_goes_on_to_the_same_weights(self, tmp_path):
        options = {"snapshots": [2, 4, 6], "config": config(save_every=0)}
        whole = run(workdir=tmp_path / "a", model=Stopped(network()), **options)
        for after in (1, 3, 3, 4):
            with pytest.raises(KeyboardInterrupt):
                run(workdir=tmp_path / "b", model=Stopped(network(), after=after), **options)
        assert torch.load(tmp_path / "b" / "state" / "latest.pt", weights_only=True)["progress"]["step"] == 4
        rest = run(workdir=tmp_path / "b", model=Stopped(network()), **options)
        assert same(whole.model, rest.model)
        assert all(same(a, b) for a, b in zip(whole.snapshots, rest.snapshots, strict=True))
        for one, other in zip(whole.history, rest.history, strict=True):
            assert {**one, "seconds": 0} == {**other, "seconds": 0}

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"config": config(lr=0.06)}, "config.lr is 0.05 there and 0.06 now"),
            ({"snapshots": [3]}, r"snapshots is \[\] there and \[3\] now"),
            ({"dataset": pairs(6)}, r"data\.items is '5 samples, .*' there and '6 samples"),
            ({"model": nn.Conv2d(3, 2, 1)}, r"network\.model is '.*' there and '.*' now"),
            (
                {"dataset": [(image, 1 - mask) for image, mask in pairs(5)]},
                r"data\.labeled is '5 items, .*' there and '5 items",
            ),
            (
                {"config": config(ignore_index=254, weak=WeakAugment(16, ignore_index=254))},
                "config.ignore_index is 255 there and 254 now",
            ),
            ({"strong": stseg.StrongAugment()}, "method.strong is None there and 'StrongAugment"),
            ({"pseudo_weight": 0.5}, "method.pseudo_weight is 1.0 there and 0.5 now"),
            ({"loss": ohem_cross_entropy}, "method.loss is None there and '.*ohem_cross_entropy.*' now"),
            ({"model": Stopped(network())}, "method.type is 'Supervised' there and 'Stopped' now"),
        ],
    )
    def test_of_other_settings_is_refused_with_the_difference(self, tmp_path, changes, message):
        run(workdir=tmp_path)
        with pytest.raises(WorkdirMismatchError, match=message):
            run(workdir=tmp_path, **changes)

    def test_of_other_workers_is_the_same_stage(self, tmp_path):
        run(workdir=tmp_path)
        assert run(workdir=tmp_path, config=config(num_workers=1)).history

    @pytest.mark.parametrize("name", ["model.safetensors", "state/latest.pt", "stage.json", "progress.json"])
    def test_with_a_damaged_file_says_which(self, tmp_path, name):
        if name.startswith("state"):
            with pytest.raises(KeyboardInterrupt):
                run(model=Stopped(network(), after=3), config=config(save_every=0), workdir=tmp_path)
        else:
            run(model=Stopped(network()), workdir=tmp_path)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises((DataError, WorkdirMismatchError), match=name.split("/")[-1]):
            run(model=Stopped(network()), workdir=tmp_path)


KILLED = """
import sys, torch, stseg
from torch import nn
generator = torch.Generator().manual_seed(0)
images = torch.rand(6, 3, 24, 24, generator=generator)
data = [(image, (image[0] > 0.5).byte()) for image in images]
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3), nn.Conv2d(8, 2, 1))
settings = {"steps": 400, "batch_size": 4, "weak": stseg.WeakAugment(24), "optimizer": "adamw", "lr": 0.01}
config = stseg.TrainConfig(**settings, save_every=0.05)
stseg.fit(model, data, config, snapshots=[100, 400], val=data[:2], workdir=sys.argv[1], progress=False)
"""


@pytest.mark.slow
def test_killed_again_and_again_a_stage_comes_to_the_same_weights(tmp_path):
    def start(folder: Path) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], env=environment)

    assert start(tmp_path / "whole").wait() == 0
    killed, latest = tmp_path / "killed", tmp_path / "killed" / "state" / "latest.pt"
    steps = []
    for _ in range(2):
        before = latest.stat().st_mtime_ns if latest.exists() else 0
        process = start(killed)
        while process.poll() is None and not (latest.exists() and latest.stat().st_mtime_ns != before):
            time.sleep(0.01)
        time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        steps.append(torch.load(latest, weights_only=True)["progress"]["step"])
    assert 0 < steps[0] < steps[1] < 400
    assert start(killed).wait() == 0
    for name in ("model", "snapshots/100", "snapshots/400"):
        one, other = ((tmp_path / run / f"{name}.safetensors").read_bytes() for run in ("whole", "killed"))
        assert one == other


def test_in_bfloat16_keeps_float32_weights():
    result = run(config=config(precision="bf16"))
    assert {p.dtype for p in result.model.parameters()} == {torch.float32}
    assert not same(result.model, run().model)


def test_trains_the_model_itself_and_returns_it_in_evaluation_mode():
    model = network().eval()
    before = copy.deepcopy(model)
    result = run(model=model)
    assert result.model.network is model
    assert not model.training
    assert not same(before, model)


def test_progress_bar_tells_loss_miou_and_time_left(capsys, monkeypatch):
    monkeypatch.setattr("stseg.progress._is_terminal", lambda: True)
    run(progress=True, val=pairs(2, seed=5))
    text = capsys.readouterr().err
    assert all(word in text for word in ("train", "loss=", "mIoU=", "6/6", "<", "\r"))
    run(progress=False, val=pairs(2, seed=5))
    assert capsys.readouterr().err == ""
