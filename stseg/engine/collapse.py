"""Early signs that a training or a labeling fails: what was seen, what it usually means, what to try.

Each function looks at numbers alone and returns a message, or None where there is no reason for one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from stseg.engine.checkpoint import Row
from stseg.inference.class_counts import ClassCounts

_DROP = 0.05  # of the mIoU below its best
_LEAST_IOU = 0.01  # of a class that is found
_LEAST_SURE = 0.01  # share of confident pixels from which something is learned
_LEAST_SHARE = 0.01  # share of a class in pseudo-masks, as a part of its share in the labeled masks
_LEAST_MASKS = 5  # in which a class would be expected: by chance (Poisson), none has it in 1 of 150 cases
_SHOWN = 8  # classes of a message


def signs_in(history: Sequence[Row], steps: int) -> dict[str, str]:
    """Return what the history of a training shows at its last row, by kind.

    Args:
        history: rows so far.
        steps: length of the training.

    Example:
        >>> rows = [{"step": 100.0 * (i + 1), "miou": miou} for i, miou in enumerate([0.3, 0.5, 0.44, 0.43])]
        >>> list(signs_in(rows, steps=1000)), list(signs_in(rows[:3], steps=1000))
        (['falling'], [])
    """
    kinds: dict[str, Callable[[Sequence[Row], int], str | None]] = {
        "falling": _falling,
        "one class": _one_class,
        "unsure": _unsure,
    }
    return {kind: text for kind, sign in kinds.items() if (text := sign(history, steps)) is not None}


def vanished_classes(labeled: ClassCounts, predicted: ClassCounts) -> str | None:
    """Return a message of the classes that labeled masks hold and pseudo-masks (nearly) do not.

    A class has vanished if its share of the pseudo-masks' pixels is below 1 % of its share of the labeled ones. Of a
    class that is so rare that fewer than 5 of the pseudo-masks would hold it, nothing is said.

    Args:
        labeled: pixels of the labeled masks.
        predicted: pixels of pseudo-masks, all of them or a sample.

    Example:
        >>> import torch
        >>> labeled, predicted = ClassCounts(2), ClassCounts(2)
        >>> for _ in range(8):
        ...     labeled.add(torch.tensor([[0, 1]]))
        ...     predicted.add(torch.tensor([[0, 0]]))
        >>> vanished_classes(labeled, predicted)[:75]
        'the pseudo-masks hold class 1 in 0.000 % of their pixels, the labeled masks'
    """
    everything, found = int(labeled.pixels.sum()), int(predicted.pixels.sum())
    if not everything or not found:
        return None
    expected = labeled.masks.double() / labeled.total * predicted.total
    before, now = labeled.pixels.double() / everything, predicted.pixels.double() / found
    gone = ((expected >= _LEAST_MASKS) & (now < _LEAST_SHARE * before)).nonzero().flatten().tolist()
    if not gone:
        return None
    shown = [f"class {index} in {now[index]:.3%} of their pixels".replace("%", " %") for index in gone[:_SHOWN]]
    more = f" (and {len(gone) - _SHOWN} more)" if len(gone) > _SHOWN else ""
    shares = ", ".join(f"{before[index]:.3%}".replace("%", " %") for index in gone[:_SHOWN])
    return (
        f"the pseudo-masks hold {', '.join(shown)}, the labeled masks in {shares}{more}: the network that labels does "
        "not predict them, nor will one that learns from these masks. Usual where a class is rare or the training was "
        "short. Try a supervised loss= that weights rare classes, more steps, pretrained weights, more labeled images "
        "that hold them; Labeling(keep_per_class=0.8) in place of a threshold keeps pixels of each class"
    )


def nothing_kept(predicted: ClassCounts) -> str | None:
    """Return a message if (nearly) all pixels of pseudo-masks are below the threshold."""
    kept, everything = int(predicted.pixels.sum()), int(predicted.pixels.sum()) + predicted.ignored
    if not everything or kept >= _LEAST_SURE * everything:
        return None
    return (
        f"the pseudo-masks keep {kept / everything:.2%} of the pixels".replace("%", " %")
        + "; all others are below the threshold, so that there is nothing to learn from. Try a lower threshold, or "
        "Labeling(keep_per_class=0.8), which follows the confidence that the network has"
    )


def slow_validation(validation: float, seconds: float, evaluations: int, *, every: int, length: int) -> str | None:
    """Return a message if validation takes more than a third of the time.

    Args:
        validation: seconds of it so far.
        seconds: seconds of the training so far, with it.
        evaluations: how many there were.
        every: epochs or steps between two of them.
        length: epochs or steps in all.

    Example:
        >>> slow_validation(40, 80, evaluations=4, every=50, length=1000)
        'validation takes 50 % of the time (10.0 s each); TrainConfig(eval_every=200), now 50, would make it 20 %'
    """
    if evaluations < 3 or validation < 10 or 3 * validation <= seconds:
        return None
    training = max(seconds - validation, 1e-9)
    wanted = min(length, math.ceil(every * 4 * validation / training))
    share = validation / (validation + training * wanted / every)
    return (
        f"validation takes {validation / seconds:.0%} of the time ({validation / evaluations:.1f} s each); "
        f"TrainConfig(eval_every={wanted}), now {every}, would make it {share:.0%}"
    ).replace("%", " %")


def _falling(history: Sequence[Row], steps: int) -> str | None:
    """The mIoU on validation is 5 points below its best in two evaluations in a row."""
    known = [row for row in history if math.isfinite(row.get("miou", math.nan))]
    if len(known) < 3:
        return None
    best = max(known[:-2], key=lambda row: row["miou"])
    if any(row["miou"] >= best["miou"] - _DROP for row in known[-2:]):
        return None
    now = known[-1]
    return (
        f"the mIoU on validation was {_percent(best['miou'])} at step {best['step']:.0f} and is "
        f"{_percent(now['miou'])} at step {now['step']:.0f}, the second time in a row more than 5 points lower: the "
        "network unlearns, usually because it follows its own mistakes, the learning rate is too high, or it overfits "
        "few labeled images. Try a lower lr, a higher threshold or less weight on what is not labeled, or fewer steps"
    )


def _one_class(history: Sequence[Row], steps: int) -> str | None:
    """A single class is found on validation, in two evaluations in a row after a fifth of the training."""
    last = [_ious(row) for row in history[-2:]]
    if len(last) < 2 or history[-1]["step"] < steps / 5:
        return None
    found = [{name for name, iou in ious.items() if iou >= _LEAST_IOU} for ious in last]
    if any(len(ious) < 2 for ious in last) or any(len(names) != 1 for names in found) or found[0] != found[1]:
        return None
    (name,) = found[1]
    return (
        f"on validation the network finds class {name} alone at step {history[-1]['step']:.0f}; the IoU of each other "
        f"class is below {_percent(_LEAST_IOU)}: it may be that it predicts one class everywhere, usually because the "
        "learning rate is too high or too low, the other classes are rare, or masks hold other values than meant. Try "
        "another lr, a loss= that weights rare classes, and a look at the table of classes and at class_map"
    )


def _unsure(history: Sequence[Row], steps: int) -> str | None:
    """For a third of the training, nearly no pixel of the unlabeled images was confident.

    All pixels confident is no sign: it is meant where the threshold is 0, and usual late in a training.
    """
    count = 0
    while count < len(history) and history[-1 - count].get("sure", math.nan) < _LEAST_SURE:
        count += 1
    began = history[-1 - count]["step"] if count < len(history) else 0
    if count < 3 or history[-1]["step"] - began < steps / 3:
        return None
    return (
        f"since step {began:.0f}, until step {history[-1]['step']:.0f}, fewer than {_percent(_LEAST_SURE)} of the "
        "pixels of unlabeled images were confident enough to learn from: the method learns nearly nothing from them. "
        "Usual with a network from scratch or few steps. Try a lower threshold= of the method, pretrained weights, or "
        "more steps"
    )


def _ious(row: Mapping[str, float]) -> dict[str, float]:
    """Return the IoU of each class, by its number; without those that are neither true nor predicted."""
    ious = {name.removeprefix("iou/"): value for name, value in row.items() if name.startswith("iou/")}
    return {name: value for name, value in ious.items() if math.isfinite(value)}


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
