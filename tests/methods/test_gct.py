from __future__ import annotations

import math

import naive
import numpy as np
import pytest
import torch
from scipy import ndimage
from tester import CLASSES, MethodTester, Network, Plain, batch, rows_seen

from stseg import TrainConfig
from stseg.functional import clean_flaws, gaussian_blur, true_flaws
from stseg.methods import GCT
from stseg.modules import FlawDetector


def blur(maps: np.ndarray, size: int) -> np.ndarray:
    half = (size - 1) // 2
    sigma = 0.3 * (half - 1) + 0.8
    kernel = np.exp(-(np.arange(-half, half + 1) ** 2) / (2 * sigma**2))
    kernel /= kernel.sum()
    for axis in (1, 2):
        maps = ndimage.convolve1d(maps, kernel, axis=axis, mode="mirror")
    return maps


def scaled(maps: np.ndarray) -> np.ndarray:
    low, high = maps.min((1, 2), keepdims=True), maps.max((1, 2), keepdims=True)
    return (maps - low) / np.maximum(high - low, 1e-3)


class TestGCT(MethodTester):
    def make(self):
        torch.manual_seed(5)
        return GCT(Network(0), Network(1), num_classes=CLASSES, consistency=1.0, detector_width=8)

    def plain(self):
        torch.manual_seed(5)  # the detector normalizes over a batch
        return GCT(Plain(0), Plain(1), num_classes=CLASSES, correction=0.0, consistency=0.0, detector_width=8)

    def test_loss_is_the_formula(self):
        torch.manual_seed(5)
        method = GCT(Plain(0), Plain(1), num_classes=CLASSES, correction=0.3, consistency=7.0, rampup=1, threshold=0.4)
        one = batch(size=96, step=3, steps=6)
        images = torch.cat([one.images, one.unlabeled])
        method.train()
        with torch.no_grad():
            logits = [network(images) for network in (method.model, method.other)]
            flaws = [method.detector(torch.cat([images, z.softmax(1)], 1)).numpy() for z in logits]
            on_labeled = [method.detector(torch.cat([one.images, z[:2].softmax(1)], 1)).numpy() for z in logits]
        p = [z.softmax(1).numpy() for z in logits]
        known, masks = (one.masks != 255).numpy(), one.masks.numpy()
        where = np.concatenate([np.ones_like(known), one.valid.numpy()])
        clean = []
        for each in flaws:
            blurred = blur(np.maximum(each.astype(np.float64), 0), 7)
            found = scaled(blurred) * (blurred.max((1, 2), keepdims=True) > 0.1)
            clean.append(np.where(found > 0.4, 1.0, found))
        bad = (clean[0] > 0.4) & (clean[1] > 0.4) & where
        correction, consistency = 0.0, 0.0
        for mine, other, p_mine, p_other, raw in (
            (clean[0], clean[1], p[0], p[1], flaws[0]),
            (clean[1], clean[0], p[1], p[0], flaws[1]),
        ):
            correction += (raw**2)[bad].sum() / where.sum()
            target = np.where((other >= mine)[:, None], p_mine, p_other)
            consistency += ((p_mine - target) ** 2).mean(1)[where].sum() / where.sum()
        detector = 0.0
        for z, found in zip(p, on_labeled, strict=True):
            onehot = np.eye(256)[masks][..., :CLASSES].transpose(0, 3, 1, 2)
            difference = 0.5 * np.abs(onehot - z[:2]).sum(1) * known
            first = blur(difference, 13)
            dilated = ndimage.maximum_filter(first, (1, 3, 3), mode="mirror")
            truth = scaled(blur(dilated, 25))
            detector += 0.5 * 10 * ((found - truth) ** 2)[known].mean()
        supervised = sum(naive.supervised(z[:2].numpy(), masks) for z in logits)
        torch.manual_seed(5)
        losses = method(one)
        parts = {"supervised": supervised, "correction": correction, "consistency": consistency, "detector": detector}
        assert consistency > 0
        for name, value in {**parts, "bad": bad.sum() / where.sum()}.items():
            assert float(losses.logged[name]) == pytest.approx(value, rel=1e-3, abs=1e-7), name
        weight = 7 * math.exp(-5 * (1 - 3 / 6) ** 2)
        total = supervised + 0.3 * correction + weight * consistency + detector
        assert float(losses.total.detach()) == pytest.approx(total, rel=1e-3)

    def test_the_detector_learns_from_its_own_loss_alone(self):
        gradients = []
        for weight in (0.0, 5.0):
            torch.manual_seed(1)
            method = GCT(Plain(0), Plain(1), num_classes=CLASSES, correction=weight, consistency=weight)
            method(batch(size=16)).total.backward()
            gradients.append([p.grad.clone() for p in method.detector.parameters()])
        assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))

    def test_each_network_sees_all_images_in_one_pass_and_learns(self):
        method = self.make().train()
        seen = rows_seen(method.other.network.encoder)
        method(batch(3, 16)).total.backward()
        assert seen == [6]
        assert all(n.network.head.weight.grad.abs().sum() > 0 for n in (method.model, method.other))

    def test_has_one_optimizer_for_both_networks_and_an_adam(self):
        method = self.make()
        networks, detector = method.optimizers(TrainConfig(steps=1, lr=0.1, head_lr_factor=10))
        assert {group["lr"] for group in networks.param_groups} == {0.1, 1.0}
        assert detector.param_groups[0]["lr"] == 1e-4
        held = [id(p) for o in (networks, detector) for group in o.param_groups for p in group["params"]]
        assert sorted(held) == sorted(id(p) for p in method.parameters())

    def test_one_network_twice_is_refused(self):
        network = Plain()
        with pytest.raises(ValueError, match="share parameters"):
            GCT(network, network, num_classes=CLASSES)


