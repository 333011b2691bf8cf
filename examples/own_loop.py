"""ST++ inside a plain PyTorch loop: the primitives of stseg, and everything else your own.

    python examples/own_loop.py

Yang et al., "ST++: Make Self-training Work Better for Semi-supervised Semantic Segmentation", CVPR 2022.
"""

import copy
from collections.abc import Iterator
from itertools import chain, islice

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

import stseg
from stseg.data import MixedDataset, SyntheticScenes

STEPS, BATCH, SIZE, CLASSES = 300, 8, 64, len(SyntheticScenes.classes)
LABELED, UNLABELED, HELD_OUT = 20, 200, 50
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_network() -> nn.Module:
    """Any network will do; Segmenter makes it take images in [0, 1] of any size."""
    return stseg.Segmenter(smp.FPN("tu-test_resnet", encoder_weights=None, classes=CLASSES))


def batches(dataset: MixedDataset) -> Iterator[list[Tensor]]:
    """STEPS batches; a data set smaller than a batch gives smaller ones."""
    loader = DataLoader(dataset, BATCH, shuffle=True, drop_last=len(dataset) >= BATCH)
    return islice(chain.from_iterable(iter(lambda: loader, None)), STEPS)


def train(dataset: MixedDataset, strong: nn.Module) -> list[nn.Module]:
    """Your own loop. Returns checkpoints after a third, two thirds and all of the steps."""
    network, checkpoints = make_network().to(DEVICE).train(), []
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=STEPS, power=0.9)
    for step, batch in enumerate(batches(dataset), start=1):
        images, masks, is_pseudo = (x.to(DEVICE) for x in batch)
        images, masks = strong(images / 255, masks, is_pseudo)  # strong augmentation where the mask is a guess
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
    """ST++ as section 3.3 of the paper tells it."""
    scenes = SyntheticScenes(LABELED + UNLABELED, size=SIZE, seed=0)
    labeled, unlabeled = Subset(scenes, range(LABELED)), Subset(scenes, range(LABELED, len(scenes)))
    held_out = SyntheticScenes(HELD_OUT, size=SIZE, seed=1)
    weak, strong = stseg.WeakAugment(SIZE, base_size=SIZE, scale=(0.75, 1.5)), stseg.StrongAugment()

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
        print(f"{name}: mIoU {stseg.evaluate(network, held_out, num_classes=CLASSES).compute():.3f}")


if __name__ == "__main__":
    main()
