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

from stseg.augment._settings import check_batch, ordered_range, uniform
from stseg.augment.cutout import Cutout
from stseg.checks import check_probability

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
_ELEMENTS_PER_PASS = 2**19


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
    """``(B, C, H, W)`` float32 in [0, 1): noise that fills the cutout; ``None`` without cutout."""


class StrongAugment(nn.Module):
    """Strong data augmentations (SDA) of ST: color jitter, gray, blur and cutout, for a whole batch on its device.

    Every draw is per image, the order of the four color operations included. Brightness multiplies, contrast
    blends with the mean of the gray image, saturation blends with the gray image (a factor of 1 is the identity),
    hue rotates the color circle; results are clamped to [0, 1] as in PIL. Images must therefore be in [0, 1], not
    normalized. For images without three channels, hue, saturation and gray are skipped, and contrast uses the mean
    over channels.

    No host synchronization and no data-dependent control flow, so it compiles as one graph. Computes in float32
    (float64 for float64 images) regardless of autocast; no gradients flow through it.

    Args:
        jitter: strengths of brightness, contrast, saturation (factors from ``max(0, 1 - s)`` to ``1 + s``) and hue
            (shifts from ``-s`` to ``s`` of the full circle, at most 0.5).
        jitter_p: probability of the color jitter.
        gray_p: probability of the conversion to grayscale.
        blur_p: probability of the Gaussian blur; the Gaussian is integrated over each pixel.
        blur_sigma: smallest and largest standard deviation in pixels.
        cutout: settings of the cutout; ``None`` for none.

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
    ) -> None:
        super().__init__()
        four = isinstance(jitter, Sequence) and len(jitter) == 4
        if not (four and all(0 <= strength < math.inf for strength in jitter) and jitter[HUE] <= 0.5):
            raise ValueError(
                f"jitter is {jitter!r}; expected brightness, contrast and saturation >= 0 and hue in [0, 0.5]"
            )
        for name, p in (("jitter_p", jitter_p), ("gray_p", gray_p), ("blur_p", blur_p)):
            check_probability(name, p)
        if cutout is not None and not isinstance(cutout, Cutout):
            raise TypeError(f"cutout is {type(cutout).__name__}; expected a stseg.Cutout or None")
        self.jitter = tuple(float(strength) for strength in jitter)
        self.jitter_p, self.gray_p, self.blur_p = jitter_p, gray_p, blur_p
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
        # On a CPU the passes over the pixels are memory-bound: a few images at a time stay in the cache, which
        # halves the time. A GPU is faster on the whole batch, and a compiler fuses the passes itself.
        rows = len(images)
        if images.device.type == "cpu" and not torch.compiler.is_compiling():
            rows = max(1, _ELEMENTS_PER_PASS // images[:1].numel()) if rows else 0
        if rows >= len(images):
            return self._transform(images, masks, parameters, where)
        parts = []
        for start in range(0, len(images), rows):
            part = slice(start, start + rows)
            drawn = StrongParameters._make(None if p is None else p[part] for p in parameters)
            parts.append(self._transform(images[part], masks[part], drawn, None if where is None else where[part]))
        return torch.cat([image for image, _ in parts]), torch.cat([mask for _, mask in parts])

    def _transform(
        self, images: Tensor, masks: Tensor, drawn: StrongParameters, where: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        device = images.device.type
        with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
            x = images.to(torch.promote_types(images.dtype, torch.float32))
            if self.jitter_p > 0 and self._operations(images):
                x = torch.where(_column(drawn.jitter), self._jittered(x, drawn.order, drawn.factors.to(x.dtype)), x)
            if self.gray_p > 0 and x.shape[1] == 3:
                x = torch.where(_column(drawn.gray), rgb_to_grayscale(x), x)
            if self.blur_p > 0:
                radius = max(6, math.ceil(3 * self.blur_sigma[1]))
                weights = _pixel_gaussian(drawn.sigma.to(x.dtype), radius)
                x = torch.where(_column(drawn.blur), _blurred(x, weights), x)
        x = x.to(images.dtype)
        if where is not None:
            x = torch.where(_column(where), x, images)
        if self.cutout is not None and drawn.boxes is not None and drawn.noise is not None:
            return self.cutout.transform(x, masks, drawn.boxes, drawn.noise, where)
        return x.clone() if x is images else x, masks.clone()

    def _operations(self, images: Tensor) -> list[int]:
        """Return the color operations that are enabled and that the number of channels allows."""
        possible = range(4) if images.shape[1] == 3 else (BRIGHTNESS, CONTRAST)
        return [operation for operation in possible if self.jitter[operation] > 0]

    def _jittered(self, x: Tensor, order: Tensor, factors: Tensor) -> Tensor:
        """Apply all operations in each image's own order, with the hue, by far the most expensive, in one pass.

        An image whose hue comes third does two operations before the common pass and one after it; in the other
        rounds its factor is 1, which is the identity.
        """
        operations = self._operations(x)
        if HUE not in operations:
            for turn in range(len(operations)):
                x = _blended(x, order[:, turn], factors)
            return x
        hue_turn = (order == HUE).int().argmax(1)
        for turn in range(len(operations) - 1):
            x = _blended(x, order[:, turn], factors, turn < hue_turn)
        x = _turned(x, factors[:, HUE])
        for turn in range(1, len(operations)):
            x = _blended(x, order[:, turn], factors, turn > hue_turn)
        return x

    def extra_repr(self) -> str:
        """Return the settings for ``repr``."""
        names = ("jitter", "jitter_p", "gray_p", "blur_p", "blur_sigma", "cutout")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


def _blended(x: Tensor, operation: Tensor, factors: Tensor, active: Tensor | None = None) -> Tensor:
    """Apply brightness, contrast or saturation, chosen per image; all three blend ``x`` with a gray image."""
    factor = factors.gather(1, operation[:, None])[:, 0]
    if active is not None:
        factor = torch.where(active, factor, 1.0)
    rest = 1 - factor
    gray = rgb_to_grayscale(x) if x.shape[1] == 3 else x.mean(1, keepdim=True)
    level = gray.mean((1, 2, 3)) * torch.where(operation == CONTRAST, rest, 0.0)
    other = gray.mul_(_column(torch.where(operation == SATURATION, rest, 0.0))).add_(_column(level))
    return torch.addcmul(other, x, _column(factor)).clamp_(0, 1)


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    """Shift the hue by a fraction of the full circle.

    Closed form: a third of the passes over the pixels of the usual round trip through HSV.
    """
    red, green, blue = x.unbind(1)
    high, low = torch.maximum(torch.maximum(red, green), blue), torch.minimum(torch.minimum(red, green), blue)
    chroma = high - low
    divisor = chroma + (chroma == 0)
    sector = torch.where(high == green, (blue - red).add_(divisor, alpha=2), (red - green).add_(divisor, alpha=4))
    sector = torch.where(high == red, green - blue, sector).div_(divisor).add_((turns * 6)[:, None, None])
    sector.sub_((sector / 6).floor_(), alpha=6)  # torch.remainder is several times slower
    channels = ((sector - 3).abs_().sub_(1), 2 - (sector - 2).abs_(), 2 - (sector - 4).abs_())
    return torch.stack([c.clamp_(0, 1).mul_(chroma).add_(low) for c in channels], 1)


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
        for distance, weight in enumerate(sides, start=1):
            pair = padded.narrow(axis, radius - distance, size) + padded.narrow(axis, radius + distance, size)
            x.addcmul_(pair, weight)
    return x


def _column(x: Tensor) -> Tensor:
    return x[:, None, None, None]
