"""Wrapper of any network that maps images to logits of the same size."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import UninitializedParameter

from stseg.checks import check_image_range
from stseg.description import describe
from stseg.errors import NetworkError
from stseg.models import symbolic
from stseg.models._select import check_select, part_of, refuse_local
from stseg.models.sides import Sides, find_sides, scale_of
from stseg.models.state import bare_network, device_of, evaluating, place_channels_first
from stseg.models.symbolic import is_traced

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_WAYS_OUT = (
    "Where its sides must be multiples of a number: stseg.Segmenter(network, stride=32); where a ViT of timm takes one "
    "size: dynamic_img_size=True; where convolutions lose the border: padding; where the output is larger than the "
    "image: select=lambda output: torch.nn.functional.avg_pool2d(output, 2)"
)


class Segmenter(nn.Module):
    """Wrapper that makes a network map images to logits of the same height and width.

    Normalizes, pads right and bottom to a multiple of the network's stride (by repeating the border),
    selects the logits in the network's output, scales them by the integer that covers the padded image, and crops them
    to the image. All functions of stseg accept a bare network and wrap it with the defaults.

    A network that returns one channel ``z``, the foreground logit, has two classes: its logits are
    ``(0, z)``. Their softmax is the sigmoid of ``z``, their cross-entropy its binary cross-entropy, and their arg max
    is 1 where the sigmoid is above 0.5.

    Args:
        network: any module that maps ``(B, C, H, W)`` float images to logits ``(B, K, h, w)``, whether alone,
            the only map in a tuple or list, under ``"out"`` or ``"logits"`` in a mapping, or as an attribute
            ``.logits``. ``network`` of the wrapper, and its weights, are those inside ``torch.compile`` and
            ``DataParallel``, which are still what runs.
        mean: per channel, subtracted from images in [0, 1]. One value applies to all channels; ``None`` for
            networks that normalize their input. The default is ImageNet's; for images without 3 channels,
            every channel uses the average of the three.
        std: per channel, divides the difference; likewise.
        stride: number that the sides must be divisible by. ``None`` determines it by trial on small inputs at
            the first call, starting from the output stride that the network reports (as networks of
            segmentation_models_pytorch do): the smallest one at which the output, scaled by one integer, covers the
            padded image.
        select: which part of the network's output the logits are, where it is not found: the place in a tuple or list
            (``0``, ``-1``), the key of a mapping or name of an attribute (``"classes"``), or a function
            ``output -> logits``. With a place or a name, an output that is a single tensor is taken as it is: many
            networks return several maps only in training. A model whose ``select`` is a lambda cannot be pickled, as
            by ``torch.save``.

    In ``torch.export`` and ``torch.jit.trace`` it records operations that are right for images of other sizes too;
    which sides the network takes must be known by then, from an earlier call or ``stride``.

    Shape:
        ``(B, C, H, W)`` uint8 or float in [0, 1], on any device -> ``(B, K, H, W)`` float32 logits (float64 from a
        float64 network) on the network's device, K at least 2. Any H and W.

    Raises:
        NetworkError: if the network has lazy layers without a shape; when called, if the network does not return a
            batch of logits, returns several, has nothing at the place or under the name ``select``, or logits that,
            scaled by one integer, do not cover the image; when exported, if it is not known which sides the network
            takes.
        TypeError: if ``select`` is none of these; when pickled, if it is a lambda or a function inside another one.
        ValueError: when called, if float images are not in [0, 1] (on a GPU only at the first call).

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
        select: Callable[[Any], Tensor] | int | str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise TypeError(f"network is {type(network).__name__}; expected a torch.nn.Module")
        if takes_images(network):
            raise ValueError(f"network is a {type(network).__name__}, which takes images as they are")
        if any(isinstance(parameter, UninitializedParameter) for parameter in network.parameters()):
            raise NetworkError(
                f"the network ({type(network).__name__}) has lazy layers without a shape; expected one that was called "
                "once, such as network(torch.zeros(1, 3, 64, 64))"
            )
        if stride is not None and stride < 1:
            raise ValueError(f"stride is {stride}; expected 1 or more")
        if (mean is None) != (std is None):
            raise ValueError("mean and std go together: give both, or None for both")
        check_select(select)
        bare = bare_network(network)
        self.network = bare
        # In a tuple: not a submodule, so that the weights keep the names of the bare network.
        self._outer = () if bare is network else (network,)
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
        self._sides = None if stride is None else Sides(stride, 1)
        self._sizes: set[tuple[int, int]] = set()  # that a network takes for which no sides are found
        self._trying = False
        self._checked_on: set[str] = set()  # devices other than the CPU
        self._rows_per_image = 1  # more inside stseg.modules.perturbed_features
        self._hooks = _count_hooks(bare)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(B, C, H, W)`` to logits ``(B, K, H, W)``."""
        if is_traced():
            return self._traced(images)
        x = self._normalized(images)
        height, width = x.shape[-2:]
        if self._sides is None and (height, width) not in self._sizes:
            self._find_sides(x)
        x = x if self._sides is None else _padded(x, self._sides)
        logits = self._logits(x)
        if logits.shape[-2:] != x.shape[-2:]:
            if scale_of(x.shape, logits.shape) is None:
                raise NetworkError(self._no_sides(_output(x, logits)))
            logits = F.interpolate(logits, size=x.shape[-2:], mode="bilinear", align_corners=False)
        # Not a slice of the whole, which would copy its gradient.
        return logits if logits.shape[-2:] == (height, width) else logits[..., :height, :width]

    def _traced(self, images: Tensor) -> Tensor:
        """Compute the same by operations that are right at all sizes, for an exporter that records them."""
        if self._sides is None:
            raise NetworkError(
                f"the network ({type(self.network).__name__}) is exported for any size, but which sides it takes is "
                "not known; expected a Segmenter that was called once before it is exported, model(images), or that "
                "has been given it: stseg.Segmenter(network, stride=32)"
            )
        x = self._normalized(images)
        padded = symbolic.pad(x, self._sides)
        with symbolic.AveragePooling():
            logits = self._logits(padded)
        if not symbolic.is_same_size(logits, padded):
            if scale_of(padded.shape, logits.shape) is None:
                raise NetworkError(self._no_sides(_output(padded, logits)))
            logits = F.interpolate(logits, size=padded.shape[-2:], mode="bilinear", align_corners=False)
        return logits if self._sides == Sides(1, 1) else symbolic.crop(logits, like=x)

    def extra_repr(self) -> str:
        """Return the settings for ``repr``."""
        shown = repr(self.select) if isinstance(self.select, (int, str)) else describe(self.select)
        select = "" if self.select is None else f", select={shown}"
        return f"mean={self.mean}, std={self.std}, stride={self.stride}{select}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        refuse_local(self.select)
        return super().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Segmenter:
        made = memo[id(self)] = self.__new__(type(self))
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def __copy__(self) -> Segmenter:
        made = self.__new__(type(self))
        made.__dict__.update(self.__dict__)
        return made

    def _find_sides(self, x: Tensor) -> None:
        """Find the sides that the network takes; if there are none, whether it takes this size."""
        self._trying = True
        try:
            self._sides = find_sides(self.network, self._logits, x)
            if self._sides is None:
                with evaluating(self.network), torch.no_grad():
                    logits = self._logits(x[:1])
                if scale_of(x.shape, logits.shape) is None:
                    raise NetworkError(self._no_sides(_output(x, logits)))
                self._sizes.add((x.shape[-2], x.shape[-1]))
        except NetworkError:
            raise
        except Exception as error:  # libraries raise different types
            raise NetworkError(
                f"the network cannot take an image of shape {tuple(x.shape[1:])}: {error} "
                f"({type(error).__name__} in {type(self.network).__name__}). {_WAYS_OUT}"
            ) from error
        finally:
            self._trying = False

    def _no_sides(self, reason: str) -> str:
        return (
            f"the network ({type(self.network).__name__}) gives no logits that cover its image: {reason}; expected "
            f"logits that cover the padded image when scaled by one integer. {_WAYS_OUT}"
        )

    def _normalized(self, images: Tensor) -> Tensor:
        if not isinstance(images, Tensor) or images.ndim != 4:
            raise ValueError(f"expected a batch of images (B, C, H, W), got {_described(images)}")
        given, images = images, images.to(device_of(self.network), non_blocking=True)
        if images.dtype == torch.uint8:
            images = images.float().div_(255)
        elif not images.is_floating_point():
            raise TypeError(f"images are {images.dtype}; expected uint8, or float in [0, 1]")
        elif not is_traced():
            check_image_range(images, self._checked_on)
        if self.mean is not None:
            images = (images - self._per_channel("mean", images)).div_(self._per_channel("std", images))
        weight = next(self.network.parameters(), None)
        if weight is not None and weight.is_floating_point():
            images = images.to(weight.dtype)
        return images.clone() if images is given else images  # the network may write into them

    def _output(self, network: nn.Module, x: Tensor) -> Any:
        """Run the network; if it views feature maps as channels-first ones, it gets them from then on."""
        try:
            return network(x)
        except RuntimeError as error:
            if "view size is not compatible" not in str(error) or not place_channels_first(self.network):
                raise
        return network(x)

    def _per_channel(self, name: str, images: Tensor) -> Tensor:
        values: Tensor = getattr(self, f"_{name}")
        if len(values) not in (1, images.shape[1]):
            if getattr(self, name) not in (IMAGENET_MEAN, IMAGENET_STD):
                raise ValueError(f"images have {images.shape[1]} channels, but {name} has {len(values)}")
            values = values.mean()[None]
        return values.to(images)[:, None, None]

    def _selected(self, output: Any) -> Tensor | Any:
        if self.select is None:
            return _logits_in(output)
        return self.select(output) if callable(self.select) else part_of(output, self.select)

    def _logits(self, x: Tensor) -> Tensor:
        network = self.network
        # Hooks that were added later, such as those of stseg.modules.captured, do not reach what is compiled.
        if self._outer and not self._trying and _count_hooks(network) == self._hooks:
            network = self._outer[0]
        output = self._output(network, x)
        logits = self._selected(output)
        rows = x.shape[0] * (1 if self._trying else self._rows_per_image)
        is_map = isinstance(logits, Tensor) and logits.is_floating_point() and logits.ndim == 4
        if not is_map or logits.shape[0] != rows or logits.shape[1] == 0:
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
    """Return the model itself if it is a ``Segmenter``, ``MultiScaleFlip`` or ``Tiled``, else wrap it.

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


