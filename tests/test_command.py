"""Console command, from two folders to predicted masks."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest
from folders import picture, save, write_folders
from PIL import Image

import stseg
from stseg.command import main

NETWORK = ["--network", "FPN", "--encoder", "tu-test_resnet", "--weights", "none", "--crop", "32", "--quiet"]
NETWORK += ["--steps", "3", "--batch-size", "2"]


@pytest.fixture
def root(tmp_path):
    return write_folders(tmp_path)


def data(root, *more: str) -> list[str]:
    return ["--images", str(root / "images"), "--masks", str(root / "masks"), *more]


MAP = ["--class-map", "0:0", "255:1"]


def run(*arguments) -> int:
    return main([str(each) for each in arguments])


@pytest.fixture
def finished(root):
    assert run("train", *data(root, *MAP), "--val", 1, *NETWORK, "--out", root / "run") == 0
    return root / "run"


def test_from_two_folders_to_masks(root, finished, capsys):
    save(picture(70, (33, 50)), root / "new/deep/a.png")
    save(picture(71), root / "new/b.png")
    Image.fromarray(picture(72)).save(root / "new/c.jpg")
    assert run("predict", "--run", finished, "--images", root / "new", "--out", root / "masked", "--quiet") == 0
    assert "3 masks of the values 0, 255" in capsys.readouterr().out
    files = sorted(p.relative_to(root / "masked").as_posix() for p in (root / "masked").rglob("*") if p.is_file())
    assert files == ["b.png", "c.png", "deep/a.png"]
    model = stseg.load(finished)
    mask = np.array(Image.open(root / "masked/deep/a.png"))
    image = stseg.data.SegmentationFolder(root / "new", ids=["deep/a"])[0]
    expected = model(image[None]).argmax(1)[0].numpy() * 255
    assert mask.shape == (33, 50)
    assert (mask == expected).all()


@pytest.mark.parametrize(
    ("given", "values"), [(["--values", "7", "9"], {7, 9}), (["--values", "7,9"], {7, 9}), (["--classes"], {0, 1})]
)
def test_values_of_predicted_masks(root, finished, given, values):
    out = root / "masked"
    assert run("predict", "--run", finished, "--images", root / "images", "--out", out, *given, "--quiet") == 0
    found = {int(value) for path in out.iterdir() for value in np.unique(np.array(Image.open(path)))}
    assert found <= values


def test_the_training_prints_where_results_are(root, capsys):
    assert run("train", *data(root, *MAP), "--val", 1, *NETWORK, "--out", root / "run") == 0
    text = capsys.readouterr().out
    assert "mIoU on 1 validation images: " in text
    assert f"stseg predict --run {root / 'run'}" in text
    assert (root / "run/report.html").exists()


def test_masks_of_0_and_255_stop_the_training_with_the_line_to_write(root, capsys):
    assert run("train", *data(root), *NETWORK, "--out", root / "run") == 1
    assert "is it --class-map 0:0 255:1?" in capsys.readouterr().out
    assert not (root / "run").exists()


def test_masks_of_classes_need_no_option(tmp_path):
    root = write_folders(tmp_path, values=(0, 1))
    assert run("train", *data(root), "--method", "mean-teacher", *NETWORK, "--out", root / "run") == 0
    assert run("predict", "--run", root / "run", "--images", root / "images", "--out", root / "masked", "--quiet") == 0


def test_a_check(root, capsys):
    assert run("check", *data(root), "--quick", "--quiet") == 1
    assert "--class-map 0:0 255:1" in capsys.readouterr().out
    assert run("check", *data(root, *MAP), *NETWORK) == 0
    text = capsys.readouterr().out
    assert "4 labeled, 6 unlabeled" in text
    assert "training     about" in text


def test_settings_of_method_and_network(root):
    given = ["--method", "cps", "--set", "weight=2", "--network-set", "decoder_pyramid_channels=16"]
    assert run("train", *data(root, *MAP), *NETWORK, *given, "--out", root / "run") == 0
    settings = (root / "run/run.json").read_text()
    assert '"weight": 2' in settings
    assert stseg.load(root / "run").network.decoder.p2.skip_conv.out_channels == 16


def test_reports(root, finished, capsys):
    before = (finished / "report.html").read_bytes()
    assert run("report", finished) == 0
    assert capsys.readouterr().out.strip() == str(finished / "report.html")
    assert len(before) > 1000
    assert run("train", *data(root, *MAP), *NETWORK, "--seed", 1, "--out", root / "second") == 0
    capsys.readouterr()
    assert run("report", finished, root / "second", "--out", root / "both.html") == 0
    assert "second" in (root / "both.html").read_text()


def test_a_run_under_way_gets_a_page_in_its_folder(root, finished, monkeypatch, capsys):
    monkeypatch.chdir(root)
    (finished / "report.html").unlink()
    assert run("report", finished) == 0
    assert capsys.readouterr().out.strip() == str(finished / "progress.html")
    assert not (root / "comparison.html").exists()


def test_problems_are_told_in_the_words_of_the_command(root, capsys):
    for path in (root / "masks").iterdir():
        path.rename(path.with_name(f"{path.stem}_mask.png"))
    assert run("check", *data(root, *MAP), "--quick", "--quiet") == 1
    found = capsys.readouterr()
    assert "--mask-suffix _mask" in found.out + found.err
    assert run("check", *data(root, *MAP), "--mask-suffix", "_mask", "--quick", "--quiet") == 0


def test_a_run_that_goes_on_says_so(root, finished, capsys):
    capsys.readouterr()
    assert run("train", *data(root, *MAP), "--val", 1, *NETWORK, "--out", root / "run") == 0
    assert capsys.readouterr().out.startswith(f"the run in {root / 'run'} goes on")


def test_tiles_below_the_stride_are_refused(root, finished, capsys):
    arguments = ["--run", finished, "--images", root / "images", "--out", root / "masked", "--tile", 7]
    assert run("predict", *arguments) == 2
    assert "the size of a tile is 7; expected at least 32, the stride" in capsys.readouterr().err


def test_an_export(root, finished):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert run("export", "--run", finished, "--out", root / "mask.onnx", "--output", "mask") == 0
    assert [each.name for each in runtime.InferenceSession(str(root / "mask.onnx")).get_outputs()] == ["mask"]
    assert run("export", "--run", finished, "--out", root / "model.onnx") == 0
    session = runtime.InferenceSession(str(root / "model.onnx"))
    images = np.random.default_rng(0).random((1, 3, 45, 71), dtype=np.float32)
    (logits,) = session.run(None, {session.get_inputs()[0].name: images})
    assert logits.shape[-2:] == (45, 71)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["predict", "--run", "nowhere", "--images", "images", "--out", "o"], 1, "nowhere is not a work directory"),
        (["report", "nowhere"], 1, "nowhere"),
        (["check", "--images", "nowhere", "--masks", "nowhere"], 1, "there is no folder nowhere"),
        (["train", "--images", "images", "--masks", "masks", "--network", "Unett", "--weights", "none", *MAP,
          "--out", "run"], 2, "network is 'Unett'; expected one of .*Unet"),
        (["train", "--images", "images", "--masks", "masks", "--set", "thresold=1", *MAP, "--weights", "none",
          "--out", "run"], 2, "'fixmatch' has no setting 'thresold'"),
        (["train", "--images", "images", "--masks", "masks", "--val", "3", "--val-images", "x", "--val-masks", "y",
          "--out", "run"], 2, "val and val_images are both given"),
        (["train", "--images", "images", "--masks", "masks", "--method", "unimatchh", "--out", "run"], 2,
          "--method is 'unimatchh'; expected .*; did you mean 'unimatch'[?]$"),
        (["train", "--images", "images", "--masks", "masks", "--encoder", "resnet3", "--out", "run"], 2,
          "--encoder is 'resnet3'; expected an encoder of .* did you mean 'resnet.*'[?]$"),
        (["train", "--images", "images", "--masks", "masks", "--encoder", "tu-resnet3", "--out", "run"], 2,
          "--encoder is 'tu-resnet3'; expected an encoder of timm.* did you mean 'tu-resnet.*'[?]$"),
        (["train", "--images", "images", "--masks", "masks", "--steps", "0", "--out", "run"], 2, ": --steps is 0"),
        (["train", "--images", "images", "--masks", "masks", "--out", "images/00.png"], 1,
          "cannot be written: .*00.png is a file; choose another --out"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(root, monkeypatch, capsys, arguments, status, message):
    monkeypatch.chdir(root)
    assert main([*arguments, "--quiet"]) == status
    text = capsys.readouterr().err.strip().split("\n")[-1]
    assert text.startswith(f"stseg {arguments[0]}: ")
    assert re.search(message, text)


@pytest.mark.parametrize("arguments", [[], ["--help"], *([name, "--help"] for name in ("check", "train", "predict"))])
def test_help(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == (0 if arguments else 2)


@pytest.mark.parametrize("option", ["--values", "--val", "--unmapped", "--class-map"])
def test_values_that_are_no_numbers_are_named(root, option, capsys):
    command = "predict" if option == "--values" else "check"
    with pytest.raises(SystemExit):
        main([command, option, "0,x:1"])
    text = capsys.readouterr().err
    assert text.startswith(f"stseg {command}: argument {option}: '0,x:1'; expected ")
    assert text.count("\n") == 2


@pytest.mark.parametrize("text", ["255", "x:1", "1:x"])
def test_class_maps_that_make_no_sense(root, text, capsys):
    with pytest.raises(SystemExit):
        main(["check", *data(root, "--class-map", text)])
    assert "--class-map" in capsys.readouterr().err


@pytest.mark.slow
def test_the_module_runs():
    ran = subprocess.run([sys.executable, "-m", "stseg", "--version"], capture_output=True, text=True)
    assert ran.stdout.strip() == f"stseg {stseg.__version__}"
