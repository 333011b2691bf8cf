"""Trial of one training step on a copy of a method before training starts."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from stseg.augment import as_batch_augmentation
from stseg.distributed import rank
from stseg.engine.batches import Streams
from stseg.engine.checkpoint import RESERVED
from stseg.engine.config import TrainConfig
from stseg.engine.method import Losses, Method
from stseg.engine.optimizers import keep_initial_rates, set_learning_rates
from stseg.engine.plan import Plan
from stseg.errors import MethodError, NetworkError, StsegError
from stseg.functional.classes import check_classes
from stseg.functional.losses import check_ignores
from stseg.models.precision import autocast
from stseg.models.segmenter import takes_images
from stseg.models.state import bare_network, device_of, train_unfrozen
from stseg.seeds import derive_seed, fixed_seed


def try_step(method: Method, streams: Streams, config: TrainConfig, *, metrics: Collection[str] = ()) -> list[str]:
    """Run one forward pass, backward pass and update on a copy of the method, with the first batch of the training.

    The method and all random generators are unchanged afterwards.

    Args:
        method: the method.
        streams: its data.
        config: the settings.
        metrics: names of the values of extra metrics, which the method cannot log.

    Returns:
        Names of the trainable parameters that got no gradient.

    Raises:
        MethodError: if the step fails, as it does if the ignore index is a class of the model, or the method does not
            implement the interface; says where and why.
        ValueError: if the method's ``strong`` writes a different ignore index into masks than the config's.
    """
    name = type(method).__name__
    check_model(method)
    as_batch_augmentation(getattr(method, "strong", None), ignore_index=config.ignore_index)
    device = device_of(method)
    try:
        trial = copy.deepcopy(method)
    except Exception as error:  # of any type
        raise MethodError(f"{name} cannot be copied (copy.deepcopy), as snapshots are: {error}") from error
    train_unfrozen(trial)
    steps = Plan.of(config, streams.steps_per_epoch).steps
    try:
        batch = next(streams.batches(range(1), total=steps, device=device, num_workers=0))
    except StsegError:
        raise
    except Exception as error:  # of any type: the view is user code
        raise MethodError(f"the first batch of {name} cannot be made: {type(error).__name__}: {error}") from error
    seed = derive_seed(config.seed, "step", 0, rank())
    with fixed_seed(seed), preserved_random_state(device):
        torch.manual_seed(seed)
        try:
            optimizers = list(trial.optimizers(config))
            keep_initial_rates(optimizers)
            outputs: list[Any] = []
            handle = trial.model.register_forward_hook(lambda module, inputs, output: outputs.append(output))
            with autocast(device, config.precision):
                losses = trial(batch)
            handle.remove()
            _check_losses(losses, name, metrics)
            _check_training_logits(outputs)
            _check_ignore_index(outputs, config.ignore_index)
            losses.total.backward()
            set_learning_rates(optimizers, config, 0, batch.steps)
            for optimizer in optimizers:
                optimizer.step()
            with torch.no_grad():
                trial.after_step(batch)
            loss = getattr(trial, "loss", None)
            if callable(loss) and streams.num_classes is not None:
                check_ignores(loss, streams.num_classes, config.ignore_index, device)
        except StsegError:
            raise
        except Exception as error:  # of any type: user code
            shapes = f"images {tuple(batch.images.shape)}" + (
                f", unlabeled {tuple(batch.unlabeled.shape)}" if isinstance(batch.unlabeled, Tensor) else ""
            )
            # The message of torch's losses for a mask value that is not a class.
            unknown = isinstance(error, IndexError) and f"Target {config.ignore_index} is out of bounds" in str(error)
            hint = f" (masks hold {config.ignore_index} where there is no label: ignore_index=...)" if unknown else ""
            if "more than 1 value per channel" in str(error):  # torch's batch normalization
                hint = " (batch normalization of a single value: batch_size=2 or more in each process, or larger crops)"
            raise MethodError(
                f"the first training step of {name} fails on a batch of {shapes}: {type(error).__name__}: {error}{hint}"
            ) from error
    _check_optimizers(trial, optimizers, name)
    return [key for key, parameter in trial.named_parameters() if parameter.requires_grad and parameter.grad is None]


def check_model(method: Method) -> None:
    """Raise a ``MethodError`` unless the method has a ``model`` that maps images to logits."""
    name = type(method).__name__
    model = getattr(method, "model", None)
    if not isinstance(model, torch.nn.Module):
        raise MethodError(
            f"{name} has no attribute model; expected a network, such as self.model = stseg.Segmenter(network)"
        )
    scripted = next((each for each in model.modules() if isinstance(each, torch.jit.ScriptModule)), None)
    if scripted is not None:
        raise NetworkError(
            f"{name}.model holds a script module ({scripted.original_name}), which cannot be trained here; "
            "expected the torch.nn.Module that it was made of (torch.compile(network) works)"
        )
    if takes_images(inner := bare_network(model)) and inner is not model:
        kind = type(model).__name__
        function = "torch.compile" if hasattr(model, "_orig_mod") else kind
        raise NetworkError(
            f"{name}.model is a {kind} around stseg.{type(inner).__name__}; expected "
            f"stseg.Segmenter({function}(network)), so that weights are those of the network"
        )
    if not takes_images(model):
        raise MethodError(
            f"{name}.model is a bare {type(model).__name__}, which would see other images in training than in "
            "evaluation; expected self.model = stseg.Segmenter(network)"
        )


def _check_training_logits(outputs: Sequence[Any]) -> None:
    """Raise a ``NetworkError`` if the model returns probabilities in training mode, whatever it does in evaluation."""
    for logits in outputs:
        if isinstance(logits, Tensor) and logits.ndim == 4 and bool((logits >= 0).all()):
            sums = logits.detach().float().sum(1)
            if torch.allclose(sums, torch.ones_like(sums), atol=1e-2 if logits.dtype != torch.float32 else 1e-4):
                raise NetworkError(
                    "the network returns values that sum to 1 at every pixel in training mode, as probabilities do; "
                    "expected logits (leave out the softmax at its end)"
                )


def _check_ignore_index(outputs: Sequence[Any], ignore_index: int) -> None:
    """Raise an error if the ignore index is a class of the model."""
    for logits in outputs:
        if isinstance(logits, Tensor) and logits.ndim == 4:
            check_classes(max(2, logits.shape[1]), ignore_index)


def _check_losses(losses: object, name: str, metrics: Collection[str]) -> None:
    if not isinstance(losses, Losses):
        raise MethodError(f"{name} returned {type(losses).__name__}; expected stseg.Losses(total, logged)")
    total = losses.total
    if not isinstance(total, Tensor) or total.shape != () or not total.requires_grad:
        got = f"a tensor of shape {tuple(total.shape)}" if isinstance(total, Tensor) else type(total).__name__
        grad = " without a gradient" if isinstance(total, Tensor) and not total.requires_grad else ""
        raise MethodError(f"the total loss of {name} is {got}{grad}; expected a scalar to differentiate")
    if not isinstance(losses.logged, Mapping):
        raise MethodError(f"{name} logs {type(losses.logged).__name__}; expected a dictionary of scalars by name")
    for key, value in losses.logged.items():
        if key in RESERVED or key.startswith("iou/"):
            raise MethodError(f"{name} logs {key!r}, a name of the history itself; expected another name")
        if key in metrics:
            raise MethodError(f"{name} logs {key!r}, which is a metric, too; expected another name in metrics={{...}}")
        if not isinstance(value, (int, float)) and not (isinstance(value, Tensor) and value.numel() == 1):
            raise MethodError(f"{name} logs {key!r} as {type(value).__name__}; expected a scalar tensor")


def _check_optimizers(method: Method, optimizers: Sequence[torch.optim.Optimizer], name: str) -> None:
    held = Counter(id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])
    for key, parameter in method.named_parameters():
        if parameter.requires_grad and held[id(parameter)] != 1:
            count = "no optimizer" if not held[id(parameter)] else "more than one optimizer"
            raise MethodError(
                f"the parameter {key!r} of {name} is in {count}; expected {name}.optimizers(config) to hold each "
                "trainable parameter once (parameter.requires_grad_(False) excludes one)"
            )


@contextmanager
def preserved_random_state(device: torch.device) -> Iterator[None]:
    """Restore the states of torch's generators on exit."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
