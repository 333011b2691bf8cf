"""What a clumsy user gives to methods is an error that names the argument, when the method is made."""

from __future__ import annotations

import pytest
import torch
from small import network
from tester import batch
from torch import nn

import stseg
from stseg import methods
from stseg.augment import BoxMix


@pytest.mark.parametrize("name", ["AdvSSL", "S4GAN", "CCT", "S4L", "GCT", "U2PL"])
@pytest.mark.parametrize(("value", "error"), [(-1, ValueError), (1, ValueError), ("2", TypeError), (None, TypeError)])
def test_num_classes_is_an_integer_of_two_or_more(name, value, error):
    networks = [network(), network(seed=1)] if name == "GCT" else [network()]
    channels = {"channels": 4} if name == "CCT" else {}
    with pytest.raises(error, match=f"num_classes is {value!r}; expected"):
        getattr(methods, name)(*networks, num_classes=value, **channels)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda n: methods.FixMatch(n, mix="x"), TypeError, "mix is 'x'; expected None or a function"),
        (lambda n: methods.UniMatch(n, mix=BoxMix), TypeError, "mix is the class BoxMix; expected"),
        (lambda n: methods.FixMatch(n, mix=methods.ClassMix(n)), TypeError, "mix is a ClassMix; .* stseg.ClassMix"),
        (lambda n: methods.ClassMix(n, mix=BoxMix()), TypeError, r"expected stseg\.ClassMix\(\) or None"),
        (lambda n: methods.DCC(n, pairs="x"), TypeError, r"pairs is 'x'; expected stseg\.augment\.CropPair"),
        (lambda n: methods.DCC(n, memory=True), TypeError, "memory is True; expected an integer"),
        (lambda n: methods.DCC(n, width=0), ValueError, "width is 0; expected 1 or more"),
        (lambda n: methods.U2PL(n, num_classes=2, ranks=3), ValueError, "ranks is 3; expected two places"),
        (lambda n: methods.AdvSSL(n, num_classes=2, adversarial=0.01), TypeError, "adversarial is 0.01; expected"),
        (lambda n: methods.AdvSSL(n, num_classes=2, semi=-1), ValueError, "semi is -1; expected 0 or more"),
        (lambda n: methods.S4GAN(n, num_classes=2, critic_lr="x"), TypeError, "critic_lr is 'x'; expected a number"),
        (lambda n: methods.ECS(n, nn.Conv2d(5, 3, 1), corrector_lr=0), ValueError, "corrector_lr is 0; expected a num"),
        (lambda n: methods.MeanTeacher(n, decay="0.99"), TypeError, "decay is '0.99'; expected a number"),
        (lambda n: methods.CPS("x", n), TypeError, "network is 'x'; expected a network"),
        (lambda n: methods.GCT(n, "y", num_classes=2), TypeError, "other is 'y'; expected a network"),
        (lambda n: methods.ECS(n, None), TypeError, "corrector is None; expected a network"),
        (
            lambda n: methods.CCT(n, num_classes=2, channels=4, background=2),
            ValueError,
            "one of the 2 classes, or None",
        ),
        (lambda n: methods.CCT(n, num_classes=2, channels=4, background="x"), TypeError, "background is 'x'"),
        (lambda n: methods.CCT(n, num_classes=2, channels=4, decoders=None), TypeError, "decoders is None"),
        (lambda n: methods.CCT(n, num_classes=2, channels=4, upsampling=2.5), TypeError, "upsampling is 2.5"),
    ],
)
def test_arguments_are_checked_when_the_method_is_made(make, error, message):
    with pytest.raises(error, match=message):
        make(network())


def test_networks_of_other_classes_are_named():
    with pytest.raises(ValueError, match="network gives 2 classes and other 3; expected equal numbers"):
        methods.CPS(network(), network(classes=3))(batch(2, 16))


def test_a_corrector_of_other_channels_is_named():
    corrector = nn.Conv2d(3, 3, 1)
    with pytest.raises(stseg.NetworkError, match=r"cannot take 5 channels, .* made with in_channels=5"):
        methods.ECS(network(), corrector)(batch(2, 16)._replace(masks=torch.zeros(2, 16, 16, dtype=torch.int64)))


@pytest.mark.parametrize("method", [methods.FixMatch, methods.UniMatch, methods.UniMatchV2, methods.CPS])
def test_unsure_and_ignored_pixels_are_no_classes_to_mix(method, monkeypatch):
    chosen = []

    def choose(self, labels, generator=None, **options):
        chosen.append(self.num_classes)
        return torch.zeros_like(labels, dtype=torch.bool)

    monkeypatch.setattr(stseg.ClassMix, "draw", choose)
    networks = [network(), network(seed=1)] if method is methods.CPS else [network()]
    options = {"backbone": "0"} if method in (methods.UniMatch, methods.UniMatchV2) else {}
    one = batch(2, 16)._replace(masks=torch.zeros(2, 16, 16, dtype=torch.int64))
    method(*networks, mix=stseg.ClassMix(), **options)(one)
    assert set(chosen) == {2}
    with pytest.raises(ValueError, match="mix is for 3 classes, but the network gives 2"):
        method(*networks, mix=stseg.ClassMix(num_classes=3), **options)(one)
