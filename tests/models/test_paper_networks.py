import inspect
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from stseg.models import DeepLabV2, DeepLabV3Plus, PSPNet

NETWORKS = [DeepLabV3Plus, PSPNet, DeepLabV2]


def shaken(network, seed=0):
    """The network with weights and batch statistics that make every layer matter."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in [
                (module.weight.data, 0.5, 1.0),
                (module.bias.data, -0.2, 0.2),
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 1.5),
            ]:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    return network


# --- an independent implementation: torchvision's ResNet, and heads written with functions


def bilinear(x, height, width):
    """Corners aligned, as two matrix products."""

    def matrix(new, old):
        weights = np.zeros((new, old))
        for i in range(new):
            at = i * (old - 1) / (new - 1) if new > 1 else 0.0
            left = min(int(at), old - 1)
            right = min(left + 1, old - 1)
            weights[i, left] += 1 - (at - left)
            weights[i, right] += at - left
        return torch.from_numpy(weights).to(x)

    return torch.einsum("ih,bchw,jw->bcij", matrix(height, x.shape[2]), x, matrix(width, x.shape[3]))


def block(x, state, name, dilation=1):
    """Convolution, batch normalization in evaluation mode, ReLU; `name` is where both are."""
    weight = state[f"{name}.0.weight"]
    x = F.conv2d(x, weight, padding=dilation * (weight.shape[-1] // 2), dilation=dilation)
    mean, var, gain, shift = (
        state[f"{name}.1.{key}"][:, None, None] for key in ("running_mean", "running_var", "weight", "bias")
    )
    return ((x - mean) / (var + 1e-5).sqrt() * gain + shift).clamp(min=0)


def pooled(x, cells):
    """Adaptive average pooling, cell by cell."""
    height, width = x.shape[2:]
    rows = [(i * height // cells, -(-(i + 1) * height // cells)) for i in range(cells)]
    columns = [(j * width // cells, -(-(j + 1) * width // cells)) for j in range(cells)]
    return torch.stack([torch.stack([x[:, :, a:b, c:d].mean((2, 3)) for c, d in columns], -1) for a, b in rows], -2)


def resnet_features(state, images):
    resnet = torchvision.models.ResNet(  # timm's resnet26
        torchvision.models.resnet.Bottleneck, [2, 2, 2, 2], replace_stride_with_dilation=[False, True, True]
    ).to(images)
    own = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    missing = resnet.load_state_dict(own, strict=False)
    assert missing.missing_keys == ["fc.weight", "fc.bias"]
    assert not missing.unexpected_keys
    resnet.eval()
    low = resnet.layer1(resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(images)))))
    return low, resnet.layer4(resnet.layer3(resnet.layer2(low)))


def deeplabv3plus(state, images):
    low, x = resnet_features(state, images)
    views = [block(x, state, "aspp.branches.0")]
    views += [block(x, state, f"aspp.branches.{i}", dilation=rate) for i, rate in ((1, 12), (2, 24), (3, 36))]
    views.append(block(pooled(x, 1), state, "aspp.pooled.1").expand_as(views[0]))
    x = bilinear(block(torch.cat(views, 1), state, "aspp.project.0"), *low.shape[-2:])
    x = torch.cat([block(low, state, "reduce"), x], 1)
    x = block(block(x, state, "fuse.0"), state, "fuse.1")
    return F.conv2d(x, state["classifier.weight"], state["classifier.bias"])


def pspnet(state, images):
    _, x = resnet_features(state, images)
    levels = [
        bilinear(block(pooled(x, cells), state, f"pyramid.{i}.1"), *x.shape[-2:])
        for i, cells in enumerate((1, 2, 3, 6))
    ]
    x = block(torch.cat([x, *levels], 1), state, "fuse.0")
    return F.conv2d(x, state["classifier.weight"], state["classifier.bias"])


def deeplabv2(state, images):
    _, x = resnet_features(state, images)
    logits = 0
    for i, rate in enumerate((6, 12, 18, 24)):
        weight, bias = state[f"classifiers.{i}.weight"], state[f"classifiers.{i}.bias"]
        logits = logits + F.conv2d(x, weight, bias, padding=rate, dilation=rate)
    return logits


@pytest.mark.parametrize(
    ("network", "reference"), [(DeepLabV3Plus, deeplabv3plus), (PSPNet, pspnet), (DeepLabV2, deeplabv2)]
)
def test_logits_equal_those_of_an_independent_implementation(network, reference):
    torch.manual_seed(0)
    net = shaken(network("resnet26", num_classes=5)).double().eval()
    images = torch.randn(2, 3, 65, 98, dtype=torch.float64)
    with torch.no_grad():
        expected = bilinear(reference(net.state_dict(), images), 65, 98)
        actual = net(images)
    assert expected.std() > 1e-3
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


# --- the paper's figures


@pytest.mark.parametrize(
    ("network", "backbone", "total", "in_backbone"),
    [
        (PSPNet, "resnet50", 46_592_597, 23_508_032),
        (DeepLabV3Plus, "resnet50", 40_352_181, 23_508_032),
        (DeepLabV3Plus, "resnet101", 59_344_309, 42_500_160),
        (DeepLabV2, "resnet101", 44_048_532, 42_500_160),
    ],
)
def test_number_of_parameters_is_that_of_the_paper(network, backbone, total, in_backbone):
    with torch.device("meta"):
        net = network(backbone, num_classes=21)
    assert sum(p.numel() for p in net.parameters()) == total
    assert sum(p.numel() for p in net.backbone.parameters()) == in_backbone


def test_backbones_are_the_paper_s_unless_told_otherwise():
    with torch.device("meta"):
        counts = [sum(p.numel() for p in net(num_classes=21).parameters()) for net in NETWORKS]
    assert counts == [40_352_181, 46_592_597, 44_048_532]


def test_dropout_is_that_of_the_paper():
    def rates(network):
        with torch.device("meta"):
            modules = network("resnet18", num_classes=2).modules()
        return [(type(m).__name__, m.p) for m in modules if "Dropout" in type(m).__name__]

    assert rates(DeepLabV3Plus) == [("Dropout2d", 0.5), ("Dropout", 0.1)]
    assert rates(PSPNet) == [("Dropout", 0.1)]
    assert rates(DeepLabV2) == []


@pytest.mark.parametrize("network", NETWORKS)
def test_stages_3_and_4_are_dilated_in_place_of_their_strides(network):
    with torch.device("meta"):
        backbone = network("resnet50", num_classes=2).backbone
        shapes = [tuple(x.shape[-2:]) for x in backbone(torch.zeros(1, 3, 96, 64))]
    assert shapes == [(48, 32), (24, 16), (12, 8), (12, 8), (12, 8)]
    dilations = [[b.conv2.dilation[0] for b in getattr(backbone, f"layer{i}")] for i in (1, 2, 3, 4)]
    assert dilations == [[1] * 3, [1] * 4, [1, 2, 2, 2, 2, 2], [2, 4, 4]]


def test_classifiers_of_deeplabv2_start_from_small_weights():
    torch.manual_seed(0)
    for classifier in DeepLabV2("resnet18", num_classes=21).classifiers:
        assert classifier.weight.std().item() == pytest.approx(0.01, rel=0.02)
        assert abs(classifier.weight.mean().item()) < 1e-4


# --- what a caller relies on


@pytest.mark.parametrize("network", NETWORKS)
def test_logits_have_the_size_of_the_images(network):
    net = network("resnet18", num_classes=4).eval()
    for size in [(97, 131), (64, 64), (33, 50), (1, 1), (321, 8)]:
        with torch.no_grad():
            assert net(torch.rand(1, 3, *size)).shape == (1, 4, *size)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("channels", [1, 4])
def test_images_may_have_other_than_3_channels(network, channels):
    net = network("resnet18", num_classes=2, in_channels=channels).eval()
    with torch.no_grad():
        assert net(torch.rand(2, channels, 40, 40)).shape == (2, 2, 40, 40)


@pytest.mark.parametrize(
    ("network", "backbone"),
    [
        (DeepLabV3Plus, "mobilenetv3_small_050"),
        (DeepLabV3Plus, "convnext_atto"),
        (DeepLabV3Plus, "efficientnet_b0"),
        (PSPNet, "regnety_002"),
        (PSPNet, "resnet18.tv_in1k"),
        (DeepLabV2, "mobilenetv2_050"),
    ],
)
def test_any_backbone_with_an_output_stride_will_do(network, backbone):
    net = network(backbone, num_classes=2).eval()
    with torch.no_grad():
        assert net(torch.rand(1, 3, 43, 51)).shape == (1, 2, 43, 51)
        assert net.backbone(torch.rand(1, 3, 64, 64))[-1].shape[-2:] == (8, 8)


@pytest.mark.parametrize("network", NETWORKS)
def test_the_default_backbone_has_the_pretrained_weights_of_the_paper(network):
    name = inspect.signature(network).parameters["backbone"].default
    assert timm.create_model(name).pretrained_cfg["tag"] == "tv_in1k"


def test_a_backbone_without_pretrained_weights_has_the_initialization_of_timm():
    blocks = DeepLabV3Plus("resnet18", num_classes=2).backbone.layer1
    assert all(not block.bn2.weight.any() for block in blocks)


@pytest.mark.parametrize("network", NETWORKS)
def test_gradients_reach_every_parameter(network):
    torch.manual_seed(0)
    net = shaken(network("resnet18", num_classes=3)).train()
    F.cross_entropy(net(torch.randn(4, 3, 48, 56)), torch.randint(3, (4, 48, 56))).backward()
    without = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@pytest.mark.parametrize("network", NETWORKS)
def test_state_dict_round_trips(network):
    a, b = (shaken(network("resnet18", num_classes=3), seed).eval() for seed in (0, 1))
    images = torch.randn(1, 3, 40, 33)
    with torch.no_grad():
        assert not torch.equal(a(images), b(images))
        b.load_state_dict(a.state_dict())
        assert torch.equal(a(images), b(images))


@pytest.mark.parametrize("network", [DeepLabV3Plus, PSPNet])
def test_training_on_a_batch_of_one_says_that_there_must_be_more(network):
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        network("resnet18", num_classes=2).train()(torch.rand(1, 3, 40, 40))


def test_deeplabv2_trains_on_a_batch_of_one():
    net = DeepLabV2("resnet18", num_classes=2).train()
    assert net(torch.rand(1, 3, 40, 40)).requires_grad


@pytest.mark.parametrize("network", NETWORKS)
def test_pretrained_weights_come_through_timm(network, monkeypatch):
    asked, create = [], timm.create_model

    def create_without_download(name, *, pretrained, **kwargs):
        asked.append((name, pretrained))
        return create(name, pretrained=False, **kwargs)

    monkeypatch.setattr(timm, "create_model", create_without_download)
    network("resnet18", num_classes=2, pretrained=True)
    network("resnet18", num_classes=2)
    assert asked == [("resnet18", True), ("resnet18", False)]


@pytest.mark.parametrize("backbone", ["vit_tiny_patch16_224", "densenet121", "vgg11"])
def test_a_backbone_without_output_stride_is_refused_by_name(backbone):
    with torch.device("meta"), pytest.raises(ValueError, match=f"{backbone}.*output stride"):
        PSPNet(backbone, num_classes=2)


def test_a_backbone_that_timm_does_not_have_is_refused_by_name():
    with pytest.raises(RuntimeError, match="resnet51"):
        DeepLabV3Plus("resnet51", num_classes=2)


def test_importing_the_networks_does_not_import_timm():
    code = "import stseg.models, sys; sys.exit('timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
