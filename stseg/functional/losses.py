"""Losses of the training methods, averaged over the pixels of all processes that are not ignored.

A sum over pixels is divided by the total number of pixels in all processes (:func:`mean_over_processes`), so that the
result does not depend on the number of processes. All processes must call the same losses in the same order. Nothing
synchronizes with the device except :func:`without_ignored`. Half-precision logits are converted to float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stseg.distributed import all_reduce_sum, world_size
from stseg.functional._checks import check_same_shape
from stseg.types import Criterion


def mean_over_processes(total: Tensor, count: Tensor) -> Tensor:
    """Divide a sum by the total number of terms in all processes.

    The result is ``total`` times the number of processes, divided by the sum of all counts. As
    DistributedDataParallel averages gradients over processes, the average is the mean over all terms.

    Args:
        total: scalar, the sum in this process.
        count: scalar, the number of its terms; no gradient flows through it.

    Returns:
        Scalar; 0 if no process has a term.

    Example:
        >>> mean_over_processes(torch.tensor(6.0), torch.tensor(4))
        tensor(1.5000)
        >>> mean_over_processes(torch.tensor(0.0), torch.tensor(0))
        tensor(0.)
    """
    return total * (world_size() / all_reduce_sum(count.detach().float()).clamp(min=1))


def cross_entropy(logits: Tensor, masks: Tensor, *, weight: Tensor | None = None, ignore_index: int = 255) -> Tensor:
    """Compute the mean cross-entropy of the pixels that are not ignored.

    Args:
        logits: ``(B, K, H, W)`` floats.
        masks: ``(B, H, W)`` integers.
        weight: float or bool, broadcastable to ``(B, H, W)``, such as ``(B, 1, 1)`` for one value per image. It
            multiplies the loss of a pixel but not the denominator: a pixel of weight 0 still counts.
        ignore_index: mask value of ignored pixels.

    Returns:
        Scalar: the weighted sum divided by the number of pixels that are not ignored, over all processes; 0 if there
        are none.

    Raises:
        ValueError: if ``weight`` has a shape that cannot be broadcast.

    Example:
        >>> logits, masks = torch.zeros(1, 2, 1, 2), torch.tensor([[[1, 255]]])
        >>> cross_entropy(logits, masks), cross_entropy(logits, masks, weight=torch.tensor(0.5))
        (tensor(0.6931), tensor(0.3466))
    """
    logits, masks = _at_least_float32(logits), masks.long()
    if weight is None:
        total = F.cross_entropy(logits, masks, ignore_index=ignore_index, reduction="sum")
    else:
        sides = zip(weight.shape, masks.shape, strict=False)
        if weight.ndim and (weight.ndim != 3 or any(side not in (1, wanted) for side, wanted in sides)):
            raise ValueError(
                f"weight has shape {tuple(weight.shape)} and masks {tuple(masks.shape)}; expected the same, or 1 in "
                "places: (B, 1, 1) for a weight for each image"
            )
        losses = F.cross_entropy(logits, masks, ignore_index=ignore_index, reduction="none")
        total = (losses * weight.to(losses.dtype)).sum()
    return mean_over_processes(total, (masks != ignore_index).sum())


def ohem_cross_entropy(
    logits: Tensor, masks: Tensor, *, threshold: float = 0.7, min_kept: int = 200_000, ignore_index: int = 255
) -> Tensor:
    """Compute the mean cross-entropy of the hard pixels (online hard example mining).

    A pixel is kept if the probability of its true class is at most ``threshold``, or among the ``min_kept`` lowest of
    the batch of this process. CPS and UniMatch train on Cityscapes with it, as the labeled loss.

    Args:
        logits: ``(B, K, H, W)`` floats.
        masks: ``(B, H, W)`` integers.
        threshold: probability up to which a pixel is hard.
        min_kept: least number of pixels to keep, if available.
        ignore_index: mask value of ignored pixels.

    Returns:
        Scalar: the mean over the kept pixels of all processes; 0 if there are none.

    Example:
        >>> logits = torch.tensor([[9.0, 0.0], [0.0, 0.0]]).reshape(1, 2, 1, 2)  # the first pixel is easy
        >>> ohem_cross_entropy(logits, torch.zeros(1, 1, 2, dtype=torch.int64), min_kept=1)
        tensor(0.6931)
    """
    counted = masks != ignore_index
    losses = F.cross_entropy(_at_least_float32(logits), masks.long(), ignore_index=ignore_index, reduction="none")
    probability = (-losses.detach()).exp().masked_fill(~counted, torch.inf)  # sorted last
    least = min(min_kept, masks.numel())
    if least > 0:
        # Not kthvalue, which is an error on a GPU under torch.use_deterministic_algorithms.
        kept = counted & (probability <= probability.flatten().sort().values[least - 1].clamp(min=threshold))
    else:
        kept = counted & (probability <= threshold)
    return mean_over_processes(torch.where(kept, losses, 0.0).sum(), kept.sum())


def squared_difference(prediction: Tensor, target: Tensor, *, where: Tensor | None = None) -> Tensor:
    """Compute the mean over classes and pixels of the squared difference of two maps.

    Args:
        prediction: ``(B, K, H, W)`` floats, probabilities or logits.
        target: ``(B, K, H, W)`` floats. Gradients flow to it as well unless it is detached.
        where: ``(B, H, W)`` bool, the pixels that count; None for all.

    Returns:
        Scalar: the mean over the pixels of all processes; 0 if none counts.

    Raises:
        ValueError: if the shapes differ, or that of ``where`` does not match.

    Example:
        >>> squared_difference(torch.ones(1, 2, 1, 1), torch.tensor([0.0, 1.0]).reshape(1, 2, 1, 1))
        tensor(0.5000)
    """
    check_same_shape("prediction", prediction, "target", target)
    difference = _at_least_float32(prediction) - _at_least_float32(target)
    return _mean_of_pixels(difference.square().mean(1), where)


def entropy(logits: Tensor, *, where: Tensor | None = None) -> Tensor:
    """Compute the mean entropy of the pixels, in nats.

    Args:
        logits: ``(B, K, H, W)`` floats.
        where: ``(B, H, W)`` bool, the pixels that count; None for all.

    Returns:
        Scalar from 0 to ``log K``: the mean over the pixels of all processes; 0 if none counts.

    Raises:
        ValueError: if the shape of ``where`` does not match.

    Example:
        >>> entropy(torch.zeros(1, 4, 2, 2))  # log 4
        tensor(1.3863)
    """
    logits = _at_least_float32(logits)
    return _mean_of_pixels(-(logits.softmax(1) * logits.log_softmax(1)).sum(1), where)


def adversarial_loss(scores: Tensor, *, real: bool, where: Tensor | None = None) -> Tensor:
    """Compute the mean binary cross-entropy of a critic's scores.

    Args:
        scores: ``(B, 1, H, W)`` floats, logits of "this is real".
        real: the label to learn.
        where: ``(B, H, W)`` bool, the pixels that count; None for all.

    Returns:
        Scalar: the mean over the pixels of all processes; 0 if none counts.

    Raises:
        ValueError: if scores have more than one channel, or the shape of ``where`` does not match.

    Example:
        >>> adversarial_loss(torch.full((1, 1, 2, 2), 3.0), real=True)
        tensor(0.0486)
    """
    if scores.ndim != 4 or scores.shape[1] != 1:
        raise ValueError(f"scores have shape {tuple(scores.shape)}; expected (B, 1, H, W)")
    scores = _at_least_float32(scores)[:, 0]
    wanted = torch.full_like(scores, float(real))
    return _mean_of_pixels(F.binary_cross_entropy_with_logits(scores, wanted, reduction="none"), where)


def supervised_loss(logits: Tensor, masks: Tensor, *, loss: Criterion | None = None, ignore_index: int = 255) -> Tensor:
    """Compute the supervised loss: :func:`cross_entropy`, or a custom one.

    Args:
        logits: ``(B, K, H, W)`` floats.
        masks: ``(B, H, W)`` int64.
        loss: ``(logits, masks) -> scalar``, such as a loss of segmentation_models_pytorch. It must
            ignore pixels without a label itself (see :func:`without_ignored`), and covers the batch of one process.
        ignore_index: mask value of ignored pixels, for the cross-entropy and for messages.

    Returns:
        Scalar.

    Raises:
        TypeError: if ``loss`` does not return a tensor.
        ValueError: if ``loss`` fails, or returns more than one value.

    Example:
        >>> logits, masks = torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, dtype=torch.int64)
        >>> supervised_loss(logits, masks), supervised_loss(logits, masks, loss=nn.CrossEntropyLoss(ignore_index=255))
        (tensor(0.6931), tensor(0.6931))
    """
    if loss is None:
        return cross_entropy(logits, masks, ignore_index=ignore_index)
    try:
        value = loss(logits, masks)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # libraries raise different types
        raise ValueError(
            f"the loss {loss!r} fails on logits {tuple(logits.shape)} and masks {tuple(masks.shape)}: "
            f"{type(error).__name__}: {error}\n{_how_to_ignore(ignore_index)}"
        ) from error
    if not isinstance(value, Tensor):
        raise TypeError(f"the loss {loss!r} returned {type(value).__name__}; expected a scalar tensor")
    if value.ndim != 0:
        raise ValueError(f"the loss {loss!r} returned a tensor of shape {tuple(value.shape)}; expected a scalar")
    return value


def check_ignores(loss: Criterion, num_classes: int, ignore_index: int, device: torch.device) -> None:
    """Raise a ``ValueError`` if pixels with the ignore index change the loss, or it fails on them.

    Args:
        loss: ``(logits, masks) -> scalar``.
        num_classes: number of classes K.
        ignore_index: mask value of ignored pixels.
        device: device of the loss.
    """
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, num_classes, 8, 8, generator=generator).to(device).requires_grad_()
    masks = torch.randint(num_classes, (2, 8, 8), generator=generator).to(device)
    masks[:, ::2] = ignore_index
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(supervised_loss(logits, masks, loss=loss, ignore_index=ignore_index), logits)
    if gradient[:, :, ::2].any():
        way_out = _how_to_ignore(ignore_index)
        raise ValueError(f"the loss {loss!r} learns from pixels with the ignore index {ignore_index}.\n{way_out}")


def _how_to_ignore(ignore_index: int) -> str:
    return (
        f"A loss is given logits (B, K, H, W), K = 2 for a network with one logit, and class indices (B, H, W),\n"
        f"with the ignore index {ignore_index} where there is no label. A loss that does not know it needs\n"
        f"    its own argument, such as nn.CrossEntropyLoss(ignore_index={ignore_index}), or\n"
        f"    stseg.functional.without_ignored(loss, ignore_index={ignore_index})"
    )


def without_ignored(loss: Criterion, *, ignore_index: int = 255) -> nn.Module:
    """Wrap a loss that has no ignore index, so that it gets only the pixels that are not ignored.

    Args:
        loss: ``(logits, masks) -> scalar`` that does not depend on the position of pixels, such as
            ``smp.losses.JaccardLoss("multiclass")``. It is given all remaining pixels as one image: logits
            ``(1, K, N, 1)`` and masks ``(1, N, 1)``.
        ignore_index: mask value of ignored pixels.

    Returns:
        The same loss for logits ``(B, K, H, W)`` and masks ``(B, H, W)``; 0, with a gradient of 0, if all pixels are
        ignored. It synchronizes with the device.

    Example:
        >>> loss = without_ignored(nn.CrossEntropyLoss())
        >>> loss(torch.zeros(1, 2, 1, 2), torch.tensor([[[1, 255]]]))
        tensor(0.6931)
    """
    return _WithoutIgnored(loss, ignore_index)


class _WithoutIgnored(nn.Module):
    def __init__(self, loss: Criterion, ignore_index: int) -> None:
        super().__init__()
        self.loss, self.ignore_index = loss, ignore_index

    def forward(self, logits: Tensor, masks: Tensor) -> Tensor:
        counted = masks != self.ignore_index
        pixels = logits.movedim(1, -1)[counted]
        if not len(pixels):
            return logits.sum() * 0
        return self.loss(pixels.T.contiguous()[None, :, :, None], masks[counted][None, :, None])

    def extra_repr(self) -> str:
        loss = "" if isinstance(self.loss, nn.Module) else f"loss={getattr(self.loss, '__qualname__', self.loss)}, "
        return f"{loss}ignore_index={self.ignore_index}"


def _mean_of_pixels(values: Tensor, where: Tensor | None) -> Tensor:
    """Average ``(B, H, W)`` values over the pixels that count."""
    if where is None:
        return mean_over_processes(values.sum(), torch.full((), values.numel(), device=values.device))
    check_same_shape("where", where, "the map of pixels", values)
    return mean_over_processes(torch.where(where, values, 0.0).sum(), where.sum())


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype.itemsize < 4 else x
