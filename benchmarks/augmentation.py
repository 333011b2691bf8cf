"""Speed of the strong augmentation of a batch, compared with the PIL recipe of the paper's code, image by image.

python benchmarks/augmentation.py
"""

from __future__ import annotations

import argparse
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageFilter
from timing import conditions, device, seconds
from torch import Tensor
from torchvision.transforms import ColorJitter, RandomGrayscale

import stseg


def with_pil(images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Apply jitter, gray, blur and cutout with PIL as in the paper, including the conversion back to tensors."""
    jitter, gray = ColorJitter(0.5, 0.5, 0.5, 0.25), RandomGrayscale(0.2)
    random = np.random.default_rng()
    out_images, out_masks = [], []
    for pixels, mask in zip(images.permute(0, 2, 3, 1).numpy(), masks.numpy(), strict=True):
        image = Image.fromarray(pixels)
        if random.random() < 0.8:
            image = jitter(image)
        image = gray(image)
        if random.random() < 0.5:
            image = image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))
        values, classes = np.array(image), mask.copy()
        height, width = classes.shape
        if random.random() < 0.5:
            while True:
                area, ratio = random.uniform(0.02, 0.4) * height * width, random.uniform(0.3, 1 / 0.3)
                h, w = int(np.sqrt(area * ratio)), int(np.sqrt(area / ratio))
                x, y = random.integers(width), random.integers(height)
                if x + w <= width and y + h <= height:
                    break
            values[y : y + h, x : x + w] = random.uniform(0, 255, (h, w, 3))
            classes[y : y + h, x : x + w] = 255
        out_images.append(torch.from_numpy(values).permute(2, 0, 1).float() / 255)
        out_masks.append(torch.from_numpy(classes))
    return torch.stack(out_images), torch.stack(out_masks)


def main() -> None:
    """Print a table over crop sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    batch = parser.parse_args().batch
    strong, compiled = stseg.StrongAugment(), stseg.StrongAugment()
    on_gpu = device().type == "cuda"
    if on_gpu:
        compiled.transform = torch.compile(compiled.transform, fullgraph=True)  # type: ignore[method-assign]
    print(f"batches of {batch}; {conditions()}\n")
    print("| crop | PIL, one process | StrongAugment |" + (" compiled |" if on_gpu else "") + " ratio |")
    print("|---|---:|---:|---:|" + ("---:|" if on_gpu else ""))
    for side in (128, 321, 513):
        images = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8)
        masks = torch.zeros(batch, side, side, dtype=torch.uint8)
        x, y = images.to(device()).float() / 255, masks.to(device())
        ways = {"pil": partial(with_pil, images, masks), "own": partial(strong, x, y)}
        if on_gpu:
            ways["compiled"] = partial(compiled, x, y)
        found = seconds(ways)
        cells = " | ".join(f"{1000 * value:.1f} ms" for value in found.values())
        print(f"| {side} x {side} | {cells} | {found['own'] / found['pil']:.2f} |")


if __name__ == "__main__":
    main()
