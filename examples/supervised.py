"""Supervised training on synthetic scenes: the baseline of all other examples, and its upper bound.

    python examples/supervised.py

The setting of Yang et al., CVPR 2022, section 3.1: weak augmentation and cross-entropy, on 20 scenes with masks, then
on all 220.

For your own data put ``SegmentationFolder("images", "masks")`` and ``SegmentationFolder("val/images", "val/masks")`` of
``stseg.data`` in place of ``few`` and ``held_out``; for your own network, any module from images to logits in
``make_network``.
"""

import segmentation_models_pytorch as smp
import torch
from torch import nn
from torch.utils.data import Subset

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
    """Train on few and on all masks, and print the IoU of each class on held-out scenes, in percent."""
    scenes = SyntheticScenes(LABELED + UNLABELED, size=SIZE, seed=1)
    few = Subset(scenes, range(LABELED))
    held_out = SyntheticScenes(HELD_OUT, size=SIZE, seed=3)
    config = stseg.TrainConfig(
        steps=STEPS,
        batch_size=8,
        weak=stseg.WeakAugment(SIZE, base_size=SIZE, scale=(0.67, 1.5)),
        optimizer="adamw",
        lr=2e-3,
        head_lr_factor=1,
    )
    print(f"{'':10}{'mIoU':>8}" + "".join(f"{name:>10}" for name in SyntheticScenes.classes))
    for name, labeled in {"few masks": few, "all masks": scenes}.items():
        torch.manual_seed(0)
        result = stseg.fit(make_network(), labeled, config)
        metric = stseg.evaluate(result.model, held_out, num_classes=CLASSES, progress=False)
        ious = "".join(f"{100 * iou:10.1f}" for iou in metric.iou().tolist())
        print(f"{name:10}{100 * metric.compute():8.1f}{ious}")


if __name__ == "__main__":
    main()
