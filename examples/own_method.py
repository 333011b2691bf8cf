"""A training method of your own: entropy minimization (Grandvalet and Bengio, NeurIPS 2004) in one small class.

    python examples/own_method.py

The network learns from the masks, and to be certain where there are none. ``stseg.fit`` does the rest: data, devices,
precision, checkpoints. A killed run resumes from ``WORKDIR``; a finished one is loaded from there.

For your own data put ``SegmentationFolder("images", "masks")`` and ``SegmentationFolder("more_images")`` of
``stseg.data`` in place of ``labeled`` and ``unlabeled``; for your own network, any module from images to logits in
``make_network``.
"""

import segmentation_models_pytorch as smp
import torch
from torch import nn

import stseg
from stseg.data import SyntheticScenes
from stseg.functional import cross_entropy, entropy

CLASSES, SIZE = len(SyntheticScenes.classes), 48
LABELED, UNLABELED, HELD_OUT = 20, 200, 100
STEPS, WORKDIR = 400, "runs/own_method"


class EntropyMinimization(stseg.Method):
    """Cross-entropy on labeled images plus ``weight`` times the entropy of the predictions on unlabeled ones."""

    def __init__(self, network: nn.Module, *, weight: float = 0.1) -> None:
        super().__init__()
        self.model = stseg.Segmenter(network)  # takes images in [0, 1] of any size
        self.weight = weight

    def forward(self, batch: stseg.Batch) -> stseg.Losses:
        """Compute the loss of a batch; ``batch.valid`` is False where a crop was padded."""
        supervised = cross_entropy(self.model(batch.images), batch.masks, ignore_index=batch.ignore_index)
        uncertainty = entropy(self.model(batch.unlabeled), where=batch.valid)
        return stseg.Losses(supervised + self.weight * uncertainty, {"entropy": uncertainty.detach()})


def make_network() -> nn.Module:
    """Make a small network with random weights; on real data, start from ``encoder_weights="imagenet"``."""
    return smp.Unet(
        "tu-test_resnet", encoder_weights=None, classes=CLASSES, encoder_depth=3, decoder_channels=(64, 32, 16)
    )


def main() -> None:
    """Train a supervised network and the method from the same weights, and compare them on held-out scenes."""
    labeled = SyntheticScenes(LABELED, size=SIZE, seed=1)
    unlabeled = SyntheticScenes(UNLABELED, size=SIZE, seed=2)  # their masks are not used
    held_out = SyntheticScenes(HELD_OUT, size=SIZE, seed=3)
    weak = stseg.WeakAugment(SIZE, base_size=SIZE, scale=(0.67, 1.5))
    config = stseg.TrainConfig(steps=STEPS, batch_size=8, weak=weak, optimizer="adamw", lr=2e-3, head_lr_factor=1)
    torch.manual_seed(0)
    supervised = stseg.fit(make_network(), labeled, config, workdir=f"{WORKDIR}/supervised")
    torch.manual_seed(0)
    method = EntropyMinimization(make_network())
    result = stseg.fit(method, labeled, config, unlabeled=unlabeled, workdir=f"{WORKDIR}/entropy")
    for name, model in {"supervised": supervised.model, "entropy minimization": result.model}.items():
        metric = stseg.evaluate(model, held_out, num_classes=CLASSES, progress=False)
        print(f"{name:20} mIoU {100 * metric.compute():.1f}")


if __name__ == "__main__":
    main()
