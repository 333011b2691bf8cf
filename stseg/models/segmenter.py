"""Wrapper of any network that maps images to logits of the same size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stseg.errors import NetworkError
from stseg.models.state import device_of, evaluating

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Segmenter(nn.Module):
    """Wrapper that makes a network map images to logits of the same height and width.

    Normalizes, pads right and bottom to a multiple of the network's stride (by repeating the border),
    selects the logits in the network's output, and resizes or crops them to the image. All functions of stseg
    accept a bare network and wrap it with the defaults.

    A network that returns one channel ``z``, the foreground logit, has two classes: its logits are
    ``(0, z)``. Their softmax is the sigmoid of ``z``, their cross-entropy its binary cross-entropy, and their arg max
    is 1 where the sigmoid is above 0.5.

    Args:
        network: any module that maps ``(B, C, H, W)`` float images to logits ``(B, K, h, w)``, whether alone,
            first in a tuple or list, under ``"out"`` or ``"logits"`` in a mapping, or as an attribute
            ``.logits``.
        mean: per channel, subtracted from images in [0, 1]. One value applies to all channels; ``None`` for
            networks that normalize their input. The default is ImageNet's; for images without 3 channels,
            every channel uses the average of the three.
        std: per channel, divides the difference; likewise.
        stride: number that the sides must be divisible by. ``None`` determines it by trial on small inputs at
            the first call, starting from the output stride that the network reports (as networks of
            segmentation_models_pytorch do).
        select: ``output -> logits``, for networks that return them in another way.

    Shape:
        ``(B, C, H, W)`` uint8 or float in [0, 1] -> ``(B, K, H, W)`` float32 logits (float64 from a float64
        network), K at least 2. Any H and W.

    Raises:
        NetworkError: when called, if the network does not return a batch of logits.

    Example:
        >>> net = Segmenter(nn.Conv2d(3, 5, kernel_size=3, stride=4, padding=1))
        >>> net(torch.zeros(2, 3, 97, 33, dtype=torch.uint8)).shape
        torch.Size([2, 5, 97, 33])
    """

    takes_images = True
    """Marks modules that ``as_segmenter`` leaves unwrapped."""

    def __init__(
        self,
        network: nn.Module,
        *,
        mean: Sequence[float] | None = IMAGENET_MEAN,
        std: Sequence[float] | None = IMAGENET_STD,
        stride: int | None = None,
        select: Callable[[Any], Tensor] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise TypeError(f"network is {type(network).__name__}; expected a torch.nn.Module")
        if takes_images(network):
            raise ValueError(f"network is a {type(network).__name__}, which takes images as they are")
        if stride is not None and stride < 1:
            raise ValueError(f"stride is {stride}; expected 1 or more")
        if (mean is None) != (std is None):
            raise ValueError("mean and std go together: give both, or None for both")
        self.network = network
        self.mean = None if mean is None else tuple(float(v) for v in mean)
        self.std = None if std is None else tuple(float(v) for v in std)
        if self.mean is not None and self.std is not None:
            if not len(self.mean) == len(self.std) >= 1:
                raise ValueError(f"mean is {self.mean} and std {self.std}; expected as many values in both")
            if not min(self.std) > 0:
                raise ValueError(f"std is {self.std}; expected positive values")
            # Not persistent: the state dict is that of the network.
            device = device_of(network)
            self.register_buffer("_mean", torch.tensor(self.mean, device=device), persistent=False)
            self.register_buffer("_std", torch.tensor(self.std, device=device), persistent=False)
        self.stride = stride
        self.select = select
        self._sides = None if stride is None else (stride, 1)  # stride and least side
        self._rows_per_image = 1  # more inside stseg.modules.perturbed_features

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(B, C, H, W)`` to logits ``(B, K, H, W)``."""
        x = self._normalized(images)
        height, width = x.shape[-2:]
        if self._sides is None:
            self._sides = _sides_by_trial(self.network, x)
        x = _padded(x, *self._sides)
        logits = self._logits(x)
        if logits.shape[-2:] != x.shape[-2:]:
            logits = F.interpolate(logits, size=x.shape[-2:], mode="bilinear", align_corners=False)
        return logits[..., :height, :width]

    def extra_repr(self) -> str:
        """Return the settings for ``repr``."""
        return f"mean={self.mean}, std={self.std}, stride={self.stride}"

    def _normalized(self, images: Tensor) -> Tensor:
        if not isinstance(images, Tensor) or images.ndim != 4:
            raise ValueError(f"expected a batch of images (B, C, H, W), got {_described(images)}")
        if images.dtype == torch.uint8:
            images = images.float() / 255
        elif not images.is_floating_point():
            raise TypeError(f"images are {images.dtype}; expected uint8, or float in [0, 1]")
        if self.mean is not None:
            images = (images - self._per_channel("mean", images)) / self._per_channel("std", images)
        weight = next(self.network.parameters(), None)
        return images if weight is None or not weight.is_floating_point() else images.to(weight.dtype)

    def _per_channel(self, name: str, images: Tensor) -> Tensor:
        values: Tensor = getattr(self, f"_{name}")
        if len(values) not in (1, images.shape[1]):
            if getattr(self, name) not in (IMAGENET_MEAN, IMAGENET_STD):
                raise ValueError(f"images have {images.shape[1]} channels, but {name} has {len(values)}")
            values = values.mean()[None]
        return values.to(images)[:, None, None]

    def _logits(self, x: Tensor) -> Tensor:
        output = self.network(x)
        logits = self.select(output) if self.select is not None else _logits_in(output)
        rows = len(x) * self._rows_per_image
        is_map = isinstance(logits, Tensor) and logits.is_floating_point() and logits.ndim == 4
        if not is_map or len(logits) != rows or logits.shape[1] == 0:
            expected = "float logits (B, K, h, w) (see select= of stseg.Segmenter)"
            if self._rows_per_image != 1:
                expected = (
                    f"{rows} rows of logits, as the features were multiplied (what returns them must be called as a "
                    "module, and no later layer may use the images)"
                )
            raise NetworkError(
                f"the network ({type(self.network).__name__}) returned {_described(logits)} for images of "
                f"shape {tuple(x.shape)}; expected {expected}"
            )
        if logits.shape[1] == 1:
            logits = torch.cat([torch.zeros_like(logits), logits], 1)
        return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def as_segmenter(model: nn.Module) -> nn.Module:
    """Return the model itself if it is a ``Segmenter`` or ``MultiScaleFlip``, else wrap it.

    Example:
        >>> model = as_segmenter(nn.Conv2d(3, 2, 1))
        >>> as_segmenter(model) is model
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a network (torch.nn.Module), got {type(model).__name__}")
    if isinstance(model, DistributedDataParallel):
        model = model.module  # it synchronizes processes at each call, and they may have different numbers of batches
    return model if takes_images(model) else Segmenter(model)


def takes_images(model: nn.Module) -> bool:
    inner = getattr(model, "module", model)  # DistributedDataParallel and DataParallel keep it there
    return getattr(inner, "takes_images", False) is True


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _sides_by_trial(network: nn.Module, x: Tensor) -> tuple[int, int]:
    """Find the smallest stride and the smallest side to which images must be padded for the network."""
    network = getattr(network, "_orig_mod", network)  # torch.compile would recompile for every size
    reported = getattr(getattr(network, "encoder", None), "output_stride", None)
    first = reported if isinstance(reported, int) and reported > 0 else 1

    def takes(height: int, width: int, stride: int) -> bool:
        try:
            network(_padded(x.new_zeros(1, x.shape[1], height, width), stride))
        except Exception:  # libraries raise different types
            return False
        return True

    with evaluating(network), torch.no_grad():
        # Two sides that differ when padded to any stride and are not both multiples of the next one.
        larger = (s for s in (2, 4, 8, 14, 16, 28, 32, 64) if s > first and s % first == 0)  # 14: DINOv2
        stride = next((s for s in (first, *larger) if takes(131, 210, s)), None)
        if stride is None:
            return first, 1  # it takes a single size or no images: let its own error surface
        return stride, next((side for side in (1, 2, 4, 8, 16, 32, 64) if takes(side, side, stride)), 128)


def _padded(x: Tensor, stride: int, least: int = 1) -> Tensor:
    height, width = (max(side, least) + -max(side, least) % stride for side in x.shape[-2:])
    bottom, right = height - x.shape[-2], width - x.shape[-1]
    return F.pad(x, (0, right, 0, bottom), mode="replicate") if bottom or right else x


def _logits_in(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output
    if isinstance(getattr(output, "logits", None), Tensor):
        return output.logits
    if isinstance(output, Mapping):
        key = next((k for k in ("out", "logits") if k in output), None)
        if key is None and len(output) == 1:
            key = next(iter(output))
        if key is None:
            raise NetworkError(
                f"the network returned a mapping with the keys {list(output)}; expected 'out' or 'logits' "
                "(see select= of stseg.Segmenter)"
            )
        return output[key]
    if isinstance(output, (tuple, list)) and output:
        return output[0]
    return output


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return type(value).__name__
