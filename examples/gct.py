"""GCT (Ke et al., ECCV 2020) on synthetic scenes, compared with supervised training.

    python examples/gct.py

Two networks are trained, and a detector of the flaws in their predictions, by which the worse of the two learns, pixel
by pixel, from the better one. The detector here is a narrow one, which trains fast.

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
    network: nn.Module = smp.Unet(
        "tu-test_resnet", encoder_weights=None, classes=CLASSES, encoder_depth=3, decoder_channels=(64, 32, 16)
    )
    return network


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
    detector = stseg.modules.FlawDetector(3 + CLASSES, width=16)
    method = stseg.methods.GCT(make_network(), make_network(), num_classes=CLASSES, detector=detector)
    result = stseg.fit(method, labeled, config, unlabeled=unlabeled)
    for name, model in {"supervised": supervised.model, "GCT": result.model}.items():
        metric = stseg.evaluate(model, held_out, num_classes=CLASSES, progress=False)
        print(f"{name:10} mIoU {100 * metric.compute():.1f}")


if __name__ == "__main__":
    main()
