"""Modules shared by training methods: averaged weights, access to features, critics."""

from stseg.modules.critics import ConvCritic, ImageCritic, conv_critic, frozen
from stseg.modules.ema import EMA
from stseg.modules.features import (
    captured,
    captured_inputs,
    changed_features,
    channel_dropout,
    complementary_dropout,
    complementary_factor,
    map_features,
    perturbed_features,
    rewritten,
)
from stseg.modules.flaw_detector import FlawDetector

__all__ = [
    "EMA",
    "ConvCritic",
    "FlawDetector",
    "ImageCritic",
    "captured",
    "captured_inputs",
    "changed_features",
    "channel_dropout",
    "complementary_dropout",
    "complementary_factor",
    "conv_critic",
    "frozen",
    "map_features",
    "perturbed_features",
    "rewritten",
]
