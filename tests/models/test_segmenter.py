import copy
import io
import pickle
import warnings
from collections import OrderedDict, namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import stseg
from stseg.errors import NetworkError
from stseg.models import IMAGENET_MEAN, IMAGENET_STD, Segmenter, as_segmenter, multi_scale

SIZES = [(97, 131), (64, 64), (321, 57), (33, 33)]


def normalized(images):
    """ImageNet's normalization, channel by channel."""
    channels = [(images[:, c] - IMAGENET_MEAN[c]) / IMAGENET_STD[c] for c in range(3)]
    return torch.stack(channels, 1)


def edge_padded(images, height, width):
    """Right and bottom, the border repeated."""
    rows, columns = height - images.shape[2], width - images.shape[3]
    return torch.from_numpy(np.pad(images.numpy(), ((0, 0), (0, 0), (0, rows), (0, columns)), mode="edge"))


class Strided(nn.Module):
    """Takes only sides that the stride divides, and says what it got."""

    def __init__(self, stride, least=1, channels=3):
        super().__init__()
        self.stride, self.least, self.seen = stride, least, []
        self.conv = nn.Conv2d(channels, 4, 1)

    def forward(self, x):
        self.seen.append(tuple(x.shape[-2:]))
        if any(side % self.stride or side < self.least for side in x.shape[-2:]):
            raise RuntimeError(f"sides {tuple(x.shape[-2:])}")
        return self.conv(x)


class Returns(nn.Module):
    """A network whose output is whatever the function makes of the logits."""

    def __init__(self, function):
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 4, 1), function

    def forward(self, x):
        return self.function(self.conv(x))


# --- networks of the libraries


def smp_network(arch, encoder):
    options = {"dynamic_img_size": True} if arch == "DPT" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(smp, arch)(encoder, encoder_weights=None, classes=5, **options)


@pytest.mark.parametrize(
    ("arch", "encoder"),
    [
        ("Unet", "resnet18"),
        ("Unet", "mit_b0"),
        ("Unet", "tu-resnet18"),
        ("UnetPlusPlus", "tu-mobilenetv3_small_050"),
        ("MAnet", "tu-mobilenetv3_small_050"),
        ("Linknet", "resnet18"),
        ("FPN", "mit_b0"),
        ("PSPNet", "resnet18"),
        ("PSPNet", "mit_b0"),
        ("PAN", "tu-resnet18"),
        ("DeepLabV3", "tu-mobilenetv3_small_050"),
        ("DeepLabV3Plus", "resnet18"),
        ("UPerNet", "tu-mobilenetv3_small_050"),
        ("Segformer", "mit_b0"),
        ("DPT", "tu-vit_tiny_patch16_224"),
    ],
)
def test_networks_of_smp_take_images_of_any_size(arch, encoder):
    model = Segmenter(smp_network(arch, encoder)).eval()
    for size in SIZES:
        with torch.no_grad():
            logits = model(torch.rand(1, 3, *size))
        assert logits.shape == (1, 5, *size)
        assert logits.isfinite().all()


def test_a_padded_image_gets_the_logits_of_the_bare_network_on_the_padded_image():
    network = smp_network("FPN", "tu-mobilenetv3_small_050").eval()
    images = torch.rand(2, 3, 70, 129)
    with torch.no_grad():
        expected = network(edge_padded(normalized(images), 96, 160))[:, :, :70, :129]
        torch.testing.assert_close(Segmenter(network)(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        torchvision.models.segmentation.deeplabv3_resnet50,
        torchvision.models.segmentation.fcn_resnet50,
        torchvision.models.segmentation.lraspp_mobilenet_v3_large,
    ],
)
def test_networks_of_torchvision_give_what_they_keep_under_out(make):
    network = make(weights=None, weights_backbone=None, num_classes=3).eval()
    images = torch.rand(1, 3, 49, 66)
    with torch.no_grad():
        expected = network(normalized(images))["out"]
        torch.testing.assert_close(Segmenter(network)(images), expected, rtol=1e-4, atol=1e-5)


def test_networks_of_transformers_give_their_logits_at_the_size_of_the_image():
    transformers = pytest.importorskip("transformers")
    config = transformers.SegformerConfig(
        num_labels=6,
        depths=[1] * 4,
        hidden_sizes=[8, 16, 24, 32],
        num_attention_heads=[1] * 4,
        decoder_hidden_size=16,
    )
    network = transformers.SegformerForSemanticSegmentation(config).eval()
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        quarter = network(normalized(images)).logits
        assert quarter.shape == (2, 6, 16, 24)
        expected = F.interpolate(quarter, size=(64, 96), mode="bilinear", align_corners=False)
        torch.testing.assert_close(Segmenter(network)(images), expected, rtol=1e-4, atol=1e-5)
        assert Segmenter(network)(torch.rand(1, 3, 33, 97)).shape == (1, 6, 33, 97)


