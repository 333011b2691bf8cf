"""Optimizer, schedule, loss, rows and log of a training."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from small import Entropic, network, pairs, same
from torch import nn

import stseg
from stseg import MethodError, TrainConfig, WeakAugment, fit, methods
from stseg.data import MixedDataset
from stseg.functional import ohem_cross_entropy, without_ignored
from stseg.methods import Supervised


def config(**changes) -> TrainConfig:
    settings = {"steps": 4, "batch_size": 4, "weak": None, "lr": 0.05, **changes}
    return TrainConfig(**({**settings, "steps": None} if "epochs" in changes else settings))


class TestIgnoreIndex:
    """Whatever value marks pixels without a label, other than a class."""

    @pytest.mark.parametrize("method", [Supervised, methods.FixMatch, methods.CutMixSeg, methods.UniMatchV2])
    def test_of_an_augmentation_is_that_of_the_training(self, method):
        strong = stseg.StrongAugment(cutout=stseg.Cutout(ignore_index=200))
        options = {"ignore_index": 200} if method is Supervised else {}
        if method is methods.UniMatchV2:
            options["backbone"] = "0"
        few, many = pairs(2), None if method is Supervised else [image for image, _ in pairs(2, seed=1)]
        made = method(network(), strong=strong, **options)
        fit(made, few, config(steps=1, batch_size=2, ignore_index=200), unlabeled=many, progress=False)
        with pytest.raises(ValueError, match="writes 200 into masks, but ignore_index is 255"):
            fit(made, few, config(steps=1, batch_size=2), unlabeled=many, progress=False)

    @pytest.mark.parametrize("method", [Supervised, methods.CutMixSeg, lambda net: methods.S4GAN(net, num_classes=3)])
    def test_that_is_a_class_is_refused(self, method):
        made = method(network(classes=3))
        many = [image for image, _ in pairs(2, seed=1)] if made.uses_unlabeled else None
        with pytest.raises(MethodError, match="ignore_index 2 is one of the 3 classes"):
            fit(made, pairs(2), config(steps=1, batch_size=2, ignore_index=2), unlabeled=many, progress=False)


def partly_labeled(count: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs whose masks hold the ignore index in places."""
    data = pairs(count)
    for index, (_, mask) in enumerate(data):
        mask[: 3 + index] = 255
    return data


def normalized(images: list[torch.Tensor]) -> torch.Tensor:
    mean, std = (torch.tensor(v)[:, None, None] for v in (stseg.IMAGENET_MEAN, stseg.IMAGENET_STD))
    return (torch.stack(images) - mean) / std


def first_logits(data: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """The logits of the first step, whose batch is the whole data set."""
    with torch.no_grad():
        return network().train()(normalized([image for image, _ in data]))


def first_loss(data, **options) -> float:
    return fit(Supervised(network(), **options), data, config(steps=1), progress=False).history[0]["loss"]


class TestOptimizer:
    def test_may_be_a_function_of_parameter_groups(self):
        optimizer = functools.partial(torch.optim.RAdam, weight_decay=0.02)
        settings = config(steps=3, optimizer=optimizer, head_lr_factor=3.0, backbone="0")
        result = fit(network(), pairs(4), settings, progress=False)
        model = network().train()
        rest = [p for name, p in model.named_parameters() if not name.startswith("0.")]
        groups = [{"params": model[0].parameters(), "lr": 0.05}, {"params": rest, "lr": 0.15}]
        by_hand = torch.optim.RAdam(groups, weight_decay=0.02)
        schedule = torch.optim.lr_scheduler.LambdaLR(by_hand, lambda t: (1 - t / 3) ** 0.9)
        images, masks = normalized([image for image, _ in pairs(4)]), torch.stack([mask for _, mask in pairs(4)])
        for _ in range(3):
            by_hand.zero_grad()
            F.cross_entropy(model(images), masks.long()).backward()
            by_hand.step()
            schedule.step()
        for name, value in result.model.network.state_dict().items():
            torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-4, atol=1e-5)

    def test_is_no_instance(self):
        with pytest.raises(TypeError, match="optimizer is an optimizer; expected a function that makes one of param"):
            config(optimizer=torch.optim.SGD(network().parameters(), lr=0.1))

    def test_that_cannot_be_built_is_named_before_training(self):
        model = network()
        with pytest.raises(MethodError, match=r"first training step of Supervised fails .* TypeError: .*'momentum'"):
            fit(model, pairs(4), config(optimizer=functools.partial(torch.optim.AdamW, momentum=0.9)), progress=False)
        assert same(model, network())


