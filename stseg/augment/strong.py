"""Strong augmentation of pseudo-labeled images, a batch at a time on the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from kornia.color import rgb_to_grayscale
from torch import Generator, Tensor, nn

from stseg.augment._settings import check_batch, may_read, ordered_range, uniform
from stseg.augment.cutout import Cutout
from stseg.checks import check_probability

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


class StrongParameters(NamedTuple):
    """Random parameters of one call of :class:`StrongAugment`, on the device of the images."""

    jitter: Tensor
    """``(B,)`` bool: images to jitter."""
    order: Tensor
    """``(B, 4)`` int64: order of the operations: 0 brightness, 1 contrast, 2 saturation, 3 hue; disabled ones last."""
    factors: Tensor
    """``(B, 4)`` float32: factors of brightness, contrast and saturation, and the shift of hue in turns."""
    gray: Tensor
    """``(B,)`` bool: images to convert to grayscale."""
    blur: Tensor
    """``(B,)`` bool: images to blur."""
    sigma: Tensor
    """``(B,)`` float32: standard deviation of the blur in pixels."""
    boxes: Tensor | None
    """``(B, 4)`` int64: the cutout's top, left, bottom and right, half-open; ``None`` without cutout."""
    noise: Tensor | None
    """``(B, C, H, W)`` float32 in [0, 1): noise that fills the cutout, on a CPU 0 outside; ``None`` without cutout."""
    invert: Tensor | None
    """``(B,)`` bool: images to invert; ``None`` for none."""


