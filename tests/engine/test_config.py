from __future__ import annotations

import dataclasses

import pytest

from stseg import TrainConfig


class TestPresets:
    def test_pascal_is_that_of_the_paper(self):
        config = TrainConfig.pascal()
        assert (config.epochs, config.steps, config.batch_size, config.lr) == (80, None, 16, 0.001)
        assert (config.crop_size, config.base_size, config.scale, config.flip) == (321, 400, (0.5, 2.0), 0.5)
        assert (config.optimizer, config.momentum, config.weight_decay) == ("sgd", 0.9, 1e-4)
        assert (config.head_lr_factor, config.power, config.double_below) == (10, 0.9, 200)

    def test_cityscapes_is_that_of_the_paper(self):
        config = TrainConfig.cityscapes()
        assert (config.epochs, config.lr, config.crop_size, config.base_size) == (240, 0.004, 721, 2048)

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
        ({"base_size": -1}, "base_size is -1; expected a positive integer"),
        ({"lr": 0}, "lr is 0; expected a positive number"),
        ({"lr": float("nan")}, "lr is nan; expected a positive number"),
        ({"head_lr_factor": float("inf")}, "head_lr_factor is inf; expected a positive number"),
        ({"momentum": -0.1}, "momentum is -0.1; expected 0 or more"),
        ({"weight_decay": float("nan")}, "weight_decay is nan; expected 0 or more"),
        ({"pseudo_weight": -0.5}, "pseudo_weight is -0.5; expected 0 or more"),
        ({"pseudo_weight": float("nan")}, "pseudo_weight is nan; expected 0 or more"),
        ({"pseudo_weight": float("inf")}, "pseudo_weight is inf; expected 0 or more"),
        ({"sync_batchnorm": 1}, "sync_batchnorm is 1; expected True or False"),
        ({"optimizer": "adam"}, "optimizer is 'adam'; expected 'sgd' or 'adamw'"),
        ({"precision": "fp16"}, "precision is 'fp16'; expected 'fp32' or 'bf16'"),
        ({"seed": "1"}, "seed is '1'"),
        ({"num_workers": -1}, "num_workers -1; expected integers, workers >= 0"),
        ({"crop_size": 0}, "crop_size is 0; expected a positive integer"),
        ({"crop_size": (3, 0)}, r"crop_size is \(3, 0\); expected"),
        ({"scale": (2.0, 0.5)}, r"scale is \(2.0, 0.5\); expected"),
        ({"flip": 1.1}, "flip is 1.1; expected a probability"),
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


class TestRecord:
    def test_is_all_but_the_workers(self):
        assert TrainConfig(epochs=1, num_workers=3).record() == TrainConfig(epochs=1).record()
        assert TrainConfig(epochs=1, lr=2.0).record()["lr"] == 2.0

    def test_names_what_goes_beyond_the_paper_only_where_it_is_asked_for(self):
        plain, weighed = TrainConfig(epochs=1).record(), TrainConfig(epochs=1, pseudo_weight=0.5).record()
        assert {"pseudo_weight", "sync_batchnorm"}.isdisjoint(plain)
        assert weighed == {**plain, "pseudo_weight": 0.5}
        assert TrainConfig(epochs=1, sync_batchnorm=True).record() == {**plain, "sync_batchnorm": True}
