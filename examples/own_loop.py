"""ST++ (Yang et al., CVPR 2022) in a plain PyTorch loop: the primitives of stseg, and everything else your own.

    python examples/own_loop.py

For your own data put ``SegmentationFolder("images", "masks")`` and ``SegmentationFolder("more_images")`` of
``stseg.data`` in place of ``labeled`` and ``unlabeled``; for your own network, any module from images to logits in
``make_network``.
"""

import copy

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, Subset

import stseg
from stseg.data import MixedDataset, SyntheticScenes

STEPS, BATCH, SIZE, CLASSES = 300, 8, 48, len(SyntheticScenes.classes)
LABELED, UNLABELED, HELD_OUT = 20, 200, 100
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_network() -> nn.Module:
    """Make a small network; Segmenter makes it take images in [0, 1] of any size."""
    return stseg.Segmenter(smp.FPN("tu-test_resnet", encoder_weights=None, classes=CLASSES)).to(DEVICE)


def train(dataset: MixedDataset, strong: nn.Module) -> list[nn.Module]:
    """Train a new network; return checkpoints after a third, two thirds and all of the steps."""
    network, checkpoints = make_network().train(), []
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=STEPS, power=0.9)
    loader = DataLoader(dataset, BATCH, sampler=RandomSampler(dataset, num_samples=STEPS * BATCH))
    for step, batch in enumerate(loader, start=1):
        images, masks, is_pseudo = (x.to(DEVICE) for x in batch)
        images, masks = strong(images / 255, masks, is_pseudo)  # the rows whose mask was predicted
        loss = F.cross_entropy(network(images), masks.long(), ignore_index=255)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step in (STEPS // 3, 2 * STEPS // 3, STEPS):
            checkpoints.append(copy.deepcopy(network).eval())
            print(f"step {step}: loss {loss.item():.3f}")
    return checkpoints


def main() -> None:
    """Run algorithm 2 of the paper, section 3.3."""
    labeled = SyntheticScenes(LABELED, size=SIZE, seed=1)
    unlabeled = SyntheticScenes(UNLABELED, size=SIZE, seed=2)  # their masks are not used
    held_out = SyntheticScenes(HELD_OUT, size=SIZE, seed=3)
    weak, strong = stseg.WeakAugment(SIZE, base_size=SIZE, scale=(0.67, 1.5)), stseg.StrongAugment()

    def label(network: nn.Module, indices: list[int]) -> stseg.PseudoLabeled:
        labeler = stseg.PseudoLabeler(stseg.MultiScaleFlip(network), num_classes=CLASSES)
        return labeler.label(Subset(unlabeled, indices))

    checkpoints = train(MixedDataset(labeled, transform=weak), strong)
    ranking = stseg.StabilityRanker(checkpoints, num_classes=CLASSES).rank(unlabeled)
    reliable, unreliable = ranking.split(0.5)
    easy = label(checkpoints[-1], reliable)
    student = train(MixedDataset(labeled, easy, transform=weak), strong)[-1]
    hard = label(student, unreliable)
    final = train(MixedDataset(labeled, easy + hard, transform=weak), strong)[-1]
    for name, network in {"supervised": checkpoints[-1], "ST++": final}.items():
        metric = stseg.evaluate(network, held_out, num_classes=CLASSES, progress=False)
        print(f"{name:10} mIoU {100 * metric.compute():.1f}")


if __name__ == "__main__":
    main()
