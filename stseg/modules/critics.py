"""Critics of label maps, and gradients that pass through a network and leave it alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

_LEAST = 32  # five halvings


class ConvCritic(nn.Module):
    """Score every pixel of a map, as the fully convolutional discriminator of AdvSSL does (Hung et al., BMVC 2018).

    Five 4x4 convolutions of stride 2 with 64, 128, 256, 512 and ``out_channels`` channels, leaky ReLUs of slope 0.2
    between them, no normalization. Its scores are brought back to the size of the map: bilinear, corners aligned. Maps
    with a side below 32 are padded to 32, on the right and at the bottom, by repeating their border, and the scores are
    cropped again.

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
        """Scores ``(B, out_channels, H, W)`` of maps ``(B, in_channels, H, W)``."""
        height, width = maps.shape[-2:]
        bottom, right = max(0, _LEAST - height), max(0, _LEAST - width)
        padded = F.pad(maps, (0, right, 0, bottom), mode="replicate") if bottom or right else maps
        scores = F.interpolate(self.layers(padded), size=padded.shape[-2:], mode="bilinear", align_corners=True)
        return scores[..., :height, :width]


def conv_critic(in_channels: int, out_channels: int = 1) -> ConvCritic:
    """Build a :class:`ConvCritic`.

    Example:
        >>> sum(p.numel() for p in conv_critic(19).parameters())
        2781121
    """
    return ConvCritic(in_channels, out_channels)


def frozen(module: nn.Module) -> Callable[..., Any]:
    """Take a module as a fixed function: gradients reach its input, not its parameters.

    So a network's loss may run through a critic, and the critic's own loss be differentiated in the same backward pass.
    Buffers stay the module's own: in training mode its running statistics go on.

    Args:
        module: any module; it is not changed.

    Returns:
        A function that takes and returns what the module does, with the parameters that it has at each call.

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
