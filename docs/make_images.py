"""Draw docs/images/augmentation.png: one scene, weakly and strongly augmented.

Run it as ``python docs/make_images.py``.
"""

from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

import stseg
from stseg.data import SyntheticScenes

CLASSES = SyntheticScenes.classes
COLORS = ("#8fbf6f", "#a8d5f2", "#6b6b76", "#d99157", "#2f7d3b", "#d43a3a", "#f6d743")
IGNORED = "#ffffff"
COLUMNS, SIZE, SCENE, SEED = 6, 160, 28, 3


def show(axes: Axes, pixels: Tensor) -> None:
    """An image ``(3, H, W)`` in [0, 1], or a mask ``(H, W)``."""
    if pixels.ndim == 3:
        axes.imshow(pixels.permute(1, 2, 0).clamp(0, 1))
    else:
        shown = torch.where(pixels == 255, len(CLASSES), pixels)
        axes.imshow(shown, cmap=ListedColormap([*COLORS, IGNORED]), vmin=0, vmax=len(CLASSES), interpolation="nearest")


def augmentation(path: Path) -> None:
    """Row by row: weak images and their masks, the same images after the strong augmentation, and their masks."""
    torch.manual_seed(SEED)
    image, mask = SyntheticScenes(SCENE + 1, size=SIZE, seed=0)[SCENE]
    weak = stseg.WeakAugment(SIZE, base_size=SIZE)
    pairs = [weak(image, mask) for _ in range(COLUMNS)]
    images, masks = torch.stack([i for i, _ in pairs]) / 255, torch.stack([m for _, m in pairs])
    strong_images, strong_masks = stseg.StrongAugment()(images, masks)

    canvas = Figure(figsize=(8.4, 5.3), layout="constrained")
    grid = canvas.subplots(4, COLUMNS + 1)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.patch.set_alpha(0)
    for axes, pixels, title in zip(grid[:2, 0], (image / 255, mask), ("the scene", "its mask"), strict=True):
        show(axes, pixels)
        axes.set_title(title, fontsize=11)
    for axes in grid[2:, 0]:
        axes.axis("off")
    rows = {"weak": images, "mask": masks, "then strong": strong_images, "mask ": strong_masks}
    for row, (name, batch) in zip(grid, rows.items(), strict=True):
        row[1].set_ylabel(name, fontsize=11)
        for axes, pixels in zip(row[1:], batch, strict=True):
            show(axes, pixels)
    handles = [Patch(color=color, label=name) for color, name in zip(COLORS, CLASSES, strict=True)]
    handles.append(Patch(facecolor=IGNORED, edgecolor="#888888", label="ignored (255)"))
    canvas.legend(handles=handles, loc="outside lower center", frameon=False, fontsize=10, ncols=len(handles) // 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=150)


if __name__ == "__main__":
    augmentation(Path(__file__).parent / "images" / "augmentation.png")
