from __future__ import annotations

import math

import naive
import numpy as np
import pytest
import torch
from tester import CLASSES, MethodTester, Network, Plain, batch, rows_seen
from torch import nn

from stseg import TrainConfig
from stseg.engine.optimizers import parameter_groups
from stseg.functional import flaw_target, less_flawed_target, refine_flaws
from stseg.methods import GCT
from stseg.modules import FlawDetector


class Pointwise(nn.Module):
    """A detector whose flaws differ from pixel to pixel even in small images."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.layer = nn.Conv2d(3 + CLASSES, 1, 1)
            nn.init.normal_(self.layer.weight, std=3.0)
            nn.init.constant_(self.layer.bias, 3.0)

    def forward(self, images, probabilities):
        return self.layer(torch.cat([images, probabilities], 1))


def small():
    torch.manual_seed(5)
    return FlawDetector(3 + CLASSES, width=4)


def mean_square(one: np.ndarray, other: np.ndarray, where: np.ndarray) -> float:
    values = [
        float(((one[b, :, i, j] - other[b, :, i, j]) ** 2).mean())
        for b, i, j in np.ndindex(*where.shape)
        if where[b, i, j]
    ]
    return sum(values) / max(1, len(values))


class TestGCT(MethodTester):
    def make(self):
        return GCT(Network(0), Network(1), num_classes=CLASSES, detector=small())

    def plain(self):
        return GCT(Plain(0), Plain(1), num_classes=CLASSES, detector=small())

    @pytest.mark.parametrize("threshold", [0.0, 0.4])
    def test_loss_is_the_formula(self, threshold):
        method = GCT(Plain(0), Plain(1), num_classes=CLASSES, detector=Pointwise())
        method.threshold, method.rampup = threshold, 0.75
        method.correction, method.consistency, method.detection = 0.7, 20.0, 3.0
        one = batch(step=3, steps=8)  # half of the ramp-up
        valid = torch.cat([torch.ones_like(one.valid), one.valid])
        images = torch.cat([one.images, one.unlabeled])
        with torch.no_grad():
            logits = [network(images) for network in (method.model, method.other)]
            p = [each.softmax(1) for each in logits]
            flaws = [method.detector(images * valid[:, None], each * valid[:, None])[:, 0] for each in p]
            refined = [refine_flaws(each, where=valid) for each in flaws]
            target, bad = less_flawed_target(*p, *refined, threshold=threshold)
            target_of_other, _ = less_flawed_target(*reversed(p), *reversed(refined), threshold=threshold)
            wanted = [flaw_target(each[:2], one.masks) for each in p]
        assert (target != p[0]).float().mean() + (target_of_other != p[1]).float().mean() > 0
        assert 0 < bad[valid].float().mean() < 1
        where, known = valid.numpy(), (one.masks != 255).numpy()
        parts = {
            "supervised": sum(naive.supervised(z[:2].numpy(), one.masks.numpy()) for z in logits),
            "correction": sum(mean_square((f * bad)[:, None].numpy(), np.zeros((4, 1, 8, 8)), where) for f in flaws),
            "consistency": mean_square(p[0].numpy(), target.numpy(), where)
            + mean_square(p[1].numpy(), target_of_other.numpy(), where),
            "detector": sum(
                mean_square(f[:2, None].numpy(), w[:, None].numpy(), known) / 2
                for f, w in zip(flaws, wanted, strict=True)
            ),
            "bad": float((bad & valid).sum() / valid.sum()),
        }
        losses = method(one)
        for name, value in parts.items():
            assert float(losses.logged[name]) == pytest.approx(value, rel=1e-4), name
        ramp = math.exp(-5 * (1 - 3 / 6) ** 2)
        total = (
            parts["supervised"] + 0.7 * parts["correction"] + 20 * ramp * parts["consistency"] + 3 * parts["detector"]
        )
        assert float(losses.total.detach()) == pytest.approx(total, rel=1e-4)

    def gradients(self, **weights):
        method = GCT(Plain(0), Plain(1), num_classes=CLASSES, rampup=0, threshold=0.3, detector=Pointwise())
        for name, value in {"correction": 0.0, "consistency": 0.0, "detection": 0.0, **weights}.items():
            setattr(method, name, value)
        method(batch()).total.backward()
        return {name: p.grad for name, p in method.named_parameters()}

    def test_the_detector_learns_from_its_own_loss_alone(self):
        without = self.gradients()
        alone = self.gradients(detection=10.0)
        everything = self.gradients(detection=10.0, correction=5.0, consistency=50.0)
        for name, gradient in alone.items():
            if name.startswith("detector."):
                assert not without[name].any()
                assert gradient.any()
                assert torch.equal(gradient, everything[name])
            else:
                assert torch.equal(gradient, without[name])  # the networks do not learn from its loss

    @pytest.mark.parametrize("term", ["correction", "consistency"])
    def test_each_term_reaches_the_networks(self, term):
        without, with_it = self.gradients(), self.gradients(**{term: 100.0})
        changed = {name.split(".")[0] for name, g in without.items() if not torch.equal(g, with_it[name])}
        assert changed == {"model", "other"}

    def test_a_network_that_is_less_flawed_everywhere_learns_nothing_from_the_other(self):
        method = self.plain().train()
        method.detector.forward = lambda images, p: torch.zeros(len(p), 1, 8, 8)  # as flawed as the other
        losses = method(batch())
        assert float(losses.logged["consistency"]) == 0
        assert float(losses.logged["correction"]) == 0

    def test_each_network_sees_both_streams_together(self):
        method = self.make().train()
        seen = [rows_seen(network.network.encoder) for network in (method.model, method.other)]
        judged = rows_seen(method.detector)
        method(batch(3))
        assert seen == [[6], [6]]
        assert judged == [6] * 4

    def test_has_an_adam_for_the_detector(self):
        method = self.make()
        networks, detector = method.optimizers(TrainConfig(steps=1, lr=0.01))
        assert isinstance(detector, torch.optim.Adam)
        assert (detector.param_groups[0]["lr"], detector.param_groups[0]["betas"]) == (1e-4, (0.9, 0.99))
        held = {id(p) for group in detector.param_groups for p in group["params"]}
        assert held == {id(p) for p in method.detector.parameters()}
        others = {id(p) for group in networks.param_groups for p in group["params"]}
        assert others == {id(p) for each in (method.model, method.other) for p in each.parameters()}

    def test_both_backbones_learn_at_the_base_rate(self):
        method = self.make()
        networks, _ = method.optimizers(TrainConfig(steps=1, lr=0.1, head_lr_factor=10))
        base = {id(p) for p in networks.param_groups[0]["params"]}
        assert base == {id(p) for each in (method.model, method.other) for p in each.network.encoder.parameters()}
        assert [group["lr"] for group in networks.param_groups] == [0.1, 1.0]
        assert parameter_groups(method, TrainConfig(steps=1))

    def test_the_detector_has_as_many_parameters_as_the_authors(self):
        detector = GCT(Plain(0), Plain(1), num_classes=21).detector
        assert sum(p.numel() for p in detector.parameters()) == 8_294_017

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"threshold": 1.5}, r"threshold is 1.5; expected a probability in \[0, 1\]"),
            ({"correction": -1}, "correction is -1; expected 0 or more"),
            ({"consistency": -1}, "consistency is -1; expected 0 or more"),
            ({"rampup": -1}, "rampup is -1; expected 0 or more"),
            ({"detection": -1}, "detection is -1; expected 0 or more"),
        ],
    )
    def test_refuses_settings_out_of_range(self, options, message):
        with pytest.raises(ValueError, match=message):
            GCT(Plain(0), Plain(1), num_classes=CLASSES, **options)

    def test_one_network_twice_is_refused(self):
        network = Plain()
        with pytest.raises(ValueError, match="share parameters; expected two networks with weights of their own"):
            GCT(network, network, num_classes=CLASSES)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_classes": 4}, "num_classes is 4, but the networks give 3 and 3 classes"),
            (
                {"num_classes": 3, "detector": FlawDetector(7, width=4)},
                "images have 3 channels and probabilities 3; the detector expects 7 together",
            ),
        ],
    )
    def test_tells_what_it_is_given(self, options, message):
        with pytest.raises(ValueError, match=message):
            GCT(Plain(0), Plain(1), **options)(batch())
