"""Pseudo-labels: predictions of a trained network used as labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from stseg.data.convert import image_of
from stseg.data.items import Items
from stseg.data.named import NamedDataset
from stseg.distributed import all_gather, all_reduce_sum, barrier, rank
from stseg.errors import DataError
from stseg.functional import PseudoLabels, pseudo_label
from stseg.functional.classes import check_classes, index_dtype
from stseg.functional.thresholds import STEPS, check_threshold, least_confidence, leaves_out, step_of
from stseg.inference.fingerprints import check_repeatable, checksum, image_checksums
from stseg.inference.mask_store import MaskStore
from stseg.inference.reading import Skipped
from stseg.inference.sweep import Sweep, check_batch_size, check_finite, finite_images, predictor
from stseg.inference.writing import writing_behind
from stseg.models.precision import resolve_precision
from stseg.models.segmenter import as_segmenter
from stseg.models.state import device_of, evaluating, fingerprint, move
from stseg.progress import LOG
from stseg.storage.files import remove_leftovers
from stseg.storage.folder_lock import check_folders
from stseg.types import Precision


class PseudoLabeled(NamedDataset[tuple[Tensor, Tensor]]):
    """Pseudo-labeled data set: items ``(image, mask)`` in the order of the images' data set.

    The mask is a copy of the stored one; the image may be the tensor of the images' data set itself.

    Attributes:
        ids: name of each item.
        indices: index of each item in the images' data set.
        skipped: items that could not be read, if ``skip_unreadable`` was set.
        store: the masks.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        store: MaskStore,
        *,
        indices: Sequence[int],
        ids: Sequence[str],
        skipped: Sequence[Skipped] = (),
    ) -> None:
        self.dataset = dataset
        self.store = store
        self.indices = list(indices)
        self.ids = list(ids)
        self.skipped = tuple(skipped)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        id = self.ids[position]
        image = image_of(self.dataset[self.indices[position]], name=id)
        try:
            mask, labeled = self.store.get_with_image(id)
        except KeyError:
            if self.store.folder is not None:
                check_folders(self.store.folder)
            raise DataError(f"the pseudo-mask of {id!r} is missing in {self.store}; start again to make it") from None
        if labeled is not None and labeled != checksum(image):
            raise self.store.other_image(id)
        if image.shape[-2:] != mask.shape:
            raise DataError(
                f"the pseudo-mask of {id!r} is {tuple(mask.shape)}, but its image {tuple(image.shape[-2:])}: "
                "the image has changed since it was labeled"
            )
        return image, mask

    def confidence(self, position: int) -> Tensor:
        """Return the ``(H, W)`` float32 confidence of an item's mask.

        Raises:
            KeyError: if labeling did not keep the confidence.
        """
        return self.store.confidence(self.ids[position])


