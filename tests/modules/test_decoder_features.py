from __future__ import annotations

from types import SimpleNamespace

import pytest
import segmentation_models_pytorch as smp
import torch
import torchvision
from torch import nn

import stseg
from stseg.models import DeepLabV3Plus
from stseg.modules import decoder_of, logits_and_features


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU())
        self.norm, self.head = nn.BatchNorm2d(16), nn.Conv2d(16, 5, 1)

    def forward(self, x):
        return self.head(self.norm(self.encoder(x)))


class TestLogitsAndFeatures:
    @pytest.mark.parametrize("size", [(64, 64), (40, 70), (33, 20)])
    def test_features_cover_the_image(self, size):
        """Those of the padding are cut off: the others do not change with where the padding ends."""
        network = smp.Unet("resnet18", encoder_weights=None, classes=3)
        logits, features = logits_and_features(stseg.Segmenter(network).eval(), torch.rand(2, 3, *size), channels=16)
        assert logits.shape == (2, 3, *size)
        assert features.shape == (2, 16, *size)
        torch.testing.assert_close(network.segmentation_head(features)[..., 1:-1, 1:-1], logits[..., 1:-1, 1:-1])

    def test_of_the_networks_of_others(self):
        class LikeHuggingFace(Plain):
            def forward(self, pixel_values):
                return SimpleNamespace(logits=super().forward(pixel_values), hidden_states=None)

        x = torch.rand(2, 3, 33, 40)
        logits, features = logits_and_features(stseg.Segmenter(LikeHuggingFace()), x, channels=16, features="norm")
        assert features.shape == (2, 16, 33, 40)
        options = {"weights": None, "weights_backbone": None, "num_classes": 3}
        fcn = torchvision.models.segmentation.fcn_resnet50(**options)
        logits, features = logits_and_features(stseg.Segmenter(fcn), x, channels=512, features="classifier.3")
        assert logits.shape == (2, 3, 33, 40)
        assert features.shape == (2, 512, 5, 5)

    def test_reaches_networks_inside_data_parallel(self):
        model = stseg.Segmenter(nn.DataParallel(Plain()))
        logits, features = logits_and_features(model, torch.rand(1, 3, 8, 8), channels=16, features="norm")
        assert torch.equal(model.network.head(features), logits)
        assert model._outer

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"channels": 4, "features": "norm"}, r"BatchNorm2d.*map of shape \(1, 16, 8, 8\).*map of 4 channels"),
            ({"channels": 16}, "Plain.*has no decoder.*'encoder', 'norm', 'head'"),
            ({"channels": 16, "features": "x"}, "has no submodule 'x'"),
        ],
    )
    def test_names_the_network(self, options, message):
        with pytest.raises(stseg.NetworkError, match=message):
            logits_and_features(stseg.Segmenter(Plain()), torch.rand(1, 3, 8, 8), **options)

    def test_refuses_a_bare_network(self):
        with pytest.raises(TypeError, match=r"expected stseg\.Segmenter"):
            logits_and_features(Plain(), torch.rand(1, 3, 8, 8), channels=16)


def test_decoders_are_found():
    unet = smp.Unet("resnet18", encoder_weights=None)
    assert decoder_of(unet) is decoder_of(stseg.Segmenter(unet)) is unet.decoder
    deeplab = DeepLabV3Plus("resnet18", num_classes=2)
    assert decoder_of(deeplab) is deeplab.fuse
    assert decoder_of(deeplab, "aspp.project") is deeplab.aspp.project
