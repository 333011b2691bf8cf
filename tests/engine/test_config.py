from __future__ import annotations

import dataclasses
import functools
import json

import numpy as np
import pytest
import torch

from stseg import TrainConfig, WeakAugment


class TestPresets:
    def test_pascal_is_that_of_the_paper(self):
        config = TrainConfig.pascal()
        assert (config.epochs, config.steps, config.batch_size, config.lr) == (80, None, 16, 0.001)
        assert config.weak == WeakAugment(321, base_size=400, scale=(0.5, 2.0), flip=0.5)
        assert (config.optimizer, config.momentum, config.weight_decay) == ("sgd", 0.9, 1e-4)
        assert (config.head_lr_factor, config.power, config.schedule) == (10, 0.9, None)

    def test_cityscapes_is_that_of_the_paper(self):
        config = TrainConfig.cityscapes()
        assert (config.epochs, config.lr) == (240, 0.004)
        assert config.weak == WeakAugment(721, base_size=2048)

    def test_unimatch_v2_is_that_of_the_paper(self):
        config = TrainConfig.unimatch_v2()
        assert (config.epochs, config.batch_size, config.unlabeled_batch_size) == (60, 16, None)
        assert config.weak == WeakAugment(518, base_size=None, scale=(0.5, 2.0), flip=0.5)
        assert (config.optimizer, config.lr, config.head_lr_factor, config.weight_decay) == ("adamw", 5e-6, 40, 0.01)
        assert (config.power, config.schedule) == (0.9, None)
        assert TrainConfig.unimatch_v2(batch_size=8).lr == 5e-6
        changed = TrainConfig.unimatch_v2(steps=7, weak=WeakAugment(798), seed=3)
        assert (changed.epochs, changed.steps, changed.weak.crop_size) == (None, 7, (798, 798))

    @pytest.mark.parametrize("preset", [TrainConfig.pascal, TrainConfig.cityscapes])
    def test_learning_rate_follows_the_batch(self, preset):
        assert preset(batch_size=8).lr == preset().lr / 2
        assert preset(batch_size=8, lr=0.3).lr == 0.3

    def test_may_be_changed_and_count_steps(self):
        config = TrainConfig.pascal(steps=500, head_lr_factor=1, seed=3)
        assert (config.epochs, config.steps, config.head_lr_factor, config.seed) == (None, 500, 1, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": None}, "epochs is None and steps is None; expected one of the two"),
        ({"steps": 5}, "epochs is 1 and steps is 5; expected one of the two"),
        ({"epochs": 0}, "epochs is 0; expected a positive integer"),
        ({"epochs": 1.5}, "epochs is 1.5; expected a positive integer"),
        ({"batch_size": True}, "batch_size is True; expected a positive integer"),
        ({"unlabeled_batch_size": 0}, "unlabeled_batch_size is 0; expected a positive integer"),
        ({"eval_batch_size": "8"}, "eval_batch_size is '8'; expected a positive integer"),
        ({"eval_every": 0}, "eval_every is 0; expected a positive integer"),
        ({"eval_every": True}, "eval_every is True; expected a positive integer"),
        ({"save_every": -1}, "save_every is -1; expected 0 or more"),
        ({"save_every": float("nan")}, "save_every is nan; expected 0 or more"),
        ({"power": -0.9}, "power is -0.9; expected 0 or more"),
        ({"lr": 0}, "lr is 0; expected a positive number"),
        ({"lr": float("nan")}, "lr is nan; expected a positive number"),
        ({"head_lr_factor": float("inf")}, "head_lr_factor is inf; expected a positive number"),
        ({"momentum": -0.1}, "momentum is -0.1; expected 0 or more"),
        ({"weight_decay": float("nan")}, "weight_decay is nan; expected 0 or more"),
        ({"optimizer": "adam"}, "optimizer is 'adam'; expected 'sgd', 'adamw' or a function"),
        ({"precision": "fp16"}, "precision is 'fp16'; expected 'auto', 'fp32' or 'bf16'"),
        ({"seed": "1"}, "seed is '1'"),
        ({"num_workers": -1}, "num_workers -1; expected integers, workers >= 0"),
        ({"ignore_index": 254}, r"weak pads masks with 255, but ignore_index is 254; expected weak=WeakAugment\("),
        ({"weak": WeakAugment(8, ignore_index=7)}, "weak pads masks with 7, but ignore_index is 255"),
    ],
)
def test_settings_that_make_no_sense_are_named_at_once(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{"epochs": 1, **changes})


def test_is_frozen_and_takes_another_seed():
    config = TrainConfig(epochs=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr = 3
    assert config.with_seed(7) == TrainConfig(epochs=1, seed=7)


@pytest.mark.parametrize("name", ["lr", "head_lr_factor", "momentum", "weight_decay", "power", "save_every"])
def test_a_setting_that_is_no_number_is_named(name):
    with pytest.raises(TypeError, match=f"{name} is '1e-3'; expected a number"):
        TrainConfig(epochs=1, **{name: "1e-3"})


def test_numbers_of_numpy_are_numbers():
    assert TrainConfig(epochs=1, lr=np.float32(0.5), momentum=np.float64(0.5)).lr == 0.5


class TestWeak:
    def test_may_be_a_function_or_none(self):
        assert TrainConfig(epochs=1, weak=None).weak is None
        assert TrainConfig(epochs=1, weak=lambda image, mask: (image, mask)).weak(1, 2) == (1, 2)

    def test_refuses_nonsense_where_it_is_made(self):
        for changes, message in (
            ({"crop_size": 0}, "crop_size is 0; expected a positive integer"),
            ({"crop_size": (3, 0)}, r"crop_size is \(3, 0\); expected"),
            ({"base_size": -1}, "base_size is -1; expected a positive integer"),
            ({"scale": (2.0, 0.5)}, r"scale is \(2.0, 0.5\); expected"),
            ({"flip": 1.1}, "flip is 1.1; expected a probability"),
        ):
            with pytest.raises(ValueError, match=message):
                WeakAugment(**{"crop_size": 8, **changes})


def halves(step: int, steps: int) -> float:
    return 0.5 ** (step / steps)


class TestProvenance:
    def test_is_all_that_the_result_depends_on(self):
        plain = TrainConfig(epochs=1, precision="fp32").provenance()
        for changes in ({"num_workers": 3}, {"eval_batch_size": 3}, {"save_every": 3.0}):
            assert TrainConfig(epochs=1, precision="fp32", **changes).provenance() == plain
        changed = {
            "epochs": 2,
            "batch_size": 3,
            "unlabeled_batch_size": 16,
            "weak": WeakAugment(322),
            "seed": 1,
            "optimizer": torch.optim.RAdam,
            "lr": 2.0,
            "head_lr_factor": 1.0,
            "backbone": "encoder",
            "momentum": 0.5,
            "weight_decay": 0.5,
            "power": 0.5,
            "schedule": halves,
            "sync_batchnorm": True,
            "precision": "bf16",
            "eval_every": 3,
        }
        assert changed.keys() == plain.keys() - {"steps", "ignore_index"}
        for name, value in changed.items():
            other = TrainConfig(**{"epochs": 1, "precision": "fp32", name: value}).provenance()
            assert [key for key in plain if plain[key] != other[key]] == [name]

    def test_can_be_written_as_json(self):
        config = TrainConfig(epochs=1, optimizer=functools.partial(torch.optim.RAdam), schedule=halves)
        assert json.loads(json.dumps(config.provenance())) == config.provenance()
