from __future__ import annotations

import math

import naive
import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from tester import CLASSES, MethodTester, Network, Plain, batch
from torch import nn

from stseg import NetworkError, Segmenter
from stseg.methods import CCT
from stseg.methods.cct import AuxiliaryDecoder
from stseg.modules import captured

FEW = {"dropout": 1, "cutout": 1, "adversarial": 1, "context": 1, "objects": 1, "drop": 1, "noise": 1}


class TestCCT(MethodTester):
    def make(self):
        torch.manual_seed(5)
        return CCT(Network(), num_classes=CLASSES, decoders=FEW)

    def plain(self):
        torch.manual_seed(5)
        return CCT(Plain(), num_classes=CLASSES, decoders={"context": 1, "objects": 1})

    def test_loss_is_the_formula(self):
        torch.manual_seed(5)
        kinds = {"context": 1, "objects": 1, "drop": 1, "noise": 1}
        method = CCT(Plain(), num_classes=CLASSES, decoders=kinds, weight=7.0, rampup=1.0)
        assert method.kinds == list(kinds)
        one = batch(step=3, steps=6)
        with torch.no_grad(), captured(method.model.network.encoder) as outputs:
            logits = method.model(one.unlabeled).numpy()
            supervised = naive.supervised(method.model(one.images).numpy(), one.masks.numpy())
        z = outputs[-2].numpy()
        foreground = (logits.argmax(1) != 0)[:, None]
        torch.manual_seed(4)
        share = 0.7 + 0.2 * float(torch.rand(()))
        noise = 0.3 * (2 * torch.rand(z.shape[1:]).numpy() - 1)
        attention = z.mean(1, keepdims=True)
        views = [
            z * foreground,
            z * ~foreground,
            z * (attention <= share * attention.max((2, 3), keepdims=True)),
            z * (1 + noise),
        ]
        terms = []
        for view, decoder in zip(views, method.decoders, strict=True):
            with torch.no_grad():
                found = decoder(torch.from_numpy(view.astype(np.float32)))
                found = nn.functional.interpolate(found, size=(8, 8), mode="bilinear", align_corners=False).numpy()
            total, count = 0.0, 0
            for b, i, j in np.ndindex(2, 8, 8):
                if one.valid[b, i, j]:
                    count += CLASSES
                    total += float(((naive.softmax(found[b, :, i, j]) - naive.softmax(logits[b, :, i, j])) ** 2).sum())
            terms.append(total / count)
        torch.manual_seed(4)
        losses = method(one)
        assert float(losses.logged["consistency"]) == pytest.approx(np.mean(terms), rel=1e-4)
        expected = supervised + 7 * math.exp(-5 * (1 - 3 / 6) ** 2) * np.mean(terms)
        assert float(losses.total.detach()) == pytest.approx(expected, rel=1e-4)

    def test_the_main_decoder_learns_from_labels_alone(self):
        gradients = []
        for weight in (0.0, 50.0):
            method = CCT(Plain(), num_classes=CLASSES, decoders={"noise": 2}, weight=weight, rampup=0)
            method(batch()).total.backward()
            network = method.model.network
            gradients.append((network.head.weight.grad, network.encoder.weight.grad))
        assert torch.equal(gradients[0][0], gradients[1][0])
        assert not torch.allclose(gradients[0][1], gradients[1][1])
        assert all(p.grad.abs().sum() > 0 for d in method.decoders for p in d.parameters() if p.ndim == 4)

    def test_without_a_background_there_are_no_objects(self):
        method = CCT(Network(), num_classes=CLASSES, background=None)
        assert {kind: method.kinds.count(kind) for kind in set(method.kinds)} == {
            **{"dropout": 6, "adversarial": 2, "drop": 6, "noise": 6}
        }
        assert method(batch()).total.isfinite()

    def test_takes_the_networks_of_smp_at_any_size(self):
        torch.manual_seed(0)
        method = CCT(smp.FPN("tu-test_resnet", encoder_weights=None, classes=CLASSES), num_classes=CLASSES)
        one = batch()
        images = torch.rand(2, 3, 45, 37)
        masks = torch.randint(CLASSES, (2, 45, 37))
        losses = method.train()(one._replace(images=images, masks=masks, unlabeled=images.flip(0), valid=None))
        assert losses.total.isfinite()
        losses.total.backward()

    @pytest.mark.parametrize(("channels", "classes", "count"), [(512, 21, 16_296), (2048, 21, 48_552)])
    def test_a_decoder_has_as_many_parameters_as_the_authors(self, channels, classes, count):
        assert sum(p.numel() for p in AuxiliaryDecoder(channels, classes).parameters()) == count

    def test_a_decoder_starts_without_a_checkerboard(self):
        logits = AuxiliaryDecoder(6, 3)(torch.rand(1, 6, 2, 2))
        blocks = logits.unfold(2, 8, 8).unfold(3, 8, 8)
        assert logits.shape == (1, 3, 16, 16)
        assert (logits >= 0).all()
        assert torch.allclose(blocks.amax((-1, -2)), blocks.amin((-1, -2)), atol=1e-5)

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"decoders": {"blur": 1}}, ValueError, r"decoders holds 'blur': 1; expected a number, 0 or more, for"),
            ({"decoders": {"noise": -1}}, ValueError, r"decoders holds 'noise': -1"),
            ({"decoders": {}}, ValueError, "no decoder is left"),
            ({"decoders": {"context": 1}, "background": None}, ValueError, "no decoder is left"),
            ({"backbone": "nowhere"}, ValueError, "has no such submodule"),
            ({"weight": -1}, ValueError, "weight is -1"),
        ],
    )
    def test_mistakes_are_named(self, options, error, message):
        with pytest.raises(error, match=message):
            CCT(Plain(), num_classes=CLASSES, **options)

    def test_networks_without_features_are_refused(self):
        with pytest.raises(NetworkError, match=r"has no encoder or backbone; .* CCT\(network, backbone=...\)"):
            CCT(Segmenter(nn.Conv2d(3, CLASSES, 1)), num_classes=CLASSES)

    def test_another_number_of_classes_is_refused(self):
        with pytest.raises(ValueError, match="num_classes is 5, but the network gives 3 classes"):
            CCT(Plain(), num_classes=5, decoders={"noise": 1})(batch())
