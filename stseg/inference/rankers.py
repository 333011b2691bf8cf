"""Which images does a training run agree on with itself? The selection of ST++."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from stseg.data.items import ids_of
from stseg.distributed import all_gather, barrier
from stseg.errors import DataError
from stseg.functional import mean_confidence, stability
from stseg.inference.fingerprints import image_checksums
from stseg.inference.ranking import Ranking
from stseg.inference.score_log import ScoreLog
from stseg.inference.sweep import Skipped, batch_by_size, check_finite, load, local_share, predictor, progress_bar
from stseg.models.segmenter import as_segmenter
from stseg.models.state import device_of, evaluating, fingerprint
from stseg.storage.records import describe
from stseg.types import Precision


class StabilityRanker:
    """Scores images by how little their masks changed in the course of training.

    The selection of ST++ (Yang et al., CVPR 2022, section 3.3): each checkpoint labels the image, at one scale, and the
    score is the mean over the earlier checkpoints of the image's mean IoU with the mask of the last one.

    Args:
        checkpoints: two or more networks (bare or wrapped) in the order of training; the last one is the reference.
            They may share one device or not; each runs where it is, unless ``device`` is given.
        num_classes: number of classes; at least 2.
        score: ``(masks, reference, num_classes) -> (B,)`` scores in [0, 1], higher where more reliable. The default is
            the paper's; :func:`stseg.functional.pixel_agreement`, ``functools.partial`` of
            :func:`stseg.functional.weighted_stability` or a function of one's own can take its place.
        batch_size: how many images of equal size at once; does not change the scores.
        num_workers: processes that read images.
        precision: ``"fp32"``, or ``"bf16"`` for speed.
        device: where to move the checkpoints, or None to leave them where they are.
        progress: whether to show a bar.

    Raises:
        ValueError: if there are fewer than two checkpoints, or an argument makes no sense. When scoring, if ``score``
            gives something else than it should.
        NetworkError: when scoring, if a network does not give finite logits of ``num_classes`` classes.

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
        precision: Precision = "fp32",
        device: torch.device | str | None = None,
        progress: bool = True,
    ) -> None:
        if isinstance(checkpoints, nn.Module) and not isinstance(checkpoints, nn.ModuleList):
            raise TypeError(f"checkpoints is one network ({type(checkpoints).__name__}); expected two or more")
        checkpoints = list(checkpoints)
        if len(checkpoints) < 2:
            raise ValueError(f"got {len(checkpoints)} checkpoints; expected two or more, the last one as reference")
        _check_options(num_classes, score, batch_size)
        self.checkpoints = [as_segmenter(network) for network in checkpoints]
        if device is not None:
            self.checkpoints = [network.to(device) for network in self.checkpoints]
        self.num_classes = num_classes
        self.score = score
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.precision = precision
        self.progress = progress
        self._predictors = [predictor(network, num_classes, precision) for network in self.checkpoints]

    def __call__(self, images: Tensor) -> Tensor:
        """Score a batch.

        Args:
            images: ``(B, C, H, W)`` uint8, or float in [0, 1].

        Returns:
            ``(B,)`` float64 in [0, 1], on the device of the last checkpoint.
        """
        return self._scoring().batch(images)

    def rank(
        self, dataset: Dataset[Any], *, resume: str | Path | None = None, skip_unreadable: bool = False
    ) -> Ranking:
        """Score and rank all images of a data set.

        Under ``torch.distributed`` the processes share the images and each gets the whole ranking.

        Args:
            dataset: items are images, or tuples that begin with one.
            resume: a file that takes each score as soon as it is known; what stands in it is not done again. Of
                several processes each further one appends to a file beside it.
            skip_unreadable: whether to go on where an image cannot be read, and list it in ``.skipped``.

        Raises:
            DataError: if there is no image, or ``resume`` holds a broken line.
            WorkdirMismatchError: if ``resume`` holds scores of other checkpoints or settings, or another score.
            UnreadableImageError: if an image cannot be read and ``skip_unreadable`` is false.
        """
        return self._scoring().rank(dataset, resume=resume, skip_unreadable=skip_unreadable)

    def __repr__(self) -> str:
        return _repr(self, self._description())

    def _scoring(self) -> _Scoring:
        return _Scoring(
            self._score, self.checkpoints, self._description, self.batch_size, self.num_workers, self.progress
        )

    def _score(self, images: Tensor) -> tuple[Tensor, Tensor]:
        highest, masks = zip(*(predict(images).max(1) for predict in self._predictors), strict=True)
        reference = masks[-1]
        earlier = torch.stack([mask.to(reference.device) for mask in masks[:-1]])
        finite = torch.stack([_finite(values).to(reference.device) for values in highest]).all(0)
        return self.score(earlier, reference, self.num_classes), finite

    def _description(self) -> dict[str, Any]:
        return {
            "checkpoints": [fingerprint(network) for network in self.checkpoints],
            "num_classes": self.num_classes,
            "precision": self.precision,
            **({} if self.score is stability else {"score": describe(self.score)}),
        }


