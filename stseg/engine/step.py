"""Training steps: losses, gradients, a check, the optimizers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stseg.distributed import all_reduce_sum, synchronized_batchnorm, world_size
from stseg.engine.config import TrainConfig
from stseg.engine.method import Batch, Losses, Method
from stseg.engine.optimizers import lay_out_states
from stseg.models.precision import autocast
from stseg.models.state import device_of


class TrainingSteps:
    """Training steps of a method, each of which leaves everything as it was if loss or gradients are not finite.

    On a GPU the host does not wait for a step: it reads how one ended after it launched forward and backward pass of
    the next one. Meanwhile the device undoes a step that was not finite: fused optimizers skip the update, and buffers
    and averages are put back. Other optimizers have to be waited for before each update.

    Args:
        network: the method, in training mode; inside DistributedDataParallel where there are several processes.
        method: the method itself.
        optimizers: its optimizers.
        config: the settings.
        lag: whether to read how a step ended after the next one was launched, if the optimizers allow it; None for on
            a GPU.
    """

    def __init__(
        self,
        network: nn.Module,
        method: Method,
        optimizers: Sequence[torch.optim.Optimizer],
        config: TrainConfig,
        *,
        lag: bool | None = None,
    ) -> None:
        self.network, self.method, self.optimizers, self.config = network, method, optimizers, config
        self.lag = device_of(method).type == "cuda" if lag is None else lag
        self._modules = list(method.modules())
        self._pending: _Outcome | None = None
        self._began = False

    def __call__(self, batch: Batch, *, settle: bool = True) -> Iterator[dict[str, float]]:
        """Run one training step.

        Args:
            batch: the batch of this process.
            settle: whether to wait until it is known how this step ended.

        Yields:
            For each step that is now known to have ended well, oldest first, the loss, as ``"loss"``, and the values
            that the method logged; means over all processes.

        Raises:
            FloatingPointError: if loss or gradients of this step, or of one before that was not settled, are not
                finite; method and optimizers are then as before that step.
        """
        # Buffers change in the forward pass: a batch with a non-finite loss also corrupts the running statistics.
        before = _Copies(self._buffers())
        losses, norm = self._gradients(batch)
        if not self._began:
            lay_out_states(self.optimizers)
        lag = self.lag and self._began and all(map(_can_skip, self.optimizers))
        try:
            yield from self.settle()
            outcome = _Outcome.of(losses, norm)
            if not lag:
                yield outcome.read()
        except FloatingPointError:
            before.restore()
            raise
        self._update(batch, skip=outcome.not_finite if lag else None, before=before)
        self._began, self._pending = True, outcome if lag else None
        if settle:
            yield from self.settle()

    def settle(self) -> Iterator[dict[str, float]]:
        """Wait until it is known how all steps ended; yields and raises what a call does."""
        outcome, self._pending = self._pending, None
        if outcome is not None:
            yield outcome.read()

    def _gradients(self, batch: Batch) -> tuple[Losses, Tensor]:
        """Compute the losses of a batch and the gradients, and their norm."""
        # Also in the backward pass, which may recompute layers.
        with synchronized_batchnorm(self.config.sync_batchnorm):
            with autocast(batch.images.device, self.config.precision):
                losses: Losses = self.network(batch)
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=True)
            losses.total.backward()  # type: ignore[no-untyped-call]
        held = (p for o in self.optimizers for group in o.param_groups for p in group["params"])
        gradients = [p.grad for p in held if p.grad is not None]
        norms = torch._foreach_norm(gradients) if gradients else [torch.zeros_like(losses.total)]
        return losses, torch.linalg.vector_norm(torch.stack(list(norms)))

    def _update(self, batch: Batch, *, skip: Tensor | None, before: _Copies) -> None:
        """Update parameters and averages, unless ``skip`` is 1 on the device, which then puts the buffers back."""
        for optimizer in self.optimizers:
            optimizer.found_inf = skip  # type: ignore[attr-defined]  # where torch's GradScaler sets it
            optimizer.step()
        overridden = type(self.method).after_step is not Method.after_step
        averages = [p for p in self.method.parameters() if not p.requires_grad] if overridden else []
        copies = [before, _Copies(averages)] if skip is not None else []
        with torch.no_grad():
            self.method.after_step(batch)
        for each in copies:
            each.restore(where=skip)

    def _buffers(self) -> list[Tensor]:
        return [each for module in self._modules for each in module._buffers.values() if each is not None]


class _Copies:
    """Copies of tensors, which can be put back."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = list(tensors)
        self.values = [tensor.detach().clone() for tensor in self.tensors]

    @torch.no_grad()
    def restore(self, where: Tensor | None = None) -> None:
        """Put all back; with ``where``, only if it is 1, which is not looked at on the host."""
        for tensor, value in zip(self.tensors, self.values, strict=True):
            tensor.copy_(value if where is None else torch.where(where > 0, value, tensor))


@dataclass
class _Outcome:
    """How a step ended, on its way to the host."""

    names: Sequence[str]
    numbers: Tensor
    """The loss, the logged values, and 1 if loss or gradients are not finite; on the host."""
    not_finite: Tensor
    """The last of them, on the device."""
    wait: Callable[[], object]

    @classmethod
    def of(cls, losses: Losses, norm: Tensor) -> _Outcome:
        total = losses.total.detach().float()
        logged = [torch.as_tensor(value, device=total.device).detach().float() for value in losses.logged.values()]
        values = all_reduce_sum(torch.stack([total, *(value.reshape(()) for value in logged)])) / world_size()
        not_finite = (~(values[0] + norm).isfinite()).float()
        numbers = torch.cat([values, not_finite[None]])
        wait: Callable[[], object] = tuple
        if numbers.device.type == "cuda":
            host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            numbers = host.copy_(numbers, non_blocking=True)
            (event := torch.cuda.Event()).record()  # type: ignore[no-untyped-call]
            wait = event.synchronize
        return cls(("loss", *losses.logged), numbers, not_finite, wait)

    def read(self) -> dict[str, float]:
        """Wait for the numbers.

        Raises:
            FloatingPointError: if loss or gradients are not finite.
        """
        self.wait()
        *numbers, not_finite = self.numbers.tolist()
        if not_finite:
            loss = numbers[0]
            raise FloatingPointError("the gradients are not finite" if math.isfinite(loss) else f"the loss is {loss}")
        return dict(zip(self.names, numbers, strict=True))


def _can_skip(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer can be told on the device to leave parameters and its state as they are."""
    return all(group.get("fused") for group in optimizer.param_groups)
