"""Validation of data sets and networks before training starts."""

from __future__ import annotations

import copy
import warnings
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from stseg.data.convert import check_mask_values
from stseg.data.folder import SegmentationFolder
from stseg.data.items import Items, shared
from stseg.data.listed import ListedFiles
from stseg.data.observations import Observations
from stseg.distributed import all_gather, rank
from stseg.errors import DataError, NetworkError, NetworkWarning, StsegError
from stseg.inference.class_counts import ClassCounts
from stseg.inference.fingerprints import check_repeatable, checksum, join_checksums
from stseg.inference.reading import Skipped
from stseg.inference.sweep import Sweep
from stseg.models.segmenter import Segmenter
from stseg.models.state import device_of, evaluating
from stseg.seeds import fixed_seed


def check_labeled(
    items: Items,
    *,
    num_classes: int,
    ignore_index: int = 255,
    name: str = "labeled",
    channels: int | None = None,
    num_workers: int = 0,
    progress: bool = True,
) -> tuple[str, ClassCounts]:
    """Read and validate every image and mask. Images must have ``channels`` channels, or as many as the first one.

    Warns of classes and keys of a ``class_map`` that no mask holds, and shows the share of each class.

    Returns:
        A fingerprint of ids, images and masks, and the number of pixels of each class.

    Raises:
        DataError: if the data set is empty, an image cannot be read, an item changes from one reading to the next, or
            a mask is missing, differs from its image in size or has a value that is neither a class nor the ignore
            index; names the item. Also if the masks hold no class, or a single one.
        TypeError: if a mask is floating-point; names the item.
    """
    if not len(items):
        raise DataError(f"the {name} data set is empty")
    check_repeatable(items, name=name, with_mask=True)
    counts = ClassCounts(num_classes, ignore_index, name)
    sweep = Sweep(items, f"check {name}", num_workers=num_workers, progress=progress, with_mask=True)
    checksums = []
    for index, (image, mask) in sweep.read():
        check_mask_values(mask, num_classes, ignore_index, name=items.ids[index])
        channels = _same_channels(image, channels, items.ids[index])
        checksums.append((index, checksum(image), checksum(mask)))
        counts.add(mask)
    observations = Observations()
    for part in all_gather(sweep.observations):
        observations.add(part)
    if rank() == 0:
        observations.warn(name)
    counts.merge_processes()
    if progress:
        counts.show()
    counts.check(of_training=name != "validation")
    return join_checksums(items.ids, [row for part in all_gather(checksums) for row in part]), counts


def find_unreadable(
    items: Items,
    *,
    channels: int | None = None,
    skip: bool = False,
    num_workers: int = 0,
    progress: bool = True,
) -> tuple[Skipped, ...]:
    """Read every image. They must have ``channels`` channels, or as many as the first one.

    Returns:
        The items that could not be read, if ``skip`` is true.

    Raises:
        UnreadableImageError: if an image cannot be read and ``skip`` is false.
        DataError: if an image has a different number of channels or changes from one reading to the next, or none can
            be read.
    """
    check_repeatable(items, name="unlabeled")
    sweep = Sweep(items, "check unlabeled", num_workers=num_workers, progress=progress, skip_unreadable=skip)
    for index, image in sweep.read():
        channels = _same_channels(image, channels, items.ids[index])
    return sweep.skipped()


def refuse_common_ids(datasets: dict[str, Items | None]) -> None:
    """Raise a ``DataError`` if an id is in two of the data sets, given by name; items without ids are ignored."""
    named = [(name, items) for name, items in datasets.items() if items is not None and items.has_ids]
    for (name, items), (other, others) in combinations(named, 2):
        if (both := shared(items.ids, others.ids)) is not None:
            raise DataError(
                f"the id {both!r} is in both the {name} and the {other} data set; expected each image in one of them"
                f"{_other_ids((name, items.dataset), (other, others.dataset))}"
            )


