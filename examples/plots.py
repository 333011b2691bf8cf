"""The figure of quickstart.py."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor, nn

import stseg
from stseg.data import SyntheticScenes

CLASSES = SyntheticScenes.classes
COLORS = ("#8fbf6f", "#a8d5f2", "#6b6b76", "#d99157", "#2f7d3b", "#d43a3a", "#f6d743")


def draw(results: dict[str, stseg.SelfTrainingResult], held_out: SyntheticScenes, path: Path) -> None:
    """Draw held-out scenes with truth and predictions; below, the most and the least stable images without masks."""
    final = results["ST++"]
    assert final.ranking is not None
    canvas = Figure(figsize=(12, 12), layout="constrained")
    upper, lower = np.asarray(canvas.subfigures(2, 1, height_ratios=(2 + len(results), 2)))

    upper.suptitle("Held-out scenes", fontsize=15)
    rows = upper.subplots(2 + len(results), 6)
    for row, title in zip(rows, ("image", "truth", *results), strict=True):
        row[0].set_ylabel(title, fontsize=13)
    for column, index in zip(rows.T, range(rows.shape[1]), strict=True):
        image, mask = held_out[index]
        show_image(column[0], image)
        masks = mask, *(predicted(result.model, image) for result in results.values())
        for axes, classes in zip(column[1:], masks, strict=True):
            show_mask(axes, classes)

    lower.suptitle("Images without masks, most stable (left) and least (right), and their pseudo-masks", fontsize=15)
    places = [*range(4), *range(len(final.ranking) - 4, len(final.ranking))]
    pseudo = {id: (data, index) for data in final.labels.values() for index, id in enumerate(data.ids)}
    for column, place in zip(lower.subplots(2, 8).T, places, strict=True):
        data, index = pseudo[final.ranking.ids[place]]
        image, mask = data[index]
        show_image(column[0], image)
        column[0].set_title(f"{final.ranking.scores[place]:.2f}")
        show_mask(column[1], mask)

    handles = [Patch(color=color, label=name) for color, name in zip(COLORS, CLASSES, strict=True)]
    canvas.legend(handles=handles, loc="outside lower center", ncols=len(CLASSES), frameon=False, fontsize=12)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=100)


def show_image(axes: Axes, image: Tensor) -> None:
    """Show an image without ticks."""
    axes.imshow(image.permute(1, 2, 0).numpy())
    axes.set(xticks=[], yticks=[])


def show_mask(axes: Axes, mask: Tensor) -> None:
    """Show classes in their colors."""
    axes.imshow(mask.numpy(), cmap=ListedColormap(COLORS), vmin=0, vmax=len(CLASSES) - 1, interpolation="nearest")
    axes.set(xticks=[], yticks=[])


def predicted(network: nn.Module, image: Tensor) -> Tensor:
    """Return the class map of one image."""
    with torch.no_grad():
        device = next(network.parameters()).device
        return network(image[None].to(device)).argmax(1)[0].cpu()
