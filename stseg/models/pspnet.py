"""PSPNet as the paper trained it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stseg.models._parts import conv_bn_relu, dilated_backbone, feature_levels, resize_as


class PSPNet(nn.Module):
    """PSPNet (Zhao et al., CVPR 2017) at output stride 8, as ST++ (Yang et al., CVPR 2022) trains it.

    The last features, concatenated with the same features pooled to 1, 2, 3 and 6 cells per side, each with a
    quarter of the channels. There is no auxiliary loss. It differs in its widths from the PSPNet of
    segmentation_models_pytorch. With 21 classes on ResNet-50: 46,592,597 parameters.

    The head starts from PyTorch's default initialization. ``pretrained=True`` downloads ImageNet weights for the
    backbone: for the default those of torchvision, from which the paper starts; a bare ``"resnet50"`` names others in
    timm. Without them, the last batch normalization of each block of a ResNet starts with weight 0, as timm has it.

    Args:
        backbone: any timm model that supports ``features_only`` and ``output_stride=8``.
        num_classes: channels of the logits.
        in_channels: channels of the images.
        pretrained: whether the backbone starts from ImageNet weights, adapted where there are not 3 channels.

    Attributes:
        backbone: the timm backbone; ``stseg.fit`` trains all other layers with a separate learning rate.

    Shape:
        Normalized images ``(B, in_channels, H, W)`` -> logits ``(B, num_classes, H, W)``, any H and W.

    Raises:
        RuntimeError: if timm has no such model.
        ValueError: if the model has no output stride of 8; and, while training, for a batch of one image,
            as batch normalization after global pooling needs two.

    Example:
        >>> net = PSPNet("resnet18", num_classes=21).eval()
        >>> net(torch.zeros(1, 3, 65, 97)).shape
        torch.Size([1, 21, 65, 97])
    """

    def __init__(
        self,
        backbone: str = "resnet50.tv_in1k",
        *,
        num_classes: int,
        in_channels: int = 3,
        pretrained: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = dilated_backbone(backbone, in_channels=in_channels, pretrained=pretrained)
        channels = feature_levels(self.backbone)[0][-1]
        width = channels // 4
        self.pyramid = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(cells), conv_bn_relu(channels, width)) for cells in (1, 2, 3, 6)
        )
        self.fuse = nn.Sequential(conv_bn_relu(channels + 4 * width, width, kernel_size=3), nn.Dropout(0.1))
        self.classifier = nn.Conv2d(width, num_classes, kernel_size=1)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalized images ``(B, C, H, W)`` to logits ``(B, num_classes, H, W)``."""
        features = self.backbone(images)[-1]
        pooled = [resize_as(level(features), features) for level in self.pyramid]
        logits = self.classifier(self.fuse(torch.cat([features, *pooled], dim=1)))
        return resize_as(logits, images)
