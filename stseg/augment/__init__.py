"""The augmentations of ST and ST++: weak ones per sample on the CPU, strong ones per batch on the device."""

from stseg.augment.cutout import Cutout
from stseg.augment.mixing import CutMix
from stseg.augment.strong import StrongAugment, StrongParameters
from stseg.augment.weak import WeakAugment

__all__ = ["CutMix", "Cutout", "StrongAugment", "StrongParameters", "WeakAugment"]
