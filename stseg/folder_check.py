"""Check of folders of images and masks before a training."""

from __future__ import annotations

import hashlib
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stseg.data.class_map import ClassMap
from stseg.data.convert import as_mask, check_mask_values, gray_of
from stseg.data.decoding import decode_mask
from stseg.data.folder import SegmentationFolder
from stseg.data.items import Items
from stseg.distributed import setup_device
from stseg.errors import DataError, NetworkError, StsegError
from stseg.folders import Folders, Training
from stseg.inference.class_counts import ClassCounts
from stseg.inference.labeler import PseudoLabeler
from stseg.inference.reading import Skipped
from stseg.methods import ST, STPlusPlus
from stseg.models import MultiScaleFlip
from stseg.progress import format_duration, progress_bar

_READERS = 4  # threads that decode
_MOST_VALUES = 256  # of masks that are counted
_MOST_CLASSES = 32  # that masks without names or a mapping may have: more look like shades or numbered objects
_SHOWN = 5  # of a list in the text
_TRIAL_STEPS = 4
Value = int | tuple[int, ...]


@dataclass(frozen=True)
class Estimate:
    """Time and memory of a training on this machine, from a few steps.

    Attributes:
        seconds: of all trainings and labelings, without ranking, validation and the check of the data before.
        step_seconds: of one step.
        memory: peak memory in bytes: of the GPU, or of this process; 0 where the system does not tell.
        device: the device.
    """

    seconds: float
    step_seconds: float
    memory: int
    device: str

    def __str__(self) -> str:
        memory = f", {self.memory / 2**30:.1f} GiB of memory" if self.memory else ""
        of = f"{self.device}: {self.step_seconds:.2f} s a step"
        return f"about {format_duration(self.seconds)} on this machine ({of}){memory}"


@dataclass(frozen=True)
class FolderCheck:
    """What a check of folders found; ``print`` shows it.

    Attributes:
        counts: number of images by use: ``"labeled"``, ``"unlabeled"``, ``"validation"``.
        sizes: number of images of each ``(height, width)``.
        channels: number of images of each number of channels.
        values: pixels of each value, or color, that the mask files hold.
        class_map: a mapping to classes, proposed where the values are not class indices.
        classes: pixels of each class; None while the classes are not known.
        same: pairs of images with equal pixels, as ``"use: id"``.
        unreadable: images and masks that cannot be read, with the reason.
        problems: what prevents a training, or makes its validation wrong, and what to do.
        notes: what should be known.
        estimate: time and memory, if it was asked for and the data have no problem.
    """

    counts: Mapping[str, int]
    sizes: Mapping[tuple[int, int], int]
    channels: Mapping[int, int]
    values: Mapping[Value, int]
    class_map: Mapping[Value, int] | None
    classes: ClassCounts | None
    same: Sequence[tuple[str, str]]
    unreadable: Sequence[Skipped]
    problems: Sequence[str]
    notes: Sequence[str] = ()
    estimate: Estimate | None = None

    @property
    def is_fine(self) -> bool:
        """Whether there is no problem."""
        return not self.problems

    def __str__(self) -> str:
        rows = [
            ("images", ", ".join(f"{count} {use}" for use, count in self.counts.items())),
            ("sizes", _most_common((f"{h} x {w}", n) for (h, w), n in self.sizes.items()) + " (height x width)"),
            ("channels", _most_common((str(c), n) for c, n in self.channels.items())),
            ("mask values", _shares(self.values)),
        ]
        lines = [f"{name:<12} {text}" for name, text in rows]
        if self.class_map is not None:
            lines.append(f"{'':<12} proposed: {class_map_option(self.class_map)}")
        if self.classes is not None:
            lines.append(self.classes.table())
        lines += [f"note         {note}" for note in self.notes]
        if twice := [f"{one} = {other}" for one, other in self.same if not _is_across(one, other)]:
            lines.append(f"note         there twice: {_listed(twice)}")
        lines += [f"PROBLEM      {problem}" for problem in self.problems] or ["no problem was found"]
        if self.estimate is not None:
            lines.append(f"training     {self.estimate}")
        return "\n".join(lines)


@dataclass
class _Seen:
    """What reading the files shows."""

    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    channels: Counter[int] = field(default_factory=Counter)
    values: Counter[Value] = field(default_factory=Counter)
    digests: dict[str, list[str]] = field(default_factory=dict)
    unreadable: list[Skipped] = field(default_factory=list)


