"""All methods by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from inspect import Parameter, signature
from typing import Any

from torch import nn

from stseg.augment import BoxMix
from stseg.checks import check_choice
from stseg.engine.method import Method
from stseg.methods.adv_ssl import AdvSSL
from stseg.methods.cct import CCT
from stseg.methods.class_mix import ClassMix
from stseg.methods.cps import CPS
from stseg.methods.cutmix_seg import CutMixSeg
from stseg.methods.fixmatch import FixMatch
from stseg.methods.gct import GCT
from stseg.methods.mean_teacher import MeanTeacher
from stseg.methods.s4gan import S4GAN
from stseg.methods.s4l import S4L
from stseg.methods.st import ST, Baseline, STPlusPlus
from stseg.methods.u2pl import U2PL
from stseg.methods.unimatch import UniMatch
from stseg.methods.unimatch_v2 import UniMatchV2
from stseg.models.state import bare_network
from stseg.stages.recipe import OneStage, Recipe
from stseg.stages.stages import MakeModel

Settings = Mapping[str, Any]


def list_methods() -> list[str]:
    """Return the names that :func:`create_method` takes.

    Example:
        >>> list_methods()[:4]
        ['supervised', 'st', 'st++', 'fixmatch']
    """
    return [*_RECIPES, *_METHODS]


def create_method(name: str, *, num_classes: int, **settings: Any) -> Recipe:
    """Create a method by its name, for ``method=`` of :class:`stseg.SelfTrainer`.

    DCC and ECS have no name: they need more than networks, a pair of crops and a corrector.

    Args:
        name: one of :func:`list_methods`.
        num_classes: number of classes.
        settings: settings of the method's class, such as ``threshold=0.9`` for ``"fixmatch"``. For ``"cct"`` and
            ``"u2pl"``, networks of segmentation_models_pytorch tell the number of ``channels``; others need it here.

    Raises:
        ValueError: if there is no such name; lists all of them.
        TypeError: if the method has no such setting; lists those that it has.

    Example:
        >>> import torch, stseg
        >>> method = create_method("fixmatch", num_classes=2, threshold=0.9)
        >>> options = {"num_classes": 2, "config": stseg.TrainConfig(steps=2, batch_size=2, weak=None)}
        >>> trainer = stseg.SelfTrainer(lambda: torch.nn.Conv2d(3, 2, 1), method=method, progress=False, **options)
        >>> images = [torch.rand(3, 16, 16) for _ in range(6)]
        >>> labeled = [(image, (image[0] > 0.5).to(torch.uint8)) for image in images[:2]]
        >>> list(trainer.fit(labeled, images[2:]).stages)
        ['train']
    """
    if name in ("dcc", "ecs"):
        raise ValueError(f"method is {name!r}, which needs more than networks: method={_LINES[name]}")
    check_choice("method", name, *list_methods())
    made: Callable[..., object] = _RECIPES[name] if name in _RECIPES else _METHODS[name].method
    known = [each.name for each in signature(made).parameters.values() if each.kind is Parameter.KEYWORD_ONLY]
    for setting in settings:
        if setting not in known:
            raise TypeError(f"{name!r} has no setting {setting!r}; expected of {', '.join(known)}")
    if name in _RECIPES:
        return _RECIPES[name](**settings)
    return OneStage(_Named(_METHODS[name], num_classes, settings))


@dataclass(frozen=True)
class _Kind:
    """A method, and what it is made of."""

    method: Callable[..., Method]
    networks: int = 1
    takes_classes: bool = False
    defaults: Settings = field(default_factory=dict)
    of_network: Callable[[nn.Module], Settings] | None = None


@dataclass(frozen=True)
class _Named:
    """``make_model -> Method``, described in records by its values."""

    kind: _Kind
    num_classes: int
    settings: Settings

    def __call__(self, make_model: MakeModel) -> Method:
        kind = self.kind
        networks = [make_model() for _ in range(kind.networks)]
        settings = {**kind.defaults, **self.settings}
        if kind.of_network is not None and "channels" not in settings:
            settings = {**kind.of_network(networks[0]), **settings}
        classes = {"num_classes": self.num_classes} if kind.takes_classes else {}
        return kind.method(*networks, **classes, **settings)


def _deepest_features(network: nn.Module) -> Settings:
    """Return channels and stride of the deepest features of a network of segmentation_models_pytorch."""
    encoder = getattr(_bare(network), "encoder", None)
    channels, stride = getattr(encoder, "out_channels", None), getattr(encoder, "output_stride", None)
    if not channels or not isinstance(stride, int):
        raise ValueError(f"'cct' does not know the encoder of {_kind_of(network)}; expected channels= and upsampling=")
    return {"channels": channels[-1], "upsampling": stride}


def _last_features(network: nn.Module) -> Settings:
    """Return the channels of the features before the head of a network of segmentation_models_pytorch."""
    head = getattr(_bare(network), "segmentation_head", None)
    for module in head.modules() if isinstance(head, nn.Module) else ():
        if isinstance(module, nn.Conv2d):
            return {"channels": module.in_channels}
    raise ValueError(f"'u2pl' does not know the decoder of {_kind_of(network)}; expected channels=")


def _bare(network: nn.Module) -> nn.Module:
    return bare_network(getattr(network, "network", network))


def _kind_of(network: nn.Module) -> str:
    return type(_bare(network)).__name__


_RECIPES: dict[str, Callable[..., Recipe]] = {"supervised": Baseline, "st": ST, "st++": STPlusPlus}

_METHODS = {
    "fixmatch": _Kind(FixMatch),
    "unimatch": _Kind(UniMatch),
    "unimatch-v2": _Kind(UniMatchV2),
    "mean-teacher": _Kind(MeanTeacher),
    "cutmix-seg": _Kind(CutMixSeg),
    "class-mix": _Kind(ClassMix),
    "cps": _Kind(CPS, networks=2),
    "cps-cutmix": _Kind(CPS, networks=2, defaults={"mix": BoxMix(area=(0.25, 0.5), boxes=3)}),
    "gct": _Kind(GCT, networks=2, takes_classes=True),
    "cct": _Kind(CCT, takes_classes=True, of_network=_deepest_features),
    "u2pl": _Kind(U2PL, takes_classes=True, of_network=_last_features),
    "adv-ssl": _Kind(AdvSSL, takes_classes=True),
    "s4gan": _Kind(S4GAN, takes_classes=True),
    "s4l": _Kind(S4L, takes_classes=True),
}

_LINES = {
    "dcc": "lambda make_model: DCC(make_model(), channels=256, pairs=CropPair(320, base_size=400))",
    "ecs": "lambda make_model: ECS(make_model(), corrector), with a network of 3 + num_classes channels",
}