class ConfidenceRanker:
    """Scores images by how sure one network is of its masks; not of the paper.

    What one would try in place of stability: it needs no checkpoints but the network itself. A network that is sure of
    its errors is not found out by it.

    Args:
        model: a network or a wrapped one, such as the teacher. With ``stseg.MultiScaleFlip(model)`` the score is that
            of the probabilities with which images are labeled. Runs where the model is; its mode is what it was
            afterwards.
        num_classes: number of classes; at least 2.
        score: ``logits (B, K, H, W) -> (B,)`` scores in [0, 1], higher where more reliable:
            :func:`stseg.functional.mean_confidence`, :func:`stseg.functional.mean_margin`,
            :func:`stseg.functional.mean_certainty` (entropy), :func:`stseg.functional.expected_iou`, or a function of
            one's own.
        batch_size: how many images of equal size at once; changes the scores by rounding alone.
        num_workers: processes that read images.
        precision: ``"fp32"``, or ``"bf16"`` for speed.
        progress: whether to show a bar.

    Raises:
        ValueError: if an argument makes no sense. When scoring, if ``score`` gives something else than it should.
        NetworkError: when scoring, if the network does not give finite logits of ``num_classes`` classes.

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
        precision: Precision = "fp32",
        progress: bool = True,
    ) -> None:
        _check_options(num_classes, score, batch_size)
        self.model = as_segmenter(model)
        self.num_classes = num_classes
        self.score = score
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.precision = precision
        self.progress = progress
        self._predict = predictor(self.model, num_classes, precision)

    def __call__(self, images: Tensor) -> Tensor:
        """Score a batch.

        Args:
            images: ``(B, C, H, W)`` uint8, or float in [0, 1].

        Returns:
            ``(B,)`` float64 in [0, 1], on the device of the model.
        """
        return self._scoring().batch(images)

    def rank(
        self, dataset: Dataset[Any], *, resume: str | Path | None = None, skip_unreadable: bool = False
    ) -> Ranking:
        """Score and rank all images of a data set, as :meth:`stseg.StabilityRanker.rank` does.

        Args:
            dataset: items are images, or tuples that begin with one.
            resume: a file that takes each score as soon as it is known; what stands in it is not done again.
            skip_unreadable: whether to go on where an image cannot be read, and list it in ``.skipped``.

        Raises:
            DataError: if there is no image, or ``resume`` holds a broken line.
            WorkdirMismatchError: if ``resume`` holds scores of another network, other settings or another score.
            UnreadableImageError: if an image cannot be read and ``skip_unreadable`` is false.
        """
        return self._scoring().rank(dataset, resume=resume, skip_unreadable=skip_unreadable)

    def __repr__(self) -> str:
        return _repr(self, self._description())

    def _scoring(self) -> _Scoring:
        return _Scoring(self._score, [self.model], self._description, self.batch_size, self.num_workers, self.progress)

    def _score(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = self._predict(images)
        return self.score(logits), _finite(logits.amax(1))

    def _description(self) -> dict[str, Any]:
        return {
            "model": fingerprint(self.model),
            "num_classes": self.num_classes,
            "precision": self.precision,
            "score": describe(self.score),
        }


@dataclass(frozen=True)
class _Scoring:
    """Goes through images and scores them: what the rankers have in common.

    Args:
        score: ``(B, C, H, W)`` images -> ``(B,)`` scores and which of the images have finite logits.
        networks: all that ``score`` runs, the last of them where the images go.
        description: whose scores they are, of JSON's types; only asked where it is needed, as it takes a while.
        batch_size: how many images of equal size at once.
        num_workers: processes that read images.
        progress: whether to show a bar.
    """

    score: Callable[[Tensor], tuple[Tensor, Tensor]]
    networks: Sequence[nn.Module]
    description: Callable[[], dict[str, Any]]
    batch_size: int
    num_workers: int
    progress: bool

    def batch(self, images: Tensor) -> Tensor:
        with evaluating(*self.networks), torch.no_grad():
            scores, finite = self.score(images)
        name = f"a batch of shape {tuple(images.shape)}"
        check_finite(bool(finite.all()), name=name)
        for score in _listed(scores, len(images)):
            _check_score(score, name=name)
        return scores

    def rank(self, dataset: Dataset[Any], *, resume: str | Path | None, skip_unreadable: bool) -> Ranking:
        ids = ids_of(dataset)
        if not ids:
            raise DataError("the data set to rank is empty")
        log = None if resume is None else ScoreLog(Path(resume), self.description(), image_checksums(dataset))
        scores: dict[int, float] = {} if log is None else log.read(ids)
        barrier()
        todo = [index for index in local_share(len(ids)) if index not in scores]
        skipped: list[Skipped] = []
        images = load(
            dataset,
            todo,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            skip=skipped.append if skip_unreadable else None,
        )

        def score_each(batch: Tensor) -> list[tuple[float, bool]]:
            values, finite = self.score(batch)
            return list(zip(_listed(values, len(batch)), finite.tolist(), strict=True))

        results = batch_by_size(score_each, images, batch_size=self.batch_size, device=device_of(self.networks[-1]))
        with evaluating(*self.networks), torch.no_grad():
            for index, (score, finite) in progress_bar(results, total=len(todo), title="rank", show=self.progress):
                check_finite(finite, name=f"image {ids[index]!r}")
                _check_score(score, name=f"image {ids[index]!r}")
                scores[index] = score
                if log is not None:
                    log.add(ids[index], score)
        for part in all_gather(scores):
            scores.update(part)
        skipped = sorted((s for part in all_gather(skipped) for s in part), key=lambda s: s.index)
        if not scores:
            raise DataError(f"none of the {len(ids)} images could be read; the first: {skipped[0].reason}")
        places = sorted(scores)
        return Ranking.from_scores(
            [scores[i] for i in places], [ids[i] for i in places], indices=places, skipped=skipped
        )


def _finite(highest: Tensor) -> Tensor:
    """``(B,)``: whether the highest logits ``(B, H, W)`` of an image are all finite; one that is NaN is the highest."""
    return highest.isfinite().flatten(1).all(1)


def _listed(scores: Any, count: int) -> list[float]:
    if not isinstance(scores, Tensor) or scores.shape != (count,):
        got = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"score gave {got} for a batch of {count} images; expected a tensor of shape ({count},)")
    return [float(score) for score in scores.tolist()]


def _check_score(score: float, *, name: str) -> None:
    if not 0 <= score <= 1:
        raise ValueError(f"score gave {score} for {name}; expected a number in [0, 1], higher where more reliable")


def _check_options(num_classes: int, score: object, batch_size: int) -> None:
    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}; expected 2 or more")
    if not callable(score):
        raise TypeError(f"score is {score!r}; expected a function such as stseg.functional.stability")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected 1 or more")


def _repr(ranker: object, description: dict[str, Any]) -> str:
    """Also what a work directory keeps of a ranker, so that the same call with another one is refused."""
    return f"{type(ranker).__name__}({', '.join(f'{key}={value!r}' for key, value in description.items())})"
