"""U2PL: using unreliable pseudo-labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stseg.augment import CutMix, strong_view
from stseg.checks import check_choice, check_count, check_mixing, check_nonnegative, check_positive, check_probability
from stseg.distributed import all_gather_rows, all_reduce_sum
from stseg.engine.method import Batch, Losses, Method
from stseg.functional import (
    consistency_target,
    cross_entropy,
    mean_over_processes,
    quantile_over_processes,
    supervised_loss,
)
from stseg.models.segmenter import as_segmenter
from stseg.models.state import evaluating
from stseg.modules import EMA, Ring, logits_and_features, representation_head
from stseg.types import Criterion


class U2PL(Method):
    """U2PL (Wang et al., CVPR 2022, section 3): what an unreliable pixel is not, can still be learned.

    A teacher, the average of the student's weights, labels unlabeled images, which are then mixed by CutMix. With H the
    entropy of the teacher's prediction on the mixed images and ``r = unreliable * (1 - step / steps)``,

    ``L = Ls + semi * Lu + contrast * Lc``,

    both after the share ``start`` of the training. Lu is the cross-entropy on the reliable pixels, those with an
    entropy below the quantile ``1 - r`` of the batch: the mean over them, times the ratio of the numbers of valid and
    of reliable pixels, which gives more weight to fewer. Lc is the mean over the classes of a contrast of
    representations, vectors that a head makes of the decoder's output: of each class,

    - anchors: the student's, drawn from labeled and unlabeled pixels of the class for which the teacher gives it a
      probability above ``confident``; unlabeled ones with an entropy up to the quantile r;
    - positive: the mean of the teacher's, over all pixels of the class that are labeled or have such an entropy;
    - negatives: drawn from a memory, for each anchor, of the teacher's at unlabeled pixels with an entropy from the
      quantile ``1 - r`` on, among whose classes this one has a place in ``ranks``, likely to be wrong, and at labeled
      pixels of another class for which it is among the first ``ranks[0]``, easily confused;

    ``Lc(class) = mean over anchors a of -log(exp(cos(a, +) / t) / (exp(cos(a, +) / t) + sum exp(cos(a, -) / t)))``.

    As in the authors' code the labels come from the teacher in evaluation mode, entropies and representations from a
    second pass of it in training mode on labeled and mixed images together, the student sees these together as well,
    and the teacher's batch normalization tracks its own statistics. Unlike there:

    - negatives are those of the paper. In the code they must, moreover, be labeled with the very class that they are
      negatives of: no labeled pixel is, and few others. Where a class is absent from a batch, it also compares the
      anchors of one class with the negatives of another;
    - in the supervised part the teacher's weights are the student's, not those from before the training, so that its
      statistics are those of these weights and its validation means something; both networks see the unlabeled images
      too, which thus count in the batch statistics;
    - the probabilities of a representation are the mean of those of its pixels, not those of the logits of its place;
    - the representation head is given the decoder's last features, as networks have them in common; theirs is given
      what the decoder of DeepLabV3+ starts from (512 channels: the pyramid, and the low-level features);
    - ``1 - r`` follows the step, not the epoch;
    - CutMix is the one of the other methods, with boxes of half of the area: drawn for each image, not for the batch,
      and pasted from the batch in reverse order, not from the next image;
    - of the pixels of a step that are negatives of a class, up to ``keys`` are drawn at random to enter the memory, in
      each process, where theirs takes all; and all classes have memories of one size, where background has 50,000;
    - the mean over classes covers those that have anchors and negatives, and quantiles, positives and numbers of pixels
      are those of all processes; so are padded pixels left out.

    Args:
        network: the student, bare or in a :class:`stseg.Segmenter`; the teacher is a copy.
        num_classes: number of classes, 2 for a network with one logit.
        channels: channels of the decoder's output.
        features: dotted name of the submodule of the network that returns it; None uses ``decoder`` or ``fuse``.
        width: length of the representations.
        decay: decay of the average; ``min(1 - 1 / (t + 1), decay)``, t counted from the end of the supervised part.
        start: share of the training that is supervised alone: 1 of 80 epochs in the paper, from pretrained weights;
            more from random ones, as there is no threshold of confidence.
        unreliable: share of the pixels that are unreliable at the beginning, in [0, 1].
        mix: mixing of the unlabeled images; None for none.
        semi: weight of Lu, 0 or more.
        contrast: weight of Lc, 0 or more.
        confident: probability of its class above which a pixel may be an anchor, in [0, 1].
        ranks: first place, counted from 0, and the place after the last, that make a class unlikely for an unlabeled
            pixel. The authors' are for 21 and 19 classes; with 3 or fewer classes, labeled pixels alone are negatives.
        anchors: number of anchors of a class, in each process.
        negatives: number of negatives of an anchor.
        keys: greatest number of representations of a class that enter the memory in a step, in each process.
        memory: number of representations of a class to keep: 30,000 of 256 numbers are 0.65 GB for 21 classes, also in
            each saved state.
        temperature: t, above 0.
        dropout: probability that a channel of the representation head is dropped.
        deploy: which of the two is validated and returned: ``"teacher"`` or ``"student"``.
        loss: supervised loss, ``(logits, masks) -> scalar``; None for cross-entropy.

    Logged: ``supervised``, ``semi``, ``contrast`` (unweighted), and ``reliable``, the share of valid pixels that are.

    Raises:
        ValueError: if a setting is out of its range; when called, if the network has another number of classes.
        NetworkError: when called, if the features are not found, or have another number of channels.

    Example:
        >>> from collections import OrderedDict
        >>> network = nn.Sequential(OrderedDict(decoder=nn.Conv2d(3, 4, 1), head=nn.Conv2d(4, 2, 1)))
        >>> method = U2PL(network, num_classes=2, channels=4, width=8, memory=100)
        >>> images, masks = torch.rand(2, 3, 8, 8), torch.randint(2, (2, 8, 8))
        >>> batch = Batch(images, masks, torch.zeros(2, dtype=torch.bool), unlabeled=torch.rand(2, 3, 8, 8))
        >>> sorted(method(batch).logged)
        ['contrast', 'reliable', 'semi', 'supervised']
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        num_classes: int,
        channels: int = 256,
        features: str | None = None,
        width: int = 256,
        decay: float = 0.99,
        start: float = 1 / 80,
        unreliable: float = 0.2,
        mix: CutMix | None = CutMix(area=(0.5, 0.5), ratio=(0.5, 2.0)),  # noqa: B008  frozen
        semi: float = 1.0,
        contrast: float = 1.0,
        confident: float = 0.3,
        ranks: tuple[int, int] = (3, 20),
        anchors: int = 256,
        negatives: int = 50,
        keys: int = 1024,
        memory: int = 30_000,
        temperature: float = 0.5,
        dropout: float = 0.1,
        deploy: Literal["teacher", "student"] = "teacher",
        loss: Criterion | None = None,
    ) -> None:
        super().__init__()
        for name, share in (("start", start), ("unreliable", unreliable), ("confident", confident)):
            check_probability(name, share)
        for name, value in (("semi", semi), ("contrast", contrast)):
            check_nonnegative(name, value)
        check_positive("temperature", temperature)
        check_count("num_classes", num_classes, least=2)
        for name, count in (("channels", channels), ("width", width), ("anchors", anchors), ("negatives", negatives)):
            check_count(name, count)
        check_count("keys", keys)
        check_count("memory", memory)
        check_mixing(mix)
        if not (isinstance(ranks, Sequence) and len(ranks) == 2 and 0 < ranks[0] < ranks[1]):
            raise ValueError(f"ranks is {ranks}; expected two places, the first above 0 and below the second")
        check_choice("deploy", deploy, "teacher", "student")
        head = representation_head(channels, width, dropout=dropout)
        self.student = nn.ModuleDict({"model": as_segmenter(network), "head": head})
        self.teacher = EMA(self.student, decay, buffers="own")
        self.memory = nn.ModuleList([Ring(memory, width) for _ in range(num_classes)])
        self.num_classes, self.channels, self.features = num_classes, channels, features
        self.start, self.unreliable, self.mix, self.semi, self.contrast = start, unreliable, mix, semi, contrast
        self.confident, self.ranks, self.temperature = confident, ranks, temperature
        self.anchors, self.negatives, self.keys = anchors, negatives, keys
        self.deploy, self.loss = deploy, loss

    @property
    def model(self) -> nn.Module:  # type: ignore[override]  # an alias, not another submodule
        """Teacher or student, according to ``deploy``."""
        networks = self.teacher.model if self.deploy == "teacher" else self.student
        return cast("nn.ModuleDict", networks)["model"]

    def forward(self, batch: Batch) -> Losses:
        """Compute the losses; see the class."""
        ignore, begun = batch.ignore_index, batch.step >= self.start * batch.steps
        unreliable = self.unreliable * (1 - batch.step / batch.steps)
        with torch.no_grad(), evaluating(self.teacher):
            weak = cast("nn.ModuleDict", self.teacher.model)["model"](batch.unlabeled)
        target = consistency_target(weak, threshold=0.0, valid=batch.valid, ignore_index=ignore)
        mixed, target = strong_view(batch.unlabeled, target, mix=self.mix, num_classes=weak.shape[1])
        images = torch.cat([batch.images, mixed])
        logits, representations = self._run(self.student, images)
        with torch.no_grad():
            opinions, vectors = self._run(self.teacher.model, images)
        labeled, unlabeled = logits[: len(batch.images)], logits[len(batch.images) :]
        if labeled.shape[1] != self.num_classes:
            raise ValueError(f"num_classes is {self.num_classes}, but the network gives {labeled.shape[1]} classes")
        supervised = supervised_loss(labeled, batch.masks, loss=self.loss, ignore_index=ignore)

        valid = target != ignore
        probabilities = opinions.softmax(1)
        entropy = torch.special.entr(probabilities[len(labeled) :]).sum(1)
        high = quantile_over_processes(entropy, 1 - unreliable, where=valid)
        low = quantile_over_processes(entropy, unreliable, where=valid)
        reliable = valid & (entropy < high)
        counts = all_reduce_sum(torch.stack([valid.sum(), reliable.sum()]).float())
        semi = cross_entropy(unlabeled, target.masked_fill(~reliable, ignore), ignore_index=ignore)
        semi = semi * counts[0] / counts[1].clamp(min=1)

        classes = torch.cat([batch.masks, target])
        known = batch.masks != ignore
        certain, uncertain = (torch.cat([known, valid & each]) for each in (entropy <= low, entropy >= high))
        cells = _at_cells(vectors, probabilities, classes, certain, uncertain)
        labeled_cells = len(labeled) * representations[0, 0].numel()
        contrast = self._contrast(_rows(representations), *cells, labeled=labeled_cells, begun=begun)

        total = supervised + float(begun) * (self.semi * semi + self.contrast * contrast)
        parts = {"supervised": supervised, "semi": semi, "contrast": contrast}
        logged = {name: part.detach() for name, part in parts.items()}
        return Losses(total, {**logged, "reliable": mean_over_processes(reliable.sum().float(), valid.sum())})

    def _run(self, networks: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and representations."""
        parts = cast("nn.ModuleDict", networks)
        options: dict[str, Any] = {"channels": self.channels, "features": self.features}
        logits, features = logits_and_features(parts["model"], images, **options)
        return logits, parts["head"](features).float()

    def _contrast(
        self,
        representations: Tensor,
        vectors: Tensor,
        probabilities: Tensor,
        classes: Tensor,
        certain: Tensor,
        uncertain: Tensor,
        *,
        labeled: int,
        begun: bool,
    ) -> Tensor:
        """Compare anchors with the mean of their class and with the memory of what is not of their class."""
        is_labeled = torch.arange(len(classes), device=classes.device) < labeled
        place = probabilities.argsort(1, descending=True).argsort(1).T  # (K, cells): rank of each class
        own = torch.arange(self.num_classes, device=classes.device)[:, None] == classes
        of_class = own & certain
        is_anchor = of_class & (self.confident < probabilities.T)
        unlikely = ~is_labeled & (place >= self.ranks[0]) & (place < self.ranks[1])
        confused = is_labeled & ~own & (place < self.ranks[0])
        is_key = uncertain & (unlikely | confused)

        drawn, found = some(is_key, self.keys)
        keys, found = all_gather_rows(vectors[drawn.T]), all_gather_rows(found.T)  # (processes * keys, K, ...)
        for number, ring in enumerate(self.memory):
            own_class = torch.full_like(found[:, number], number, dtype=torch.int64)
            cast("Ring", ring).add(keys[:, number], own_class, where=found[:, number] & begun)

        with torch.autocast(vectors.device.type, enabled=False):
            sums = all_reduce_sum(torch.cat([of_class.float() @ vectors, of_class.sum(1, keepdim=True)], 1))
            positives = F.normalize(sums[:, :-1] / sums[:, -1:].clamp(min=1), dim=1)
            rows, has_anchors = draw(is_anchor, self.anchors)
            # Once for all classes: each indexing has a gradient of the size of all representations.
            drawn_anchors = F.normalize(representations[rows], dim=2)
            losses, counts = [], []
            for number, ring in enumerate(self.memory):
                bank = cast("Ring", ring)
                filled = (bank.labels >= 0).sum()
                anchors = drawn_anchors[number]
                chosen = torch.rand(self.anchors, self.negatives, device=anchors.device) * filled
                negatives = F.normalize(bank.vectors[chosen.long()], dim=2)
                similarity = torch.cat(
                    [(anchors @ positives[number])[:, None], (negatives @ anchors[:, :, None])[..., 0]], 1
                )
                counts.append(has_anchors[number] & (filled > 0))
                loss = -(similarity / self.temperature).log_softmax(1)[:, 0].mean()
                losses.append(torch.where(counts[-1], loss, 0.0))
            return mean_over_processes(torch.stack(losses).sum(), torch.stack(counts).sum())

    def after_step(self, batch: Batch) -> None:
        """Move the teacher towards the student, to which it is equal until the end of the supervised part."""
        self.teacher.update(self.student, max(batch.step - math.ceil(self.start * batch.steps), 0))


def draw(where: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Draw columns of each row of a mask at random, with replacement, without synchronizing with the device.

    Args:
        where: ``(K, N)`` bool, the columns to draw from.
        count: how many.

    Returns:
        ``(K, count)`` int64, the columns, and ``(K,)`` bool, whether the row has any: else its columns are arbitrary.
    """
    numbers = where.cumsum(1)
    total = numbers[:, -1:]
    wanted = (torch.rand(len(where), count, device=where.device) * total).long() + 1
    columns = torch.searchsorted(numbers, torch.minimum(wanted, total))
    return columns.clamp(max=where.shape[1] - 1), total[:, 0] > 0


def some(where: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Draw columns of each row of a mask at random, without replacement, without synchronizing with the device.

    Args:
        where: ``(K, N)`` bool, the columns to draw from.
        count: how many at most.

    Returns:
        ``(K, min(count, N))`` int64, the columns, and bool, whether each is one of those to draw from.
    """
    order = torch.rand(where.shape, device=where.device).masked_fill(~where, -1.0)
    columns = order.topk(min(count, where.shape[1])).indices
    return columns, where.gather(1, columns)


def _rows(maps: Tensor) -> Tensor:
    """Turn ``(B, C, h, w)`` into a row for each cell."""
    return maps.movedim(1, -1).flatten(0, 2)


def _at_cells(vectors: Tensor, probabilities: Tensor, *maps: Tensor) -> list[Tensor]:
    """Bring maps ``(B, H, W)`` and probabilities to the cells of vectors ``(B, C, h, w)``; one row for each cell."""
    size = (vectors.shape[-2], vectors.shape[-1])
    nearest = (F.interpolate(each[:, None].float(), size=size)[:, 0].to(each.dtype).flatten() for each in maps)
    return [_rows(vectors), _rows(F.adaptive_avg_pool2d(probabilities, size)), *nearest]
