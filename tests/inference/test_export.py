"""Exported networks, run by onnxruntime and compared with PyTorch at many sizes."""

import copy
import json
import os
import warnings
from collections import OrderedDict

import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
import torchvision
from small import Pooled
from torch import nn

import stseg
from stseg.errors import NetworkError
from stseg.models import DeepLabV3Plus, PSPNet

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

SIZES = [(2, 64, 96), (1, 201, 187), (3, 33, 65), (1, 130, 31), (1, 7, 100), (1, 1, 1)]


def randomized(network):
    """Statistics and weights of batch normalization as after a training, so that borders matter."""
    generator = torch.Generator().manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1, generator=generator)
            layer.running_var.uniform_(0.5, 1.5, generator=generator)
            nn.init.uniform_(layer.weight, 0.5, 1.5, generator=generator)
    return network.eval()


def run(path, images):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": images.numpy()})
    return torch.from_numpy(found)


def assert_equal_at_all_sizes(path, model, channels=3):
    """The file gives the logits of the model."""
    generator = torch.Generator().manual_seed(1)
    for batch, height, width in SIZES:
        images = torch.rand(batch, channels, height, width, generator=generator)
        with torch.no_grad():
            expected = model(images)
        found = run(path, images)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4 * max(1.0, float(expected.abs().max())))


class Strided(nn.Module):
    """An encoder and a decoder that take multiples of 8 only, with the pools of PSPNet in between."""

    def __init__(self, classes=3, cells=(1, 2, 3, 6)):
        super().__init__()
        self.down = nn.ModuleList(nn.Conv2d(i, o, 3, stride=2, padding=1) for i, o in ((3, 6), (6, 8), (8, 8)))
        self.pools = nn.ModuleList(nn.AdaptiveAvgPool2d(count) for count in cells)
        self.head = nn.Conv2d(8 + 8 + 6, classes, 3, padding=1)

    def forward(self, x):
        maps = []
        for layer in self.down:
            x = layer(x).relu()
            maps.append(x)
        pooled = (F.interpolate(pool(x), x.shape[-2:], mode="bilinear", align_corners=True) for pool in self.pools)
        x = torch.cat([F.interpolate(x + sum(pooled), scale_factor=2), maps[1]], 1)
        x = torch.cat([F.interpolate(x, scale_factor=2), maps[0]], 1)
        return F.interpolate(self.head(x), scale_factor=2, mode="bilinear")


def smp_network(arch, encoder="resnet18", **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(smp, arch)(encoder, encoder_weights=None, **{"classes": 3, **options})


SMALL = {
    "one convolution": lambda: nn.Conv2d(3, 4, 1),
    "one logit": lambda: nn.Conv2d(3, 1, 3, padding=1),
    "smaller output": lambda: nn.Conv2d(3, 5, 3, stride=4, padding=1),
    "encoder and decoder": Strided,
    "sees the whole image": Pooled,
    "select": lambda: stseg.Segmenter(Two(), select=lambda output: output["b"]),
    "mapping": lambda: Returns(lambda x: OrderedDict(out=x, aux=x + 1)),
    "own normalization": lambda: stseg.Segmenter(Strided(), mean=[0.1], std=[0.3]),
    "no normalization": lambda: stseg.Segmenter(Strided(), mean=None, std=None, stride=16),
    "least side": lambda: Reflected(),
}
LARGE = {
    "smp.Unet": lambda: smp_network("Unet"),
    "smp.DeepLabV3Plus": lambda: smp_network("DeepLabV3Plus"),
    "smp.FPN": lambda: smp_network("FPN"),
    "smp.PSPNet": lambda: smp_network("PSPNet"),
    "smp.Segformer": lambda: smp_network("Segformer", "mit_b0"),
    "timm": lambda: smp_network("Unet", "tu-mobilenetv3_small_050"),
    "torchvision": lambda: torchvision.models.segmentation.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=3
    ),
    "DeepLabV3Plus": lambda: DeepLabV3Plus("resnet18", num_classes=3),
    "PSPNet": lambda: PSPNet("resnet18", num_classes=3),
}


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        return {"a": self.a(x), "b": self.b(x)}


class Returns(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 4, 1), function

    def forward(self, x):
        return self.function(self.conv(x))


class Reflected(nn.Conv2d):
    """Takes no image below 16 pixels."""

    def __init__(self):
        super().__init__(3, 2, 21, padding=10, padding_mode="reflect")


