"""Modules shared by training methods: averaged weights, access to features, critics."""

from stseg.modules.critics import ConvCritic, ImageCritic, conv_critic, frozen
from stseg.modules.ema import EMA
from stseg.modules.features import (
    captured,
    captured_inputs,
    changed_features,
    channel_dropout,
    complementary_dropout,
    decoder_of,
    map_features,
    perturbed_features,
    rewritten,
)
from stseg.modules.flaw_detector import FlawDetector
from stseg.modules.ring import Ring

__all__ = [
    "EMA",
    "ConvCritic",
    "FlawDetector",
    "ImageCritic",
    "Ring",
    "captured",
    "captured_inputs",
    "changed_features",
    "channel_dropout",
    "complementary_dropout",
    "conv_critic",
    "decoder_of",
    "frozen",
    "map_features",
    "perturbed_features",
    "rewritten",
]
