"""ST (Yang et al., CVPR 2022, section 3.2) on synthetic scenes, compared with its supervised teacher.

    python examples/st.py

The teacher labels all images without masks, and a student learns from both, with strong augmentation on the
pseudo-labeled ones. The network starts from random weights, hence ``ST.from_scratch()``; with pretrained weights,
``ST()`` is the method of the paper. ``workdir=`` of the trainer keeps every step on disk and resumes a killed run.

For your own data put ``SegmentationFolder("images", "masks")`` and ``SegmentationFolder("more_images")`` of
``stseg.data`` in place of ``labeled`` and ``unlabeled``; for your own network, any module from images to logits in
``make_network``.
"""

import segmentation_models_pytorch as smp
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
    """Train all stages, and compare the supervised network with the last student on held-out scenes."""
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
    method = stseg.methods.ST.from_scratch()
    trainer = stseg.SelfTrainer(make_network, num_classes=CLASSES, config=config, method=method)
    result = trainer.fit(labeled, unlabeled)
    for name, model in {"supervised": result.stages["teacher"].model, "ST": result.model}.items():
        metric = stseg.evaluate(model, held_out, num_classes=CLASSES, progress=False)
        print(f"{name:10} mIoU {100 * metric.compute():.1f}")


if __name__ == "__main__":
    main()
