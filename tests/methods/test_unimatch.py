from __future__ import annotations

import naive
import pytest
import segmentation_models_pytorch as smp
import torch
from test_fixmatch import FixedBox
from tester import MethodTester, Network, Plain, batch, rows_seen
from torch import nn

import stseg
from stseg.methods import UniMatch


class TestUniMatch(MethodTester):
    def make(self):
        return UniMatch(Network(), threshold=0.4)

    def plain(self):
        return UniMatch(Plain(), threshold=0.4, dropout=0.0, strong=None, mix=None)

    @pytest.mark.parametrize("threshold", [0.0, 0.37, 1.0])
    def test_loss_is_the_formula(self, threshold):
        """With a dropout of 1 the decoder sees no feature at all, so its perturbed logits are known."""
        method, one = UniMatch(Plain(), threshold=threshold, dropout=1.0, strong=None, mix=FixedBox()), batch(3)
        network = method.model.network
        with torch.no_grad():
            labeled, weak = (method.model(x).numpy() for x in (one.images, one.unlabeled))
            strong = method.model(torch.from_numpy(naive.paste(FixedBox.box, one.unlabeled.numpy()))).numpy()
            perturbed = network.head(torch.zeros(3, 6, 8, 8)).numpy()
        label, confidence = naive.targets(weak)
        valid = one.valid.numpy()
        mixed = [naive.paste(FixedBox.box, x) for x in (label, confidence, valid)]
        parts = {
            "supervised": naive.supervised(labeled, one.masks.numpy()),
            "strong": naive.consistency(strong, *mixed, threshold),  # both views are alike here
            "features": naive.consistency(perturbed, label, confidence, valid, threshold),
        }
        losses = method(one)
        for name, value in parts.items():
            assert float(losses.logged[name]) == pytest.approx(value, rel=1e-5), name
        total = (parts["supervised"] + 0.5 * parts["strong"] + 0.5 * parts["features"]) / 2
        assert float(losses.total.detach()) == pytest.approx(total, rel=1e-5)

    def test_the_two_strong_views_are_drawn_apart(self):
        views = []

        def strong(images, masks, where):
            views.append(images + 0.1 * torch.rand(len(images), 1, 1, 1))
            return views[-1], masks

        method = UniMatch(Plain(), threshold=0.0, strong=strong, mix=None)
        method(batch())
        assert len(views) == 2
        assert not torch.equal(*views)

    def test_the_encoder_runs_once_on_the_weak_images_and_once_on_both_strong_views(self):
        method = UniMatch(Network(), strong=None, mix=None).train()
        seen = {name: rows_seen(getattr(method.model.network, name)) for name in ("encoder", "decoder")}
        method(batch(3))
        assert seen == {"encoder": [6, 6], "decoder": [12, 6]}

    def test_the_gradient_of_the_perturbed_stream_reaches_the_encoder(self):
        method = UniMatch(Network(), threshold=0.0, strong=None, mix=None).train()
        torch.manual_seed(0)
        method.strong = None
        one = batch()
        losses = method(one._replace(masks=torch.full_like(one.masks, 255)))
        losses.total.backward()
        assert method.model.network.encoder[0].weight.grad.abs().sum() > 0

    def test_without_dropout_the_perturbed_stream_is_the_weak_one(self):
        network = Plain()
        network.head.bias.data.copy_(torch.tensor([0.0, 1e3, 0.0]))
        method = UniMatch(network, threshold=0.0, dropout=0.0, strong=None, mix=None)
        assert float(method(batch(seed=1)).logged["features"]) == 0

    @pytest.mark.parametrize(
        "network",
        [
            lambda: smp.Unet("resnet18", encoder_weights=None, classes=3),
            lambda: smp.FPN("tu-test_resnet", encoder_weights=None, classes=3),
            lambda: smp.DeepLabV3Plus("resnet18", encoder_weights=None, classes=3),
            lambda: stseg.models.DeepLabV3Plus("resnet18", num_classes=3),
        ],
    )
    def test_takes_the_networks_of_others_at_any_size(self, network):
        method = UniMatch(network(), threshold=0.0).train()
        losses = method(batch(2, 41))
        losses.total.backward()
        assert all(value.isfinite() for value in losses.logged.values())

    def test_names_the_network_without_a_backbone(self):
        method = UniMatch(nn.Conv2d(3, 3, 1))
        with pytest.raises(stseg.NetworkError, match="Conv2d"):
            method(batch())

    def test_takes_a_named_backbone(self):
        method = UniMatch(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1)), backbone="0", threshold=0.0)
        assert method(batch()).total.isfinite()
