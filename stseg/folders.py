"""Training from folders of images and masks, as the console command does it."""

from __future__ import annotations

import filecmp
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import ConcatDataset, Dataset

from stseg.augment import WeakAugment
from stseg.checks import check_count
from stseg.data import SegmentationFolder, split_ids
from stseg.data._reading import Mode
from stseg.data.convert import image_of
from stseg.engine.config import TrainConfig
from stseg.errors import DataError
from stseg.methods import create_method
from stseg.models.smp_networks import create_network
from stseg.self_trainer import SelfTrainer
from stseg.stages.result import SelfTrainingResult
from stseg.storage.files import absolute_folder
from stseg.storage.records import claim, read_record

FILE = "folders.json"
_CROPS, _CROP_STEP = (64, 320), 32
_SIZES_READ = 25  # images whose size decides about the crop


@dataclass(frozen=True, kw_only=True)
class Folders:
    """Folders of images and masks, and how to read them.

    Images without a mask are unlabeled: those in ``images`` for which ``masks`` has none, and those in ``unlabeled``,
    without the ones that ``images`` holds under the same name.

    Args:
        images: folder of images, some or all of which have a mask. See :class:`stseg.data.SegmentationFolder`, also for
            ``mask_suffix``, ``class_map``, ``unmapped``, ``mode`` and ``value_range``.
        masks: folder of the masks, paired with the images by name.
        unlabeled: folder of further images.
        val: how many of the images with masks to hold out for validation: a number, or a share below 1. They are drawn
            at random by ``seed``.
        val_images: folder of images for validation, in place of ``val``.
        val_masks: folder of their masks.
        classes: name of each class, or how many there are.
        mask_suffix: what the names of masks have after those of their images.
        class_map: the class of each value, or color, of the masks.
        unmapped: class of all other values, such as 255 to ignore them; None refuses them.
        mode: what images are converted to; None keeps the channels of the files.
        value_range: the values of black and white in images of more than 8 bits.
        seed: seed of the draw of ``val``.

    Raises:
        ValueError: if both ``val`` and ``val_images`` are given, or only one of ``val_images`` and ``val_masks``, or
            ``class_map`` has a class beyond ``classes``.
        DataError: when the images are looked for; see :class:`stseg.data.SegmentationFolder`.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> root = Path(tempfile.mkdtemp())
        >>> for name in ("images/1.png", "images/2.png", "images/3.png", "masks/1.png", "masks/2.png"):
        ...     (root / name).parent.mkdir(exist_ok=True)
        ...     Image.new("L", (6, 4)).save(root / name)
        >>> folders = Folders(images=root / "images", masks=root / "masks")
        >>> folders.labeled().ids, folders.images_only().ids
        (['1', '2'], ['3'])
    """

    images: str | Path
    masks: str | Path
    unlabeled: str | Path | None = None
    val: int | float | None = None
    val_images: str | Path | None = None
    val_masks: str | Path | None = None
    classes: Sequence[str] | int | None = None
    mask_suffix: str = ""
    class_map: Mapping[Any, int] | None = None
    unmapped: int | None = None
    mode: Mode | None = "RGB"
    value_range: tuple[float, float] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.val_images is None) != (self.val_masks is None):
            raise ValueError("val_images and val_masks go together; expected both")
        if self.val is not None and self.val_images is not None:
            raise ValueError("val and val_images are both given; expected one of them")
        if isinstance(self.classes, int):
            check_count("classes", self.classes, least=2)
        mapped = self.class_map.values() if isinstance(self.class_map, Mapping) else ()
        highest = max((to for to in mapped if isinstance(to, int) and to != 255), default=0)
        if self.classes is not None and highest >= (count := self.num_classes()):
            raise ValueError(
                f"class_map has the class {highest}, and classes has {count}; expected {highest + 1}, "
                "with the background"
            )

    @property
    def class_names(self) -> Sequence[str] | None:
        """Names of the classes; None if they have none."""
        return None if isinstance(self.classes, int) else self.classes

    def labeled(self) -> SegmentationFolder:
        """Return the images with masks, without those held out."""
        held_out = self._held_out_ids()
        return self._masked(self.images, self.masks, exclude=held_out)

    def validation(self) -> SegmentationFolder | None:
        """Return the images and masks for validation; None if there are none."""
        if self.val_images is not None and self.val_masks is not None:
            return self._masked(self.val_images, self.val_masks)
        held_out = self._held_out_ids()
        return self._masked(self.images, self.masks, ids=held_out) if held_out else None

    def images_only(self) -> Dataset[Any] | None:
        """Return the unlabeled images, with ``ids``; None if there are none."""
        masked = self._masked(self.images, self.masks)
        parts: list[SegmentationFolder] = []
        if masked.without_mask:
            parts.append(self._plain(self.images, exclude=masked.ids))
        if self.unlabeled is not None:
            parts += self._further(self.unlabeled, [masked, *parts])
        if len(parts) < 2:
            return parts[0] if parts else None
        both: ConcatDataset[Any] = ConcatDataset(parts)
        both.ids = [id for part in parts for id in part.ids]  # type: ignore[attr-defined]
        return both

    def num_classes(self) -> int:
        """Return the number of classes that ``classes`` or ``class_map`` states.

        Raises:
            DataError: if neither does.
        """
        if self.classes is not None:
            return self.classes if isinstance(self.classes, int) else len(self.classes)
        if self.class_map is not None:
            return 1 + max(to for to in self.class_map.values() if to != 255)
        raise DataError("the number of classes is not known; expected classes=, names or a number, or class_map=")

    def channels(self) -> int:
        """Return the number of channels of the images: of the first one, if ``mode`` does not tell."""
        if self.mode is None:
            return len(image_of(self.labeled()[0], name="image"))
        return {"RGB": 3, "RGBA": 4, "L": 1}[self.mode]

    def suggest_crop(self) -> int:
        """Return the side of training crops: the largest multiple of 32 in the median short side, from 64 to 320."""
        labeled = self.labeled()
        step = max(1, len(labeled) // _SIZES_READ)
        sides: list[int] = sorted(min(labeled[index][0].shape[-2:]) for index in range(0, len(labeled), step))
        low, high = _CROPS
        return min(high, max(low, sides[len(sides) // 2] // _CROP_STEP * _CROP_STEP))

    def reading(self) -> dict[str, Any]:
        """Return how the files are read, JSON-serializable."""
        class_map = None if self.class_map is None else [[key, to] for key, to in self.class_map.items()]
        return {
            "classes": self.classes if isinstance(self.classes, int | None) else list(self.classes),
            "class_map": class_map,
            "unmapped": self.unmapped,
            "mode": self.mode,
            "value_range": None if self.value_range is None else list(self.value_range),
        }

    def read(self, images: str | Path) -> SegmentationFolder:
        """Return the images of another folder, read in the same way."""
        return self._plain(images)

    def without_masks(self, masked: SegmentationFolder) -> SegmentationFolder:
        """Return the images of a data set of images and masks."""
        beside = self.mask_suffix if masked.images == masked.masks else ""
        return SegmentationFolder(
            masked.images, ids=masked.ids, mask_suffix=beside, mode=self.mode, value_range=self.value_range
        )

    def values(self) -> tuple[int, ...] | None:
        """Return the mask value of each class in the files; None where the values are the classes, or are colors."""
        if self.class_map is None:
            return None
        of_class: dict[int, Any] = {}
        for value, to in self.class_map.items():
            of_class.setdefault(to, value)
        values = tuple(of_class.get(index) for index in range(self.num_classes()))
        return None if not all(isinstance(value, int) for value in values) else values  # type: ignore[return-value]

    def repeated(self) -> list[str]:
        """Return the names in ``unlabeled`` of files that ``images`` holds as well; they are counted once."""
        if self.unlabeled is None:
            return []
        return self._shared(self._plain(self.unlabeled), [self._plain(self.images)])[0]

    def _further(self, folder: str | Path, known: Sequence[SegmentationFolder]) -> list[SegmentationFolder]:
        """Return the images of another folder without those that are known; others of equal names get a prefix."""
        found = self._plain(folder)
        same, other = self._shared(found, known)
        if len(same) == len(found):
            return []
        prefix = "unlabeled/" if other else ""
        return [self._plain(folder, exclude=[prefix + id for id in same], id_prefix=prefix)]

    def _shared(self, found: SegmentationFolder, known: Sequence[SegmentationFolder]) -> tuple[list[str], bool]:
        """Return the ids of the same files as known ones, and whether other files have the id of a known one."""
        places = {id: (part, index) for part in known for index, id in enumerate(part.ids)}
        same, other = [], False
        for index, id in enumerate(found.ids):
            if id in places:
                part, place = places[id]
                equal = _equal_files(found.image_path(index), part.image_path(place))
                same += [id] if equal else []
                other = other or not equal
        return same, other

    def _held_out_ids(self) -> list[str]:
        if self.val is None:
            return []
        return split_ids(self._masked(self.images, self.masks).ids, self.val, self.seed)[0]

    def _masked(self, images: str | Path, masks: str | Path, **chosen: Any) -> SegmentationFolder:
        return SegmentationFolder(
            images,
            masks,
            labeled_only=True,
            mask_suffix=self.mask_suffix,
            class_map=self.class_map,
            unmapped=self.unmapped if self.class_map is not None else 255,
            mode=self.mode,
            value_range=self.value_range,
            **chosen,
        )

    def _plain(self, images: str | Path, **chosen: Any) -> SegmentationFolder:
        beside = Path(images) == Path(self.images) == Path(self.masks)
        suffix = self.mask_suffix if beside else ""
        return SegmentationFolder(images, mask_suffix=suffix, mode=self.mode, value_range=self.value_range, **chosen)


def _equal_files(one: Path, other: Path) -> bool:
    try:
        return filecmp.cmp(one, other, shallow=False)
    except OSError:  # what cannot be read is named when it is
        return False


def folders_of(workdir: str | Path) -> Folders | None:
    """Return how the files of a run of :func:`train_folders` were read, without folders; None for other runs."""
    folder = absolute_folder(workdir)
    assert folder is not None
    record = read_record(folder / FILE)
    if record is None:
        return None
    reading = record["reading"]
    pairs = reading["class_map"]
    class_map = None if pairs is None else {_key(key): to for key, to in pairs}
    value_range = None if reading["value_range"] is None else tuple(reading["value_range"])
    return Folders(images="", masks="", **{**reading, "class_map": class_map, "value_range": value_range})


def _key(key: Any) -> Any:
    return tuple(key) if isinstance(key, list) else key


@dataclass(frozen=True, kw_only=True)
class Training:
    """What to train on folders: method, network and length.

    Args:
        method: name of a method; see :func:`stseg.methods.list_methods`.
        method_settings: its settings, such as ``{"threshold": 0.9}``.
        network: architecture of segmentation_models_pytorch; see :func:`stseg.models.create_network`, also for
            ``encoder``, ``weights`` and ``network_options``.
        encoder: its encoder.
        weights: of the encoder; None for random ones.
        network_options: further arguments of the network.
        crop: side of the training crops; None for :meth:`Folders.suggest_crop`.
        any_orientation: whether images have no up and down, as of tissue or from above: training images are also
            rotated by quarter turns and flipped vertically.
        settings: changes to the settings for few masks: AdamW at 3e-4 for the encoder and ten times that for the rest
            (without pretrained weights 1e-3 for all), 4,000 steps of 8 labeled images. The names are those of
            :class:`stseg.TrainConfig`.

    Raises:
        ValueError: if both ``crop`` and the setting ``weak`` are given; when a trainer is made, if a setting is out of
            its range.

    Example:
        >>> training = Training(method="unimatch", encoder="resnet18", settings={"steps": 2000})
        >>> config = training.config(crop=96)
        >>> config.steps, config.weak.crop_size, config.lr
        (2000, (96, 96), 0.0003)
    """

    method: str = "fixmatch"
    method_settings: Mapping[str, Any] = field(default_factory=dict)
    network: str = "Unet"
    encoder: str = "resnet34"
    weights: str | None = "imagenet"
    network_options: Mapping[str, Any] = field(default_factory=dict)
    crop: int | None = None
    any_orientation: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.crop is not None and "weak" in self.settings:
            raise ValueError("crop and the setting weak are both given; expected one of them")

    def check_names(self) -> None:
        """Raise a ``ValueError`` if there is no such method, network, encoder or setting; loads no weights."""
        create_method(self.method, num_classes=2, **self.method_settings)
        create_network(self.network, self.encoder, num_classes=2, weights=None, options=dict(self.network_options))
        self.config(crop=1)

    def config(self, *, crop: int) -> TrainConfig:
        """Return all settings of the training; crops have this side, unless the settings have a ``weak``."""
        rates = {"lr": 1e-3, "head_lr_factor": 1.0} if self.weights is None else {"lr": 3e-4, "head_lr_factor": 10.0}
        length = {} if "epochs" in self.settings else {"steps": 4000}
        weak = WeakAugment(
            crop,
            ignore_index=self.settings.get("ignore_index", 255),
            vertical_flip=0.5 if self.any_orientation else 0.0,
            quarter_turns=self.any_orientation,
        )
        defaults = {"batch_size": 8, "optimizer": "adamw", "weight_decay": 0.01, "weak": weak, **length, **rates}
        return TrainConfig(**{**defaults, **self.settings})

    def trainer(self, folders: Folders, out: str | Path | None, **options: Any) -> SelfTrainer:
        """Return the trainer of a run."""
        num_classes = folders.num_classes()
        make_model = partial(
            create_network,
            self.network,
            self.encoder,
            num_classes=num_classes,
            weights=self.weights,
            channels=folders.channels(),
            options=dict(self.network_options),
        )
        config = self.config(crop=1 if "weak" in self.settings else self.crop or folders.suggest_crop())
        method = create_method(self.method, num_classes=num_classes, **self.method_settings)
        settings = {"num_classes": num_classes, "config": config, "method": method, "class_names": folders.class_names}
        return SelfTrainer(make_model, workdir=out, **{**settings, **options})


def train_folders(
    folders: Folders, out: str | Path, training: Training | None = None, **options: Any
) -> SelfTrainingResult:
    """Train a network on folders of images and masks.

    The same call again resumes a run that was interrupted. ``stseg.load(out)`` returns the network, and
    ``stseg predict --run`` reads how the images were read from the folder.

    Args:
        folders: the folders.
        out: work directory of the run.
        training: method, network and length; None for the defaults.
        options: further arguments of :class:`stseg.SelfTrainer`, such as ``skip_unreadable=True``.

    Raises:
        DataError: if there are no unlabeled images for a method that learns from them, or the data are invalid; see
            :meth:`stseg.SelfTrainer.fit`.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from PIL import Image
        >>> root = Path(tempfile.mkdtemp())
        >>> for index in range(6):
        ...     pixels = np.random.default_rng(index).integers(0, 256, (32, 32), dtype=np.uint8)
        ...     for name, shown in (("images", pixels), ("masks", np.where(pixels > 127, 255, 0).astype(np.uint8))):
        ...         (root / name).mkdir(exist_ok=True)
        ...         if name == "images" or index < 2:
        ...             Image.fromarray(shown).save(root / name / f"{index}.png")
        >>> folders = Folders(images=root / "images", masks=root / "masks", class_map={0: 0, 255: 1})
        >>> tiny = {"network": "FPN", "encoder": "tu-test_resnet", "weights": None, "crop": 32}
        >>> training = Training(**tiny, settings={"steps": 2, "batch_size": 2})
        >>> result = train_folders(folders, root / "run", training, progress=False)
        >>> folders_of(root / "run").values()
        (0, 255)
    """
    training = training or Training()
    trainer = training.trainer(folders, out, **options)
    labeled, unlabeled, val = folders.labeled(), folders.images_only(), folders.validation()
    if unlabeled is None and training.method != "supervised":
        raise DataError(
            f"there are no unlabeled images for {training.method!r}: all images in {folders.images} have a mask; "
            "expected unlabeled=, a folder of images without masks, or method='supervised'"
        )
    result = trainer.fit(labeled, None if training.method == "supervised" else unlabeled, val)
    assert trainer.workdir is not None
    claim(trainer.workdir / FILE, {"reading": folders.reading()}, delete=trainer.workdir, to="start over")
    return result