@pytest.mark.parametrize("name", SMALL)
def test_small_networks_are_right_at_every_size(tmp_path, name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = randomized(SMALL[name]())
    path = stseg.export_onnx(model, tmp_path / "network.onnx")
    assert list(tmp_path.iterdir()) == [path]
    assert_equal_at_all_sizes(path, stseg.models.as_segmenter(model).eval())


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_networks_of_the_libraries_are_right_at_every_size(tmp_path, name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = randomized(LARGE[name]())
    path = stseg.export_onnx(model, tmp_path / "network.onnx")
    assert list(tmp_path.iterdir()) == [path]
    assert_equal_at_all_sizes(path, stseg.Segmenter(model).eval())


@pytest.mark.parametrize("output", ["logits", "probabilities", "mask"])
def test_outputs(tmp_path, output):
    model = stseg.Segmenter(randomized(Strided())).eval()
    path = stseg.export_onnx(model, tmp_path / "a.onnx", output=output)
    images = torch.rand(2, 3, 45, 67)
    logits, found = model(images), run(path, images)
    if output == "mask":
        assert found.dtype == torch.uint8
        assert found.shape == (2, 45, 67)
        assert (found == logits.argmax(1)).float().mean() > 0.999
    else:
        torch.testing.assert_close(
            found, logits if output == "logits" else logits.softmax(1), rtol=1e-4, atol=1e-4, check_stride=False
        )
    (value,) = onnx.load(path).graph.output
    dims = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
    assert value.name == output
    assert dims == (["batch", "height", "width"] if output == "mask" else ["batch", 3, "height", "width"])


def test_a_mask_of_many_classes_is_int64(tmp_path):
    network = nn.Conv2d(3, 300, 1)
    found = run(stseg.export_onnx(network, tmp_path / "a.onnx", output="mask"), torch.rand(1, 3, 9, 5))
    assert found.dtype == torch.int64


@pytest.mark.parametrize("channels", [1, 5])
def test_channels_and_the_description(tmp_path, channels):
    model = stseg.Segmenter(nn.Conv2d(channels, 4, 1))
    path = stseg.export_onnx(model, tmp_path / "deep" / "a.onnx", channels=channels, opset=17)
    assert_equal_at_all_sizes(path, model, channels)
    file = onnx.load(path)
    said = {each.key: each.value for each in file.metadata_props}
    assert said["stseg_version"] == stseg.__version__
    assert (said["num_classes"], said["channels"], said["input_range"]) == ("4", str(channels), "[0, 1]")
    assert json.loads(said["mean"]) == pytest.approx([sum(stseg.IMAGENET_MEAN) / 3] * channels)
    assert json.loads(said["std"]) == pytest.approx([sum(stseg.IMAGENET_STD) / 3] * channels)
    assert file.opset_import[0].version == 17
    onnx.checker.check_model(file)


def test_the_model_stays_as_it_is_and_nothing_is_printed(tmp_path, capfd):
    network = Strided().to(memory_format=torch.channels_last).double().train()
    network.down[0].eval()
    model = stseg.Segmenter(nn.DataParallel(network))
    modes = [each.training for each in model.modules()]
    weights, state = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    layouts, random = [p.stride() for p in weights.values()], torch.get_rng_state()
    stseg.export_onnx(model, tmp_path / "a.onnx")
    assert [each.training for each in model.modules()] == modes
    assert all(now is weights[name] for name, now in model.named_parameters())
    assert [p.stride() for p in weights.values()] == layouts
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert capfd.readouterr() == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]


class SizeInPython(nn.Conv2d):
    """Records the height of the example with TorchScript, and the symbol with torch.export."""

    def forward(self, x):
        return super().forward(x) * (int(x.shape[2]) / 100)


class Random(nn.Conv2d):
    def forward(self, x):
        return F.dropout(super().forward(x), training=True)


class Transposed(nn.Conv2d):
    """Has an operation that the exporter by TorchScript does not know."""

    def forward(self, x):
        return super().forward(x.mT).mT


@pytest.mark.parametrize("kind", [SizeInPython, Transposed])
def test_where_torchscript_is_wrong_or_fails_the_other_exporter_is_used(tmp_path, capfd, kind):
    network = kind(3, 2, 1)
    path = stseg.export_onnx(network, tmp_path / "a.onnx")
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == [path]
    assert_equal_at_all_sizes(path, stseg.Segmenter(network))


def test_operators_of_another_version_than_asked_for_are_refused(tmp_path):
    with pytest.raises(NetworkError, match=r"by TorchScript: .*99.* expected opset 99"):
        stseg.export_onnx(nn.Conv2d(3, 2, 1), tmp_path / "a.onnx", opset=99)
    assert list(tmp_path.iterdir()) == []


def test_what_is_wrong_is_refused_and_the_earlier_file_kept(tmp_path):
    path = tmp_path / "a.onnx"
    path.write_bytes(b"earlier")
    message = r"by TorchScript: for images of 2 x 3 x 69 x 91 its output differs .*by torch\.export: .*differs"
    with pytest.raises(NetworkError, match=message):
        stseg.export_onnx(Random(3, 2, 1), path)
    assert path.read_bytes() == b"earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_unchecked_files_need_no_onnxruntime(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"needs onnxruntime \(pip install .*check=False"):
        stseg.export_onnx(nn.Conv2d(3, 2, 1), tmp_path / "a.onnx")
    path = stseg.export_onnx(nn.Conv2d(3, 2, 1), tmp_path / "a.onnx", check=False)
    monkeypatch.undo()
    assert run(path, torch.rand(1, 3, 9, 5)).shape == (1, 2, 9, 5)


def test_onnx_is_needed(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(ImportError, match=r'needs onnx \(pip install "stseg\[onnx\]"\)'):
        stseg.export_onnx(nn.Conv2d(3, 2, 1), tmp_path / "a.onnx")


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (stseg.MultiScaleFlip(nn.Conv2d(3, 2, 1)), {}, TypeError, r"stseg\.export_onnx\(model\.model, path\)"),
        (3, {}, TypeError, "expected a network"),
        (nn.Conv2d(3, 2, 1), {"output": "classes"}, ValueError, "output is 'classes'; expected 'logits'"),
        (nn.Conv2d(3, 2, 1), {"channels": 0}, ValueError, "channels is 0"),
        (nn.Conv2d(3, 2, 1), {"channels": 4}, NetworkError, "images of 4 channels; others: channels="),
        (nn.Conv2d(3, 2, 1), {"opset": "17"}, TypeError, "opset is '17'"),
        (nn.Conv2d(3, 2, 1), {"opset": 9}, ValueError, "opset is 9; expected 11 or more"),
        (nn.Linear(3, 2), {}, NetworkError, "Linear"),
    ],
    ids=[
        "multi-scale",
        "no network",
        "output",
        "no channels",
        "other channels",
        "opset",
        "early opset",
        "no segmentation",
    ],
)
def test_what_a_user_gets_wrong(tmp_path, model, options, error, message):
    with pytest.raises(error, match=message):
        stseg.export_onnx(model, tmp_path / "a.onnx", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(IsADirectoryError, match="expected a file"):
        stseg.export_onnx(nn.Conv2d(3, 2, 1), tmp_path)


@pytest.mark.skipif(os.getuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match=r"a\.onnx"):
        stseg.export_onnx(nn.Conv2d(3, 2, 1), tmp_path / "a.onnx")


def test_weights_beyond_the_format(tmp_path):
    network = nn.Conv2d(3, 2, 1)
    with torch.device("meta"):
        network.large = nn.Linear(2**15, 2**15)
    with pytest.raises(NetworkError, match=r"the weights have 4\.00 GiB; expected less than 2 GiB"):
        stseg.export_onnx(network, tmp_path / "a.onnx")


def test_a_network_that_cannot_be_copied(tmp_path):
    class Stubborn(nn.Conv2d):
        def __deepcopy__(self, memo):
            raise RuntimeError("no copies")

    with pytest.raises(NetworkError, match=r"cannot be copied .*no copies"):
        stseg.export_onnx(Stubborn(3, 2, 1), tmp_path / "a.onnx")


# --- PyTorch's exporters, called by the user


def exported(model, path, *, dynamo):
    options = {"dynamo": dynamo, "input_names": ["images"], "output_names": ["logits"]}
    shape = {0: "batch", 2: "height", 3: "width"}
    options |= (
        {"dynamic_shapes": {"images": shape}, "verbose": False} if dynamo else {"dynamic_axes": {"images": shape}}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (torch.rand(2, 3, 256, 320),), path, **options)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [False, True], ids=["TorchScript", "torch.export"])
def test_a_segmenter_that_is_exported_directly_is_right(tmp_path, dynamo):
    model = stseg.Segmenter(randomized(Strided()), stride=8).eval()
    assert_equal_at_all_sizes(exported(model, tmp_path / "a.onnx", dynamo=dynamo), model)


@pytest.mark.slow
def test_a_unet_that_is_exported_directly_is_right(tmp_path):
    model = stseg.Segmenter(randomized(smp_network("Unet", classes=1)), stride=32).eval()
    assert_equal_at_all_sizes(exported(model, tmp_path / "a.onnx", dynamo=False), model)
