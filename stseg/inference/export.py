"""Networks as ONNX files."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from stseg.checks import check_choice, check_count
from stseg.errors import NetworkError
from stseg.models.segmenter import Segmenter, as_segmenter
from stseg.models.sides import Sides
from stseg.models.state import bare_network, place_channels_first
from stseg.storage.files import write_atomically
from stseg.version import __version__

Output = Literal["logits", "probabilities", "mask"]

_LARGEST = 2**31 - 2**20  # bytes of a file of protocol buffers, less what is not weights
_LEAST_OPSET = 11  # what resizing with half pixel centers needs
_TOLERANCE = 1e-3  # of logits, relative to the largest one
_SHAPE = {0: "batch", 2: "height", 3: "width"}


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    output: Output = "logits",
    channels: int = 3,
    opset: int | None = None,
    check: bool = True,
) -> Path:
    """Export a network as an ONNX file that takes images of any size.

    Normalization, padding and cropping of :class:`stseg.Segmenter` are part of the file. It has one input, ``images``
    ``(B, C, H, W)`` float32 in [0, 1], and one output of the same height and width, named as ``output`` says. Batch,
    height and width are dynamic. The file holds the weights, and as metadata the version of stseg, the number of
    classes, mean, standard deviation and the range of the input. The network stays as it is: a copy of it, in float32
    and evaluation mode on the CPU, is exported.

    PyTorch has two exporters, and there are networks that one of them records for a single size. With ``check=True``
    the file is run by onnxruntime on images of several sizes, odd ones too, and compared with PyTorch; if the quicker
    exporter, by TorchScript, fails or its file is wrong, the one by ``torch.export`` is tried. A file that is wrong is
    not kept.

    Args:
        model: a network, bare or in a :class:`stseg.Segmenter`.
        path: the file, which is replaced if it is there; by convention its name ends with ``.onnx``.
        output: ``"logits"`` ``(B, K, H, W)`` float32; ``"probabilities"``, their softmax; ``"mask"`` ``(B, H, W)``, the
            most probable class, uint8 (int64 if there are more than 256 classes).
        channels: of the images.
        opset: version of the ONNX operators; None for the default of PyTorch's exporter.
        check: whether to compare the file with PyTorch. False if onnxruntime is not at hand: then nothing tells
            whether the file is right at sizes other than one.

    Returns:
        The path.

    Raises:
        ImportError: if onnx is not installed, or, with ``check=True``, onnxruntime.
        NetworkError: if the network takes no images of any size, or neither exporter makes a file of it that
            computes the same; names the size and the difference. There is no new file then.
        OSError: if the file cannot be written.

    Example:
        >>> import tempfile, onnxruntime
        >>> network = nn.Conv2d(3, 5, kernel_size=3, stride=4, padding=1)
        >>> path = export_onnx(network, Path(tempfile.mkdtemp()) / "network.onnx", output="mask")
        >>> session = onnxruntime.InferenceSession(path)
        >>> (mask,) = session.run(None, {"images": torch.rand(1, 3, 97, 33).numpy()})
        >>> mask.shape, mask.dtype
        ((1, 97, 33), dtype('uint8'))
    """
    check_choice("output", output, "logits", "probabilities", "mask")
    check_count("channels", channels)
    if opset is not None:
        check_count("opset", opset, least=_LEAST_OPSET)
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; expected a file, such as {path / 'network.onnx'}")
    _import("onnx")
    if check:
        _import("onnxruntime", "; without a check of the file: check=False")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        segmenter = _copy_on_cpu(model)
        examples = _examples(segmenter, channels)
        deployed = _Deployed(segmenter, output, classes=examples[0].logits.shape[1])
        content = _export(deployed, examples, opset, check)
    write_atomically(path, lambda file: file.write(content))
    return path


class _Example(NamedTuple):
    images: Tensor
    logits: Tensor


class _Deployed(nn.Module):
    """What is exported: a ``Segmenter`` and what is made of its logits."""

    def __init__(self, segmenter: Segmenter, output: Output, classes: int) -> None:
        super().__init__()
        self.segmenter, self.output, self.classes = segmenter, output, classes

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.segmenter(images)
        if self.output == "logits":
            return logits.float()
        if self.output == "probabilities":
            return logits.float().softmax(1)
        mask = logits.argmax(1)
        return mask.to(torch.uint8) if self.classes <= 256 else mask


def _import(name: str, otherwise: str = "") -> None:
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f'stseg.export_onnx needs {name} (pip install "stseg[onnx]"){otherwise}') from error


def _copy_on_cpu(model: nn.Module) -> Segmenter:
    """Return a copy of a network, wrapped, in float32 and evaluation mode on the CPU."""
    wrapped = as_segmenter(bare_network(model) if isinstance(model, nn.Module) else model)
    if not isinstance(wrapped, Segmenter):
        raise TypeError(
            f"model is a {type(wrapped).__name__}; expected one network, bare or in a stseg.Segmenter, whose output is "
            "one forward pass: of a MultiScaleFlip, stseg.export_onnx(model.model, path)"
        )
    size = sum(each.numel() * each.element_size() for each in wrapped.network.state_dict().values())
    if size > _LARGEST:
        raise NetworkError(
            f"the weights have {size / 2**30:.2f} GiB; expected less than 2 GiB, which an ONNX file holds"
        )
    try:
        network = copy.deepcopy(wrapped.network)
    except Exception as error:  # libraries raise different types
        raise NetworkError(
            f"the network ({type(wrapped.network).__name__}) cannot be copied (copy.deepcopy): {error}"
        ) from error
    network = network.to("cpu", torch.float32).eval().requires_grad_(False)
    place_channels_first(network)
    copied = Segmenter(network, mean=wrapped.mean, std=wrapped.std, stride=wrapped.stride, select=wrapped.select)
    copied._sides = wrapped._sides
    return copied.eval()


def _examples(segmenter: Segmenter, channels: int) -> list[_Example]:
    """Return images of several sizes, the first for the exporter to trace, and their logits by PyTorch."""
    generator = torch.Generator().manual_seed(0)
    try:
        segmenter(torch.rand(1, channels, 64, 64, generator=generator))
    except (NetworkError, ValueError) as error:
        raise NetworkError(
            f"{error} (images of {channels} channels; others: channels= of stseg.export_onnx)"
        ) from error
    if segmenter._sides is None:
        raise NetworkError(
            f"the network ({type(segmenter.network).__name__}) takes only some sizes, and no number is found that its "
            "sides must be multiples of; expected one that takes images of any size, or stseg.Segmenter(network, "
            "stride=32)"
        )
    images = (torch.rand(size, generator=generator) for size in _sizes(segmenter._sides, channels))
    return [_Example(each, segmenter(each)) for each in images]


def _sizes(sides: Sides, channels: int) -> list[tuple[int, int, int, int]]:
    """Return sizes of batches: multiples of the stride or not, odd, smaller than one stride, and higher than wide."""
    unit = max(sides.padded(1), 32)
    return [
        (2, channels, 2 * unit + 5, 3 * unit - 5),
        (1, channels, 2 * unit, 3 * unit),
        (1, channels, unit // 2 + 1, 2 * unit + 1),
        (3, channels, unit + 1, unit - 1),
        (1, channels, 6 * unit + 9, 5 * unit + 27),
    ]


def _export(deployed: _Deployed, examples: list[_Example], opset: int | None, check: bool) -> bytes:
    """Return the content of an ONNX file by the first exporter whose file is right."""
    exporters: dict[str, Callable[..., bytes]] = {"TorchScript": _by_torchscript, "torch.export": _by_torch_export}
    failures = []
    for name, export in exporters.items():
        try:
            with _silent():
                content = export(deployed, examples[0].images, opset)
            content = _described(content, deployed, examples[0].images.shape[1], opset)
            if check:
                _check(deployed, content, examples)
            return content
        except Exception as error:  # noqa: PERF203  they raise different types, as does onnxruntime
            failures.append(f"by {name}: {_in_one_line(error)}")
    raise NetworkError(
        f"the network ({type(deployed.segmenter.network).__name__}) cannot be exported as an ONNX file that is right "
        f"at every size. {'. '.join(failures)}"
    )


def _by_torchscript(deployed: _Deployed, images: Tensor, opset: int | None) -> bytes:
    file = io.BytesIO()
    axes = {"images": _SHAPE, deployed.output: _output_shape(deployed)}
    torch.onnx.export(
        deployed,
        (images,),
        file,  # type: ignore[arg-type, unused-ignore]
        input_names=["images"],
        output_names=[deployed.output],
        dynamic_axes=axes,
        opset_version=opset,
        dynamo=False,
    )
    return file.getvalue()


def _by_torch_export(deployed: _Deployed, images: Tensor, opset: int | None) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        torch.onnx.export(
            deployed,
            (images,),
            path,
            input_names=["images"],
            output_names=[deployed.output],
            dynamic_shapes={"images": _SHAPE},
            opset_version=opset,
            external_data=False,
            dynamo=True,
            verbose=False,
        )
        return path.read_bytes()


def _check(deployed: _Deployed, content: bytes, examples: list[_Example]) -> None:
    """Raise a ``NetworkError`` unless onnxruntime computes what PyTorch does, at every size."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    for images, logits in examples:
        found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        size = " x ".join(map(str, images.shape))
        batch, classes, *sides = logits.shape
        shape = (batch, *sides) if deployed.output == "mask" else (batch, classes, *sides)
        if tuple(found.shape) != shape:
            raise NetworkError(f"for images of {size} its output is {tuple(found.shape)}; expected {shape}")
        difference = _difference(deployed.output, found, logits)
        allowed = _TOLERANCE * (1.0 if deployed.output == "probabilities" else max(1.0, float(logits.abs().max())))
        if not difference <= allowed:
            raise NetworkError(
                f"for images of {size} its output differs from PyTorch's by {difference:.3g}; expected at most "
                f"{allowed:.3g}"
            )


