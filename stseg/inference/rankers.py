"""Rank unlabeled images by prediction stability, the selection of ST++, or by confidence."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from stseg.data.items import Items
from stseg.description import describe
from stseg.distributed import all_gather, barrier, rank
from stseg.functional import mean_confidence, stability
from stseg.functional.classes import check_classes
from stseg.functional.reliability import compute_stability
from stseg.inference.fingerprints import check_repeatable, image_checksums
from stseg.inference.ranking import Ranking
from stseg.inference.score_log import ScoreLog
from stseg.inference.sweep import Sweep, check_batch_size, check_finite, finite_images, predictor
from stseg.models.precision import resolve_precision
from stseg.models.segmenter import as_segmenter
from stseg.models.state import device_of, evaluating, fingerprint, move
from stseg.progress import LOG
from stseg.types import Precision


class _Ranker(ABC):
    """Base class that scores batches and ranks data sets."""

    def __init__(
        self,
        networks: Sequence[nn.Module],
        num_classes: int,
        score: Callable[..., Tensor],
        batch_size: int,
        num_workers: int,
        precision: Precision,
        device: torch.device | str | None,
        progress: bool,
    ) -> None:
        check_classes(num_classes, -1)
        check_batch_size(batch_size)
        if not callable(score):
            raise TypeError(f"score is {score!r}; expected a function such as stseg.functional.stability")
        self.networks = [move(as_segmenter(network), device) for network in networks]
        self.num_classes, self.score = num_classes, score
        self.batch_size, self.num_workers, self.progress = batch_size, num_workers, progress
        self.precision = resolve_precision(precision, *map(device_of, self.networks))
        self._predictors = [predictor(network, num_classes, self.precision) for network in self.networks]

    @abstractmethod
    def _score(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Score images ``(B, C, H, W)``: ``(B,)`` scores, and whether the logits of each image are finite."""

    def __call__(self, images: Tensor) -> Tensor:
        """Score a batch.

        Args:
            images: ``(B, C, H, W)`` uint8, or float in [0, 1].

        Returns:
            ``(B,)`` float64 in [0, 1], on the device of the last network.
        """
        with evaluating(*self.networks), torch.no_grad():
            scores, finite = self._score(images)
        name = f"a batch of shape {tuple(images.shape)}"
        check_finite(bool(finite.all()), name=name)
        for score in _checked_shape(scores, len(images)).tolist():
            _check_score(score, name=name)
        return scores

    def rank(self, dataset: Dataset[Any], *, store: str | Path | None = None, skip_unreadable: bool = False) -> Ranking:
        """Score and rank all images of a data set.

        Under ``torch.distributed`` the processes share the images and each gets the complete ranking.

        Args:
            dataset: items are images, or tuples or mappings that contain one.
            store: file to which each score is appended as soon as it is known; images already in it are skipped. With
                several processes, each further one appends to its own file next to it.
            skip_unreadable: whether to skip images that cannot be read and list them in ``.skipped``.

        Raises:
            DataError: if there is no image, one changes from one reading to the next, or ``store`` has a malformed
                line.
            WorkdirMismatchError: if ``store`` was made with other networks, settings or another score function.
            UnreadableImageError: if an image cannot be read and ``skip_unreadable`` is false.
        """
        items = Items.of(dataset)
        check_repeatable(items, name="unlabeled")
        sweep = Sweep(items, "rank", self.batch_size, self.num_workers, self.progress, skip_unreadable)
        log = None if store is None else ScoreLog(Path(store), self.provenance(), image_checksums(items))
        scores: dict[int, float] = {} if log is None else log.read(items.ids)
        if scores and rank() == 0:
            LOG.info(f"rank: {len(scores)} of {len(items)} scores are in {store} already")
        barrier()

        def score_each(batch: Tensor) -> tuple[Tensor, Tensor]:
            values, finite = self._score(batch)
            return _checked_shape(values, len(batch)), finite

        todo = [index for index in sweep.share if index not in scores] if scores else sweep.share
        with sweep.predict(self.networks, score_each, indices=todo) as values:
            for index, (value,) in values:
                score = float(value)
                _check_score(score, name=f"image {items.ids[index]!r}")
                scores[index] = score
                if log is not None:
                    log.add(items.ids[index], score)
        for part in all_gather(scores):
            scores.update(part)
        skipped = sweep.skipped()
        indices = sorted(scores)
        return Ranking.from_scores(
            [scores[i] for i in indices], [items.ids[i] for i in indices], indices=indices, skipped=skipped
        )

    def provenance(self) -> dict[str, Any]:
        """Return the settings and weights that the scores depend on, JSON-serializable; reads all weights."""
        return {
            "networks": [fingerprint(network) for network in self.networks],
            "num_classes": self.num_classes,
            "precision": self.precision,
            "score": describe(self.score),
        }

    def __repr__(self) -> str:
        networks = ", ".join(type(getattr(network, "network", network)).__name__ for network in self.networks)
        return f"{type(self).__name__}([{networks}], num_classes={self.num_classes}, score={describe(self.score)})"


