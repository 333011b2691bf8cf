"""S4GAN (Mittal et al., TPAMI 2019) on synthetic scenes, without and with its classifier of images (MLMT).

    python examples/s4gan.py

A critic learns to tell images with masks from images with predictions; the network learns to please it. A second
network learns which classes an image holds, with a Mean Teacher on unlabeled images. At prediction, classes that it
does not see are left out of the masks.

For your own data put ``SegmentationFolder("images", "masks")`` and ``SegmentationFolder("more_images")`` of
``stseg.data`` in place of ``labeled`` and ``unlabeled``; for your own network, any module from images to logits in
``make_network``.
"""

import segmentation_models_pytorch as smp
import timm
import torch
from torch import Tensor, nn

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


class MLMT(stseg.Method):
    """Mean Teacher of an image classifier, which restricts the classes of a trained segmentation network."""

    def __init__(self, segmenter: nn.Module) -> None:
        super().__init__()
        self.student = timm.create_model("test_resnet", num_classes=CLASSES)
        self.teacher = stseg.modules.EMA(self.student, 0.999)
        self.model = stseg.Segmenter(Fused(segmenter, self.teacher.model), mean=None, std=None)
        self.strong = stseg.StrongAugment(jitter=(0.4, 0.4, 0.4, 0.1), gray_p=0, cutout=None)

    def forward(self, batch: stseg.Batch) -> stseg.Losses:
        present = stseg.functional.one_hot(batch.masks, CLASSES).amax((2, 3))
        supervised = nn.functional.binary_cross_entropy_with_logits(self.student(batch.images), present)
        strong, _ = self.strong(batch.unlabeled, torch.zeros_like(batch.unlabeled[:, 0]).long())
        with torch.no_grad():
            target = self.teacher(batch.unlabeled)
        consistency = 1 - nn.functional.cosine_similarity(self.student(strong), target).mean()
        weight = stseg.functional.linear_rampup(batch.step, 0.1 * batch.steps, 0.5 * batch.steps)
        return stseg.Losses(supervised + weight * consistency)

    def after_step(self, batch: stseg.Batch) -> None:
        self.teacher.update(self.student, batch.step)


class Fused(nn.Module):
    """Segmentation network without the classes that a classifier of images does not see."""

    def __init__(self, segmenter: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.segmenter, self.classifier = segmenter.requires_grad_(False), classifier

    def forward(self, images: Tensor) -> Tensor:
        present = self.classifier(images).sigmoid()[:, :, None, None]
        return torch.where(present >= 0.2, self.segmenter(images), -1e4)


def main() -> None:
    """Train a supervised network, the method, and its classifier, and compare them on held-out scenes."""
    counts = (LABELED, UNLABELED, HELD_OUT)  # masks of the second are not used
    labeled, unlabeled, held_out = (SyntheticScenes(count, size=SIZE, seed=i) for i, count in enumerate(counts, 1))
    weak = stseg.WeakAugment(SIZE, base_size=SIZE, scale=(0.67, 1.5))
    config = stseg.TrainConfig(steps=STEPS, batch_size=8, weak=weak, optimizer="adamw", lr=2e-3, head_lr_factor=1)
    torch.manual_seed(0)
    supervised = stseg.fit(make_network(), labeled, config)
    result = stseg.fit(stseg.methods.S4GAN(make_network(), num_classes=CLASSES), labeled, config, unlabeled=unlabeled)
    fused = stseg.fit(MLMT(result.model), labeled, config, unlabeled=unlabeled)
    for name, model in {"supervised": supervised.model, "S4GAN": result.model, "with MLMT": fused.model}.items():
        metric = stseg.evaluate(model, held_out, num_classes=CLASSES, progress=False)
        print(f"{name:10} mIoU {100 * metric.compute():.1f}")


if __name__ == "__main__":
    main()