# --- what comes out of the network


@pytest.mark.parametrize(
    "function",
    [
        lambda y: y,
        lambda y: (y, y.mean()),
        lambda y: [y, y.mean((2, 3))],
        lambda y: {"out": y, "aux": y + 1},
        lambda y: OrderedDict(loss=None, logits=y),
        lambda y: {"semantic": y},
        lambda y: SimpleNamespace(logits=y, hidden_states=None),
    ],
    ids=["tensor", "tuple", "list", "out", "logits-key", "only-key", "logits-attribute"],
)
def test_logits_are_found_in_what_the_network_returns(function):
    network = Returns(function)
    images = torch.rand(2, 3, 7, 9)
    torch.testing.assert_close(Segmenter(network)(images), network.conv(normalized(images)))


def test_select_picks_the_logits():
    network = Returns(lambda y: {"a": [y + 1], "b": [y]})
    images = torch.rand(2, 3, 7, 9)
    model = Segmenter(network, select=lambda output: output["b"][0])
    torch.testing.assert_close(model(images), network.conv(normalized(images)))


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (lambda y: y.argmax(1), "int64"),
        (lambda y: y.argmax(1, keepdim=True), "int64"),
        (lambda y: y[:, 0], r"float32 of shape \(1, 130, 131\)"),
        (lambda y: y.mean((2, 3)), r"float32 of shape \(1, 4\)"),
        (lambda y: y[:1], r"\(1, 4, 7, 9\)"),
        (lambda y: None, "NoneType"),
        (lambda y: (), "tuple"),
        (lambda y: ((y, y.mean()), None, y), r"a tuple with 2 maps.*select=0\)"),
        (lambda y: [y, y + 1], r"a list with 2 maps.*select=0\)"),
        (lambda y: (y, [y]), r"a tuple with 2 maps"),
        (lambda y: (y, {"features": y}), r"a tuple with 2 maps"),
        (lambda y: torch.stack([y, y], 1), r"of shape \(1, 2, 4, 130, 131\)"),
        (lambda y: {"out": [y]}, "list"),
        (lambda y: {"masks": y, "boxes": y}, "masks.*boxes"),
    ],
)
def test_what_is_no_batch_of_logits_is_refused(function, what):
    with pytest.raises(NetworkError, match=what):
        Segmenter(Returns(function))(torch.rand(2, 3, 7, 9))


LOGITS = namedtuple("LOGITS", "aux, main")


@pytest.mark.parametrize(
    ("function", "select"),
    [
        (lambda y: (y + 1, y), 1),
        (lambda y: [y, y + 1, y + 2], -3),
        (lambda y: (y + 1, y, None), -2),
        (lambda y: {"depth": y + 1, "classes": y}, "classes"),
        (lambda y: {"items": y, "out": y + 1}, "items"),
        (lambda y: SimpleNamespace(aux=y + 1, main=y), "main"),
        (lambda y: LOGITS(y + 1, y), "main"),
        (lambda y: LOGITS(y + 1, y), 1),
        (lambda y: y, 5),
        (lambda y: y, "classes"),
    ],
)
def test_select_by_place_or_name(function, select):
    network = Returns(function)
    images = torch.rand(2, 3, 7, 9)
    model = Segmenter(network, select=select)
    torch.testing.assert_close(model(images), network.conv(normalized(images)))
    assert f"select={select!r}" in repr(model)
    for copied in (pickle.loads(pickle.dumps(Segmenter(nn.Conv2d(3, 2, 1), select=select))), copy.deepcopy(model)):
        assert copied.select == select


@pytest.mark.parametrize(
    ("function", "select", "message"),
    [
        (lambda y: (y, y), 2, "a tuple of 2, which has no place 2"),
        (lambda y: [y, y], -3, "a list of 2, which has no place -3"),
        (lambda y: {"a": y, "b": y}, 0, "a dict, which has no place 0"),
        (lambda y: {"a": y, "b": y}, "c", r"a dict with the keys \['a', 'b'\]; expected 'c' in it"),
        (lambda y: {"a": y, "b": y}, "items", r"a dict with the keys \['a', 'b'\]; expected 'items' in it"),
        (lambda y: SimpleNamespace(a=y), "b", "a SimpleNamespace; expected 'b' in it"),
        (lambda y: (y, y), "b", "a tuple; expected 'b' in it"),
        (lambda y: (y, [y]), 1, "returned list"),
        (lambda y: {"a": y, "b": y}, None, r"such as stseg.Segmenter\(network, select='a'\)"),
        (lambda y: (y.mean(), y, y), None, r"such as stseg.Segmenter\(network, select=1\)"),
    ],
)
def test_a_place_or_name_that_is_not_there_is_named(function, select, message):
    with pytest.raises(NetworkError, match=message):
        Segmenter(Returns(function), select=select)(torch.rand(1, 3, 4, 4))