class StrongAugment(nn.Module):
    """Strong data augmentations (SDA) of ST: color jitter, gray, blur and cutout, for a whole batch on its device.

    Every draw is per image, the order of the four color operations included. Brightness multiplies, contrast
    blends with the mean of the gray image, saturation blends with the gray image (a factor of 1 is the identity),
    hue rotates the color circle; results are clamped to [0, 1] as in PIL. Images must therefore be in [0, 1], not
    normalized. For images without three channels, hue, saturation and gray are skipped, and contrast uses the mean
    over channels.

    ``invert_p``, which the paper does not have, inverts images (``1 - x``) before all else. Where objects are brighter
    than their surroundings in some images and darker in others, as in microscopy of several stains, a network that
    has masks of one kind learns the other so.

    On a CPU, each image is given only what was drawn for it. Elsewhere, and in a graph that is compiled, no value is
    read: no host synchronization and no data-dependent control flow. Computes in float32 (float64 for float64 images)
    regardless of autocast; no gradients flow through it.

    Args:
        jitter: strengths of brightness, contrast, saturation (factors from ``max(0, 1 - s)`` to ``1 + s``) and hue
            (shifts from ``-s`` to ``s`` of the full circle, at most 0.5).
        jitter_p: probability of the color jitter.
        gray_p: probability of the conversion to grayscale.
        blur_p: probability of the Gaussian blur; the Gaussian is integrated over each pixel.
        blur_sigma: smallest and largest standard deviation in pixels.
        cutout: settings of the cutout; ``None`` for none.
        invert_p: probability of the inversion.

    Shape:
        images ``(B, C, H, W)`` float, masks ``(B, H, W)`` integer, where ``(B,)`` bool -> images and masks of
        the same shapes and dtypes. Rows where ``where`` is False are returned unchanged; the input is not modified.

    Raises:
        ValueError: if a setting is out of its range; when called, if shapes do not match, images are not in [0, 1]
            (on a GPU only at the first call) or the cutout's ignore index does not fit into the dtype of the masks.
        TypeError: when called, if images are not float, masks not integer or ``where`` not bool.

    Example:
        >>> strong = StrongAugment()
        >>> images, masks = torch.rand(2, 3, 33, 40), torch.zeros(2, 33, 40, dtype=torch.uint8)
        >>> new_images, new_masks = strong(images, masks, torch.tensor([True, False]))
        >>> bool((new_images[1] == images[1]).all())
        True
    """

    def __init__(
        self,
        *,
        jitter: Sequence[float] = (0.5, 0.5, 0.5, 0.25),
        jitter_p: float = 0.8,
        gray_p: float = 0.2,
        blur_p: float = 0.5,
        blur_sigma: tuple[float, float] = (0.1, 2.0),
        cutout: Cutout | None = Cutout(),  # noqa: B008  frozen, so sharing it does no harm
        invert_p: float = 0.0,
    ) -> None:
        super().__init__()
        four = isinstance(jitter, Sequence) and len(jitter) == 4
        if not (four and all(0 <= strength < math.inf for strength in jitter) and jitter[HUE] <= 0.5):
            raise ValueError(
                f"jitter is {jitter!r}; expected brightness, contrast and saturation >= 0 and hue in [0, 0.5]"
            )
        for name, p in (("jitter_p", jitter_p), ("gray_p", gray_p), ("blur_p", blur_p), ("invert_p", invert_p)):
            check_probability(name, p)
        if cutout is not None and not isinstance(cutout, Cutout):
            raise TypeError(f"cutout is {type(cutout).__name__}; expected a stseg.Cutout or None")
        self.jitter = tuple(float(strength) for strength in jitter)
        self.jitter_p, self.gray_p, self.blur_p, self.invert_p = jitter_p, gray_p, blur_p, invert_p
        self.blur_sigma = ordered_range("blur_sigma", blur_sigma, low=0.0)
        self.cutout = cutout
        self._checked_on: set[str] = set()  # devices other than the CPU

    def forward(
        self,
        images: Tensor,
        masks: Tensor,
        where: Tensor | None = None,
        *,
        generator: Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw and transform; see the class."""
        check_batch(images, masks, where, self._checked_on)
        return self.transform(images, masks, self.draw(images, generator), where)

    def draw(self, images: Tensor, generator: Generator | None = None) -> StrongParameters:
        """Draw everything for a batch ``(B, C, H, W)``, from ``generator`` or the default one of the device."""
        batch = len(images)
        place: dict[str, Any] = {"generator": generator, "device": images.device}
        keys = torch.rand(batch, 4, **place)
        factors = torch.rand(batch, 4, **place)
        for operation, strength in enumerate(self.jitter):
            low, high = (-strength, strength) if operation == HUE else (max(0.0, 1 - strength), 1 + strength)
            factors[:, operation] = uniform(factors[:, operation], low, high)
            if operation not in self._operations(images):
                keys[:, operation] = 2.0
        jitter, gray, blur, sigma = torch.rand(4, batch, **place)
        boxes, noise = self.cutout.draw(images, generator) if self.cutout is not None else (None, None)
        return StrongParameters(
            jitter=jitter < self.jitter_p,
            order=keys.argsort(1),
            factors=factors,
            gray=gray < self.gray_p,
            blur=blur < self.blur_p,
            sigma=uniform(sigma, *self.blur_sigma),
            boxes=boxes,
            noise=noise,
            invert=torch.rand(batch, **place) < self.invert_p if self.invert_p > 0 else None,
        )

    @torch.no_grad()
    def transform(
        self, images: Tensor, masks: Tensor, parameters: StrongParameters, where: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Apply parameters that :meth:`draw` returned for images of this shape; deterministic."""
        check_batch(images, masks, where)
        if len(parameters.jitter) != len(images):
            raise ValueError(f"parameters are for {len(parameters.jitter)} images, but there are {len(images)}")
        if parameters.noise is not None and parameters.noise.shape != images.shape:
            raise ValueError(
                f"parameters are for images of shape {tuple(parameters.noise.shape)}, not {tuple(images.shape)}"
            )
        device = images.device.type
        with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
            transform = self._transform_chosen if may_read(images) else self._transform_all
            images = transform(images, parameters, where)
        if self.cutout is None or parameters.boxes is None or parameters.noise is None:
            return images, masks.clone()
        return self.cutout.transform(images, masks, parameters.boxes, parameters.noise, where)

    def _transform_chosen(self, images: Tensor, drawn: StrongParameters, where: Tensor | None) -> Tensor:
        """Give each image only what was drawn for it.

        For a CPU, where reading what was drawn costs nothing, and where one image at a time stays in the cache.
        """
        new = images.clone()
        dtype = torch.promote_types(images.dtype, torch.float32)
        orders = drawn.order[:, : len(self._operations(images))].tolist()
        factors, turns = drawn.factors.tolist(), _turn_weights(drawn.factors[:, HUE].to(dtype))
        weights = self._weights(drawn.sigma.to(dtype))
        reaches = (weights > 0).sum(1).tolist()  # the others are 0 in this precision
        flags = zip((drawn.jitter, drawn.gray, drawn.blur), self._steps(images), strict=True)
        jitter, gray, blur = ((chosen & possible).tolist() for chosen, possible in flags)
        invert = [False] * len(images) if drawn.invert is None else drawn.invert.tolist()
        rows = [True] * len(images) if where is None else where.tolist()
        for i, row in enumerate(slice(i, i + 1) for i in range(len(images))):
            if not (rows[i] and (invert[i] or jitter[i] or gray[i] or blur[i])):
                continue
            x = images[row].to(dtype, memory_format=torch.contiguous_format)
            if invert[i]:
                x = 1 - x
            for operation in orders[i] if jitter[i] else ():
                if operation == HUE:
                    x = _turned(x, turns[row])
                else:
                    x = _blended(x, _other(x, operation), factors[i][operation])
            if gray[i]:
                x = _grayed(x)
            if blur[i]:
                x = _blurred(x, weights[row, : reaches[i]])
            new[row] = x
        return new

    def _transform_all(self, images: Tensor, drawn: StrongParameters, where: Tensor | None) -> Tensor:
        """Compute everything for all images and choose afterwards: no value is read, so a GPU never waits."""
        x = images.to(torch.promote_types(images.dtype, torch.float32))
        jitter, gray, blur = self._steps(images)
        if drawn.invert is not None:
            x = torch.where(_column(drawn.invert), 1 - x, x)
        if jitter:
            x = torch.where(_column(drawn.jitter), self._jittered(x, drawn.order, drawn.factors.to(x.dtype)), x)
        if gray:
            x = torch.where(_column(drawn.gray), _grayed(x), x)
        if blur:
            x = torch.where(_column(drawn.blur), _blurred(x, self._weights(drawn.sigma.to(x.dtype))), x)
        x = x.to(images.dtype)
        if where is not None:
            x = torch.where(_column(where), x, images)
        return x.clone() if x is images else x

    def _steps(self, images: Tensor) -> tuple[bool, bool, bool]:
        """Return whether there are jitter, gray and blur at all."""
        return (
            self.jitter_p > 0 and bool(self._operations(images)),
            self.gray_p > 0 and images.shape[1] == 3,
            self.blur_p > 0,
        )

    def _weights(self, sigma: Tensor) -> Tensor:
        return _pixel_gaussian(sigma, max(6, math.ceil(3 * self.blur_sigma[1])))

    def _operations(self, images: Tensor) -> list[int]:
        """Return the color operations that are enabled and that the number of channels allows."""
        possible = range(4) if images.shape[1] == 3 else (BRIGHTNESS, CONTRAST)
        return [operation for operation in possible if self.jitter[operation] > 0]

    def _jittered(self, x: Tensor, order: Tensor, factors: Tensor) -> Tensor:
        """Apply all operations in each image's own order, with the hue, the most expensive, in one pass.

        An image whose hue comes third does two operations before the common pass and one after it; in the other
        rounds its factor is 1, which is the identity.
        """
        operations = self._operations(x)
        if HUE not in operations:
            for turn in range(len(operations)):
                x = _blended_each(x, order[:, turn], factors)
            return x
        hue_turn = (order == HUE).int().argmax(1)
        for turn in range(len(operations) - 1):
            x = _blended_each(x, order[:, turn], factors, turn < hue_turn)
        x = _turned(x, _turn_weights(factors[:, HUE]))
        for turn in range(1, len(operations)):
            x = _blended_each(x, order[:, turn], factors, turn > hue_turn)
        return x

    def extra_repr(self) -> str:
        """Return the settings for ``repr``."""
        names = ("jitter", "jitter_p", "gray_p", "blur_p", "blur_sigma", "cutout", "invert_p")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


def _blended(x: Tensor, other: Tensor, factor: Tensor | float) -> Tensor:
    """Blend with another image or color or, with a factor above 1, move away from it."""
    return torch.lerp(other, x, factor).clamp_(0, 1)


def _other(x: Tensor, operation: int) -> Tensor:
    """Return what an operation blends with: black, the mean of the gray image or the gray image."""
    if operation == BRIGHTNESS:
        return x.new_zeros(1, 1, 1, 1)
    return _gray(x.mean((2, 3), keepdim=True) if operation == CONTRAST else x)


def _blended_each(x: Tensor, operation: Tensor, factors: Tensor, active: Tensor | None = None) -> Tensor:
    """Apply brightness, contrast or saturation, chosen for each image, or, where not active, nothing."""
    factor = factors.gather(1, operation[:, None])[:, 0]
    if active is not None:
        factor = torch.where(active, factor, 1.0)
    gray = _gray(x)
    level = gray.mean((1, 2, 3), keepdim=True) * _column(operation == CONTRAST)
    return _blended(x, gray.mul_(_column(operation == SATURATION)).add_(level), _column(factor))


def _gray(x: Tensor) -> Tensor:
    """Return the gray images ``(B, 1, H, W)``, as PIL weighs the channels; if they are not three, their mean."""
    return rgb_to_grayscale(x) if x.shape[1] == 3 else x.mean(1, keepdim=True)


def _grayed(x: Tensor) -> Tensor:
    return _gray(x).expand_as(x)


def _turn_weights(turns: Tensor) -> Tensor:
    """Return the weights ``(B, 4)`` of :func:`_turned` that shift the hue by fractions of the full circle.

    A shift by a third exchanges the channels; what is left is up to a sixth in either direction.
    """
    thirds = (turns * 3).round()
    rest = turns * 6 - 2 * thirds
    own, following, preceding = torch.ones_like(rest), 2 * (-rest).relu() - 1, 2 * rest.relu() - 1
    places = (torch.arange(3, device=turns.device) + thirds[:, None].long()) % 3
    channels = torch.stack((own, following, preceding), 1).gather(1, places)
    return torch.cat((channels, 1 - rest.abs()[:, None]), 1)


def _turned(x: Tensor, weights: Tensor) -> Tensor:
    """Shift the hue of HSV, which leaves the largest and the smallest channel of a pixel as they are.

    Between these two, a channel shifted by ``0 <= t <= 1`` sixths of the circle is linear in the color, and it is cut
    off where it leaves them: ``R' = clamp((1 - t) * (max + min) + R - G + (2 * t - 1) * B, min, max)``; the same with
    the channels exchanged in turn for G and B, and with G and B exchanged for shifts backwards. So neither hue nor
    saturation is computed, nothing is divided and no case is told from another.
    """
    same, following, preceding, both = weights[:, :, None, None, None].unbind(1)
    red, green, blue = torch.split(x, 1, 1)
    high, low = torch.maximum(torch.maximum(red, green), blue), torch.minimum(torch.minimum(red, green), blue)
    again = torch.cat((green, blue, red, green), 1)
    x = torch.addcmul((high + low).mul_(both), x, same)
    x.addcmul_(again[:, :3], following).addcmul_(again[:, 1:], preceding)
    return torch.clamp(x, low, high)


def _pixel_gaussian(sigma: Tensor, radius: int) -> Tensor:
    """Integrate a Gaussian for each ``sigma`` over the pixels at distances 0 to ``radius`` from its center.

    The weights ``(B, radius + 1)`` add up to 1 over both sides. A Gaussian sampled at the centers of pixels hardly
    blurs at a small sigma: at 0.3 its center weight is 0.99 in place of 0.90.
    """
    edges = torch.arange(radius + 1, device=sigma.device, dtype=sigma.dtype) + 0.5
    within = torch.erf(edges / (math.sqrt(2) * sigma)[:, None])
    sides = within.diff(dim=1) / 2
    return torch.cat([within[:, :1], sides], 1) / within[:, -1:]


def _blurred(x: Tensor, weights: Tensor) -> Tensor:
    """Blur each image along both axes, repeating the border, with its own ``weights`` for distances 0, 1, and so on.

    A sum of weighted slices: kornia's ``gaussian_blur2d`` is as fast but reads sigma back to the host, and its
    ``filter2d_separable`` does not but takes, on a CPU, two to five times as long at usual crop sizes.
    """
    radius = weights.shape[1] - 1
    center, *sides = weights[:, :, None, None, None].unbind(1)
    for axis, padding in ((-1, (radius, radius, 0, 0)), (-2, (0, 0, radius, radius))):
        size = x.shape[axis]
        padded = F.pad(x, padding, mode="replicate")
        x = x * center
        for distance, weight in enumerate(sides, 1):
            pair = padded.narrow(axis, radius - distance, size) + padded.narrow(axis, radius + distance, size)
            x.addcmul_(pair, weight)
    return x


def _column(x: Tensor) -> Tensor:
    return x[:, None, None, None]
