"""Console command ``stseg``: check, train, predict, report, export."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NoReturn, TextIO, get_args

import stseg
from stseg.distributed import rank, setup_device
from stseg.errors import StsegError
from stseg.folder_check import check_folders
from stseg.folders import FILE, Folders, Training, folders_of, train_folders
from stseg.inference.export import Output
from stseg.loggers import TensorBoard
from stseg.methods import list_methods
from stseg.options import as_options

_EXAMPLES = """examples:
  stseg check --images images --masks masks
  stseg train --images images --masks masks --class-map 0:0 255:1 --out runs/first
  stseg predict --run runs/first --images new --out predicted
  stseg report runs/first
  stseg export --run runs/first --out model.onnx

Images that have no mask, in --images or in --unlabeled, are the unlabeled ones. `stseg COMMAND --help` has all options.
"""
_CHECK = """Read every image and mask once, and say what is wrong before a training finds it out: files that cannot be
read, masks of another size than their image, values that are no classes, validation images among those of the training.
The status is 1 if there is a problem.
"""
_TRAIN = """Train a network on images with and without masks. The same command again resumes a run that was interrupted.
"""
_PREDICT = """Write a mask for every image of a folder: PNG files of the images' names and sizes. The same command again
goes on where it was interrupted.
"""
_REPORT = """Compare runs in one page, finished or under way. Of one that is finished, print the path of its report.
"""
_EXPORT = """Write the network of a run as an ONNX file, which takes images of any size, and check it against PyTorch.
"""
_PRECISION = "auto computes in bfloat16 where the device has it, fp32 never (%(default)s)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status: 0, 1 for a problem, 2 for arguments that make no sense."""
    args = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = args.run_command
    try:
        return run(args)
    except (StsegError, OSError, ImportError, ValueError, TypeError) as error:
        print(f"stseg {args.command}: {as_options(str(error), args.options)}", file=sys.stderr)
        return 2 if isinstance(error, (ValueError, TypeError)) and not isinstance(error, StsegError) else 1
    except KeyboardInterrupt:
        print(f"stseg {args.command}: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def check(args: argparse.Namespace) -> int:
    """Check folders and print what was found."""
    training = _training(args)
    training.check_names()
    found = check_folders(_folders(args), None if args.quick else training, progress=not args.quiet)
    _say(as_options(str(found), args.options))
    return 0 if found.is_fine else 1


def train(args: argparse.Namespace) -> int:
    """Train on folders, and print where the results are."""
    folders, training = _folders(args), _training(args)
    training.check_names()
    _check_out(args.out)
    if folders.classes is None and folders.class_map is None:
        found = check_folders(folders, unlabeled=False, progress=not args.quiet)
        if not found.is_fine or found.classes is None:
            _say(as_options(str(found), args.options))
            return 1
        folders = replace(folders, classes=found.classes.num_classes)
    if (args.out / FILE).exists():
        _say(f"the run in {args.out} goes on")
    result = train_folders(
        folders,
        args.out,
        training,
        keep=args.keep,
        skip_unreadable=args.skip_unreadable,
        log=None if args.tensorboard is None else TensorBoard(args.tensorboard),
        progress=not args.quiet,
    )
    last = [stage.history[-1] for stage in result.stages.values() if stage.history]
    if last and "miou" in last[-1]:
        _say(f"mIoU on {len(folders.validation() or ())} validation images: {100 * last[-1]['miou']:.1f} %")
    _say(f"report:  {Path(args.out) / 'report.html'}")
    _say(f"predict: stseg predict --run {args.out} --images FOLDER --out FOLDER")
    return 0


def predict(args: argparse.Namespace) -> int:
    """Predict the images of a folder by the network of a run."""
    model, folders = stseg.load(args.run, step=args.step), folders_of(args.run)
    images: Any = Path(args.images) if folders is None else folders.read(args.images)
    values = args.values
    if values is None and folders is not None and not args.classes:
        values = folders.values()
    predicted = stseg.predict(
        model,
        images,
        args.out,
        values=values,
        tta=stseg.MultiScaleFlip if args.tta else None,
        tile=args.tile,
        overlap=args.overlap,
        confidence=args.confidence,
        batch_size=args.batch_size,
        num_workers=args.workers,
        precision=args.precision,
        device=args.device or setup_device(),
        skip_unreadable=args.skip_unreadable,
        progress=not args.quiet,
    )
    for skipped in predicted.skipped:
        _say(f"left out: {skipped.id}: {skipped.reason}", file=sys.stderr)
    written = "class indices" if values is None else "the values " + ", ".join(map(str, values))
    _say(f"{len(predicted)} masks of {written}: {args.out}")
    return 0


def report(args: argparse.Namespace) -> int:
    """Print the path of the report of a finished run, or write a comparison of several, or of one that is under way."""
    written: Path = args.runs[0] / "report.html"
    if len(args.runs) > 1 or args.out is not None:
        written = stseg.compare_runs(args.runs, args.out or Path("comparison.html"))
    elif not written.exists():
        written = stseg.compare_runs(args.runs, args.runs[0] / "progress.html")
    print(written)
    return 0


def export(args: argparse.Namespace) -> int:
    """Export the network of a run."""
    path = stseg.export_onnx(stseg.load(args.run, step=args.step), args.out, output=args.output)
    print(f"{path}: images -> {args.output}")
    return 0


class _Parser(argparse.ArgumentParser):
    """One line for a mistake, in place of all options."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n`{self.prog} --help` shows all options\n")


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog="stseg",
        description="Semi-supervised segmentation: masks from few annotated and many plain images.",
        epilog=_EXAMPLES,
        formatter_class=raw,
    )
    parser.add_argument("--version", action="version", version=f"stseg {stseg.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], description: str, example: str) -> Any:
        added = commands.add_parser(
            name,
            help=description.split(". ")[0].rstrip(".\n").replace("\n", " "),
            description=description,
            epilog=f"example:\n  {example}",
            formatter_class=raw,
        )
        added.set_defaults(run_command=run)
        added.add_argument("--quiet", action="store_true", help="no progress on the screen")
        return added

    checking = command("check", check, _CHECK, "stseg check --images images --masks masks --unlabeled more")
    _add_folders(checking)
    _add_training(checking)
    checking.add_argument("--quick", action="store_true", help="no estimate of time and memory")

    training = command(
        "train",
        train,
        _TRAIN,
        "stseg train --images images --masks masks --class-map 0:0 255:1 --val 0.2 \\\n"
        "      --method unimatch --network Unet --encoder resnet34 --steps 4000 --out runs/first",
    )
    _add_folders(training)
    _add_training(training)
    training.add_argument("--out", type=Path, required=True, help="folder of the run")
    training.add_argument("--keep", choices=("final", "best"), default="final", help="which weights, by validation")
    training.add_argument("--tensorboard", type=Path, metavar="FOLDER", help="write the history for TensorBoard")
    training.add_argument("--skip-unreadable", action="store_true", help="leave out unlabeled images that are broken")

    predicting = command(
        "predict", predict, _PREDICT, "stseg predict --run runs/first --images new --out predicted --values 0 255"
    )
    _add_run(predicting)
    predicting.add_argument("--images", type=Path, required=True, help="folder of images")
    predicting.add_argument("--out", type=Path, required=True, help="folder of the masks")
    values = predicting.add_mutually_exclusive_group()
    values.add_argument(
        "--values",
        type=_integers,
        nargs="+",
        action=_Flat,
        help="value of each class; by default as the run's masks had",
    )
    values.add_argument("--classes", action="store_true", help="write class indices")
    predicting.add_argument(
        "--tta", action="store_true", help="average ten views of each image: about fifteen times as long"
    )
    predicting.add_argument("--tile", type=int, metavar="PIXELS", help="side of tiles, for images of many megapixels")
    predicting.add_argument("--overlap", type=float, default=0.25, help="of tiles, as a share of their side")
    predicting.add_argument("--confidence", action="store_true", help="write the confidence, too")
    predicting.add_argument("--batch-size", type=int, default=8, help="most images of a pass (%(default)s)")
    predicting.add_argument("--workers", type=int, default=0, help="processes that read images")
    predicting.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help=_PRECISION)
    predicting.add_argument("--device", help="such as cuda:1; by default the GPU if there is one")
    predicting.add_argument("--skip-unreadable", action="store_true", help="leave out images that are broken")

    reporting = command("report", report, _REPORT, "stseg report runs/first runs/second --out comparison.html")
    reporting.add_argument("runs", type=Path, nargs="+", help="folders of runs")
    reporting.add_argument("--out", type=Path, help="file of the comparison; comparison.html by default")

    exporting = command("export", export, _EXPORT, "stseg export --run runs/first --out model.onnx")
    _add_run(exporting)
    exporting.add_argument("--out", type=Path, required=True, help="the file")
    exporting.add_argument("--output", choices=get_args(Output), default="logits", help="what it computes: %(default)s")
    for added in commands.choices.values():
        options = {action.dest: action.option_strings[0] for action in added._actions if action.option_strings}
        added.set_defaults(options=options | {"num_classes": "--classes"} if "classes" in options else options)
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run")
    parser.add_argument("--step", help="one of its trainings, such as teacher; by default the last")


def _add_folders(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("folders")
    group.add_argument("--images", type=Path, required=True, help="images, some or all of which have a mask")
    group.add_argument("--masks", type=Path, required=True, help="masks, named as the images")
    group.add_argument("--unlabeled", type=Path, help="further images")
    group.add_argument("--val", type=_share, help="masks to hold out for validation: a number, or a share such as 0.2")
    group.add_argument("--val-images", type=Path, help="images for validation, in place of --val")
    group.add_argument("--val-masks", type=Path, help="their masks")
    group.add_argument("--classes", nargs="+", metavar="NAME", help="names of the classes, in order, or their number")
    group.add_argument("--mask-suffix", default="", help="what masks' names have after those of the images")
    group.add_argument(
        "--class-map",
        type=_pair,
        nargs="+",
        metavar="VALUE:CLASS",
        help="class of each value, 0:0 255:1, or color, 0,0,0:0 128,0,0:1; by default the values are the classes",
    )
    group.add_argument(
        "--unmapped",
        type=_integer_or_none,
        help="class of other values, such as 255 to ignore them; by default refused",
    )
    group.add_argument("--mode", choices=("RGB", "RGBA", "L", "any"), default="RGB", help="what images are read as")
    group.add_argument("--value-range", type=float, nargs=2, metavar=("BLACK", "WHITE"), help="of deeper images")


def _add_training(parser: argparse.ArgumentParser) -> None:
    defaults = {each.name: each.default for each in fields(Training)}
    group = parser.add_argument_group("training")
    group.add_argument("--method", default=defaults["method"], help=f"{', '.join(list_methods())} (%(default)s)")
    group.add_argument(
        "--set",
        type=_setting,
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="settings of the method, such as threshold=0.9: the arguments of its class",
    )
    group.add_argument("--network", default=defaults["network"], help="of segmentation_models_pytorch (%(default)s)")
    group.add_argument(
        "--encoder", default=defaults["encoder"], help="its encoder; tu-... are those of timm (%(default)s)"
    )
    group.add_argument(
        "--weights",
        default=defaults["weights"],
        help="of the encoder; none for random ones, installed for those of stseg[weights] (%(default)s)",
    )
    group.add_argument(
        "--network-set", type=_setting, nargs="+", default=[], metavar="NAME=VALUE", help="its arguments"
    )
    group.add_argument("--crop", type=int, help="side of training crops; by default from the images")
    group.add_argument(
        "--any-orientation", action="store_true", help="images have no up and down: turn and flip them in training"
    )
    config = Training().config(crop=1)
    for name, text in (
        ("steps", "of every training"),
        ("batch_size", "labeled images of a step, beside as many unlabeled ones"),
        ("seed", "of all random numbers"),
        ("num_workers", "processes that read images"),
        ("eval_every", "steps between validations"),
    ):
        shown = "" if getattr(config, name) is None else " (%(default)s)"
        group.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(config, name), help=text + shown)
    group.add_argument(
        "--lr",
        type=float,
        help="of the encoder: 0.0003, and ten times that for the rest; 0.001 for all without pretrained weights",
    )
    group.add_argument("--head-lr-factor", type=float, help="learning rate of the rest, as a multiple of --lr")
    group.add_argument("--precision", choices=("auto", "fp32", "bf16"), default=config.precision, help=_PRECISION)


def _folders(args: argparse.Namespace) -> Folders:
    given = {each.name: getattr(args, each.name) for each in fields(Folders)}
    mode = None if args.mode == "any" else args.mode
    class_map = None if args.class_map is None else dict(args.class_map)
    value_range = None if args.value_range is None else tuple(args.value_range)
    classes: Any = args.classes
    if classes is not None and len(classes) == 1 and classes[0].isdecimal():
        classes = int(classes[0])
    return Folders(**{**given, "classes": classes, "mode": mode, "class_map": class_map, "value_range": value_range})


def _training(args: argparse.Namespace) -> Training:
    names = ("steps", "batch_size", "seed", "num_workers", "eval_every", "precision", "lr", "head_lr_factor")
    return Training(
        method=args.method,
        method_settings=dict(args.set),
        network=args.network,
        encoder=args.encoder,
        weights=None if args.weights == "none" else args.weights,
        network_options=dict(args.network_set),
        crop=args.crop,
        any_orientation=args.any_orientation,
        settings={name: getattr(args, name) for name in names if getattr(args, name) is not None},
    )


def _check_out(out: Path) -> None:
    """Raise an error before anything is read if nothing can be written there."""
    place = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        why = "a file" if not place.is_dir() else "read-only"
        raise OSError(f"{out} cannot be written: {place} is {why}; choose another --out")


def _say(text: object, file: TextIO | None = None) -> None:
    """Print in the first process."""
    if rank() == 0:
        print(text, file=file)


def _pair(text: str) -> tuple[Any, int]:
    value, colon, to = text.rpartition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f"{text!r}; expected VALUE:CLASS, such as 255:1")
    try:
        key: Any = tuple(int(part) for part in value.split(",")) if "," in value else int(value)
        return key, int(to)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected integers, such as 255:1 or 128,0,0:1") from None


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r}; expected NAME=VALUE, such as threshold=0.9")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _share(text: str) -> int | float:
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a number, such as 20, or a share, such as 0.2") from None


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected integers, such as 0 255") from None


def _integer_or_none(text: str) -> int | None:
    try:
        return None if text == "none" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected an integer, such as 255, or none") from None


class _Flat(argparse.Action):
    """Takes ``0 255`` and ``0,255``."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, [value for part in values for value in part])


if __name__ == "__main__":
    sys.exit(main())
