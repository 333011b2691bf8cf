"""Every method takes one step on a network of each family, as it comes; where one cannot, it says why."""

from __future__ import annotations

from collections import OrderedDict
from types import SimpleNamespace

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from small import training_step
from tester import CLASSES, batch, config, images, pairs
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation.fcn import FCN, FCNHead

import stseg
from stseg import methods
from stseg.augment import BoxMix, CropPair
from stseg.modules import FlawDetector

SIZE = 36  # a multiple of no stride


def block(inputs: int, outputs: int, stride: int = 2) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class LikeHuggingFace(nn.Module):
    """Keyword arguments, a list of states in an object, and logits of a quarter of the sides in another."""

    base_model_prefix = "segformer"

    class Base(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages = nn.ModuleList([block(3, 8, 4), block(8, 16)])

        def forward(self, pixel_values: Tensor, *, output_hidden_states: bool) -> OrderedDict:
            states = [pixel_values]
            for stage in self.stages:
                states.append(stage(states[-1]))
            return OrderedDict(last_hidden_state=states[-1], hidden_states=tuple(states[1:]))

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fuse, self.classifier = block(24, 8, 1), nn.Conv2d(8, CLASSES, 1)

        def forward(self, states: tuple[Tensor, ...]) -> Tensor:
            low, high = states
            high = nn.functional.interpolate(high, low.shape[-2:], mode="bilinear")
            return self.classifier(self.fuse(torch.cat([low, high], 1)))

    def __init__(self) -> None:
        super().__init__()
        self.segformer, self.decode_head = self.Base(), self.Head()

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        base = self.segformer(pixel_values=pixel_values, output_hidden_states=True)
        return SimpleNamespace(loss=None, logits=self.decode_head(base["hidden_states"]))


class PlainViT(nn.Module):
    """Tokens of a ViT of timm, and one layer."""

    def __init__(self) -> None:
        super().__init__()
        settings = {"patch_size": 8, "img_size": 32, "embed_dim": 16, "depth": 2, "num_heads": 2}
        self.backbone = timm.create_model("test_vit", num_classes=0, global_pool="", dynamic_img_size=True, **settings)
        self.to_map, self.head = nn.Identity(), nn.Conv2d(16, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.backbone(x)[:, self.backbone.num_prefix_tokens :]
        return self.head(self.to_map(tokens.mT.unflatten(2, (x.shape[2] // 8, x.shape[3] // 8))))


def unet() -> nn.Module:
    return smp.Unet(
        "tu-test_resnet", encoder_weights=None, encoder_depth=3, decoder_channels=(16, 8, 8), classes=CLASSES
    )


def fcn() -> nn.Module:
    """The class that torchvision's functions make, with a small backbone; it returns a dictionary."""
    layers = OrderedDict(layer1=block(3, 8), layer2=block(8, 8), layer3=block(8, 32))
    return FCN(IntermediateLayerGetter(nn.Sequential(layers), {"layer3": "out"}), FCNHead(32, CLASSES))


FAMILIES = {"smp": unet, "torchvision": fcn, "Hugging Face": LikeHuggingFace, "timm ViT": PlainViT}

# The submodule that returns what the last layer sees, and its channels.
DECODERS = {
    "smp": ("decoder", 8),
    "torchvision": ("classifier.2", 8),
    "Hugging Face": ("decode_head.fuse", 8),
    "timm ViT": ("to_map", 16),
}


def dcc(make, family: str) -> stseg.Method:
    name, channels = DECODERS[family]
    options = {"channels": channels, "features": name, "width": 8, "memory": 64, "start": 0.0, "threshold": 0.0}
    return methods.DCC(make(), pairs=CropPair(32, base_size=40), **options)


def cct(make, family: str) -> stseg.Method:
    channels = {"smp": 48, "torchvision": 32, "Hugging Face": 16, "timm ViT": 16}[family]
    features = "to_map" if family == "timm ViT" else None  # the ViT itself returns tokens
    return methods.CCT(make(), num_classes=CLASSES, channels=channels, features=features)


def gct(make, family: str) -> stseg.Method:
    return methods.GCT(make(), make(), num_classes=CLASSES, detector=FlawDetector(3 + CLASSES, width=4))


def u2pl(make, family: str) -> stseg.Method:
    name, channels = DECODERS[family]
    return methods.U2PL(make(), num_classes=CLASSES, channels=channels, features=name, width=8, memory=64, start=0.0)


METHODS = {
    "Supervised": lambda make, family: methods.Supervised(make()),
    "FixMatch": lambda make, family: methods.FixMatch(make()),
    "UniMatch": lambda make, family: methods.UniMatch(make()),
    "UniMatchV2": lambda make, family: methods.UniMatchV2(make()),
    "MeanTeacher": lambda make, family: methods.MeanTeacher(make()),
    "CutMixSeg": lambda make, family: methods.CutMixSeg(make()),
    "ClassMix": lambda make, family: methods.ClassMix(make()),
    "CPS": lambda make, family: methods.CPS(make(), make()),
    "CPS with CutMix": lambda make, family: methods.CPS(make(), make(), mix=BoxMix(area=(0.25, 0.5), boxes=3)),
    "GCT": gct,
    "CCT": cct,
    "DCC": dcc,
    "AdvSSL": lambda make, family: methods.AdvSSL(make(), num_classes=CLASSES),
    "S4GAN": lambda make, family: methods.S4GAN(make(), num_classes=CLASSES),
    "ECS": lambda make, family: methods.ECS(make(), nn.Conv2d(3 + CLASSES, CLASSES + 1, 1)),
    "U2PL": u2pl,
    "S4L": lambda make, family: methods.S4L(make(), num_classes=CLASSES),
}


def training_batch(method: stseg.Method) -> stseg.Batch:
    one = batch(2, SIZE)
    if isinstance(method, methods.DCC):
        views = [method.view(image, None)[0] for image in images(2, size=(40, 44))]
        one = one._replace(unlabeled={name: torch.stack([view[name] for view in views]) for name in views[0]})
    return one


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_a_step_trains_every_parameter(name, family):
    torch.manual_seed(0)
    method = METHODS[name](FAMILIES[family], family).train()
    settings = config()
    optimizers = list(method.optimizers(settings))
    row = training_step(method, optimizers, training_batch(method), settings)
    assert all(torch.tensor(value).isfinite() for value in row.values())
    learning = {key: p.grad for key, p in method.named_parameters() if p.requires_grad}
    assert [key for key, gradient in learning.items() if gradient is None] == []
    for network in {key.split(".network.")[0] for key in learning if ".network." in key}:
        first = next(gradient for key, gradient in learning.items() if key.startswith(f"{network}.network."))
        assert first.any()  # in residual networks others start with a gradient of 0
    with torch.no_grad():
        assert method.eval().model(torch.rand(2, 3, 33, 45)).shape == (2, CLASSES, 33, 45)


def on(device: str, value):
    if isinstance(value, dict):
        return {key: on(device, each) for key, each in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value


# CCT labels the objects until nothing changes; the others turn off autocast, which this device lacks.
@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("CCT", "GCT", "DCC", "U2PL")])
def test_a_step_reads_no_value_back_from_the_device(name):
    method = METHODS[name](lambda: stseg.Segmenter(fcn(), stride=8), "torchvision").train()
    one = stseg.Batch(*(on("meta", value) for value in training_batch(method)))
    method.to("meta")(one).total.backward()


@pytest.mark.parametrize("name", ["UniMatch", "UniMatchV2", "CCT", "DCC"])
def test_features_are_reached_in_a_compiled_network(name):
    method = METHODS[name](lambda: torch.compile(LikeHuggingFace(), backend="eager"), "Hugging Face").train()
    method(training_batch(method)).total.backward()
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)


class Direct(PlainViT):
    """Calls a method of the ViT, which forward hooks do not see."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.backbone.forward_features(x)[:, self.backbone.num_prefix_tokens :]
        return self.head(tokens.mT.unflatten(2, (x.shape[2] // 8, x.shape[3] // 8)))


@pytest.mark.parametrize(("make", "message"), [(Direct, "called as a module"), (lambda: nn.Conv2d(3, 3, 1), "Conv2d")])
@pytest.mark.parametrize("name", ["UniMatch", "UniMatchV2"])
def test_features_that_cannot_be_reached_are_an_error(name, make, message):
    with pytest.raises(stseg.NetworkError, match=message):
        METHODS[name](make, "timm ViT")(batch(2, SIZE))


def test_tokens_are_no_map():
    method = methods.CCT(PlainViT(), num_classes=CLASSES, channels=16)
    with pytest.raises(stseg.NetworkError, match=r"VisionTransformer .*\(PlainViT\) returned no map .* features='"):
        method(batch(2, SIZE))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", [methods.ST, methods.STPlusPlus])
def test_a_recipe_trains_its_networks(recipe, family):
    torch.manual_seed(0)
    labeling = methods.Labeling(tta=None)
    settings = config(steps=3, lr=0.001)
    trainer = stseg.SelfTrainer(
        FAMILIES[family], num_classes=CLASSES, config=settings, method=recipe(labeling=labeling), progress=False
    )
    result = trainer.fit(pairs(3), images(4, seed=1))
    assert all(torch.tensor(row["loss"]).isfinite() for stage in result.stages.values() for row in stage.history)
    assert result.model(torch.rand(1, 3, 33, 45)).shape == (1, CLASSES, 33, 45)


def test_no_method_is_left_out():
    kinds = {name: getattr(methods, name) for name in methods.__all__}
    trainings = {name for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, stseg.Method)}
    assert trainings == {name for name in METHODS if " " not in name}