def _other_ids(*datasets: tuple[str, Any]) -> str:
    """Return how to get different ids, for a message."""
    sources = [(name, _source(dataset)) for name, dataset in datasets]
    folders = [(name, source) for name, source in sources if isinstance(source, SegmentationFolder)]
    if len({folder.images.resolve() for _, folder in folders}) < len(folders):
        return f": SegmentationFolder(images, exclude={sources[0][0]}.ids) takes the other images of a folder"
    if folders:
        prefix = f"{folders[-1][0]}/"
        return (
            "; if they are different images, give one folder's ids a prefix: "
            f"SegmentationFolder(..., id_prefix={prefix!r})"
        )
    if any(isinstance(source, ListedFiles) for _, source in sources):
        return "; if they are different images, give ListedFiles a root above both: ids are paths below it"
    return (
        f"; if they are different images, give the {datasets[1][0]} data set other ids in its attribute: "
        f"dataset.ids = [f'{datasets[1][0]}/{{id}}' for id in dataset.ids]"
    )


def _source(dataset: Any) -> Any:
    while isinstance(dataset, (Subset, Items)):
        dataset = dataset.dataset
    return dataset


def check_network(model: nn.Module, image: Tensor, num_classes: int | None = None) -> int:
    """Run a wrapped network on one image ``(C, H, W)``.

    Returns:
        The number of classes.

    Raises:
        NetworkError: if the network fails on the image, or does not return logits of ``num_classes`` classes.
    """
    with evaluating(model), torch.no_grad():
        try:
            logits = model(image[None].to(device_of(model)))
        except StsegError:
            raise
        except Exception as error:  # libraries raise different types
            raise NetworkError(f"the network cannot take an image of shape {tuple(image.shape)}: {error}") from error
    classes = int(logits.shape[1])
    if num_classes is not None and classes != num_classes:
        hint = " (one logit counts as two classes)" if classes == 2 else ""
        raise NetworkError(f"the network gives {classes} classes; num_classes is {num_classes}{hint}")
    if not logits.isfinite().all():
        raise NetworkError("the network returned NaN or infinite logits for the first image")
    if rank() == 0 and not torch.allclose(logits, _again(model, image), rtol=1e-3, atol=1e-4):
        warnings.warn(
            "the network gives other logits for the same image in evaluation mode, so that labels and figures are not "
            "reproducible; is dropout or noise applied without regard to self.training?",
            NetworkWarning,
            stacklevel=2,
        )
    if isinstance(model, Segmenter) and _is_bounded(model, image, logits):
        lowest = 0 if (logits >= 0).all() else -1
        one = torch.ones((), device=logits.device, dtype=logits.dtype)
        sums = " and sum to 1, as probabilities do" if torch.allclose(logits.sum(1), one, atol=1e-4) else ""
        raise NetworkError(
            f"the network returns values that cannot leave [{lowest}, 1]{sums}; expected logits "
            "(leave out the softmax, sigmoid or tanh at its end, as with activation=None)"
        )
    return classes


def _again(model: nn.Module, image: Tensor) -> Tensor:
    """Return the logits of an image with other random numbers."""
    with evaluating(model), torch.no_grad(), fixed_seed(1):
        logits: Tensor = model(image[None].to(device_of(model)))
    return logits


def _is_bounded(model: Segmenter, image: Tensor, logits: Tensor) -> bool:
    """Return whether the logits stay in [-1, 1] when all weights grow, as behind a sigmoid, softmax or tanh."""
    limit = 1 + 1e-4
    if logits.abs().max() > limit or next(model.parameters(), None) is None:
        return False
    for factor in (1000, 30, 3):  # the largest one at which nothing overflows
        try:
            with torch.no_grad(), evaluating(trial := copy.deepcopy(model).double()):
                for parameter in trial.parameters():
                    parameter.mul_(factor).add_(1)
                grown = trial((image if model._sides is None else image[:, :64, :64])[None])
        except Exception:  # of any type: the network may not run in float64
            return False
        if grown.isfinite().all():
            return bool(grown.abs().max() <= limit)
    return False


def _same_channels(image: Tensor, channels: int | None, name: str) -> int:
    if channels is not None and len(image) != channels:
        raise DataError(f"image {name!r} has {len(image)} channels; expected {channels}, as the first image has")
    return len(image)
