"""Cross-consistency training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stseg.checks import check_nonnegative
from stseg.engine.method import Batch, Losses, Method
from stseg.errors import NetworkError
from stseg.functional import sigmoid_rampup, squared_difference, supervised_loss
from stseg.models import backbone_of
from stseg.models.segmenter import Segmenter, as_segmenter
from stseg.models.state import device_of, evaluating
from stseg.modules import captured, captured_inputs, channel_dropout
from stseg.modules.perturbations import (
    adversarial_direction,
    feature_drop,
    feature_noise,
    guided_cutout,
    mask_context,
    mask_objects,
)
from stseg.types import Criterion

DECODERS: Mapping[str, int] = {
    "dropout": 6,
    "cutout": 6,
    "adversarial": 2,
    "context": 2,
    "objects": 2,
    "drop": 6,
    "noise": 6,
}
_NEED_FOREGROUND = ("cutout", "context", "objects")


class CCT(Method):
    """CCT (Ouali et al., CVPR 2020, section 3): auxiliary decoders that see perturbed features.

    ``L = Ls + weight * r(t) * mean over decoders of mean((softmax(g(z~)) - softmax(main(z)))^2)``, the second term on
    unlabeled images. Each auxiliary decoder g sees the encoder's features z of an image in a perturbed form and has to
    predict what the main decoder predicts from z itself; the main decoder learns from labels alone. r(t) rises from
    near 0 to 1 in the first ``rampup`` of the training. The perturbations, with the number of decoders of the paper:
    ``dropout`` of channels (6); ``cutout``, a rectangle of each object (6); ``adversarial`` direction (2); the
    ``context`` masked (2) or the ``objects`` (2); ``drop`` of the most active positions (6); ``noise`` (6).

    At prediction only the network is used. As in the authors' code a decoder is a 1x1 convolution to K channels and
    three times a 1x1 convolution, a ReLU and a pixel shuffle; objects are what the main decoder predicts and is not
    ``background``. Unlike there, z is the deepest feature map of the network's backbone (there, the output of a pyramid
    pooling module that belongs to the encoder), predictions are resized to the image, objects are found at the
    resolution of z, and padded pixels are ignored.

    Args:
        network: a network, bare or in a :class:`stseg.Segmenter`, with a backbone.
        num_classes: number of classes, 2 for a network with one logit.
        decoders: number of auxiliary decoders of each perturbation.
        weight: final weight of the consistency.
        rampup: share of the training until that weight is reached; 0 for no ramp-up.
        background: class that is no object; None, where there is none, leaves out ``cutout``, ``context`` and
            ``objects``.
        backbone: name of the submodule of the network that returns the features; None uses ``encoder``, ``backbone`` or
            the one that ``base_model_prefix`` names.
        image_channels: channels of the images.
        loss: supervised loss, ``(logits, masks) -> scalar``; None for cross-entropy.

    Logged: ``supervised``, ``consistency`` (unweighted).

    Raises:
        ValueError: if a setting is out of its range.
        NetworkError: if the network has no backbone that returns a feature map.

    Example:
        >>> import segmentation_models_pytorch as smp
        >>> method = CCT(smp.FPN("tu-test_resnet", encoder_weights=None, classes=2), num_classes=2)
        >>> images, masks = torch.rand(2, 3, 32, 32), torch.randint(2, (2, 32, 32))
        >>> batch = Batch(images, masks, torch.zeros(2, dtype=torch.bool), unlabeled=torch.rand(2, 3, 32, 32))
        >>> sorted(method(batch).logged), len(method.decoders)
        (['consistency', 'supervised'], 30)
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        num_classes: int,
        decoders: Mapping[str, int] = DECODERS,
        weight: float = 30.0,
        rampup: float = 0.1,
        background: int | None = 0,
        backbone: str | None = None,
        image_channels: int = 3,
        loss: Criterion | None = None,
    ) -> None:
        super().__init__()
        check_nonnegative("weight", weight)
        check_nonnegative("rampup", rampup)
        for name, count in decoders.items():
            if name not in DECODERS or not isinstance(count, int) or count < 0:
                raise ValueError(
                    f"decoders holds {name!r}: {count!r}; expected a number, 0 or more, for some of {list(DECODERS)}"
                )
        used = {n: c for n, c in decoders.items() if c and (background is not None or n not in _NEED_FOREGROUND)}
        if not used:
            raise ValueError(f"decoders is {dict(decoders)} and background {background}: no decoder is left")
        self.model = as_segmenter(network)
        self.num_classes, self.weight, self.rampup = num_classes, weight, rampup
        self.background, self.backbone, self.loss = background, backbone, loss
        channels = self._channels(image_channels)
        self.kinds = [name for name, count in used.items() for _ in range(count)]
        self.decoders = nn.ModuleList(AuxiliaryDecoder(channels, num_classes) for _ in self.kinds)

    def forward(self, batch: Batch) -> Losses:
        """Compute the losses; see the class."""
        labeled = self.model(batch.images)
        if labeled.shape[1] != self.num_classes:
            raise ValueError(f"num_classes is {self.num_classes}, but the network gives {labeled.shape[1]} classes")
        supervised = supervised_loss(labeled, batch.masks, loss=self.loss, ignore_index=batch.ignore_index)

        logits, features, padded = self._with_features(batch.unlabeled)
        target = logits.detach().float().softmax(1)
        foreground = self._foreground(target, features, padded)
        height, width = target.shape[-2:]
        terms = []
        for kind, decoder in zip(self.kinds, self.decoders, strict=True):
            prediction = decoder(_perturb(kind, features, foreground, decoder))
            resized = F.interpolate(prediction, size=padded, mode="bilinear", align_corners=False)
            found = resized[..., :height, :width].float().softmax(1)
            terms.append(squared_difference(found, target, where=batch.valid))
        consistency = torch.stack(terms).mean()

        weight = self.weight * sigmoid_rampup(batch.step, self.rampup * batch.steps)
        logged = {"supervised": supervised.detach(), "consistency": consistency.detach()}
        return Losses(supervised + weight * consistency, logged)

    def _with_features(self, images: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Return logits, the deepest feature map, and the height and width of the images in the network."""
        assert isinstance(self.model, Segmenter)
        network = self.model.network
        backbone = backbone_of(network, self.backbone)
        if backbone is None:
            raise NetworkError(
                f"no features are found in the network ({type(network).__name__}), as it has no encoder or backbone; "
                "name the submodule that returns them: CCT(network, backbone=...)"
            )
        with captured(backbone) as outputs, captured_inputs(network) as inputs:
            logits = self.model(images)
        height, width = inputs[-1].shape[-2:]
        return logits, _deepest(outputs[-1], type(backbone).__name__), (height, width)

    def _channels(self, image_channels: int) -> int:
        if not isinstance(self.model, Segmenter):
            raise TypeError(f"network is a {type(self.model).__name__}; expected a network or a stseg.Segmenter")
        image = torch.zeros(1, image_channels, 64, 64, device=device_of(self.model))
        with evaluating(self.model), torch.no_grad():
            return self._with_features(image)[1].shape[1]

    def _foreground(self, target: Tensor, features: Tensor, padded: tuple[int, int]) -> Tensor | None:
        """Return which positions of the features are predicted as objects, ``(B, h, w)`` bool."""
        if self.background is None:
            return None
        objects = (target.argmax(1, keepdim=True) != self.background).float()
        bottom, right = padded[0] - objects.shape[-2], padded[1] - objects.shape[-1]
        resized = F.interpolate(F.pad(objects, (0, right, 0, bottom)), size=features.shape[-2:], mode="nearest")
        return resized[:, 0] > 0


class AuxiliaryDecoder(nn.Module):
    """Decoder of CCT: from feature maps to logits of eight times their height and width.

    Args:
        channels: channels of the features.
        num_classes: number of classes K.

    Shape:
        ``(B, C, h, w)`` -> ``(B, K, 8h, 8w)``, 0 or more, as the last layers are a ReLU and a pixel shuffle.

    Example:
        >>> sum(p.numel() for p in AuxiliaryDecoder(512, 21).parameters())
        16296
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, num_classes, 1, bias=False)]
        nn.init.kaiming_normal_(layers[0].weight, nonlinearity="relu")  # type: ignore[arg-type]
        for _ in range(3):
            layers += [_upsampling(num_classes), nn.ReLU(), nn.PixelShuffle(2)]
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        """Compute logits."""
        logits: Tensor = self.layers(features)
        return logits


