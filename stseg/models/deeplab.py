"""DeepLabV3+ and DeepLabV2 as the paper trained them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stseg.models._parts import conv_bn_relu, dilated_backbone, feature_levels, resize_as


class DeepLabV3Plus(nn.Module):
    """DeepLabV3+ (Chen et al., ECCV 2018) at output stride 8, as ST++ (Yang et al., CVPR 2022) trains it.

    Low-level features of stride 4, concatenated with an atrous pyramid of dense convolutions with rates 12,
    24 and 36, and fused by two convolutions of 256 channels. It differs from the DeepLabV3Plus of
    segmentation_models_pytorch, which has separable convolutions and output stride 16.
    With 21 classes: 40,352,181 parameters on ResNet-50, 59,344,309 on ResNet-101.

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
        >>> net = DeepLabV3Plus("resnet18", num_classes=21).eval()
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
        channels, strides = feature_levels(self.backbone)
        self.low_level = strides.index(4)
        width = channels[-1] // 8
        self.aspp = _AtrousPyramid(channels[-1], width, rates=(12, 24, 36))
        self.reduce = conv_bn_relu(channels[self.low_level], 48)
        self.fuse = nn.Sequential(
            conv_bn_relu(48 + width, 256, kernel_size=3),
            conv_bn_relu(256, 256, kernel_size=3),
            nn.Dropout(0.1),
        )
        self.classifier = nn.Conv2d(256, num_classes, kernel_size=1)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalized images ``(B, C, H, W)`` to logits ``(B, num_classes, H, W)``."""
        features = self.backbone(images)
        low = self.reduce(features[self.low_level])
        high = resize_as(self.aspp(features[-1]), low)
        logits = self.classifier(self.fuse(torch.cat([low, high], dim=1)))
        return resize_as(logits, images)


class DeepLabV2(nn.Module):
    """DeepLabV2 (Chen et al., TPAMI 2018) at output stride 8, as ST++ (Yang et al., CVPR 2022) trains it.

    The sum of four dilated convolutions, each a classifier, with weights initialized from N(0, 0.01). The
    paper uses ResNet-101 with weights from COCO, where the head has the learning rate of the backbone
    (``head_lr_factor=1`` in :class:`stseg.TrainConfig`); these weights are not provided here. With 21 classes:
    44,048,532 parameters.

    Args:
        backbone: any timm model that supports ``features_only`` and ``output_stride=8``.
        num_classes: channels of the logits.
        in_channels: channels of the images.
        pretrained: whether the backbone starts from ImageNet weights, for the default those of torchvision,
            adapted where there are not 3 channels.

    Attributes:
        backbone: the timm backbone.

    Shape:
        Normalized images ``(B, in_channels, H, W)`` -> logits ``(B, num_classes, H, W)``, any H and W.

    Raises:
        RuntimeError: if timm has no such model.
        ValueError: if the model has no output stride of 8.

    Example:
        >>> DeepLabV2("resnet18", num_classes=21)(torch.zeros(1, 3, 65, 97)).shape
        torch.Size([1, 21, 65, 97])
    """

    def __init__(
        self,
        backbone: str = "resnet101.tv_in1k",
        *,
        num_classes: int,
        in_channels: int = 3,
        pretrained: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = dilated_backbone(backbone, in_channels=in_channels, pretrained=pretrained)
        channels, _ = feature_levels(self.backbone)
        self.classifiers = nn.ModuleList()
        for rate in (6, 12, 18, 24):
            classifier = nn.Conv2d(channels[-1], num_classes, kernel_size=3, padding=rate, dilation=rate)
            nn.init.normal_(classifier.weight, std=0.01)
            self.classifiers.append(classifier)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalized images ``(B, C, H, W)`` to logits ``(B, num_classes, H, W)``."""
        features = self.backbone(images)[-1]
        logits = torch.stack([classifier(features) for classifier in self.classifiers]).sum(0)
        return resize_as(logits, images)


class _AtrousPyramid(nn.Module):
    """Parallel 1x1 convolution, dilated convolutions and image-level pooling, projected to one width."""

    def __init__(self, in_channels: int, width: int, rates: Sequence[int]) -> None:
        super().__init__()
        self.branches = nn.ModuleList([conv_bn_relu(in_channels, width)])
        self.branches.extend(conv_bn_relu(in_channels, width, kernel_size=3, dilation=rate) for rate in rates)
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv_bn_relu(in_channels, width))
        self.project = nn.Sequential(conv_bn_relu((len(rates) + 2) * width, width), nn.Dropout2d(0.5))

    def forward(self, features: Tensor) -> Tensor:
        views = [branch(features) for branch in self.branches]
        views.append(resize_as(self.pooled(features), features))
        projected: Tensor = self.project(torch.cat(views, dim=1))
        return projected