def check_folders(
    folders: Folders, training: Training | None = None, *, unlabeled: bool = True, progress: bool = True
) -> FolderCheck:
    """Read all images and masks, and report what they hold and what would prevent a training.

    Finds files that cannot be read, masks that differ from their image in size, mask values that are not class indices,
    images of several numbers of channels, and images with equal pixels in two places, such as validation images among
    the unlabeled ones.

    Args:
        folders: the folders.
        training: tries a few of its steps on this machine to estimate time and memory; None does not.
        unlabeled: whether to read the unlabeled images, too.
        progress: whether to show a bar.

    Raises:
        DataError: if a folder is missing, or no image has a mask.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> root = Path(tempfile.mkdtemp())
        >>> for name, value in (("images/1.png", 9), ("images/2.png", 8), ("masks/1.png", 0), ("masks/2.png", 255)):
        ...     (root / name).parent.mkdir(exist_ok=True)
        ...     Image.new("L", (6, 4), value).save(root / name)
        >>> check = check_folders(Folders(images=root / "images", masks=root / "masks"), progress=False)
        >>> check.class_map, check.is_fine
        ({0: 0, 255: 1}, False)
    """
    labeled, val, others = folders.labeled(), folders.validation(), folders.images_only() if unlabeled else None
    parts: dict[str, Any] = {"labeled": labeled, "unlabeled": others, "validation": val}
    found = {use: Items.of(part) for use, part in parts.items() if part is not None}
    masked = {use: part for use, part in (("labeled", labeled), ("validation", val)) if part is not None}
    # Images and masks are read one by one: a mask that cannot be read says nothing of its image.
    images = {use: Items.of(folders.without_masks(masked[use])) if use in masked else found[use] for use in found}
    seen = _read_all(images, masked, folders, progress=progress)
    proposed = _proposal(folders, seen.values)
    problems, notes, classes = [], [], None
    if len(seen.channels) > 1:
        problems.append(
            f"images have {_most_common((str(c), n) for c, n in seen.channels.items())} channels; expected one number: "
            "--mode RGB converts all"
        )
    problems += [f"{skipped.id}: {skipped.reason}" for skipped in seen.unreadable]
    if proposed is not None:
        problems.append(
            f"the masks hold the values {_listed(_sorted(seen.values))}, which are not class indices 0, 1, ...; is it "
            f"{class_map_option(proposed)}? Where they are, and some classes are in no mask: --classes, all names or "
            "their number"
        )
    elif not seen.unreadable:
        try:
            classes = _count_classes(folders, labeled, val, seen.values)
            classes.check()
        except StsegError as error:
            problems.append(str(error))
    same, worst = _same(seen.digests)
    problems += worst
    if unlabeled and (repeated := folders.repeated()):
        notes.append(f"in both --images and --unlabeled, counted once: {_listed(repeated)}")
    if unlabeled and others is None:
        notes.append("there are no unlabeled images: expected others than those with masks, in --images or --unlabeled")
    estimate = None
    if training is not None and "epochs" in training.settings:
        notes.append("time and memory are estimated for a length in steps, not in epochs")
    elif training is not None and classes is not None and not problems:
        try:
            estimate = _estimate(replace(folders, classes=folders.classes or classes.num_classes), training)
        except NetworkError as error:
            problems.append(str(error))
    return FolderCheck(
        counts={use: len(items) for use, items in found.items()},
        sizes=seen.sizes,
        channels=seen.channels,
        values=seen.values,
        class_map=proposed,
        classes=classes,
        same=same,
        unreadable=seen.unreadable,
        problems=problems,
        notes=notes,
        estimate=estimate,
    )


def propose_class_map(values: Iterable[Value]) -> dict[Value, int] | None:
    """Propose a class for each value of masks; None if they are classes already: 0, 1, ... and 255 for ignored pixels.

    Example:
        >>> propose_class_map([0, 1, 2, 255]), propose_class_map([255, 0]), propose_class_map([(0, 0, 0), (9, 9, 9)])
        (None, {0: 0, 255: 1}, {(0, 0, 0): 0, (9, 9, 9): 1})
    """
    found = _sorted(values)
    if not found or len(found) > _MOST_VALUES:
        return None
    if all(isinstance(value, int) for value in found):
        classes = [value for value in found if value != 255]
        # 0 and 255 alone are a background and a foreground.
        if classes and classes == list(range(len(classes))) and found != [0, 255]:
            return None
        if len(found) == 1:
            return None
    return {value: index for index, value in enumerate(found)}


