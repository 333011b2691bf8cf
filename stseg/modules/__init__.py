"""Modules shared by training methods: averaged weights, access to features, critics, heads."""

from stseg.modules.critics import ConvCritic, ImageCritic, conv_critic, frozen
from stseg.modules.decoder_features import decoder_of, logits_and_features
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
from stseg.modules.representation_head import representation_head
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
    "complementary_factor",
    "conv_critic",
    "decoder_of",
    "frozen",
    "logits_and_features",
    "map_features",
    "perturbed_features",
    "representation_head",
    "rewritten",
]