def _difference(output: Output, found: Tensor, logits: Tensor) -> float:
    """Return the largest difference; of a mask, that of the logits of its class to the largest ones."""
    if output == "mask":
        chosen = found.long()[:, None]
        if not bool((chosen < logits.shape[1]).all()):
            return float("inf")
        return float((logits.amax(1, keepdim=True) - logits.gather(1, chosen)).max())
    expected = logits.softmax(1) if output == "probabilities" else logits
    return float((found - expected).abs().max())


def _described(content: bytes, deployed: _Deployed, channels: int, opset: int | None) -> bytes:
    """Return a file with names for its dimensions and a description."""
    import onnx

    model: Any = onnx.load_from_string(content)
    found = next(each.version for each in model.opset_import if each.domain == "")
    if opset is not None and found != opset:
        raise NetworkError(f"the exporter wrote operators of version {found}; expected opset {opset}")
    shape = _output_shape(deployed)
    for value, names in ((model.graph.input[0], _SHAPE), (model.graph.output[0], shape)):
        for place, name in names.items():
            value.type.tensor_type.shape.dim[place].dim_param = name
    if 1 not in shape:
        model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = deployed.classes
    segmenter = deployed.segmenter
    onnx.helper.set_model_props(
        model,
        {
            "stseg_version": __version__,
            "num_classes": str(deployed.classes),
            "channels": str(channels),
            "input_range": "[0, 1]",
            "mean": json.dumps(_applied(segmenter.mean, channels)),
            "std": json.dumps(_applied(segmenter.std, channels)),
        },
    )
    described: bytes = model.SerializeToString()
    return described


def _applied(values: tuple[float, ...] | None, channels: int) -> list[float] | None:
    """Return the mean or standard deviation of each channel, as the ``Segmenter`` applies it."""
    if values is None:
        return None
    return list(values) if len(values) == channels else [sum(values) / len(values)] * channels


def _output_shape(deployed: _Deployed) -> dict[int, str]:
    return {0: "batch", 1: "height", 2: "width"} if deployed.output == "mask" else _SHAPE


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep PyTorch's exporters from printing, and from warning of what is checked."""
    printed = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        warnings.simplefilter("ignore")
        with mock.patch.object(torch._C, "_jit_onnx_log", create=True):  # prints the graph where the first one fails
            yield


def _in_one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}" if not isinstance(error, NetworkError) else text