@pytest.mark.parametrize("select", [0.5, True, ("a",), b"a"])
def test_select_of_another_type_is_refused(select):
    with pytest.raises(TypeError, match=r"select is .*; expected a place"):
        Segmenter(nn.Conv2d(3, 2, 1), select=select)


def test_a_lambda_is_copied_but_not_pickled():
    model = Segmenter(nn.Conv2d(3, 2, 1), select=lambda output: output)
    images = torch.rand(1, 3, 4, 4)
    for copied in (copy.deepcopy(model), copy.copy(model)):
        assert torch.equal(copied(images), model(images))
    assert copy.deepcopy(model).network.weight is not model.network.weight
    assert copy.copy(model).network.weight is model.network.weight
    for dump in (lambda: torch.save(model, io.BytesIO()), lambda: pickle.dumps(nn.Sequential(model))):
        with pytest.raises(TypeError, match=r"select=0.*stseg\.save_weights"):
            dump()
    torch.save(Segmenter(nn.Conv2d(3, 2, 1), select=torch.neg), io.BytesIO())


def test_what_select_returns_is_checked_too():
    with pytest.raises(NetworkError, match="str"):
        Segmenter(Returns(lambda y: y), select=lambda output: "logits")(torch.rand(1, 3, 4, 4))


# --- what goes into it


def test_an_image_that_fits_gets_the_bare_network_s_logits():
    network = smp_network("Unet", "resnet18").eval()
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(Segmenter(network)(images), network(normalized(images)))


def test_uint8_and_float_images_give_the_same():
    model = Segmenter(nn.Conv2d(3, 4, 3, padding=1))
    images = torch.randint(256, (2, 3, 12, 13), dtype=torch.uint8)
    assert torch.equal(model(images), model(images.float() / 255))


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_other_than_3_channels_are_normalized_by_the_average(channels):
    model = Segmenter(nn.Identity())
    images = torch.rand(2, channels, 5, 6)
    expected = (images - np.mean(IMAGENET_MEAN)) / np.mean(IMAGENET_STD)
    torch.testing.assert_close(model(images)[:, -channels:], expected)


def test_one_value_of_mean_and_std_serves_all_channels():
    images = torch.rand(2, 4, 5, 6)
    torch.testing.assert_close(Segmenter(nn.Identity(), mean=[0.5], std=[0.25])(images), images * 4 - 2)


def test_a_value_for_each_channel():
    images = torch.rand(1, 2, 5, 6)
    expected = torch.stack([images[:, 0], (images[:, 1] - 1) / 2], 1)
    torch.testing.assert_close(Segmenter(nn.Identity(), mean=[0, 1], std=[1, 2])(images), expected)


def test_without_mean_images_go_in_as_they_are():
    images = torch.rand(1, 3, 5, 6)
    assert torch.equal(Segmenter(nn.Identity(), mean=None, std=None)(images), images)


def test_images_with_other_channels_than_mean_are_refused():
    with pytest.raises(ValueError, match="4 channels, but mean has 2"):
        Segmenter(nn.Identity(), mean=[0, 1], std=[1, 2])(torch.rand(1, 4, 5, 6))


@pytest.mark.parametrize(
    ("images", "error"),
    [
        (torch.rand(3, 5, 6), ValueError),
        (np.zeros((1, 3, 5, 6)), ValueError),
        (torch.zeros(1, 3, 5, 6, dtype=torch.int64), TypeError),
        (torch.zeros(1, 3, 5, 6, dtype=torch.bool), TypeError),
    ],
)
def test_what_is_no_batch_of_images_is_refused(images, error):
    with pytest.raises(error, match="expected"):
        Segmenter(nn.Conv2d(3, 2, 1))(images)


# --- sides


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    stride=st.sampled_from([1, 2, 4, 8, 14, 16, 28, 32, 64]),
    least=st.sampled_from([1, 20, 100]),
    height=st.integers(1, 150),
    width=st.integers(1, 150),
)
def test_a_network_sees_the_smallest_sides_that_it_takes(stride, least, height, width):
    network = Strided(stride, least)
    assert Segmenter(network)(torch.rand(1, 3, height, width)).shape == (1, 4, height, width)
    for side, seen in zip((height, width), network.seen[-1], strict=True):
        assert seen % stride == 0
        assert seen >= least
        if side >= 128:
            assert seen - side < stride