class StabilityRanker(_Ranker):
    """Ranker of images by the stability of their predictions during training.

    The selection of ST++ (Yang et al., CVPR 2022, section 3.3): each checkpoint labels the image at one scale; the
    score is the mean IoU with the mask of the last checkpoint, averaged over the earlier ones.

    Args:
        checkpoints: two or more networks (bare or wrapped) in the order of training; the last one is the reference.
            They may be on different devices; each runs where it is, unless ``device`` is given.
        num_classes: number of classes; at least 2.
        score: ``(masks, reference, num_classes) -> (B,)`` scores in [0, 1], higher where more reliable. The default is
            the paper's; :func:`stseg.functional.pixel_agreement`, ``functools.partial`` of
            :func:`stseg.functional.weighted_stability` and custom functions can be used instead.
        batch_size: most images of a batch.
        num_workers: processes that read images.
        precision: ``"fp32"``, ``"bf16"`` for speed, or ``"auto"`` for bfloat16 where the device computes it natively.
        device: device to move the networks to; None leaves them where they are.
        progress: whether to show a bar.

    Raises:
        ValueError: if there are fewer than two checkpoints, or an argument is out of its range. When scoring, if
            ``score`` does not return (B,) numbers in [0, 1].
        NetworkError: when scoring, if a network does not return finite logits of ``num_classes`` classes.

    Example:
        >>> nets = [nn.Conv2d(3, 4, 1) for _ in range(3)]
        >>> ranker = StabilityRanker(nets, num_classes=4, progress=False)
        >>> ranker(torch.rand(2, 3, 8, 8)).shape
        torch.Size([2])
        >>> len(ranker.rank([torch.rand(3, 8, 8), torch.rand(3, 5, 9)]))
        2
    """

    def __init__(
        self,
        checkpoints: Sequence[nn.Module],
        *,
        num_classes: int,
        score: Callable[[Tensor, Tensor, int], Tensor] = stability,
        batch_size: int = 8,
        num_workers: int = 0,
        precision: Precision = "auto",
        device: torch.device | str | None = None,
        progress: bool = True,
    ) -> None:
        if isinstance(checkpoints, nn.Module) and not isinstance(checkpoints, nn.ModuleList):
            raise TypeError(f"checkpoints is one network ({type(checkpoints).__name__}); expected two or more")
        checkpoints = list(checkpoints)
        if len(checkpoints) < 2:
            raise ValueError(f"got {len(checkpoints)} checkpoints; expected two or more, the last one as reference")
        super().__init__(checkpoints, num_classes, score, batch_size, num_workers, precision, device, progress)

    def _score(self, images: Tensor) -> tuple[Tensor, Tensor]:
        highest, masks = zip(*(predict(images).max(1) for predict in self._predictors), strict=True)
        reference = masks[-1]
        earlier = torch.stack([mask.to(reference.device) for mask in masks[:-1]])
        finite = torch.stack([finite_images(values).to(reference.device) for values in highest]).all(0)
        score = compute_stability if self.score is stability else self.score  # arg max makes valid masks
        return score(earlier, reference, self.num_classes), finite


class ConfidenceRanker(_Ranker):
    """Ranker of images by the confidence of one network; not part of the paper.

    An alternative to stability that needs no earlier checkpoints. It cannot detect confident mistakes.

    Args:
        model: a network or a wrapped one, such as the teacher. With ``stseg.MultiScaleFlip(model)`` the score uses
            the same probabilities as labeling. Its training mode is restored.
        num_classes: number of classes; at least 2.
        score: ``logits (B, K, H, W) -> (B,)`` scores in [0, 1], higher where more reliable:
            :func:`stseg.functional.mean_confidence`, :func:`stseg.functional.mean_margin`,
            :func:`stseg.functional.mean_certainty` (entropy), :func:`stseg.functional.expected_iou`, or a custom
            function.
        batch_size: most images of a batch.
        num_workers: processes that read images.
        precision: ``"fp32"``, ``"bf16"`` for speed, or ``"auto"`` for bfloat16 where the device computes it natively.
        device: device to move the networks to; None leaves them where they are.
        progress: whether to show a bar.

    Raises:
        ValueError: if an argument is out of its range. When scoring, if ``score`` does not return (B,) numbers in
            [0, 1].
        NetworkError: when scoring, if the network does not return finite logits of ``num_classes`` classes.

    Example:
        >>> ranker = ConfidenceRanker(nn.Conv2d(3, 4, 1), num_classes=4, progress=False)
        >>> ranker(torch.rand(2, 3, 8, 8)).shape
        torch.Size([2])
        >>> len(ranker.rank([torch.rand(3, 8, 8), torch.rand(3, 5, 9)]))
        2
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        num_classes: int,
        score: Callable[[Tensor], Tensor] = mean_confidence,
        batch_size: int = 8,
        num_workers: int = 0,
        precision: Precision = "auto",
        device: torch.device | str | None = None,
        progress: bool = True,
    ) -> None:
        super().__init__([model], num_classes, score, batch_size, num_workers, precision, device, progress)

    def _score(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = self._predictors[0](images)
        return self.score(logits), finite_images(logits.amax(1))


def _checked_shape(scores: Any, count: int) -> Tensor:
    if not isinstance(scores, Tensor) or scores.shape != (count,):
        got = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"score gave {got} for a batch of {count} images; expected a tensor of shape ({count},)")
    return scores


def _check_score(score: float, *, name: str) -> None:
    if not 0 <= score <= 1:
        raise ValueError(f"score gave {score} for {name}; expected a number in [0, 1], higher where more reliable")
