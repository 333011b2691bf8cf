"""Networks: a wrapper for any network, and the three networks of the paper."""

from stseg.models.backbone import backbone_of
from stseg.models.deeplab import DeepLabV2, DeepLabV3Plus
from stseg.models.multi_scale import MultiScaleFlip
from stseg.models.pspnet import PSPNet
from stseg.models.segmenter import IMAGENET_MEAN, IMAGENET_STD, Segmenter, as_segmenter
from stseg.models.smp_networks import create_network
from stseg.models.tiled import Tiled

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "DeepLabV2",
    "DeepLabV3Plus",
    "MultiScaleFlip",
    "PSPNet",
    "Segmenter",
    "Tiled",
    "as_segmenter",
    "backbone_of",
    "create_network",
]