def test_sides_are_found_once():
    model = Segmenter(network := Strided(16))
    for _ in range(2):
        network.seen.clear()
        model(torch.rand(1, 3, 20, 40))
    assert network.seen == [(32, 48)]


def test_a_network_that_tells_its_stride_is_believed():
    network = Strided(1)
    network.encoder = nn.Identity()
    network.encoder.output_stride = 32
    Segmenter(network)(torch.rand(1, 3, 20, 40))
    assert network.seen[-1] == (32, 64)


def test_a_network_that_needs_more_than_it_tells_gets_more():
    network = Strided(32)
    network.encoder = nn.Identity()
    network.encoder.output_stride = 16
    assert Segmenter(network)(torch.rand(1, 3, 20, 40)).shape == (1, 4, 20, 40)


def test_a_given_stride_needs_no_trial():
    network = Strided(1)
    Segmenter(network, stride=10)(torch.rand(1, 3, 20, 41))
    assert network.seen == [(20, 50)]


def test_a_network_of_a_single_size_takes_that_size_and_says_so_of_others():
    model = Segmenter(Returns(lambda y: y if y.shape[-2:] == (24, 24) else 1 / 0))
    assert model(torch.rand(1, 3, 24, 24)).shape == (1, 4, 24, 24)
    with pytest.raises(NetworkError, match=r"\(3, 25, 24\): division by zero .*dynamic_img_size=True") as error:
        model(torch.rand(1, 3, 25, 24))
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_trial_leaves_no_trace_on_a_network_in_training():
    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(), Strided(8, 1, 4))

    images = torch.rand(2, 3, 20, 40)
    bare, wrapped = network(), Segmenter(network())
    torch.manual_seed(1)
    expected = bare(edge_padded(normalized(images), 24, 40))[:, :, :20]
    torch.manual_seed(1)
    torch.testing.assert_close(wrapped(images), expected)
    assert all(module.training for module in wrapped.modules())
    for name, value in bare.state_dict().items():
        torch.testing.assert_close(wrapped.network.state_dict()[name], value)


def test_logits_smaller_than_the_padded_image_are_resized_before_they_are_cropped():
    network = nn.Conv2d(3, 4, 8, stride=8)
    images = torch.rand(1, 3, 20, 33)
    quarter = network(edge_padded(normalized(images), 24, 40))
    expected = F.interpolate(quarter, size=(24, 40), mode="bilinear", align_corners=False)[:, :, :20, :33]
    torch.testing.assert_close(Segmenter(network, stride=8)(images), expected)


# --- as a module


def test_state_dict_is_the_network_s_own():
    network = smp_network("FPN", "tu-mobilenetv3_small_050")
    state = Segmenter(network).state_dict()
    assert list(state) == [f"network.{name}" for name in network.state_dict()]


def test_state_dict_round_trips():
    one, other = (Segmenter(nn.Conv2d(3, 4, 3, padding=1)) for _ in range(2))
    images = torch.rand(1, 3, 9, 9)
    assert not torch.equal(one(images), other(images))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(images), other(images))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("used", [False, True])
def test_copies_do_the_same(copied, used):
    model = Segmenter(Strided(8))
    images = torch.rand(1, 3, 9, 17)
    if used:
        model(images)
    assert torch.equal(copied(model)(images), model(images))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("whole", [False, True])
def test_half_precision_weights_give_float32_logits(dtype, whole):
    network = nn.Conv2d(3, 4, 1)
    images = torch.rand(2, 3, 9, 17)
    expected = Segmenter(network)(images)
    half = copy.deepcopy(network).to(dtype)
    model = Segmenter(network).to(dtype) if whole else Segmenter(half)
    logits = model(images)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=0.05, atol=0.05)


def test_double_precision_is_kept():
    assert Segmenter(nn.Conv2d(3, 4, 1).double())(torch.rand(1, 3, 5, 5)).dtype == torch.float64


def test_gradients_reach_images_and_weights():
    model = Segmenter(Strided(8))
    images = torch.rand(1, 3, 9, 17, requires_grad=True)
    model(images).sum().backward()
    assert images.grad.abs().min() > 0
    assert model.network.conv.weight.grad.abs().min() > 0


