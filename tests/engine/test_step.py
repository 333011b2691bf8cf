from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stseg import Segmenter, TrainConfig
from stseg.engine.optimizers import build_optimizer, parameter_groups, polynomial_decay
from stseg.engine.step import training_step

CONFIG = TrainConfig(epochs=1, lr=0.01, head_lr_factor=10.0)


class TestPoly:
    @given(st.integers(1, 10_000), st.floats(0.1, 3))
    @settings(max_examples=30, deadline=None)
    def test_falls_from_one_towards_zero(self, total, power):
        factors = [polynomial_decay(step, total, power) for step in (0, total // 2, total - 1, total)]
        assert factors[0] == 1
        assert factors[-1] == 0
        assert factors == sorted(factors, reverse=True)

    def test_is_the_formula_of_the_paper(self):
        for step in range(100):
            assert polynomial_decay(step, 100, 0.9) == pytest.approx(
                math.exp(0.9 * math.log((100 - step) / 100)), rel=1e-12
            )


def learning_rates(network: nn.Module, config: TrainConfig = CONFIG) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return {names[id(p)]: group["lr"] for group in parameter_groups(network, config) for p in group["params"]}


class TestParameterGroups:
    def test_of_smp_the_encoder_is_the_backbone(self):
        network = smp.FPN("tu-test_resnet", encoder_weights=None, classes=3)
        rates = learning_rates(network)
        assert rates.keys() == dict(network.named_parameters()).keys()
        for name, rate in rates.items():
            assert rate == pytest.approx(0.01 if name.startswith("encoder.") else 0.1)

    def test_of_torchvision_it_is_called_backbone(self):
        rates = learning_rates(
            torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None)
        )
        assert {name.split(".")[0]: rate for name, rate in rates.items()} == {
            "backbone": 0.01,
            "classifier": pytest.approx(0.1),
        }

    def test_of_hugging_face_it_has_the_name_of_base_model_prefix(self):
        network = nn.Module()
        network.base_model_prefix = "segformer"
        network.segformer, network.decode_head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
        rates = learning_rates(network)
        assert rates["segformer.weight"] == 0.01
        assert rates["decode_head.bias"] == pytest.approx(0.1)

    def test_may_be_named(self):
        network = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1)), nn.Conv2d(4, 2, 1))
        rates = learning_rates(network, TrainConfig(epochs=1, lr=0.01, backbone="0.0"))
        assert rates == pytest.approx({"0.0.weight": 0.01, "0.0.bias": 0.01, "1.weight": 0.1, "1.bias": 0.1})

    def test_without_a_backbone_all_learn_at_the_base_rate(self):
        assert set(learning_rates(nn.Conv2d(3, 2, 1)).values()) == {0.01}

    def test_looks_inside_a_segmenter(self):
        network = smp.FPN("tu-test_resnet", encoder_weights=None, classes=3)
        assert len(parameter_groups(Segmenter(network), CONFIG)) == 2

    def test_leaves_frozen_parameters_out(self):
        network = smp.FPN("tu-test_resnet", encoder_weights=None, classes=3)
        network.encoder.requires_grad_(False)
        assert not any(name.startswith("encoder.") for name in learning_rates(network))

    def test_refuses_a_backbone_that_is_not_there(self):
        with pytest.raises(ValueError, match=r"backbone is 'trunk'; the network \(Conv2d\) has no such submodule"):
            parameter_groups(nn.Conv2d(3, 2, 1), TrainConfig(epochs=1, backbone="trunk"))

    def test_refuses_a_network_that_cannot_learn(self):
        with pytest.raises(ValueError, match="no parameters that require gradients"):
            parameter_groups(nn.Conv2d(3, 2, 1).requires_grad_(False), CONFIG)


def test_optimizers_are_those_of_torch_with_the_settings():
    network = nn.Conv2d(3, 2, 1)
    sgd = build_optimizer(network, TrainConfig(epochs=1, lr=0.02, momentum=0.8, weight_decay=0.3))
    assert isinstance(sgd, torch.optim.SGD)
    assert [(g["lr"], g["momentum"], g["weight_decay"]) for g in sgd.param_groups] == [(0.02, 0.8, 0.3)]
    adamw = build_optimizer(network, TrainConfig(epochs=1, lr=0.02, optimizer="adamw", weight_decay=0.3))
    assert isinstance(adamw, torch.optim.AdamW)
    assert [(g["lr"], g["weight_decay"]) for g in adamw.param_groups] == [(0.02, 0.3)]


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
    def batch(self):
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(3, 3, 5, 7, generator=generator)
        masks = torch.randint(0, 4, (3, 5, 7), generator=generator)
        masks[0, :3] = 255
        masks[2] = 255
        return images, masks

    def test_loss_is_one_mean_over_the_batch(self):
        network, (images, masks) = nn.Conv2d(3, 4, 1), self.batch()
        expected = naive_cross_entropy(network(images).detach().numpy(), masks.numpy(), 255)
        loss = training_step(network, build_optimizer(network, CONFIG), images, masks, CONFIG, 255)
        assert loss == pytest.approx(expected, rel=1e-6)

    def test_moves_the_weights_against_the_gradient(self):
        network, (images, masks) = nn.Conv2d(3, 4, 1), self.batch()
        F.cross_entropy(network(images), masks, ignore_index=255).backward()
        expected = (network.weight - 0.01 * network.weight.grad).detach()
        config = TrainConfig(epochs=1, lr=0.01, momentum=0.0, weight_decay=0.0)
        training_step(network, build_optimizer(network, config), images, masks, config, 255)
        torch.testing.assert_close(network.weight.detach(), expected)

    def test_of_a_batch_without_a_pixel_that_counts_changes_nothing_but_statistics(self):
        network = nn.Conv2d(3, 4, 1)
        before = copy.deepcopy(network.state_dict())
        images, masks = self.batch()
        config = TrainConfig(epochs=1, lr=0.01, weight_decay=0.0)
        assert training_step(network, build_optimizer(network, config), images, masks.fill_(255), config, 255) == 0
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())

    @pytest.mark.parametrize("spoil", ["loss", "gradient"])
    def test_that_is_not_finite_leaves_weights_and_statistics(self, spoil):
        network = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1))
        optimizer = build_optimizer(network, CONFIG)
        images, masks = self.batch()
        training_step(network, optimizer, images, masks, CONFIG, 255)
        before = copy.deepcopy((network.state_dict(), optimizer.state_dict()))
        if spoil == "loss":
            images = images.clone()
            images[1, 0, 0, 0] = math.nan
        else:
            network[1].weight.register_hook(lambda gradient: gradient * math.inf)
        with pytest.raises(FloatingPointError, match="the loss is nan" if spoil == "loss" else "gradients"):
            training_step(network, optimizer, images, masks, CONFIG, 255)
        after = network.state_dict(), optimizer.state_dict()
        assert all(torch.equal(value, before[0][name]) for name, value in after[0].items())
        for name, value in after[1]["state"].items():
            assert torch.equal(value["momentum_buffer"], before[1]["state"][name]["momentum_buffer"])


