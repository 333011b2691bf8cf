from __future__ import annotations

import math
from functools import partial

import pytest
import segmentation_models_pytorch as smp
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from small import Entropic, network
from torch import nn

from stseg import Segmenter, TrainConfig
from stseg.engine.optimizers import build_optimizer, keep_initial_rates, parameter_groups, set_learning_rates
from stseg.functional import polynomial_decay

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


class Two(nn.Module):
    """Two networks, a part of its own that is not a network, and a frozen copy of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = (Segmenter(self.net()) for _ in range(2))
        self.average = Segmenter(self.net()).requires_grad_(False)
        self.decoder = nn.Conv2d(4, 2, 1)

    @staticmethod
    def net() -> nn.Module:
        made = nn.Module()
        made.encoder, made.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
        return made


def test_of_a_method_with_two_networks_each_has_a_backbone_and_the_rest_are_heads():
    rates = learning_rates(Two())
    assert set(rates) == {name for name, p in Two().named_parameters() if p.requires_grad}
    for name, rate in rates.items():
        assert rate == pytest.approx(0.01 if ".encoder." in name else 0.1)


def test_of_a_method_whose_network_has_no_backbone_all_learn_at_the_base_rate():
    assert set(learning_rates(Entropic(network())).values()) == {0.01}


def test_a_function_is_given_the_groups():
    given = []

    def make(groups):
        given.extend(groups)
        return torch.optim.Adagrad(groups)

    made = build_optimizer(Two(), TrainConfig(epochs=1, lr=0.02, optimizer=make))
    assert isinstance(made, torch.optim.Adagrad)
    assert [group["lr"] for group in given] == pytest.approx([0.02, 0.2])


def test_all_rates_follow_one_factor():
    one, two = (
        torch.optim.SGD(nn.Conv2d(3, 2, 1).parameters(), lr=3.0),
        torch.optim.Adam(network().parameters(), lr=7.0),
    )
    keep_initial_rates([one, two])
    config = TrainConfig(epochs=1, power=2.0)
    for step in (0, 3, 9, 3):
        assert set_learning_rates([one, two], config, step, 10) == pytest.approx((1 - step / 10) ** 2)
        assert one.param_groups[0]["lr"] == pytest.approx(3 * (1 - step / 10) ** 2)
        assert two.param_groups[0]["lr"] == pytest.approx(7 * (1 - step / 10) ** 2)


class TestFused:
    """One pass over the parameters, against torch's optimizers, one operation after the other."""

    @pytest.mark.parametrize(
        ("name", "plain"),
        [
            ("sgd", partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)),
            ("adamw", partial(torch.optim.AdamW, lr=0.1, weight_decay=0.01)),
        ],
    )
    def test_updates_are_those_of_plain_ones_even_if_a_parameter_gets_its_first_gradient_late(self, name, plain):
        one, two = (nn.Sequential(nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 1)) for _ in range(2))
        two.load_state_dict(one.state_dict())
        config = TrainConfig(steps=1, optimizer=name, lr=0.1, momentum=0.9, weight_decay=0.01)
        optimizers = build_optimizer(one, config), plain(two.parameters())
        for step in range(4):
            for each, optimizer in zip((one, two), optimizers, strict=True):
                x = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(step))
                optimizer.zero_grad()
                (each if step > 1 else each[0])(x).square().sum().backward()
                optimizer.step()
            for mine, other in zip(one.parameters(), two.parameters(), strict=True):
                torch.testing.assert_close(mine, other)

    def test_parameters_that_are_no_floats_are_left_to_plain_ones(self):
        optimizer = build_optimizer(nn.Conv2d(3, 2, 1, dtype=torch.complex64), TrainConfig(steps=1))
        assert not optimizer.param_groups[0]["fused"]