def test_a_compiled_segmenter_does_the_same():
    model = Segmenter(Strided(8))
    compiled = torch.compile(model, backend="eager")
    for size in [(16, 24), (9, 17), (33, 20)]:
        images = torch.rand(1, 3, *size)
        torch.testing.assert_close(compiled(images), model(images))


def test_a_compiled_network_is_compiled_for_the_images_alone():
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    network = nn.Conv2d(3, 4, 3, padding=1)
    images = torch.rand(1, 3, 9, 17)
    logits = Segmenter(torch.compile(network, backend=backend))(images)
    torch.testing.assert_close(logits, Segmenter(network)(images))
    assert len(compiled) == 1


def test_repr_shows_the_settings():
    text = repr(Segmenter(nn.Identity(), mean=[0.5], std=[0.25], stride=8))
    assert "mean=(0.5,), std=(0.25,), stride=8" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 0}, "stride is 0"),
        ({"mean": None}, "go together"),
        ({"std": None}, "go together"),
        ({"mean": [0.5], "std": [1, 1, 1]}, "as many"),
        ({"mean": [], "std": []}, "as many"),
        ({"mean": [0.5], "std": [0]}, "positive"),
        ({"mean": [0.5], "std": [float("nan")]}, "positive"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Segmenter(nn.Identity(), **options)


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match="function"):
        Segmenter(lambda x: x)


# --- as_segmenter


def test_a_bare_network_is_wrapped():
    network = nn.Conv2d(3, 2, 1)
    model = as_segmenter(network)
    assert isinstance(model, Segmenter)
    assert model.network is network


@pytest.mark.parametrize("wrap", [Segmenter, multi_scale.MultiScaleFlip, lambda n: nn.DataParallel(Segmenter(n))])
def test_what_takes_images_stays_as_it_is(wrap):
    model = wrap(nn.Conv2d(3, 2, 1))
    assert as_segmenter(model) is model


def test_a_compiled_segmenter_stays_as_it_is():
    model = torch.compile(Segmenter(nn.Conv2d(3, 2, 1)), backend="eager")
    assert as_segmenter(model) is model


def test_a_parallel_bare_network_is_wrapped():
    assert isinstance(as_segmenter(nn.DataParallel(nn.Conv2d(3, 2, 1))), Segmenter)


def test_wrapping_moves_nothing():
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 1, device="meta"))
    as_segmenter(network)
    assert [p.device.type for p in network.parameters()] == ["cpu", "cpu", "meta", "meta"]


def test_a_segmenter_is_not_wrapped_twice():
    with pytest.raises(ValueError, match="takes images"):
        Segmenter(Segmenter(nn.Conv2d(3, 2, 1)))


def test_as_segmenter_refuses_what_is_no_module():
    with pytest.raises(TypeError, match="str"):
        as_segmenter("unet")


class TestOneChannel:
    @pytest.fixture
    def binary(self):
        torch.manual_seed(0)
        return stseg.Segmenter(nn.Conv2d(3, 1, 3, stride=2, padding=1))

    def test_is_two_classes_of_which_the_first_has_the_logit_zero(self, binary):
        images = torch.rand(2, 3, 9, 7)
        logits = binary(images)
        assert logits.shape == (2, 2, 9, 7)
        assert not logits[:, 0].any()
        torch.testing.assert_close(logits.softmax(1)[:, 1], logits[:, 1].sigmoid())
        assert torch.equal(logits.argmax(1) == 1, logits[:, 1] > 0)

    def test_trains_with_binary_cross_entropy(self, binary):
        images, masks = torch.rand(2, 3, 9, 7), torch.randint(2, (2, 9, 7))
        two = nn.functional.cross_entropy(binary(images), masks)
        one = nn.functional.binary_cross_entropy_with_logits(binary(images)[:, 1], masks.float())
        torch.testing.assert_close(two, one)
        (gradient,) = torch.autograd.grad(two, binary.network.weight)
        (wanted,) = torch.autograd.grad(one, binary.network.weight)
        torch.testing.assert_close(gradient, wanted)

    def test_keeps_the_weights_of_one(self, binary):
        assert binary.network.weight.shape[0] == 1
        assert binary.state_dict()["network.weight"].shape[0] == 1

    def test_is_labeled_and_evaluated_as_two(self, binary):
        scenes = [(torch.rand(3, 8, 8), torch.randint(2, (8, 8))) for _ in range(3)]
        assert stseg.evaluate(binary, scenes, num_classes=2, progress=False).iou().shape == (2,)
        labeled = stseg.PseudoLabeler(binary, num_classes=2, progress=False).label([image for image, _ in scenes])
        assert {int(value) for _, mask in labeled for value in mask.unique()} <= {0, 1}
