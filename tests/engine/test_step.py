from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small import same, training_step
from torch import nn

from stseg import Batch, Losses, Method, Segmenter, TrainConfig
from stseg.engine.optimizers import build_optimizer
from stseg.methods import Supervised

CONFIG = TrainConfig(epochs=1, lr=0.01, head_lr_factor=10.0)


def step(method: Method, batch: Batch, config: TrainConfig = CONFIG) -> dict[str, float]:
    return training_step(method.train(), [build_optimizer(method, config)], batch, config)


def naive_weighted_cross_entropy(logits, masks, is_pseudo, weight: float, ignore_index: int) -> float:
    """(sum over labeled pixels + lambda * sum over pseudo-labeled ones) / pixels of both, pixel by pixel."""
    sums, pixels = {True: 0.0, False: 0.0}, 0
    for image, mask, guessed in zip(logits, masks, is_pseudo, strict=True):
        for row, column in np.ndindex(*mask.shape):
            if mask[row, column] != ignore_index:
                scores = image[:, row, column].astype(np.float64)
                loss = np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[mask[row, column]]
                sums[bool(guessed)] += float(loss)
                pixels += 1
    return (sums[False] + weight * sums[True]) / pixels


def naive_cross_entropy(logits: np.ndarray, masks: np.ndarray, ignore_index: int) -> float:
    """The mean of -log softmax over the pixels that count, pixel by pixel."""
    losses = []
    for image, mask in zip(logits, masks, strict=True):
        for row, column in np.ndindex(*mask.shape):
            if mask[row, column] != ignore_index:
                scores = image[:, row, column].astype(np.float64)
                losses.append(np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[mask[row, column]])
    return float(np.mean(losses))


class TestTrainStep:
    def batch(self) -> Batch:
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(3, 3, 5, 7, generator=generator)
        masks = torch.randint(0, 4, (3, 5, 7), generator=generator)
        masks[0, :3] = 255
        masks[2] = 255
        return Batch(images, masks, torch.zeros(3, dtype=torch.bool))

    def test_loss_is_one_mean_over_the_batch(self):
        method, batch = Supervised(nn.Conv2d(3, 4, 1)), self.batch()
        expected = naive_cross_entropy(method.model(batch.images).detach().numpy(), batch.masks.numpy(), 255)
        assert step(method, batch) == {"loss": pytest.approx(expected, rel=1e-6)}

    def test_moves_the_weights_against_the_gradient(self):
        method, batch = Supervised(nn.Conv2d(3, 4, 1)), self.batch()
        weight = method.model.network.weight
        F.cross_entropy(method.model(batch.images), batch.masks, ignore_index=255).backward()
        expected = (weight - 0.01 * weight.grad).detach()
        step(method, batch, TrainConfig(epochs=1, lr=0.01, momentum=0.0, weight_decay=0.0))
        torch.testing.assert_close(weight.detach(), expected)

    def test_of_a_batch_without_a_pixel_that_counts_changes_nothing_but_statistics(self):
        method, batch = Supervised(nn.Conv2d(3, 4, 1)), self.batch()
        before = copy.deepcopy(method)
        batch.masks.fill_(255)
        assert step(method, batch, TrainConfig(epochs=1, lr=0.01, weight_decay=0.0)) == {"loss": 0}
        assert same(method, before)

    @pytest.mark.parametrize("spoil", ["loss", "gradient"])
    def test_that_is_not_finite_leaves_weights_and_statistics(self, spoil):
        method = Supervised(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)))
        optimizer = build_optimizer(method, CONFIG)
        batch = self.batch()
        training_step(method, [optimizer], batch, CONFIG)
        before = copy.deepcopy((method, optimizer.state_dict()))
        if spoil == "loss":
            images = batch.images.clone()
            images[1, 0, 0, 0] = math.nan
            batch = batch._replace(images=images)
        else:
            method.model.network[1].weight.register_hook(lambda gradient: gradient * math.inf)
        with pytest.raises(FloatingPointError, match="the loss is nan" if spoil == "loss" else "gradients"):
            training_step(method, [optimizer], batch, CONFIG)
        assert same(method, before[0])
        assert len(before[1]["state"]) > 0
        for name, value in optimizer.state_dict()["state"].items():
            assert torch.equal(value["momentum_buffer"], before[1]["state"][name]["momentum_buffer"])

    def test_returns_what_the_method_logs(self):
        class Logging(Supervised):
            def forward(self, batch):
                total, _ = super().forward(batch)
                return Losses(total, {"twice": 2 * total.detach(), "pixels": (batch.masks != 255).sum(), "one": 1})

        numbers = step(Logging(nn.Conv2d(3, 4, 1)), self.batch())
        assert list(numbers) == ["loss", "twice", "pixels", "one"]
        assert numbers["twice"] == pytest.approx(2 * numbers["loss"], rel=1e-6)
        assert (numbers["pixels"], numbers["one"]) == (14 + 35, 1)
        assert {type(value) for value in numbers.values()} == {float}

    def test_whose_logged_number_is_not_finite_goes_on(self):
        class Logging(Supervised):
            def forward(self, batch):
                return Losses(super().forward(batch).total, {"odd": torch.tensor(math.nan)})

        assert math.isnan(step(Logging(nn.Conv2d(3, 4, 1)), self.batch())["odd"])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_states_that_were_saved_in_another_layout_are_those_that_were_saved(optimizer):
    settings = TrainConfig(steps=3, optimizer=optimizer, lr=0.01)
    batch = Batch(torch.rand(2, 3, 8, 8), torch.randint(4, (2, 8, 8)), torch.zeros(2, dtype=torch.bool))
    first = Supervised(nn.Conv2d(3, 4, 3, padding=1))
    before = build_optimizer(first, settings)
    training_step(first, [before], batch, settings)
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        method = copy.deepcopy(first).to(memory_format=layout)
        resumed = build_optimizer(method, settings)
        resumed.load_state_dict(copy.deepcopy(before.state_dict()))
        training_step(method, [resumed], batch, settings)
        found.append(method.model.network.weight.detach())
    assert found[1].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(*found)


