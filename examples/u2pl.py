"""U2PL (Wang et al., CVPR 2022) on synthetic scenes, compared with supervised training.

    python examples/u2pl.py

A teacher labels unlabeled images. Where it is not sure which class a pixel has, it still knows which ones it has not:
the contrast of representations learns from that. The network needs a decoder, or the submodule that ``U2PL(...,
features=)`` names, of so many ``channels``.

For your own data put ``SegmentationFolder("images", "masks")`` and ``SegmentationFolder("more_images")`` of
``stseg.data`` in place of ``labeled`` and ``unlabeled``; for your own network, any module from images to logits in
``make_network``.
"""

import segmentation_models_pytorch as smp
import torch
from torch import nn

import stseg
from stseg.data import SyntheticScenes

CLASSES, SIZE = len(SyntheticScenes.classes), 48
LABELED, UNLABELED, HELD_OUT = 20, 200, 100
STEPS = 400


def make_network() -> nn.Module:
    """Make a small network with random weights; on real data, start from ``encoder_weights="imagenet"``."""
    return smp.Unet(
        "tu-test_resnet", encoder_weights=None, classes=CLASSES, encoder_depth=3, decoder_channels=(64, 32, 16)
    )


def main() -> None:
    """Train a supervised network and the method from random weights, and compare them on held-out scenes."""
    labeled = SyntheticScenes(LABELED, size=SIZE, seed=1)
    unlabeled = SyntheticScenes(UNLABELED, size=SIZE, seed=2)  # their masks are not used
    held_out = SyntheticScenes(HELD_OUT, size=SIZE, seed=3)
    config = stseg.TrainConfig(
        steps=STEPS,
        batch_size=8,
        weak=stseg.WeakAugment(SIZE, base_size=SIZE, scale=(0.67, 1.5)),
        optimizer="adamw",
        lr=2e-3,
        head_lr_factor=1,
    )
    torch.manual_seed(0)
    supervised = stseg.fit(make_network(), labeled, config)
    # Half of the training is supervised, as the network starts from random weights.
    method = stseg.methods.U2PL(
        make_network(), num_classes=CLASSES, channels=16, width=32, start=0.5, memory=2000, keys=64
    )
    result = stseg.fit(method, labeled, config, unlabeled=unlabeled)
    for name, model in {"supervised": supervised.model, "U2PL": result.model}.items():
        metric = stseg.evaluate(model, held_out, num_classes=CLASSES, progress=False)
        print(f"{name:10} mIoU {100 * metric.compute():.1f}")


if __name__ == "__main__":
    main()
