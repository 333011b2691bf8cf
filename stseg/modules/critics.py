"""Critics of label maps, and networks with fixed parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

_LEAST = 32  # five halvings


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
        bottom, right = max(0, _LEAST - height), max(0, _LEAST - width)
        padded = F.pad(maps, (0, right, 0, bottom), mode="replicate") if bottom or right else maps
        scores = F.interpolate(self.layers(padded), size=padded.shape[-2:], mode="bilinear", align_corners=True)
        return scores[..., :height, :width]


class ImageCritic(nn.Module):
    """Critic that scores an image together with its label map: the discriminator of S4GAN (Mittal et al., TPAMI 2019).

    Four 4x4 convolutions of stride 2 with 64, 128, 256 and 512 channels, leaky ReLUs of slope 0.2, dropout of channels
    after the first three, the mean over pixels, and one linear layer. Maps with a side below 16 are padded to 16 on the
    right and at the bottom by repeating the border.

    Args:
        in_channels: channels of the maps: classes and image channels together.
        dropout: probability that a channel is dropped.

    Shape:
        ``(B, in_channels, H, W)`` -> features ``(B, 512)`` and scores ``(B,)``, logits of "this is annotated".

    Example:
        >>> import torch
        >>> critic = ImageCritic(21 + 3)
        >>> sum(p.numel() for p in critic.parameters())
        2778561
        >>> [tuple(x.shape) for x in critic(torch.zeros(2, 24, 65, 40))]
        [(2, 512), (2,)]
    """

    def __init__(self, in_channels: int, *, dropout: float = 0.5) -> None:
        super().__init__()
        widths = (in_channels, 64, 128, 256, 512)
        layers: list[nn.Module] = []
        for index in range(4):
            layers += [nn.Conv2d(widths[index], widths[index + 1], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
            layers += [nn.Dropout2d(dropout)] if index < 3 else []
        self.layers = nn.Sequential(*layers)
        self.score = nn.Linear(512, 1)

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Compute features and scores of maps."""
        bottom, right = (max(0, 16 - side) for side in maps.shape[-2:])
        padded = F.pad(maps, (0, right, 0, bottom), mode="replicate") if bottom or right else maps
        features = self.layers(padded).mean((2, 3))
        return features, self.score(features)[:, 0]


def conv_critic(in_channels: int, out_channels: int = 1) -> ConvCritic:
    """Build a :class:`ConvCritic`.

    Example:
        >>> sum(p.numel() for p in conv_critic(19).parameters())
        2781121
    """
    return ConvCritic(in_channels, out_channels)


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