class PseudoLabeler:
    """Labeler of images by a network, such as the teacher of ST (Yang et al., CVPR 2022, section 3.1).

    Args:
        model: a network or a wrapped one. For the paper's 10 views, pass ``stseg.MultiScaleFlip(model)``.
            Its training mode is restored.
        num_classes: number of classes; at least 2.
        threshold: pixels whose confidence is below it get ``ignore_index``; one value, or one for each class, such as
            those of :meth:`class_thresholds`. The paper keeps all (0).
        ignore_index: value of pixels that are left out.
        batch_size: most images of a batch; does not change the labels.
        num_workers: processes that read images.
        precision: ``"fp32"``, ``"bf16"`` for speed, or ``"auto"`` for bfloat16 where the device computes it natively.
        device: device to move the model to; None leaves it where it is.
        progress: whether to show a bar.

    Raises:
        ValueError: if an argument is out of its range; names it.
        NetworkError: when labeling, if the network does not return finite logits of ``num_classes`` classes.

    Example:
        >>> labeler = PseudoLabeler(nn.Conv2d(3, 4, 1), num_classes=4, progress=False)
        >>> mask, confidence = labeler(torch.rand(2, 3, 8, 8))
        >>> mask.shape, mask.dtype, confidence.dtype
        (torch.Size([2, 8, 8]), torch.uint8, torch.float32)
        >>> labeled = labeler.label([torch.rand(3, 8, 8), torch.rand(3, 5, 9)])
        >>> [tuple(mask.shape) for image, mask in labeled]
        [(8, 8), (5, 9)]
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        num_classes: int,
        threshold: float | Sequence[float] | Tensor = 0.0,
        ignore_index: int = 255,
        batch_size: int = 8,
        num_workers: int = 0,
        precision: Precision = "auto",
        device: torch.device | str | None = None,
        progress: bool = True,
    ) -> None:
        check_classes(num_classes, ignore_index)
        threshold = check_threshold(threshold, num_classes)
        check_batch_size(batch_size)
        self.model = move(as_segmenter(model), device)
        self.num_classes = num_classes
        self.threshold = threshold
        self.ignore_index = ignore_index
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.precision = resolve_precision(precision, device_of(self.model))
        self.progress = progress
        self._predict = predictor(self.model, num_classes, self.precision)

    def __call__(self, images: Tensor) -> PseudoLabels:
        """Label a batch.

        Args:
            images: ``(B, C, H, W)`` uint8, or float in [0, 1].

        Returns:
            mask ``(B, H, W)`` uint8 (int32 where classes or ignore index do not fit) and confidence ``(B, H, W)``
            float32, on the model's device.
        """
        with evaluating(self.model), torch.no_grad():
            labels = self._label(images)
        check_finite(bool(labels.confidence.isfinite().all()), name=f"a batch of shape {tuple(images.shape)}")
        return labels

    def label(
        self,
        dataset: Dataset[Any],
        store: MaskStore | str | Path | None = None,
        *,
        confidence: bool = False,
        skip_unreadable: bool = False,
    ) -> PseudoLabeled:
        """Label all images of a data set.

        Images of equal size are batched on the fly; memory does not grow with the number of images. Each mask is stored
        as soon as it is computed; images that the same model has already labeled in the store are skipped. Under
        ``torch.distributed`` the processes share the images, and a folder must be visible to all of them.

        Args:
            dataset: items are images, or tuples that begin with one. Masks are named by its ``ids``, else by number.
            store: a folder, a store, or None for memory.
            confidence: whether to store the confidence of each mask.
            skip_unreadable: whether to skip images that cannot be read and list them in ``.skipped``.

        Returns:
            A data set of ``(image, mask)``, in the order and with the ids of ``dataset``.

        Raises:
            DataError: before labeling starts, if there is no image, an id would leave the store, or an image changes
                from one reading to the next.
            DamagedFileError: before labeling starts, if the store holds masks that this labeler did not write, such as
                edited ones; says what to delete. Truncated and broken ones are made again.
            WorkdirMismatchError: before labeling starts, if the store was filled by another model or with other
                settings.
            UnreadableImageError: if an image cannot be read and ``skip_unreadable`` is false; the masks made
                so far stay in the store.
        """
        items = Items.of(dataset)
        sweep = Sweep(items, "label", self.batch_size, self.num_workers, self.progress, skip_unreadable)
        store = store if isinstance(store, MaskStore) else MaskStore(store)
        if store.folder is not None and leaves_out(self.threshold):
            check_stored(self.ignore_index)
        store.expect(items.ids)
        check_repeatable(items, name="unlabeled")
        store.claim(self.provenance(), images=image_checksums(items))
        if store.folder is not None and rank() == 0:
            remove_leftovers(store.folder)
        barrier()
        mine = [items.ids[index] for index in sweep.share]
        missing = store.missing(mine, confidence=confidence)
        todo: Sequence[int] = sweep.share  # of a million images, a list of numbers takes 36 MB
        if len(missing) < len(mine):
            absent = set(missing)
            todo = [index for index in sweep.share if items.ids[index] in absent]
            if rank() == 0:
                LOG.info(f"label: {len(mine) - len(missing)} of {len(mine)} masks are in {store} already")
        del mine, missing

        def label_each(batch: Tensor) -> tuple[Tensor, ...]:
            if confidence or leaves_out(self.threshold):
                labels = self._label(batch)
                kept = (labels.confidence,) if confidence else ()
                return labels.mask, *kept, finite_images(labels.confidence)
            highest, mask = self._predict(batch).max(1)  # without the softmax, which nothing needs
            return mask.to(index_dtype(self.num_classes, self.ignore_index)), finite_images(highest)

        # Threads write the PNGs while the network runs; their queue is bounded.
        with writing_behind() as write:
            of: dict[int, int] = {}  # checksums of the images that were read
            note = None if store.folder is None else lambda index, image: of.update({index: checksum(image)})
            with sweep.predict([self.model], label_each, indices=todo, on_item=note) as labeled:
                for index, (mask, *kept) in labeled:
                    known: dict[str, Any] = {} if note is None else {"image": of.pop(index)}
                    write(store.put, items.ids[index], mask, *kept, **known)
        if store.folder is None:
            _share_memory(store, [items.ids[index] for index in sweep.share])
        skipped = sweep.skipped()
        left_out = {s.index for s in skipped}
        for index in sweep.share:
            if index not in left_out and items.ids[index] not in store:
                raise DataError(f"the mask of {items.ids[index]!r} has vanished from {store}; start again to make it")
        indices = [index for index in range(len(items)) if index not in left_out]
        return PseudoLabeled(items, store, indices=indices, ids=[items.ids[i] for i in indices], skipped=skipped)

    def class_thresholds(
        self, dataset: Dataset[Any], keep: float = 0.8, *, skip_unreadable: bool = False
    ) -> tuple[float, ...]:
        """Compute thresholds that keep the same share of the predicted pixels of each class in a data set.

        A common threshold drops most pixels of hard classes; these thresholds are class-balanced (the idea of CBST, Zou
        et al., ECCV 2018). They take one more pass over the images. Memory holds only a histogram of the confidence of
        each class, whose steps get finer towards 1: within 0.1 % of ``1 - confidence``. At least the share ``keep`` of
        a class is kept, plus at most the pixels in the same step as the threshold. Under ``torch.distributed`` the
        processes share the images, and each gets the same thresholds.

        Args:
            dataset: items are images, or tuples that begin with one.
            keep: share of the pixels of each predicted class to keep, in (0, 1].
            skip_unreadable: whether to skip images that cannot be read.

        Returns:
            A threshold for each class, to be used as ``threshold`` of a labeler of the same model; 0 for a class that
            is kept entirely or never predicted. The ``threshold`` of this labeler is not used.

        Raises:
            DataError: if there is no image.
            NetworkError: if the logits of an image are not finite; names it.
            UnreadableImageError: if an image cannot be read and ``skip_unreadable`` is false.
            ValueError: if ``keep`` is not in (0, 1].

        Example:
            >>> torch.manual_seed(0)
            <...>
            >>> labeler = PseudoLabeler(nn.Conv2d(3, 4, 1), num_classes=4, progress=False)
            >>> images = [torch.rand(3, 8, 8) for _ in range(3)]
            >>> thresholds = labeler.class_thresholds(images, keep=0.5)
            >>> labels = PseudoLabeler(labeler.model, num_classes=4, threshold=thresholds, progress=False).label(images)
            >>> kept = sum(int((mask != 255).sum()) for _, mask in labels)
            >>> 0.5 <= kept / (3 * 8 * 8) < 0.55
            True
        """
        if not 0 < keep <= 1:
            raise ValueError(f"keep is {keep}; expected a share in (0, 1]")
        sweep = Sweep(
            Items.of(dataset), "find thresholds for", self.batch_size, self.num_workers, self.progress, skip_unreadable
        )
        counts = torch.zeros(self.num_classes, STEPS, dtype=torch.int64, device=device_of(self.model))

        def count(batch: Tensor) -> tuple[Tensor]:
            mask, confidence = pseudo_label(self._predict(batch), ignore_index=self.ignore_index)
            cells = (mask.long() * STEPS + step_of(confidence)).flatten()
            counts.add_(torch.bincount(cells, minlength=counts.numel()).reshape(counts.shape))
            return (finite_images(confidence),)

        with sweep.predict([self.model], count) as counted:
            for _ in counted:
                pass
        return tuple(least_confidence(of_class.tolist(), keep) for of_class in all_reduce_sum(counts).cpu())

    def _label(self, images: Tensor) -> PseudoLabels:
        return pseudo_label(self._predict(images), threshold=self.threshold, ignore_index=self.ignore_index)

    def provenance(self) -> dict[str, Any]:
        """Return the settings and weights that the labels depend on, JSON-serializable; reads all weights."""
        return {
            "model": fingerprint(self.model),
            "num_classes": self.num_classes,
            "threshold": self.threshold,
            "ignore_index": self.ignore_index,
            "precision": self.precision,
        }


def check_stored(ignore_index: int) -> None:
    """Raise a ``ValueError`` if a store on disk cannot represent the ignore index."""
    if not 0 <= ignore_index <= 65535:
        raise ValueError(f"ignore_index is {ignore_index}; a store on disk takes values in 0..65535")


def _share_memory(store: MaskStore, mine: list[str]) -> None:
    """Give every process the masks of all, in chunks: NCCL sends them through the memory of the GPU."""
    made = [id for id in mine if id in store]
    for start in range(0, max(all_gather(len(made))), 32):
        part = []
        for id in made[start : start + 32]:
            certainty = store.confidence(id) if store.holds(id, confidence=True) else None
            part.append((id, store.get(id), certainty))
        for other in all_gather(part):
            for id, mask, certainty in other:
                store.put(id, mask, certainty)