class TestSchedule:
    def test_is_a_factor_of_step_and_steps(self):
        asked = []

        def warmup(step: int, steps: int) -> float:
            asked.append((step, steps))
            return min(1.0, (step + 1) / 2)

        result = fit(network(), pairs(4), config(schedule=warmup), progress=False)
        assert [row["lr"] for row in result.history] == pytest.approx([0.025, 0.05, 0.05, 0.05])
        assert asked[-4:] == [(step, 4) for step in range(4)]

    def test_of_zero_changes_no_weight(self):
        result = fit(network(), pairs(4), config(schedule=lambda step, steps: 0), progress=False)
        for one, other in zip(result.model.parameters(), network().parameters(), strict=True):
            assert torch.equal(one, other)


class TestRows:
    @pytest.mark.parametrize(
        ("changes", "steps"),
        [
            ({"epochs": 5, "eval_every": 2, "batch_size": 2}, [4, 8, 10]),
            ({"epochs": 3, "batch_size": 2}, [2, 4, 6]),
            ({"steps": 7, "eval_every": 3}, [3, 6, 7]),
            ({"steps": 7, "eval_every": 9}, [7]),
        ],
    )
    def test_come_as_often_as_eval_every_says_and_at_the_end(self, changes, steps):
        result = fit(network(), pairs(4), config(**changes), val=pairs(2, seed=1), progress=False)
        assert [row["step"] for row in result.history] == steps
        assert all("miou" in row for row in result.history)

    def test_hold_the_mean_of_the_steps_since_the_row_before(self):
        each = fit(network(), pairs(4), config(steps=6, eval_every=1), progress=False).history
        two = fit(network(), pairs(4), config(steps=6, eval_every=4), progress=False).history
        losses = [row["loss"] for row in each]
        assert [row["loss"] for row in two] == pytest.approx([np.mean(losses[:4]), np.mean(losses[4:])])


class TestLog:
    def test_gets_the_rows_of_the_history_as_floats(self):
        rows = []
        result = fit(
            Entropic(network()),
            pairs(4),
            config(lr=1, schedule=lambda step, steps: 1),
            unlabeled=[image for image, _ in pairs(4, seed=2)],
            val=pairs(2, seed=1),
            log=rows.append,
            progress=False,
        )
        assert rows == list(result.history)
        assert list(rows[0]) == ["epoch", "step", "lr", "loss", "entropy", "miou", "iou/0", "iou/1", "seconds"]
        assert {type(value) for row in rows for value in row.values()} == {float}

    def test_may_change_its_row(self):
        result = fit(network(), pairs(4), config(), log=lambda row: row.clear(), progress=False)
        assert len(result.history) == 4
        assert all(row["loss"] > 0 for row in result.history)

    def test_that_fails_does_not_end_the_training(self, caplog):
        rows, tried = [], []

        def broken(row):
            tried.append(row["step"])
            raise ZeroDivisionError("mine")

        with pytest.warns(
            RuntimeWarning, match=r"log=.*broken raised ZeroDivisionError: mine\. The training goes on"
        ) as w:
            result = fit(network(), pairs(4), config(), log=[broken, rows.append], progress=False)
        assert len([each for each in w if each.category is RuntimeWarning]) == 1
        assert rows == list(result.history)
        assert tried == [row["step"] for row in rows]
        assert "broken did not take 4 of the rows" in caplog.text

    @pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
    def test_can_end_the_training_as_ctrl_c_does(self, error):
        def log(row):
            raise error

        with pytest.raises(error):
            fit(network(), pairs(4), config(), log=log, progress=False)

    @pytest.mark.parametrize("log", ["tensorboard", ["tensorboard"], [print, None], 3, {}, stseg.loggers.TensorBoard])
    def test_of_another_type_is_refused(self, log):
        with pytest.raises(TypeError, match=r"^log (is|holds) .*; expected a function"):
            fit(network(), pairs(4), config(), log=log, progress=False)
        with pytest.raises(TypeError, match=r"^log (is|holds) .*; expected a function"):
            stseg.SelfTrainer(network, num_classes=2, config=config(), log=log)


