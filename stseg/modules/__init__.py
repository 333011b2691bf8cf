"""Modules shared by training methods: averaged weights, features and their perturbations, heads, critics."""

from stseg.modules.critics import ConvCritic, ImageCritic, conv_critic, frozen
from stseg.modules.decoder_features import decoder_of, logits_and_features
from stseg.modules.ema import EMA
from stseg.modules.features import (
    captured,
    changed_features,
    channel_dropout,
    complementary_dropout,
    deepest_features,
    map_features,
    perturbed_features,
    rewritten,
)
from stseg.modules.flaw_detector import FlawDetector
from stseg.modules.heads import PixelShuffleDecoder, RotationHead
from stseg.modules.perturbations import adversarial_perturbation, feature_drop, feature_noise, guided_cutout
from stseg.modules.representation_head import representation_head
from stseg.modules.ring import Ring

__all__ = [
    "EMA",
    "ConvCritic",
    "FlawDetector",
    "ImageCritic",
    "PixelShuffleDecoder",
    "Ring",
    "RotationHead",
    "adversarial_perturbation",
    "captured",
    "changed_features",
    "channel_dropout",
    "complementary_dropout",
    "conv_critic",
    "decoder_of",
    "deepest_features",
    "feature_drop",
    "feature_noise",
    "frozen",
    "guided_cutout",
    "logits_and_features",
    "map_features",
    "perturbed_features",
    "representation_head",
    "rewritten",
]
