"""Augmentations: weak ones per sample on the CPU, strong ones and mixing per batch on the device."""

from stseg.augment.adapters import (
    as_batch_augmentation,
    as_pair_transform,
    from_albumentations,
    from_kornia,
    from_torchvision,
)
from stseg.augment.box_mix import BoxMix
from stseg.augment.class_mix import ClassMix
from stseg.augment.cutout import Cutout
from stseg.augment.mixing import CutMix
from stseg.augment.pairs import CropPair
from stseg.augment.strong import StrongAugment, StrongParameters
from stseg.augment.views import strong_view
from stseg.augment.weak import WeakAugment

__all__ = [
    "BoxMix",
    "ClassMix",
    "CropPair",
    "CutMix",
    "Cutout",
    "StrongAugment",
    "StrongParameters",
    "WeakAugment",
    "as_batch_augmentation",
    "as_pair_transform",
    "from_albumentations",
    "from_kornia",
    "from_torchvision",
    "strong_view",
]