class TestPseudoWeight:
    def batch(self, flags: tuple[bool, ...] = (True, False, True), seed: int = 0) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        images = torch.rand(len(flags), 3, 5, 7, generator=generator)
        masks = torch.randint(0, 4, (len(flags), 5, 7), generator=generator)
        masks[0, :3] = 255
        masks[-1, :, 2:] = 255
        return Batch(images, masks, torch.tensor(flags))

    def step(self, weight: float, batch: Batch, network: nn.Module | None = None, **options) -> tuple[float, nn.Module]:
        network = nn.Conv2d(3, 4, 1) if network is None else network
        return step(Supervised(network, pseudo_weight=weight, **options), batch)["loss"], network

    @pytest.mark.parametrize("loss", [None, nn.CrossEntropyLoss(ignore_index=255)], ids=["built in", "custom"])
    @given(weight=st.floats(0, 10), flags=st.lists(st.booleans(), min_size=1, max_size=4), seed=st.integers(0, 2**31))
    @settings(max_examples=25, deadline=None)
    def test_loss_is_the_formula(self, loss, weight, flags, seed):
        batch, network = self.batch(tuple(flags), seed), nn.Conv2d(3, 4, 1)
        logits = Segmenter(network)(batch.images).detach().numpy()
        expected = naive_weighted_cross_entropy(logits, batch.masks.numpy(), flags, weight, 255)
        assert self.step(weight, batch, network, loss=loss)[0] == pytest.approx(expected, rel=1e-5, abs=1e-7)

    @pytest.mark.parametrize("weight", [0.0, 0.3, 4.0])
    def test_gradient_is_that_of_the_formula(self, weight):
        images, masks, is_pseudo = (batch := self.batch())[:3]
        network = nn.Conv2d(3, 4, 1)
        by_hand = Segmenter(copy.deepcopy(network))
        true, guessed = (
            F.cross_entropy(by_hand(images[rows]), masks[rows], ignore_index=255, reduction="sum")
            for rows in (~is_pseudo, is_pseudo)
        )
        ((true + weight * guessed) / (masks != 255).sum()).backward()
        self.step(weight, batch, network)
        torch.testing.assert_close(network.weight.grad, by_hand.network.weight.grad)
        torch.testing.assert_close(network.bias.grad, by_hand.network.bias.grad)

    def test_of_one_is_bit_for_bit_the_mean_over_the_mixed_batch(self):
        batch = self.batch()
        one, other = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        other.load_state_dict(one.state_dict())
        true = batch._replace(is_pseudo=torch.zeros(3, dtype=torch.bool))
        assert step(Supervised(one), true)["loss"] == self.step(1.0, batch, other)[0]
        assert same(one, other)

    def test_of_zero_learns_nothing_from_pseudo_masks(self):
        _, masks, is_pseudo = (batch := self.batch())[:3]
        others = torch.where(is_pseudo[:, None, None] & (masks != 255), 3 - masks, masks)
        network = nn.Conv2d(3, 4, 1)
        one, with_others = (self.step(0.0, batch._replace(masks=m), copy.deepcopy(network)) for m in (masks, others))
        assert one[0] == with_others[0]
        assert torch.equal(one[1].weight, with_others[1].weight)

    def test_of_zero_and_a_batch_of_guesses_alone_is_no_loss(self):
        method = Supervised(nn.Conv2d(3, 4, 1), pseudo_weight=0.0)
        before = copy.deepcopy(method)
        assert step(method, self.batch((True, True)), TrainConfig(epochs=1, weight_decay=0.0)) == {"loss": 0}
        assert same(method, before)

    @pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
    def test_of_a_batch_without_a_pixel_that_counts_is_no_nan(self, weight):
        batch = self.batch()
        batch.masks.fill_(255)
        loss, network = self.step(weight, batch)
        assert loss == 0
        assert all(p.isfinite().all() for p in network.parameters())

    @pytest.mark.parametrize("weight", [-0.5, math.nan, math.inf])
    def test_that_makes_no_sense_is_refused(self, weight):
        with pytest.raises(ValueError, match=f"pseudo_weight is {weight}; expected 0 or more"):
            Supervised(nn.Conv2d(3, 4, 1), pseudo_weight=weight)

    def test_that_is_no_number_is_refused(self):
        with pytest.raises(TypeError, match=r"pseudo_weight is '0\.5'; expected a number"):
            Supervised(nn.Conv2d(3, 4, 1), pseudo_weight="0.5")
