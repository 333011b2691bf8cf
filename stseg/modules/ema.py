"""Exponential moving average of a network's weights, the teacher of Mean Teacher and related methods."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from stseg.checks import check_number


class EMA(AveragedModel):
    """Exponential moving average of a network's weights, in a copy without gradients.

    After each step of the optimizer the average becomes ``decay_t * average + (1 - decay_t) * weights``. With the
    warm-up ``decay_t = min(1 - 1 / (t + 1), decay)`` after step ``t``, counted from 0: the first update copies the
    weights, and the next ones are plain means of all weights so far until ``decay`` is reached. Without warm-up,
    ``decay_t`` is always ``decay``.

    The step is an argument of :meth:`update`, not read from the device, so an update does not synchronize. The whole
    state is in the state dict.

    Args:
        model: the network in its initial state; it is copied.
        decay: from 0 to 1; the mean covers about ``1 / (1 - decay)`` steps.
        warmup: whether to start with smaller decays.
        buffers: ``"own"`` leaves the buffers of the copy alone: in training mode it tracks its own running statistics.
            ``"average"`` averages floating-point buffers like the weights and copies the others.

    Raises:
        ValueError: if ``decay`` is out of its range or ``buffers`` is not one of the two.

    Example:
        >>> student = nn.Linear(1, 1)
        >>> teacher = EMA(student, decay=0.99)
        >>> for step in range(3):
        ...     _ = nn.init.constant_(student.weight, step)  # what an optimizer would do
        ...     teacher.update(student, step)
        >>> teacher.model.weight
        Parameter containing:
        tensor([[1.]])
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.99,
        *,
        warmup: bool = True,
        buffers: Literal["own", "average"] = "own",
    ) -> None:
        check_number("decay", decay)
        if not 0 <= decay <= 1:
            raise ValueError(f"decay is {decay}; expected a number from 0 to 1")
        if buffers not in ("own", "average"):
            raise ValueError(f"buffers is {buffers!r}; expected 'own' or 'average'")
        super().__init__(model)
        self.decay, self.warmup, self.buffers_from = decay, warmup, buffers
        self.module.requires_grad_(False)

    @property
    def model(self) -> nn.Module:
        """Averaged network."""
        return self.module

    def decay_at(self, step: int) -> float:
        """Compute the decay of the update after a step, counted from 0."""
        return min(1 - 1 / (step + 1), self.decay) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Update the average with the weights of a network after an optimizer step.

        Args:
            model: the network, with the same architecture as the copy.
            step: the number of the step, counted from 0.

        Raises:
            ValueError: if ``step`` is negative, or the tensors of the network do not match the copy.
        """
        if step < 0:
            raise ValueError(f"step is {step}; expected 0 or more")
        average = get_ema_multi_avg_fn(self.decay_at(step))  # type: ignore[no-untyped-call]
        pairs = _paired(list(self.module.parameters()), list(model.parameters()))
        if self.buffers_from == "average":
            for mine, other in _paired(list(self.module.buffers()), list(model.buffers())):
                if mine.is_floating_point():
                    pairs.append((mine, other))
                else:
                    mine.copy_(other)
        if pairs:
            average([mine for mine, _ in pairs], [other for _, other in pairs], 0)
        self.n_averaged += 1

    def update_parameters(self, model: nn.Module) -> None:
        """Raise a ``NotImplementedError``: use :meth:`update`, which takes the number of the step."""
        raise NotImplementedError("an EMA needs the number of the step: update(model, step)")

    def extra_repr(self) -> str:
        """Return the settings for ``repr``."""
        return f"decay={self.decay}, warmup={self.warmup}, buffers={self.buffers_from!r}"


def _paired(mine: list[Tensor], others: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    if [tuple(x.shape) for x in mine] != [tuple(x.shape) for x in others]:
        raise ValueError("the network has other parameters or buffers than the average; expected its architecture")
    return list(zip(mine, others, strict=True))
