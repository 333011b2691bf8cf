"""Sides that networks of many kinds take, and outputs that do not cover the image."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import stseg
from stseg import NetworkError, Segmenter
from stseg.models.sides import scale_of


class Multiple(nn.Module):
    """Takes sides that are multiples of a number and not below another one."""

    def __init__(self, stride, least=1):
        super().__init__()
        self.stride, self.least, self.seen = stride, least, []
        self.conv = nn.Conv2d(3, 2, 1)

    def forward(self, x):
        if any(side % self.stride or side < self.least for side in x.shape[-2:]):
            raise ValueError(f"input of {tuple(x.shape[-2:])}")
        self.seen.append(tuple(x.shape[-2:]))
        return self.conv(x)


class Patches(nn.Module):
    """Drops the rows and columns that do not fill a patch, as the patch embedding of a ViT does."""

    def __init__(self, patch, up=1):
        super().__init__()
        self.conv, self.up = nn.Conv2d(3, 2, patch, stride=patch), up

    def forward(self, x):
        return F.interpolate(self.conv(x), scale_factor=self.up) if self.up > 1 else self.conv(x)


class Strided(nn.Module):
    """Convolution with padding: its output rounds up, as in SegFormer."""

    def __init__(self, stride):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3, stride=stride, padding=1)

    def forward(self, x):
        return self.conv(x)


@pytest.mark.parametrize("least", [1, 224, 256])
@pytest.mark.parametrize("stride", [1, 2, 8, 12, 14, 16, 24, 32, 48, 56, 64, 96, 112, 128])
def test_strides_and_smallest_sides_are_found(stride, least):
    network = Multiple(stride, least)
    model = Segmenter(network)
    assert model(torch.rand(1, 3, 150, 201)).shape == (1, 2, 150, 201)
    for side, seen in zip((150, 201), network.seen[-1], strict=True):
        needed = max(side, least) + -max(side, least) % stride
        assert needed <= seen <= needed + stride - 1


@pytest.mark.parametrize("patch", [4, 7, 8, 14, 16, 28, 32])
def test_patches_are_filled(patch):
    """Every row and column changes the output."""
    model = Segmenter(Patches(patch))
    images = torch.rand(1, 3, 109, 125)
    whole = model(images)
    assert model._sides.stride == patch
    for place in (108, 100, 0):
        changed = images.clone()
        changed[..., place, :] = 0
        assert not torch.equal(model(changed), whole)


@pytest.mark.parametrize(("patch", "up"), [(16, 4), (16, 16), (14, 2), (32, 8)])
def test_patches_that_are_scaled_up_are_filled_too(patch, up):
    assert Segmenter(Patches(patch, up))(torch.rand(1, 3, 50, 70)).shape == (1, 2, 50, 70)
    model = Segmenter(Patches(patch, up))
    model(torch.rand(1, 3, 50, 70))
    assert model._sides.stride == patch


@pytest.mark.parametrize("stride", [2, 4, 8, 16, 32])
def test_outputs_that_round_up_are_scaled_by_one_integer(stride):
    model = Segmenter(Strided(stride), mean=None, std=None)
    images = torch.rand(1, 3, 50, 70)
    height, width = (side + -side % stride for side in (50, 70))
    padded = F.pad(images, (0, width - 70, 0, height - 50), mode="replicate")
    expected = F.interpolate(model.network.conv(padded), size=(height, width), mode="bilinear")[..., :50, :70]
    torch.testing.assert_close(model(images), expected)


@pytest.mark.parametrize(
    "network",
    [nn.Conv2d(3, 2, 21), nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)), nn.Conv2d(3, 2, 3, stride=2)],
    ids=["a border", "a small border", "half"],
)
@pytest.mark.parametrize("stride", [None, 16])
def test_outputs_that_lose_the_border_are_refused(network, stride):
    with pytest.raises(NetworkError, match=r"its output for an image of 1\d\d x 1\d\d is \d+ x \d+; .*padding"):
        Segmenter(network, stride=stride)(torch.rand(1, 3, 120, 120))
    data = [(torch.rand(3, 120, 120), torch.randint(2, (120, 120)))] * 4
    with pytest.raises(NetworkError, match="padding"):
        stseg.evaluate(network, data, num_classes=2, progress=False)


def test_a_network_that_gives_another_size_in_training_is_refused_before_it_is_trained():
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1)

        def forward(self, x):
            return self.conv(x)[..., 3:-3, 3:-3] if self.training else self.conv(x)

    data = [(torch.rand(3, 40, 40), torch.randint(2, (40, 40)))] * 4
    config = stseg.TrainConfig(steps=2, batch_size=2, weak=stseg.WeakAugment(32))
    with pytest.raises(NetworkError, match="its output for an image of 32 x 32 is 26 x 26"):
        stseg.fit(Cut(), data, config, progress=False)


def test_what_does_not_help_is_refused_with_the_ways_out():
    with pytest.raises(NetworkError, match=r"\(3, 50, 70\): input of .*stride=32.*dynamic_img_size=True"):
        Segmenter(Multiple(90))(torch.rand(1, 3, 50, 70))
    assert Segmenter(Multiple(90), stride=90)(torch.rand(1, 3, 50, 70)).shape == (1, 2, 50, 70)


def test_a_vit_of_timm_is_told_how_to_take_other_sizes():
    timm = pytest.importorskip("timm")

    class ViT(nn.Module):
        def __init__(self, **options):
            super().__init__()
            self.encoder = timm.create_model("test_vit", pretrained=False, img_size=160, **options)
            self.head = nn.Conv2d(self.encoder.embed_dim, 2, 1)

        def forward(self, x):
            tokens = self.encoder.forward_features(x)[:, self.encoder.num_prefix_tokens :]
            return self.head(tokens.mT.reshape(len(x), -1, x.shape[-2] // 16, x.shape[-1] // 16))

    with pytest.raises(NetworkError, match="dynamic_img_size=True"):
        Segmenter(ViT(dynamic_img_size=False))(torch.rand(1, 3, 200, 260))
    assert Segmenter(ViT(dynamic_img_size=False))(torch.rand(1, 3, 160, 160)).shape == (1, 2, 160, 160)
    assert Segmenter(ViT(dynamic_img_size=True))(torch.rand(1, 3, 200, 260)).shape == (1, 2, 200, 260)


def test_the_trial_draws_no_random_numbers():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1)

        def forward(self, x):
            return self.conv(x + torch.rand(()))

    model, images = Segmenter(Noisy()), torch.rand(1, 3, 8, 8)
    torch.manual_seed(0)
    first = model(images)
    torch.manual_seed(0)
    assert torch.equal(model(images), first)


def test_scale_of_wants_one_integer_for_both_sides():
    def scale(image, logits):
        return scale_of(torch.Size([1, 3, *image]), torch.Size([1, 2, *logits]))

    assert scale((64, 96), (16, 24)) == 4
    assert scale((64, 96), (64, 96)) == 1
    for logits in ((16, 25), (32, 24), (128, 192), (15, 24), (0, 0)):
        assert scale((64, 96), logits) is None
