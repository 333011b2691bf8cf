"""Critics of label maps, and networks with fixed parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from stseg.checks import check_probability

_LEAST = 32  # five halvings
_LEAST_OF_IMAGE = 16  # four halvings


class ConvCritic(nn.Module):
    """Critic that scores every pixel: the fully convolutional discriminator of AdvSSL (Hung et al., BMVC 2018).

    Five 4x4 convolutions of stride 2 with 64, 128, 256, 512 and ``out_channels`` channels, leaky ReLUs of slope 0.2
    between them, no normalization. Scores are resized to the map: bilinear, corners aligned. Maps with a side below
    32 are padded to 32 on the right and at the bottom by repeating the border, and the scores are cropped.

    Args:
        in_channels: channels of the maps, such as the number of classes.
        out_channels: scores of each pixel.

    Shape:
        ``(B, in_channels, H, W)`` -> ``(B, out_channels, H, W)``, any H and W.

    Example:
        >>> import torch
        >>> critic = ConvCritic(21)
        >>> sum(p.numel() for p in critic.parameters())
        2783169
        >>> critic(torch.zeros(2, 21, 65, 97)).shape
        torch.Size([2, 1, 65, 97])
    """

    def __init__(self, in_channels: int, out_channels: int = 1) -> None:
        super().__init__()
        widths = (in_channels, 64, 128, 256, 512, out_channels)
        layers: list[nn.Module] = []
        for index in range(5):
            layers += [nn.Conv2d(widths[index], widths[index + 1], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, maps: Tensor) -> Tensor:
        """Compute scores ``(B, out_channels, H, W)`` of maps ``(B, in_channels, H, W)``."""
        height, width = maps.shape[-2:]
        padded = _at_least(maps, _LEAST)
        scores = F.interpolate(self.layers(padded), size=padded.shape[-2:], mode="bilinear", align_corners=True)
        return scores[..., :height, :width]


class ImageCritic(nn.Module):
    """Critic that scores whole images: the discriminator of S4GAN (Mittal et al., TPAMI 2019).

    Four 4x4 convolutions of stride 2 with 64, 128, 256 and 512 channels, leaky ReLUs of slope 0.2 after them and
    dropout of channels after the first three, no normalization; then the mean over all places, and a linear layer. Maps
    with a side below 16 are padded to 16 on the right and at the bottom by repeating the border.

    Args:
        in_channels: channels of the maps, such as the number of classes and the 3 of the image.
        dropout: probability that a channel is dropped, in training mode.

    Shape:
        ``(B, in_channels, H, W)`` -> scores ``(B,)``, logits of "real", and features ``(B, 512)``; any H and W.

    Raises:
        ValueError: if ``dropout`` is not in [0, 1].

    Example:
        >>> import torch
        >>> critic = ImageCritic(21 + 3)
        >>> sum(p.numel() for p in critic.parameters())
        2778561
        >>> scores, features = critic(torch.zeros(2, 24, 65, 97))
        >>> scores.shape, features.shape
        (torch.Size([2]), torch.Size([2, 512]))
    """

    def __init__(self, in_channels: int, *, dropout: float = 0.5) -> None:
        super().__init__()
        check_probability("dropout", dropout)
        widths = (in_channels, 64, 128, 256, 512)
        layers: list[nn.Module] = []
        for index in range(4):
            layers += [nn.Conv2d(widths[index], widths[index + 1], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
            layers.append(nn.Dropout2d(dropout))
        self.layers = nn.Sequential(*layers[:-1])
        self.score = nn.Linear(512, 1)

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Compute a score ``(B,)`` and features ``(B, 512)`` of each of the maps ``(B, in_channels, H, W)``."""
        features = self.layers(_at_least(maps, _LEAST_OF_IMAGE)).mean((2, 3))
        return self.score(features)[:, 0], features


def conv_critic(in_channels: int, out_channels: int = 1) -> ConvCritic:
    """Build a :class:`ConvCritic`.

    Example:
        >>> sum(p.numel() for p in conv_critic(19).parameters())
        2781121
    """
    return ConvCritic(in_channels, out_channels)


def _at_least(maps: Tensor, side: int) -> Tensor:
    """Pad maps to a least height and width, on the right and at the bottom, by repeating the border."""
    bottom, right = (max(0, side - length) for length in maps.shape[-2:])
    return F.pad(maps, (0, right, 0, bottom), mode="replicate") if bottom or right else maps


def frozen(module: nn.Module) -> Callable[..., Any]:
    """Return a module as a function whose gradients reach its input but not its parameters.

    A network's loss can thus pass through a critic while the critic's own loss is differentiated in the same backward
    pass. Buffers are shared: in training mode, running statistics are updated.

    Args:
        module: any module; it is not modified.

    Returns:
        A function with the signature of the module, which uses its current parameters at each call.

    Example:
        >>> import torch
        >>> critic, prediction = nn.Linear(2, 1), torch.ones(1, 2, requires_grad=True)
        >>> frozen(critic)(prediction).sum().backward()
        >>> prediction.grad is not None, critic.weight.grad
        (True, None)
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        constant = {name: parameter.detach() for name, parameter in module.named_parameters()}
        return functional_call(module, constant, args, kwargs)

    return run