class TestPseudoWeight:
    def batch(self, flags: tuple[bool, ...] = (True, False, True), seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        images = torch.rand(len(flags), 3, 5, 7, generator=generator)
        masks = torch.randint(0, 4, (len(flags), 5, 7), generator=generator)
        masks[0, :3] = 255
        masks[-1, :, 2:] = 255
        return images, masks, torch.tensor(flags)

    def step(self, weight: float, batch, network: nn.Module | None = None) -> tuple[float, nn.Module]:
        network = nn.Conv2d(3, 4, 1) if network is None else network
        config = TrainConfig(epochs=1, lr=0.01, pseudo_weight=weight)
        images, masks, is_pseudo = batch
        return training_step(network, build_optimizer(network, config), images, masks, config, 255, is_pseudo), network

    @given(st.floats(0, 10), st.lists(st.booleans(), min_size=1, max_size=4), st.integers(0, 2**31))
    @settings(max_examples=25, deadline=None)
    def test_loss_is_the_formula(self, weight, flags, seed):
        batch, network = self.batch(tuple(flags), seed), nn.Conv2d(3, 4, 1)
        logits = network(batch[0]).detach().numpy()
        expected = naive_weighted_cross_entropy(logits, batch[1].numpy(), flags, weight, 255)
        assert self.step(weight, batch, network)[0] == pytest.approx(expected, rel=1e-5, abs=1e-7)

    @pytest.mark.parametrize("weight", [0.0, 0.3, 4.0])
    def test_gradient_is_that_of_the_formula(self, weight):
        images, masks, is_pseudo = self.batch()
        network = nn.Conv2d(3, 4, 1)
        by_hand = copy.deepcopy(network)
        true, guessed = (
            F.cross_entropy(by_hand(images[rows]), masks[rows], ignore_index=255, reduction="sum")
            for rows in (~is_pseudo, is_pseudo)
        )
        ((true + weight * guessed) / (masks != 255).sum()).backward()
        self.step(weight, (images, masks, is_pseudo), network)
        torch.testing.assert_close(network.weight.grad, by_hand.weight.grad)
        torch.testing.assert_close(network.bias.grad, by_hand.bias.grad)

    def test_of_one_is_bit_for_bit_the_mean_over_the_mixed_batch(self):
        images, masks, is_pseudo = self.batch()
        one, other = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        other.load_state_dict(one.state_dict())
        loss = training_step(one, build_optimizer(one, CONFIG), images, masks, CONFIG, 255)
        assert self.step(1.0, (images, masks, is_pseudo), other)[0] == loss
        assert all(torch.equal(value, one.state_dict()[name]) for name, value in other.state_dict().items())

    def test_of_zero_learns_nothing_from_pseudo_masks(self):
        images, masks, is_pseudo = self.batch()
        others = torch.where(is_pseudo[:, None, None] & (masks != 255), 3 - masks, masks)
        network = nn.Conv2d(3, 4, 1)
        one, with_others = (self.step(0.0, (images, m, is_pseudo), copy.deepcopy(network)) for m in (masks, others))
        assert one[0] == with_others[0]
        assert torch.equal(one[1].weight, with_others[1].weight)

    def test_of_zero_and_a_batch_of_guesses_alone_is_no_loss(self):
        network = nn.Conv2d(3, 4, 1)
        before = copy.deepcopy(network.state_dict())
        config = TrainConfig(epochs=1, weight_decay=0.0, pseudo_weight=0.0)
        images, masks, is_pseudo = self.batch((True, True))
        assert training_step(network, build_optimizer(network, config), images, masks, config, 255, is_pseudo) == 0
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())

    @pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
    def test_of_a_batch_without_a_pixel_that_counts_is_no_nan(self, weight):
        images, masks, is_pseudo = self.batch()
        loss, network = self.step(weight, (images, masks.fill_(255), is_pseudo))
        assert loss == 0
        assert all(p.isfinite().all() for p in network.parameters())