def class_map_option(class_map: Mapping[Any, int]) -> str:
    """Format a mapping as the option of the console command.

    Example:
        >>> class_map_option({0: 0, 255: 1}), class_map_option({(0, 0, 0): 0, (128, 0, 0): 1})
        ('--class-map 0:0 255:1', '--class-map 0,0,0:0 128,0,0:1')
    """
    return "--class-map " + " ".join(
        f"{','.join(map(str, key)) if isinstance(key, tuple) else key}:{to}" for key, to in class_map.items()
    )


def _proposal(folders: Folders, values: Mapping[Value, int]) -> dict[Value, int] | None:
    if folders.class_map is not None:
        return None
    if folders.classes is not None and set(values) != {0, 255}:
        known = {*range(folders.num_classes()), 255}
        if known.issuperset(values):
            return None
    return propose_class_map(values)


def _read_all(
    parts: Mapping[str, Items], masked: Mapping[str, SegmentationFolder], folders: Folders, *, progress: bool
) -> _Seen:
    seen = _Seen()
    jobs = [(use, items, index) for use, items in parts.items() for index in range(len(items))]

    def read(job: tuple[str, Items, int]) -> tuple[str, Tensor | str, Counter[Value] | str | None]:
        use, items, index = job
        name = f"{use}: {items.ids[index]}"
        folder = masked.get(use)
        try:
            image = items.image(index)
        except (StsegError, OSError) as error:
            return name, str(error), None
        if folder is None:
            return name, image, None
        try:
            return name, image, _values(folder, index, image, folders)
        except (StsegError, OSError) as error:
            return name, image, str(error)

    with (
        ThreadPoolExecutor(_READERS) as readers,
        progress_bar(title="check", total=len(jobs), show=progress, unit="image") as bar,
    ):
        # In parts: a map over all would hold all images.
        for start in range(0, len(jobs), 8 * _READERS):
            part = jobs[start : start + 8 * _READERS]
            for (_, _, index), (name, image, values) in zip(part, readers.map(read, part), strict=True):
                bar.update()
                if isinstance(image, str):
                    seen.unreadable.append(Skipped(index, name, image))
                    continue
                seen.sizes[image.shape[-2], image.shape[-1]] += 1
                seen.channels[image.shape[0]] += 1
                digest = hashlib.blake2b(image.contiguous().view(torch.uint8).numpy().data, digest_size=16)
                seen.digests.setdefault(f"{digest.hexdigest()} {tuple(image.shape)}", []).append(name)
                if isinstance(values, str):
                    seen.unreadable.append(Skipped(index, f"mask of {name}", values))
                elif values is not None:
                    seen.values.update(values)
    return seen


def _values(folder: SegmentationFolder, index: int, image: Tensor, folders: Folders) -> Counter[Value]:
    """Count the values that a mask file holds, or its colors."""
    path, name = folder.mask_path(index), folder.ids[index]
    colored = folders.class_map is not None and any(isinstance(key, tuple) for key in folders.class_map)
    pixels = decoded = decode_mask(path, colors=colored)
    if pixels.ndim == 3:
        try:
            pixels = gray_of(pixels, name=name)
        except DataError:  # in colors
            pixels = pixels[..., :3] if pixels.shape[-1] >= 3 else pixels
    if pixels.shape[:2] != tuple(image.shape[-2:]):
        (height, width), (h, w) = image.shape[-2:], pixels.shape[:2]
        raise DataError(f"{path} is {h} x {w}, its image {height} x {width} (height x width); expected equal sizes")
    if folders.class_map is not None:
        to_classes = ClassMap(folders.class_map, folders.unmapped)
        to_classes(decoded if colored else pixels, name=name)  # names a value that it does not have
    if pixels.ndim == 3:
        colors, counts = np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0, return_counts=True)
        return Counter({tuple(c): int(n) for c, n in zip(colors[:_MOST_VALUES].tolist(), counts, strict=False)})
    values, counts = np.unique(as_mask(pixels, name=name).numpy(), return_counts=True)
    return Counter({int(v): int(n) for v, n in zip(values[:_MOST_VALUES], counts, strict=False)})


