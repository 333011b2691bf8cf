"""Device, mode and weights of a network."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter or buffer; the CPU if it has none."""
    for tensor in chain(model.parameters(), model.buffers()):  # torch.compile of PyTorch 2.4 has no next() of a chain
        return tensor.device
    return torch.device("cpu")


def bare_network(network: nn.Module) -> nn.Module:
    """Return the network inside ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel``.

    Example:
        >>> network = nn.Conv2d(3, 2, 1)
        >>> bare_network(nn.DataParallel(torch.compile(network))) is network
        True
    """
    while True:
        if isinstance(inner := getattr(network, "_orig_mod", None), nn.Module):
            network = inner
        elif isinstance(network, (nn.DataParallel, DistributedDataParallel)):
            network = network.module
        else:
            return network


def move(model: nn.Module, device: torch.device | str | None) -> nn.Module:
    """Move a model to a device; None leaves it where it is."""
    return model if device is None else model.to(device)


def place(model: ModuleT, device: torch.device | str | None = None) -> ModuleT:
    """Move a model to a device (None leaves it where it is), and lay out the weights of its convolutions for speed.

    In ``torch.channels_last``, the values of all channels of a pixel lie side by side, and so they do in what a
    convolution with such weights returns: CPUs and GPUs compute it faster, in bfloat16 above all. Values, state dict
    and fingerprint are the same. What is compiled stays as it is: the compiler chooses layouts itself.

    Call it before an optimizer makes its first step: fused ones take their state to be laid out like the weights.

    Example:
        >>> net = place(nn.Conv2d(3, 8, 3))
        >>> net.weight.is_contiguous(memory_format=torch.channels_last)
        True
    """
    model = model if device is None else model.to(device)
    for weight in _other_weights(model, torch.channels_last):
        weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    return model


@contextmanager
def laid_out(*models: nn.Module) -> Iterator[None]:
    """Lay out weights as :func:`place` does, and give them back their memory on exit.

    Example:
        >>> net = nn.Conv2d(3, 8, 3)
        >>> with laid_out(net):
        ...     net.weight.is_contiguous(memory_format=torch.channels_last)
        True
        >>> net.weight.is_contiguous()
        True
    """
    before = {weight: weight.data for model in models for weight in _other_weights(model, torch.channels_last)}
    try:
        for model in models:
            place(model)
        yield
    finally:
        for weight, data in before.items():
            weight.data = data


def place_channels_first(model: nn.Module) -> bool:
    """Undo what :func:`place` did to the layout; return whether that changed anything."""
    weights = _other_weights(model, torch.contiguous_format)
    for weight in weights:
        weight.data = weight.data.contiguous()
    return bool(weights)


def _other_weights(model: nn.Module, layout: torch.memory_format) -> list[nn.Parameter]:
    """Return the weights of the convolutions that are laid out otherwise, and whose memory is theirs alone."""
    if is_compiled(model):
        return []
    convolutions = (each for each in model.modules() if isinstance(each, (nn.Conv2d, nn.ConvTranspose2d)))
    weights = dict.fromkeys(each.weight for each in convolutions if isinstance(each.weight, nn.Parameter))
    return [each for each in weights if not each.is_contiguous(memory_format=layout) and not _shares_memory(each)]


def _shares_memory(weight: Tensor) -> bool:
    """Return whether others use the memory of a weight: another process, or a tensor that it is a part of."""
    if weight.device.type == "meta" or weight.is_inference():
        return True
    memory = weight.untyped_storage()
    part = memory.nbytes() != weight.numel() * weight.element_size()
    return part or (weight.device.type == "cpu" and memory.is_shared())


def is_compiled(model: nn.Module) -> bool:
    """Return whether a model, or one inside it, is compiled."""
    outer = (each for module in model.modules() for each in getattr(module, "_outer", ()))  # of a Segmenter
    modules = (*model.modules(), *(inner for each in outer for inner in each.modules()))
    return any(hasattr(each, "_orig_mod") or each._compiled_call_impl is not None for each in modules)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Set models to evaluation mode, and restore the mode of every submodule on exit.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout())
        >>> _ = net[0].eval()  # frozen by the caller
        >>> with evaluating(net):
        ...     net.training
        False
        >>> net.training, net[0].training
        (True, False)
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def train_unfrozen(module: nn.Module) -> None:
    """Set training mode, except where the caller froze layers by evaluation mode.

    In a network that is in training mode, what is in evaluation mode stays. In one that is in evaluation mode as a
    whole, as after loading pretrained weights, that holds for the submodules without trainable parameters. Copies
    without gradients, such as averaged teachers, are treated like the network that they have the layers of.

    Args:
        module: a network, or a method with one or more wrapped networks.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout())
        >>> _ = net[0].eval()  # frozen by the caller
        >>> train_unfrozen(net)
        >>> net.training, net[0].training, net[1].training
        (True, False, True)
    """
    inner = (getattr(each, "network", None) for each in module.modules())
    networks = [each for each in inner if isinstance(each, nn.Module)] or [module]
    frozen = {id(each): _frozen_names(each) for each in networks if any(p.requires_grad for p in each.parameters())}
    learners = [each for each in networks if id(each) in frozen]
    module.train()
    for network in networks:
        layers = dict(network.named_modules())
        like = network if id(network) in frozen else next((e for e in learners if _layers(e) == list(layers)), None)
        for name in frozen[id(like)] if like is not None else ():
            layers[name].training = False


def _frozen_names(network: nn.Module) -> list[str]:
    resting = {name: layer for name, layer in network.named_modules() if not layer.training}
    if network.training:
        return list(resting)
    names: list[str] = []
    for name, layer in resting.items():
        parameters = list(layer.parameters())
        inside_frozen = any(name.startswith(f"{frozen}.") for frozen in names)
        if inside_frozen or (parameters and not any(p.requires_grad for p in parameters)):
            names.append(name)
    return names


def _layers(network: nn.Module) -> list[str]:
    return [name for name, _ in network.named_modules()]


def cpu_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the model's state dict on the CPU, each tensor with its own memory."""
    return {
        name: value.detach().to("cpu", copy=True).contiguous()
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor)
    }


def check_apart(**networks: nn.Module) -> None:
    """Raise an error unless the two arguments, by name, are networks with weights of their own."""
    for name, network in networks.items():
        if not isinstance(network, nn.Module):
            raise TypeError(f"{name} is {network!r}; expected a network (torch.nn.Module)")
    one, other = ({id(p) for p in network.parameters()} for network in networks.values())
    if one & other:
        raise ValueError(f"{' and '.join(networks)} share parameters; expected two networks with weights of their own")


def fingerprint(model: nn.Module, *, weights: bool = True) -> str:
    """Compute a hash of a model's architecture and weights.

    It does not depend on the mode, the device or the layout in memory.

    Example:
        >>> net = nn.Conv2d(3, 2, 1)
        >>> before = fingerprint(net)
        >>> _ = nn.init.zeros_(net.bias)
        >>> len(before), fingerprint(net) == before
        (16, False)
    """
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(model))  # addresses differ from run to run
    total = hashlib.sha256(text.encode())
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            if weights:
                total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()[:16]
