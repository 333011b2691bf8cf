"""Any network as a map from images to logits of the images' size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stseg.errors import NetworkError
from stseg.models.state import device_of, frozen

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Segmenter(nn.Module):
    """Wraps a network so that images go in and logits of the same height and width come out.

    Normalises, pads right and bottom up to a multiple of the network's stride (by repeating the border), picks
    the logits out of what the network returns, and resizes or crops them back to the image. Everything in stseg
    accepts a bare network and wraps it in this with its defaults.

    Args:
        network: any module that maps ``(B, C, H, W)`` float images to logits ``(B, K, h, w)``, whether alone, first
            in a tuple or list, under ``"out"`` or ``"logits"`` in a mapping, or as an attribute ``.logits``.
        mean: per channel, subtracted from images in [0, 1]. One value serves all channels; ``None`` for networks that
            normalise for themselves. The default is ImageNet's, which with other than 3 channels gives every channel
            the average of the three.
        std: likewise, what the difference is divided by.
        stride: what the sides must be divisible by. Read off networks of segmentation_models_pytorch; of
            others found by trial on a small input, the first time an image comes whose sides 64 does not divide.
        select: ``output -> logits``, for networks that return them in yet another way.

    Shape:
        ``(B, C, H, W)`` uint8 or float in [0, 1] -> ``(B, K, H, W)`` float32 logits (float64 from a float64
        network). Any ``H`` and ``W``.

    Raises:
        NetworkError: if what the network returns is no batch of logits.

    Example:
        >>> net = Segmenter(nn.Conv2d(3, 5, kernel_size=3, stride=4, padding=1))
        >>> net(torch.zeros(2, 3, 97, 33, dtype=torch.uint8)).shape
        torch.Size([2, 5, 97, 33])
    """

    takes_images = True
    """What tells ``as_segmenter`` that a module is already in this form."""

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
        if (mean is None) != (std is None):
            raise ValueError("mean and std go together: give both, or None for both")
        if stride is not None and stride < 1:
            raise ValueError(f"stride is {stride}; expected 1 or more")
        self.network = network
        self.mean = None if mean is None else tuple(float(v) for v in mean)
        self.std = None if std is None else tuple(float(v) for v in std)
        if self.mean is not None and self.std is not None:
            if len(self.mean) != len(self.std) or not self.mean:
                raise ValueError(f"mean has {len(self.mean)} values and std {len(self.std)}; expected as many")
            if min(self.std) <= 0:
                raise ValueError(f"std holds {min(self.std)}; expected positive values")
            # Not in the state dict, which stays the network's own.
            self.register_buffer("_mean", torch.tensor(self.mean), persistent=False)
            self.register_buffer("_std", torch.tensor(self.std), persistent=False)
        self.select = select
        self.stride = stride if stride is not None else _stride_told_by(network)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, K, H, W)`` of images ``(B, C, H, W)``."""
        x = self._normalised(images)
        height, width = x.shape[-2:]
        stride = self.stride
        if stride is None and (height % 64 or width % 64):
            stride = self.stride = self._stride_by_trial(x)
        if stride is not None:
            x = _padded_to(x, stride)
        logits = self._logits(x)
        if logits.shape[-2:] != x.shape[-2:]:
            logits = F.interpolate(logits, size=x.shape[-2:], mode="bilinear", align_corners=False)
        return logits[..., :height, :width]

    def extra_repr(self) -> str:
        """What `repr` shows beside the network."""
        return f"mean={self.mean}, std={self.std}, stride={self.stride}"

    def _normalised(self, images: Tensor) -> Tensor:
        if not isinstance(images, Tensor) or images.ndim != 4:
            got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"expected a batch of images (B, C, H, W), got {got}")
        if images.dtype == torch.uint8:
            images = images.float() / 255
        elif not images.is_floating_point():
            raise TypeError(f"images are {images.dtype}; expected uint8, or float in [0, 1]")
        if self.mean is not None:
            images = (images - self._per_channel("mean", images)) / self._per_channel("std", images)
        weight = next(self.network.parameters(), None)
        return images if weight is None or not weight.is_floating_point() else images.to(weight.dtype)

    def _per_channel(self, name: str, images: Tensor) -> Tensor:
        values, channels = getattr(self, f"_{name}"), images.shape[1]
        if len(values) not in (1, channels):
            if getattr(self, name) not in (IMAGENET_MEAN, IMAGENET_STD):
                raise ValueError(f"images have {channels} channels, but {name} has {len(values)}")
            values = values.mean()[None]
        return values.to(images)[:, None, None]

    def _logits(self, x: Tensor) -> Tensor:
        output = self.network(x)
        logits = self.select(output) if self.select is not None else _logits_in(output)
        if not isinstance(logits, Tensor) or logits.ndim != 4 or not logits.is_floating_point():
            raise NetworkError(
                f"the network ({type(self.network).__name__}) returned {_described(logits)} for images of shape "
                f"{tuple(x.shape)}; expected float logits (B, K, h, w) (see select= of stseg.Segmenter)"
            )
        if logits.shape[0] != x.shape[0]:
            raise NetworkError(f"the network returned {logits.shape[0]} results for {x.shape[0]} images")
        return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _stride_by_trial(self, x: Tensor) -> int:
        probe = x.new_zeros(1, x.shape[1], 67, 93)
        with frozen(self.network), torch.no_grad():
            for stride in (1, 2, 4, 8, 16, 32, 64):
                try:
                    self.network(_padded_to(probe, stride))
                except (RuntimeError, ValueError, AssertionError):
                    continue
                return stride
        return 1  # nothing fits the probe: let the network speak for itself on the image


def as_segmenter(model: nn.Module) -> nn.Module:
    """The model itself if it maps images to logits already (a ``Segmenter`` or ``MultiScaleFlip``), else wrapped.

    Example:
        >>> model = as_segmenter(nn.Conv2d(3, 2, 1))
        >>> as_segmenter(model) is model
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a network (torch.nn.Module), got {type(model).__name__}")
    inner = getattr(model, "module", model)  # DistributedDataParallel and DataParallel keep it there
    return model if getattr(inner, "takes_images", False) is True else Segmenter(model).to(device_of(model))


def _stride_told_by(network: nn.Module) -> int | None:
    # segmentation_models_pytorch: what its `check_input_shape` asks for.
    stride = getattr(getattr(network, "encoder", None), "output_stride", None)
    return stride if isinstance(stride, int) and stride > 0 else None


def _padded_to(x: Tensor, stride: int) -> Tensor:
    bottom, right = -x.shape[-2] % stride, -x.shape[-1] % stride
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
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
