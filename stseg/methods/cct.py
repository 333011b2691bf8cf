"""Cross-consistency training."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stseg.checks import check_count, check_nonnegative
from stseg.engine.method import Batch, Losses, Method
from stseg.functional import connected_components, sigmoid_rampup, squared_difference, supervised_loss
from stseg.models.segmenter import as_segmenter
from stseg.modules import (
    PixelShuffleDecoder,
    adversarial_perturbation,
    channel_dropout,
    deepest_features,
    feature_drop,
    feature_noise,
    guided_cutout,
)
from stseg.types import Criterion

DECODERS: Mapping[str, int] = {
    "feature_noise": 6,
    "feature_drop": 6,
    "dropout": 6,
    "cutout": 6,
    "context": 2,
    "objects": 2,
    "adversarial": 2,
}
"""How many auxiliary decoders the authors train for each perturbation."""

_NEED_OBJECTS = ("cutout", "context", "objects")


class CCT(Method):
    """CCT (Ouali et al., CVPR 2020, section 3): auxiliary decoders that see perturbed features agree with the network.

    Let z be the features of the unlabeled images, and g_1, ..., g_n auxiliary decoders, each with one of seven
    perturbations:

    ``L = Ls + weight * r(t) * mean over i of mean((softmax(g_i(perturbed z)) - softmax(network))^2)``,

    where the inner mean is over classes and valid pixels, and ``r(t) = exp(-5 (1 - t / rampup)^2)`` rises from near 0
    to 1 in the first ``rampup`` of the training. The network's own predictions are constants in the second term, so
    its decoder learns from masks alone, the encoder and the auxiliary decoders from both terms. The perturbations
    (section 3.3, with the authors' values):

    - ``feature_noise`` (F-Noise): noise in proportion to the features, up to 0.3; ``feature_drop`` (F-Drop): the
      positions above a share of 0.7 to 0.9 of the largest attention are zeroed; ``dropout`` (DropOut): half of the
      channels are zeroed;
    - ``cutout`` (G-Cutout): a rectangle of 0.4 of the box around every predicted object is zeroed; ``context``
      (Con-Msk): all but the objects is zeroed; ``objects`` (Obj-Msk): the objects are zeroed;
    - ``adversarial`` (I-VAT): a change of length 2 in the direction in which the decoder's prediction changes most.

    As in the authors' code, labeled and unlabeled images have forward passes of their own, and the decoders are
    :class:`stseg.modules.PixelShuffleDecoder`, but for the last ReLU. What differs:

    - z is the deepest map that the backbone returns, or the output of the submodule that ``features`` names; the
      authors' z comes from a pyramid pooling at stride 8. Predictions are resized to the image, where they are
      compared, since networks differ in their stride.
    - Padded pixels do not count.
    - Objects are found on the grid of the features: connected positions that are not background. The authors trace
      contours of more than 50 points on the prediction; here a rectangle of less than half a position is none.
    - The adversarial direction is computed exactly; see :func:`stseg.modules.adversarial_perturbation`.
    - The share of ``feature_drop`` is drawn from 0.7 to 0.9, and the length of the adversarial change is 2; versions of
      the authors' code with other values are known (from 0.6, and 10: not checked).

    Args:
        network: a network, bare or in a :class:`stseg.Segmenter`.
        num_classes: number of classes, 2 for a network with one logit.
        channels: channels of z.
        features: dotted name of the submodule of the network that returns z; None uses the backbone.
        upsampling: factor of the sides in an auxiliary decoder, a power of 2.
        decoders: number of auxiliary decoders by perturbation; what is not named has none.
        background: the class that is no object; None if there is none: ``cutout``, ``context`` and ``objects`` are
            left out.
        weight: final weight of the consistency.
        rampup: share of the training until the final weight is reached; 0 for no ramp-up.
        loss: supervised loss, ``(logits, masks) -> scalar``; None for cross-entropy.

    Logged: ``supervised``, ``consistency`` (unweighted).

    Raises:
        ValueError: if a setting is out of its range, or ``decoders`` names something else than the seven; when
            called, if ``num_classes`` or ``channels`` does not match.
        NetworkError: when called, if the network has no backbone whose features can be used; names it.

    Example:
        >>> import segmentation_models_pytorch as smp
        >>> network = smp.FPN("tu-test_resnet", encoder_weights=None, classes=2)
        >>> method = CCT(network, num_classes=2, channels=network.encoder.out_channels[-1])
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
        channels: int,
        features: str | None = None,
        upsampling: int = 8,
        decoders: Mapping[str, int] = DECODERS,
        background: int | None = 0,
        weight: float = 30.0,
        rampup: float = 0.1,
        loss: Criterion | None = None,
    ) -> None:
        super().__init__()
        check_count("num_classes", num_classes, least=2)
        check_count("channels", channels)
        check_count("upsampling", upsampling)
        check_nonnegative("weight", weight)
        check_nonnegative("rampup", rampup)
        self.kinds = _kinds(decoders, background, num_classes)
        self.model = as_segmenter(network)
        self.decoders = nn.ModuleList(PixelShuffleDecoder(channels, num_classes, upsampling) for _ in self.kinds)
        self.num_classes, self.channels, self.features, self.background = num_classes, channels, features, background
        self.weight, self.rampup, self.loss = weight, rampup, loss

    def forward(self, batch: Batch) -> Losses:
        """Compute the losses; see the class."""
        labeled = self.model(batch.images)
        supervised = supervised_loss(labeled, batch.masks, loss=self.loss, ignore_index=batch.ignore_index)
        with deepest_features(self.model, features=self.features) as found:
            unlabeled = self.model(batch.unlabeled)
        z, size = found[-1]
        self._check_sizes(unlabeled, z)

        target = unlabeled.detach().softmax(1)
        objects = None if self.background is None else _on_grid(target.argmax(1) != self.background, size, z)
        perturb = perturbations(z, objects)
        differences = []
        for kind, decoder in zip(self.kinds, self.decoders, strict=True):
            prediction = _on_images(decoder(perturb[kind](decoder)), size, unlabeled).softmax(1)
            differences.append(squared_difference(prediction, target, where=batch.valid))
        consistency = torch.stack(differences).mean()

        weight = self.weight * sigmoid_rampup(batch.step, self.rampup * batch.steps)
        logged = {"supervised": supervised.detach(), "consistency": consistency.detach()}
        return Losses(supervised + weight * consistency, logged)

    def _check_sizes(self, logits: Tensor, z: Tensor) -> None:
        if logits.shape[1] != self.num_classes:
            raise ValueError(f"num_classes is {self.num_classes}, but the network gives {logits.shape[1]} classes")
        if z.shape[1] != self.channels:
            raise ValueError(f"channels is {self.channels}, but the network gives {z.shape[1]} channels of features")


