"""Foreground and background: a network with one logit, masks of 0 and 1, and ST (Yang et al., CVPR 2022).

    python examples/binary.py

A network with one logit counts as one of two classes. Here the foreground is the buildings of synthetic scenes.

For your own data put ``SegmentationFolder("images", "masks")`` and ``SegmentationFolder("more_images")`` of
``stseg.data`` in place of ``labeled`` and ``unlabeled``; where masks are stored as 0 and 255, add
``class_map={0: 0, 255: 1}``. For your own network, any module from images to one logit in ``make_network``.
"""

import segmentation_models_pytorch as smp
from torch import Tensor, nn
from torch.utils.data import Dataset

import stseg
from stseg.data import SyntheticScenes

SIZE, FOREGROUND = 48, SyntheticScenes.classes.index("building")
LABELED, UNLABELED, HELD_OUT = 20, 200, 100
STEPS = 400


class Binary(Dataset[tuple[Tensor, Tensor]]):
    """Scenes with masks that are 1 in the foreground and 0 elsewhere."""

    def __init__(self, scenes: SyntheticScenes) -> None:
        self.scenes, self.ids = scenes, scenes.ids

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask = self.scenes[index]
        return image, (mask == FOREGROUND).byte()


def make_network() -> nn.Module:
    """Make a small network with random weights; on real data, start from ``encoder_weights="imagenet"``."""
    return smp.FPN("tu-test_resnet", encoder_weights=None, classes=1)


def main() -> None:
    """Train all stages, and compare the supervised network with the student on held-out scenes."""
    labeled = Binary(SyntheticScenes(LABELED, size=SIZE, seed=1))
    unlabeled = SyntheticScenes(UNLABELED, size=SIZE, seed=2)  # their masks are not used
    held_out = Binary(SyntheticScenes(HELD_OUT, size=SIZE, seed=3))
    weak = stseg.WeakAugment(SIZE, base_size=SIZE, scale=(0.67, 1.5))
    config = stseg.TrainConfig(steps=STEPS, batch_size=8, weak=weak, optimizer="adamw", lr=2e-3, head_lr_factor=1)
    trainer = stseg.SelfTrainer(make_network, num_classes=2, config=config, method=stseg.methods.ST.from_scratch())
    result = trainer.fit(labeled, unlabeled)
    for name, model in {"supervised": result.stages["teacher"].model, "ST": result.model}.items():
        background, foreground = stseg.evaluate(model, held_out, num_classes=2, progress=False).iou().tolist()
        print(f"{name:10} IoU of the foreground {100 * foreground:.1f}, of the background {100 * background:.1f}")


if __name__ == "__main__":
    main()