def _count_classes(
    folders: Folders, labeled: SegmentationFolder, val: SegmentationFolder | None, values: Mapping[Value, int]
) -> ClassCounts:
    """Count the pixels of each class in the labeled masks.

    Raises:
        DataError: if the number of classes is not known, or a mask holds another class.
    """
    num_classes = _known_classes(folders, values)
    counts = ClassCounts(num_classes, name="labeled")
    for part in (labeled, val):
        for index in range(0 if part is None else len(part)):
            assert part is not None
            mask = part[index][1]
            check_mask_values(mask, num_classes, 255, name=part.ids[index])
            if part is labeled:
                counts.add(mask)
    return counts


def _known_classes(folders: Folders, values: Mapping[Value, int]) -> int:
    """Return the number of classes that the arguments state, else that of the masks if there are few."""
    if folders.classes is not None or folders.class_map is not None:
        return folders.num_classes()
    found = 1 + max((value for value in values if isinstance(value, int) and value != 255), default=0)
    if found > _MOST_CLASSES:
        raise DataError(
            f"the masks hold values up to {found - 1}, as shades of gray do, or numbers of objects; if they are "
            f"{found} classes: --classes {found}"
        )
    return max(2, found)


def _is_across(one: str, other: str) -> bool:
    """Return whether one of two images, ``"use: id"``, is for validation and the other is not."""
    return one.startswith("validation:") != other.startswith("validation:")


def _same(digests: Mapping[str, list[str]]) -> tuple[list[tuple[str, str]], list[str]]:
    """Return pairs of equal images, and the problem that some of them are."""
    pairs = [(names[0], other) for names in digests.values() for other in names[1:]]
    across = [
        (one, other)
        for names in digests.values()
        for place, one in enumerate(names)
        for other in names[place + 1 :]
        if _is_across(one, other)
    ]
    problems = []
    if across:
        shown = _listed([f"{one} = {other}" for one, other in across])
        problems.append(
            f"{len(across)} validation images are among those of the training: {shown}; the validation would be too "
            "good: leave them out of one"
        )
    return pairs, problems


def _estimate(folders: Folders, training: Training) -> Estimate:
    """Try a few steps of the first training, and labeling where there is any."""
    trainer = training.trainer(folders, None, progress=False)
    device = setup_device()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    labeled, others = folders.labeled(), folders.images_only()
    unlabeled = None if others is None else Items.of(others)
    few = None if unlabeled is None else unlabeled.subset(range(min(len(unlabeled), 4 * trainer.config.batch_size)))
    one = training
    if _trainings(trainer.recipe) > 1:  # of which each is supervised
        one = replace(training, method="supervised", method_settings={})
    one = replace(one, settings={**one.settings, "steps": _TRIAL_STEPS + 2, "eval_every": 1})
    stamps: list[float] = []
    quick = one.trainer(folders, None, progress=False, log=lambda row: stamps.append(time.perf_counter()))
    result = quick.fit(labeled, None if one.method == "supervised" else few)
    step = statistics.median(after - before for before, after in pairwise(stamps))
    seconds = step * (trainer.config.steps or 0) * _trainings(trainer.recipe)
    if isinstance(trainer.recipe, ST) and unlabeled is not None:
        views = MultiScaleFlip(result.model) if trainer.recipe.labeling.tta is not None else result.model
        labeler = PseudoLabeler(views, num_classes=trainer.num_classes, progress=False)
        began = time.perf_counter()
        tried = range(min(2, len(unlabeled)))
        labeler.label(unlabeled.subset(tried))
        seconds += (time.perf_counter() - began) / len(tried) * len(unlabeled)
    return Estimate(seconds, step, _peak_memory(device), device.type)


def _trainings(recipe: object) -> int:
    return 3 if isinstance(recipe, STPlusPlus) else 2 if isinstance(recipe, ST) else 1


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _most_common(counted: Iterable[tuple[str, int]]) -> str:
    rows = sorted(counted, key=lambda row: -row[1])
    if len(rows) == 1:
        return f"{rows[0][0]} (all)"
    return _listed([f"{name} ({count})" for name, count in rows])


def _shares(values: Mapping[Value, int]) -> str:
    everything = max(1, sum(values.values()))
    rows = [f"{value} ({values[value] / everything:.1%})".replace("%", " %") for value in _sorted(values)]
    return _listed(rows, most=12)


def _sorted(values: Iterable[Value]) -> list[Value]:
    return sorted(values, key=lambda value: value if isinstance(value, tuple) else (value,))


def _listed(texts: Sequence[object], most: int = _SHOWN) -> str:
    shown = ", ".join(map(str, texts[:most]))
    return shown if len(texts) <= most else f"{shown}, ... ({len(texts)} in all)"