def perturbations(z: Tensor, objects: Tensor | None) -> dict[str, Callable[[nn.Module], Tensor]]:
    """Return the perturbations of features by name: functions of the decoder that will see the result.

    Args:
        z: ``(B, C, h, w)``, the features.
        objects: ``(B, h, w)`` bool, the positions of objects; None leaves out the three that need them.

    Example:
        >>> z, objects = torch.ones(1, 1, 1, 2), torch.tensor([[[True, False]]])
        >>> [perturbations(z, objects)[name](nn.Identity()).flatten().tolist() for name in ("context", "objects")]
        [[1.0, 0.0], [0.0, 1.0]]
    """
    found: dict[str, Callable[[nn.Module], Tensor]] = {
        "feature_noise": lambda decoder: feature_noise(z, 0.3),
        "feature_drop": lambda decoder: feature_drop(z, 0.7, 0.9),
        "dropout": lambda decoder: channel_dropout(z, 0.5),
        "adversarial": lambda decoder: z + adversarial_perturbation(decoder, z, length=2.0),
    }
    if objects is not None:
        components = connected_components(objects)
        found["cutout"] = lambda decoder: guided_cutout(z, components, share=0.4)
        found["context"] = lambda decoder: z * objects[:, None]
        found["objects"] = lambda decoder: z * ~objects[:, None]
    return found


def _on_grid(masks: Tensor, size: tuple[int, int], z: Tensor) -> Tensor:
    """Pad masks to the size that the features z cover, with False, and reduce them to positions of z."""
    bottom, right = size[0] - masks.shape[1], size[1] - masks.shape[2]
    padded = F.pad(masks.float(), (0, right, 0, bottom))
    return F.interpolate(padded[:, None], size=z.shape[-2:], mode="nearest")[:, 0] > 0


def _on_images(logits: Tensor, size: tuple[int, int], images: Tensor) -> Tensor:
    """Resize logits to the size that they cover, and crop them to the images."""
    height, width = images.shape[-2:]
    return F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)[..., :height, :width]


def _kinds(decoders: Mapping[str, int], background: int | None, num_classes: int) -> tuple[str, ...]:
    """Return the perturbation of each decoder."""
    if background is not None:
        check_count("background", background, least=0)
        if background >= num_classes:
            raise ValueError(f"background is {background}; expected one of the {num_classes} classes, or None")
    if not isinstance(decoders, Mapping):
        raise TypeError(f"decoders is {decoders!r}; expected the number of decoders by perturbation, as in DECODERS")
    for name, number in decoders.items():
        if name not in DECODERS:
            raise ValueError(f"decoders has the key {name!r}; expected some of {', '.join(DECODERS)}")
        check_count(f"decoders[{name!r}]", number, least=0)
    left_out = _NEED_OBJECTS if background is None else ()
    kinds = tuple(name for name, number in decoders.items() if name not in left_out for _ in range(number))
    if not kinds:
        raise ValueError(f"decoders is {dict(decoders)} and background {background}; expected at least one decoder")
    return kinds