def _count_hooks(network: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules())


def _padded(x: Tensor, sides: Sides) -> Tensor:
    bottom, right = (sides.padded(side) - side for side in x.shape[-2:])
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
                f"the network returned a mapping with the keys {list(output)}; expected 'out' or 'logits', or the key "
                f"of the logits, such as stseg.Segmenter(network, select={next(iter(output), 'logits')!r})"
            )
        return output[key]
    if isinstance(output, (tuple, list)) and output:
        maps = list(_maps_in(output))
        if len(maps) > 1:
            shapes = ", ".join(str(tuple(each.shape)) for each in maps)
            raise NetworkError(
                f"the network returned a {type(output).__name__} with {len(maps)} maps, of the shapes {shapes}, any of "
                "which may be the logits; expected one, or its place, such as stseg.Segmenter(network, "
                f"select={_place_of(maps[0], output)}), which takes a single tensor as it is, as of a network that "
                "returns several only in training"
            )
        return maps[0] if maps else output[0]
    return output


def _place_of(found: Tensor, output: Sequence[Any]) -> int:
    """Return the first place that holds a map, or maps."""
    return next(place for place, each in enumerate(output) if any(map_ is found for map_ in _maps_in(each)))


def _maps_in(output: Any) -> Iterator[Tensor]:
    """Yield the tensors of a nested output that may be logits."""
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.ndim in (4, 5):
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _maps_in(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _maps_in(value)


def _output(x: Tensor, logits: Tensor) -> str:
    return f"its output for an image of {x.shape[-2]} x {x.shape[-1]} is {logits.shape[-2]} x {logits.shape[-1]}"


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return type(value).__name__
