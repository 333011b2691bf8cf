"""S4GAN (Mittal et al., TPAMI 2019), on synthetic scenes, compared with supervised training.

    python examples/s4gan.py

A critic of images and label maps guides the network and selects the images it learns from. The second branch of the
paper is a classifier of the classes in an image: at prediction, classes that it does not see are left out. Here it is a
small network that is trained on the labeled images (the paper's is a Mean Teacher).

For your own data put ``SegmentationFolder("images", "masks")`` and ``SegmentationFolder("more_images")`` of
``stseg.data`` in place of ``labeled`` and ``unlabeled``; for your own network, any module from images to logits in
``make_network``.
"""

import segmentation_models_pytorch as smp
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

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


class Fused(nn.Module):
    """A segmentation network without the classes that a classifier does not see in an image."""

    def __init__(self, model: nn.Module, classifier: nn.Module, least: float = 0.2) -> None:
        super().__init__()
        self.model, self.classifier, self.least = model, classifier, least

    def forward(self, images: Tensor) -> Tensor:
        """Lower the logits of unseen classes; images are uint8 or in [0, 1]."""
        scale = 255 if images.dtype == torch.uint8 else 1
        unseen = self.classifier(images / scale).sigmoid() < self.least
        return self.model(images).masked_fill(unseen[:, :, None, None], -1e4)


def train_classifier(labeled: SyntheticScenes) -> nn.Module:
    """Train a network to tell which classes are in an image."""
    classifier = timm.create_model("test_resnet", num_classes=CLASSES)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3)
    loader = DataLoader(labeled, batch_size=min(8, len(labeled)), shuffle=True)
    for _ in range(max(1, STEPS // max(1, len(loader)))):
        for images, masks in loader:
            present = torch.stack([(masks == k).flatten(1).any(1) for k in range(CLASSES)], 1).float()
            loss = nn.functional.binary_cross_entropy_with_logits(classifier(images / 255), present)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return classifier.eval()


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
    method = stseg.methods.S4GAN(make_network(), num_classes=CLASSES)
    result = stseg.fit(method, labeled, config, unlabeled=unlabeled)
    fused = stseg.Segmenter(Fused(result.model, train_classifier(labeled)), mean=None, std=None, stride=1)
    for name, model in {"supervised": supervised.model, "S4GAN": result.model, "and classes": fused}.items():
        metric = stseg.evaluate(model, held_out, num_classes=CLASSES, progress=False)
        print(f"{name:11} mIoU {100 * metric.compute():.1f}")


if __name__ == "__main__":
    main()