def naive_dice(logits: torch.Tensor, masks: torch.Tensor) -> float:
    """1 - 2 |A and B| / (|A| + |B|), the mean over the classes."""
    probability, masks = logits.double().softmax(1).numpy(), masks.numpy()
    scores = []
    for k in range(probability.shape[1]):
        shared = total = 0.0
        for i, y, x in np.ndindex(*masks.shape):
            if masks[i, y, x] != 255:
                p, truth = probability[i, k, y, x], float(masks[i, y, x] == k)
                shared, total = shared + p * truth, total + p + truth
        scores.append(1 - 2 * shared / total)
    return float(np.mean(scores))


def naive_jaccard(logits: torch.Tensor, masks: torch.Tensor) -> float:
    probability, masks = logits.double().softmax(1).numpy(), masks.numpy()
    scores = []
    for k in range(probability.shape[1]):
        shared = total = 0.0
        for i, y, x in np.ndindex(*masks.shape):
            if masks[i, y, x] != 255:
                p, truth = probability[i, k, y, x], float(masks[i, y, x] == k)
                shared, total = shared + p * truth, total + p + truth
        scores.append(1 - shared / (total - shared))
    return float(np.mean(scores))


def naive_weighted(logits: torch.Tensor, masks: torch.Tensor, weights: tuple[float, ...]) -> float:
    """-sum of weight * log p by the sum of the weights of the true classes."""
    log_probability, masks = logits.double().log_softmax(1).numpy(), masks.numpy()
    top = bottom = 0.0
    for i, y, x in np.ndindex(*masks.shape):
        if masks[i, y, x] != 255:
            weight = weights[masks[i, y, x]]
            top, bottom = top - weight * log_probability[i, masks[i, y, x], y, x], bottom + weight
    return float(top / bottom)


def naive_hard(logits: torch.Tensor, masks: torch.Tensor) -> float:
    """The mean over the pixels whose true class has a probability of at most 0.7, or the 50 hardest."""
    log_probability, masks = logits.double().log_softmax(1).numpy(), masks.numpy()
    losses = sorted(
        (-log_probability[i, masks[i, y, x], y, x] for i, y, x in np.ndindex(*masks.shape) if masks[i, y, x] != 255),
        reverse=True,
    )
    return float(np.mean([loss for place, loss in enumerate(losses) if place < 50 or np.exp(-loss) <= 0.7]))


FOCAL = smp.losses.FocalLoss("multiclass", ignore_index=255)