def _upsampling(channels: int) -> nn.Conv2d:
    """Make the convolution of a pixel shuffle whose four positions start equal (ICNR)."""
    layer = nn.Conv2d(channels, 4 * channels, 1)
    with torch.no_grad():
        kernel = torch.empty(channels, channels, 1, 1)
        nn.init.kaiming_normal_(kernel)
        layer.weight.copy_(kernel.repeat_interleave(4, 0))
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


def _perturb(kind: str, features: Tensor, foreground: Tensor | None, decoder: Callable[[Tensor], Tensor]) -> Tensor:
    if kind == "dropout":
        return channel_dropout(features, 0.5)
    if kind == "adversarial":
        return features + adversarial_direction(decoder, features)
    if kind == "drop":
        return feature_drop(features)
    if kind == "noise":
        return feature_noise(features)
    assert foreground is not None
    change = {"cutout": guided_cutout, "context": mask_context, "objects": mask_objects}[kind]
    return change(features, foreground)


def _deepest(output: Any, name: str) -> Tensor:
    """Return the last feature map in the output of a backbone."""
    if isinstance(output, Tensor) and output.ndim == 4:
        return output
    values = list(output.values()) if isinstance(output, Mapping) else output
    for value in reversed(values if isinstance(values, (list, tuple)) else []):
        if isinstance(value, (list, tuple, Mapping)) or (isinstance(value, Tensor) and value.ndim == 4):
            return _deepest(value, name)
    raise NetworkError(
        f"the {name} of the network returns no feature map (B, C, h, w); name a submodule that does: "
        "CCT(network, backbone=...)"
    )
