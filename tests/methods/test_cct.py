from __future__ import annotations

import math
from collections import Counter

import naive
import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from tester import CLASSES, MethodTester, Network, Plain, batch, rows_seen
from torch import nn
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

import stseg
from stseg import TrainConfig
from stseg.engine.optimizers import parameter_groups
from stseg.methods import CCT
from stseg.models import PSPNet

MASKS = {"context": 1, "objects": 1}  # the perturbations in which nothing is random


class Strided(nn.Module):
    """Features at a quarter of the sides, which the wrapper pads images for."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Conv2d(3, 6, 4, stride=4), nn.Conv2d(6, CLASSES, 1)
        self.up = nn.Upsample(scale_factor=4, mode="bilinear")

    def forward(self, x):
        return self.up(self.head(self.encoder(x).relu()))


def decode(decoder: nn.Module, z: np.ndarray) -> np.ndarray:
    """One auxiliary decoder without upsampling: a 1 x 1 convolution."""
    (layer,) = decoder
    return np.einsum("kc,bchw->bkhw", layer.weight.detach().numpy()[:, :, 0, 0], z)


def mean_square(prediction: np.ndarray, target: np.ndarray, valid: np.ndarray) -> float:
    total, count = 0.0, 0
    for b, i, j in np.ndindex(*valid.shape):
        if valid[b, i, j]:
            total += float(((naive.softmax(prediction[b, :, i, j]) - naive.softmax(target[b, :, i, j])) ** 2).mean())
            count += 1
    return total / max(1, count)


class TestCCT(MethodTester):
    def make(self):
        torch.manual_seed(5)
        decoders = dict.fromkeys(("feature_noise", "feature_drop", "dropout", "cutout", "adversarial"), 1)
        return CCT(Network(), num_classes=CLASSES, channels=8, upsampling=2, decoders={**decoders, **MASKS})

    def plain(self):
        torch.manual_seed(5)
        return CCT(Plain(), num_classes=CLASSES, channels=6, upsampling=1, decoders=MASKS)

    def test_loss_is_the_formula(self):
        method = self.plain()
        method.rampup = 0.75
        one = batch(step=3, steps=8)  # half of the ramp-up
        with torch.no_grad():
            labeled, unlabeled = (method.model(x).numpy() for x in (one.images, one.unlabeled))
            mean, std = (getattr(method.model, name)[:, None, None] for name in ("_mean", "_std"))
            z = method.model.network.encoder((one.unlabeled - mean) / std).numpy()
        label, _ = naive.targets(unlabeled)
        assert 0 < (label == 0).mean() < 1
        kept = {"context": label != 0, "objects": label == 0}
        valid = one.valid.numpy()
        consistency = 0.0
        for kind, decoder in zip(method.kinds, method.decoders, strict=True):
            perturbed = np.zeros_like(z)
            for b, i, j in np.ndindex(*label.shape):
                if kept[kind][b, i, j]:
                    perturbed[b, :, i, j] = z[b, :, i, j]
            consistency += mean_square(decode(decoder, perturbed), unlabeled, valid) / 2
        supervised = naive.supervised(labeled, one.masks.numpy())
        losses = method(one)
        assert float(losses.logged["supervised"]) == pytest.approx(supervised, rel=1e-5)
        assert float(losses.logged["consistency"]) == pytest.approx(consistency, rel=1e-5)
        ramp = math.exp(-5 * (1 - 3 / 6) ** 2)
        assert float(losses.total.detach()) == pytest.approx(supervised + 30 * ramp * consistency, rel=1e-5)

    @pytest.mark.parametrize(("step", "weight"), [(0, 0.202138), (50, 8.595144), (100, 30), (700, 30)])
    def test_the_weight_rises_in_the_first_tenth(self, step, weight):
        losses = self.plain()(batch(step=step, steps=1000))
        expected = losses.logged["supervised"] + weight * losses.logged["consistency"]
        assert float(losses.total.detach()) == pytest.approx(float(expected), rel=1e-5)

    def test_has_the_decoders_of_the_paper(self):
        method = CCT(Plain(), num_classes=21, channels=512)
        assert Counter(method.kinds) == {
            "feature_noise": 6,
            "feature_drop": 6,
            "dropout": 6,
            "cutout": 6,
            "context": 2,
            "objects": 2,
            "adversarial": 2,
        }
        assert sum(p.numel() for p in method.decoders.parameters()) == 488_880

    def test_without_a_background_three_perturbations_are_left_out(self):
        method = CCT(Plain(), num_classes=3, channels=6, upsampling=1, background=None)
        assert Counter(method.kinds) == {"feature_noise": 6, "feature_drop": 6, "dropout": 6, "adversarial": 2}
        assert method(batch()).total.isfinite()

    def test_the_networks_own_decoder_learns_from_masks_alone(self):
        gradients = {}
        for weight in (0.0, 30.0):
            method = self.make()
            method.weight, method.rampup = weight, 0
            torch.manual_seed(0)
            method.train()(batch()).total.backward()
            gradients[weight] = {name: p.grad for name, p in method.named_parameters()}
        without, with_it = gradients.values()
        for name, gradient in without.items():
            own = name.startswith(("model.network.decoder", "model.network.head"))
            assert torch.equal(gradient, with_it[name]) == own, name

    def test_every_decoder_learns(self):
        method = self.make().train()
        method(batch()).total.backward()
        assert all(p.grad.any() for decoder in method.decoders for p in decoder[0].parameters())

    def test_the_adversarial_search_leaves_no_gradients_behind(self):
        torch.manual_seed(5)
        method = CCT(Plain(), num_classes=CLASSES, channels=6, upsampling=2, decoders={"adversarial": 1})
        method(batch())
        assert all(p.grad is None for p in method.parameters())

    def test_a_decoder_that_sees_what_the_network_sees_has_no_loss(self):
        """All positions are background, so that masking the objects changes nothing; and the decoder is the head."""
        method = CCT(Plain(), num_classes=CLASSES, channels=6, upsampling=1, decoders={"objects": 1})
        head = method.model.network.head
        method.model.network.forward = lambda x: head(method.model.network.encoder(x))
        with torch.no_grad():
            head.bias.zero_()
            method.decoders[0][0].weight.copy_(head.weight)
        one = batch()
        assert float(method(one).logged["consistency"]) > 0
        method.background = 7  # whatever is predicted is an object
        method.kinds = ("context",)
        assert float(method(one).logged["consistency"]) == pytest.approx(0, abs=1e-12)

    def test_labeled_and_unlabeled_images_have_batch_statistics_of_their_own(self):
        method = self.make().train()
        seen = rows_seen(method.model.network.encoder)
        method(batch(3))
        assert seen == [3, 3]

    def test_decoders_learn_at_the_rate_of_heads(self):
        method = self.make()
        base, head = parameter_groups(method, TrainConfig(steps=1, lr=0.1, head_lr_factor=10))
        held = {id(p) for p in head["params"]}
        assert all(id(p) in held for p in method.decoders.parameters())
        assert {id(p) for p in base["params"]} == {id(p) for p in method.model.network.encoder.parameters()}

    def test_predictions_lie_on_the_pixels_that_they_belong_to(self):
        """An image of 13 x 14 is padded to 16: the decoders' maps cover the padded one, as the network's do."""
        torch.manual_seed(0)
        method = CCT(Strided(), num_classes=CLASSES, channels=6, upsampling=1, decoders={"context": 1})
        method.background = 7  # all is objects
        network = method.model.network
        network.forward = lambda x: network.up(network.head(network.encoder(x)))
        with torch.no_grad():
            network.head.bias.zero_()
            method.decoders[0][0].weight.copy_(network.head.weight)
        one = batch(2, 16)
        one = one._replace(unlabeled=one.unlabeled[..., :13, :14], valid=one.valid[..., :13, :14])
        assert float(method(one).logged["consistency"]) == pytest.approx(0, abs=1e-12)

    @pytest.mark.parametrize(
        ("network", "channels", "features"),
        [
            (lambda: smp.Unet("tu-test_resnet", encoder_weights=None, classes=CLASSES), 96, None),
            (lambda: smp.DeepLabV3Plus("resnet18", encoder_weights=None, classes=CLASSES), 512, None),
            (lambda: lraspp_mobilenet_v3_large(weights_backbone=None, num_classes=CLASSES), 960, None),
            (lambda: PSPNet("resnet18", num_classes=CLASSES), 512, None),
            (lambda: PSPNet("resnet18", num_classes=CLASSES), 128, "fuse"),
        ],
    )
    def test_takes_the_networks_of_others_at_any_size(self, network, channels, features):
        options = {"channels": channels, "features": features, "decoders": {"cutout": 1, "adversarial": 1}}
        method = CCT(network(), num_classes=CLASSES, **options).train()
        losses = method(batch(2, 41))
        losses.total.backward()
        assert all(value.isfinite() for value in losses.logged.values())

    def test_takes_a_network_that_returns_an_object(self):
        class Output:
            """Like those of Hugging Face."""

            def __init__(self, logits):
                self.logits = logits

        network = Plain()
        network.forward = lambda x: Output(network.head(network.encoder(x).relu()))
        method = CCT(network, num_classes=CLASSES, channels=6, decoders={"cutout": 1})
        assert method(batch()).total.isfinite()

    def test_takes_features_by_name(self):
        network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1))
        method = CCT(network, num_classes=3, channels=4, upsampling=1, features="0")
        assert method(batch()).total.isfinite()

    def test_names_the_network_without_a_backbone(self):
        method = CCT(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1)), num_classes=3, channels=4)
        with pytest.raises(stseg.NetworkError, match=r"\(Sequential\), as it has no .*, as in features='0'"):
            method(batch())

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"weight": -1}, "weight is -1; expected 0 or more"),
            ({"rampup": -1}, "rampup is -1; expected 0 or more"),
            ({"upsampling": 6}, "upsampling is 6; expected a power of 2"),
            ({"decoders": {"noise": 1}}, "decoders has the key 'noise'; expected some of feature_noise, feature_drop"),
            ({"decoders": {"dropout": -1}}, r"decoders\['dropout'\] is -1; expected 0 or more"),
            ({"decoders": {"dropout": 1.5}}, r"decoders\['dropout'\] is 1.5; expected an integer"),
            ({"decoders": {}}, "expected at least one decoder"),
            ({"decoders": {"cutout": 1}, "background": None}, "expected at least one decoder"),
        ],
    )
    def test_refuses_settings_out_of_range(self, options, message):
        with pytest.raises((ValueError, TypeError), match=message):
            CCT(Plain(), **{"num_classes": CLASSES, "channels": 6, **options})

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_classes": 4}, "num_classes is 4, but the network gives 3 classes"),
            ({"channels": 5}, "channels is 5, but the network gives 6 channels"),
        ],
    )
    def test_tells_what_the_network_gives(self, options, message):
        method = CCT(Plain(), **{"num_classes": CLASSES, "channels": 6, **options})
        with pytest.raises(ValueError, match=message):
            method(batch())