class TestLoss:
    @pytest.mark.parametrize(
        ("loss", "reference"),
        [
            (smp.losses.DiceLoss("multiclass", ignore_index=255), naive_dice),
            (FOCAL, lambda logits, masks: float(FOCAL(logits, masks))),
            (without_ignored(smp.losses.JaccardLoss("multiclass")), naive_jaccard),
            (without_ignored(nn.CrossEntropyLoss()), functools.partial(naive_weighted, weights=(1.0, 1.0))),
            (functools.partial(ohem_cross_entropy, min_kept=50), naive_hard),
            (
                nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0]), ignore_index=255),
                functools.partial(naive_weighted, weights=(1.0, 3.0)),
            ),
        ],
        ids=["dice", "focal", "jaccard", "wrapped", "ohem", "weighted"],
    )
    def test_takes_the_place_of_cross_entropy(self, loss, reference):
        data = partly_labeled()
        expected = reference(first_logits(data), torch.stack([mask for _, mask in data]))
        assert first_loss(data, loss=loss) == pytest.approx(expected, rel=1e-4)

    def test_moves_with_the_method(self):
        method = Supervised(network(), loss=nn.CrossEntropyLoss(weight=torch.ones(2), ignore_index=255))
        assert method.to("meta").loss.weight.device.type == "meta"

    @pytest.mark.parametrize("weight", [0.0, 0.25, 3.0])
    def test_weighs_pseudo_labeled_pixels_as_without_it(self, weight):
        true, guessed = partly_labeled(2), pairs(2, seed=1)
        mixed = MixedDataset(true, guessed)
        logits = [first_logits([*true, *guessed])[rows] for rows in (slice(0, 2), slice(2, 4))]
        masks = [torch.stack([mask for _, mask in part]) for part in (true, guessed)]
        pixels = [int((mask != 255).sum()) for mask in masks]
        dice = [naive_dice(*part) for part in zip(logits, masks, strict=True)]
        expected = (pixels[0] * dice[0] + weight * pixels[1] * dice[1]) / sum(pixels)
        loss = smp.losses.DiceLoss("multiclass", ignore_index=255)
        assert first_loss(mixed, loss=loss, pseudo_weight=weight) == pytest.approx(expected, rel=1e-4)

    @pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), smp.losses.DiceLoss("multiclass")], ids=["ce", "dice"])
    def test_that_does_not_know_the_ignore_index_fails_with_the_way_out(self, loss):
        model = network()
        with pytest.raises(MethodError, match=r"ignore index 255 where there is no label") as caught:
            fit(Supervised(model, loss=loss), partly_labeled(), config(), progress=False)
        assert "nn.CrossEntropyLoss(ignore_index=255)" in str(caught.value)
        assert "stseg.functional.without_ignored(loss, ignore_index=255)" in str(caught.value)
        assert type(loss).__name__ in str(caught.value)
        assert same(model, network())

    @pytest.mark.parametrize(
        ("loss", "message"),
        [
            (lambda logits, masks: 0.0, "returned float; expected a scalar tensor"),
            (lambda logits, masks: logits.mean((1, 2, 3)), r"returned a tensor of shape \(4,\); expected a scalar"),
            (lambda logits, masks: torch.zeros(()), "tensor of shape .* without a gradient; expected a scalar"),
        ],
    )
    def test_that_returns_something_else_is_refused(self, loss, message):
        with pytest.raises(MethodError, match=message):
            first_loss(pairs(4), loss=loss)


class TestWeak:
    def test_of_none_takes_items_as_they_are(self):
        assert first_loss(pairs(4)) == pytest.approx(
            naive_weighted(first_logits(pairs(4)), torch.stack([mask for _, mask in pairs(4)]), (1.0, 1.0)), rel=1e-4
        )

    def test_of_none_needs_images_of_one_size(self):
        with pytest.raises(stseg.DataError, match=r"shapes \[\(3, 16, 16\), \(3, 20, 20\)\]; expected one .*WeakAug"):
            fit(network(), [*pairs(2), *pairs(2, size=20)], config(), progress=False)

    def test_and_the_transform_of_a_mixture_exclude_each_other(self):
        mixed = MixedDataset(pairs(2), pairs(2, seed=1), transform=WeakAugment(8))
        with pytest.raises(ValueError, match=r"MixedDataset has a transform.*weak=None"):
            fit(network(), mixed, config(weak=WeakAugment(16)), progress=False)
        assert fit(network(), mixed, config(), progress=False).history

    def test_that_fails_is_named_with_the_item(self):
        def broken(image, mask):
            raise KeyError("no such thing")

        with pytest.raises(stseg.DataError, match=r"weak augmentation .*broken.* fails for '0': 'no such thing'"):
            fit(network(), pairs(4), config(weak=broken), progress=False)