class TestFlaws:
    @pytest.mark.parametrize("size", [1, 3, 5, 21])
    def test_blur_is_that_of_scipy(self, size):
        maps = torch.rand(2, 24, 31)
        torch.testing.assert_close(
            gaussian_blur(maps, size), torch.from_numpy(blur(maps.double().numpy(), size)).float()
        )

    def test_blur_with_a_kernel_beyond_the_image_is_one_of_a_smaller_kernel(self):
        assert gaussian_blur(torch.ones(1, 4, 3), 65).allclose(torch.ones(1, 4, 3))

    def test_of_right_predictions_are_none(self):
        masks = torch.randint(3, (2, 32, 32))
        right = torch.nn.functional.one_hot(masks, 3).movedim(-1, 1).float()
        assert true_flaws(right, masks).max() == 0
        masks[0, :9] = 255
        assert true_flaws(right, masks).max() == 0

    def test_are_where_predictions_are_wrong(self):
        masks = torch.zeros(1, 64, 64, dtype=torch.int64)
        wrong = torch.zeros(1, 2, 64, 64)
        wrong[:, 0] = 1
        wrong[:, :, 10:20, 40:50] = torch.tensor([0.0, 1.0])[None, :, None, None]
        flaws = true_flaws(wrong, masks)
        assert (flaws.min(), flaws.max()) == (0, pytest.approx(1, abs=1e-4))
        top, left = divmod(int(flaws.argmax()), 64)
        assert 10 <= top < 20
        assert 40 <= left < 50

    def test_that_are_small_are_cleaned_away(self):
        assert clean_flaws(torch.rand(2, 16, 16) * 0.05).max() == 0
        cleaned = clean_flaws(torch.linspace(-1, 1, 256).reshape(1, 16, 16))
        assert ((cleaned <= 0.6) | (cleaned == 1)).all()
        assert cleaned.min() == 0

    def test_kernels_are_those_of_the_authors(self):
        for side, expected in ((513, (33, 65, 129)), (321, (21, 41, 81))):
            from stseg.functional.flaws import odd

            assert (odd(side // 16), odd(side // 8), odd(side // 4)) == expected

    def test_the_detector_has_as_many_parameters_as_the_authors(self):
        assert sum(p.numel() for p in FlawDetector(24).parameters()) == 8_294_017
