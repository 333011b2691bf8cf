"""The pages of the documentation and the README: their code runs, and the reference is complete."""

from __future__ import annotations

import doctest
import importlib
import inspect
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import stseg
from stseg.command import main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [path for path in (ROOT / "README.md", *sorted(DOCS.rglob("*.md"))) if path.exists()]
NEEDS = re.compile(r"^<!-- needs: (\w+) -->$", re.M)
NOT_INSTALLED = ("lightning", "transformers")  # pages that need one of these run where it is
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>python|pycon)\b[^\n]*\n(?P<code>.*?)^(?P=indent)```", re.M | re.S)


def blocks(page: Path) -> list[tuple[int, str, str]]:
    """Line, language and code of the blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        (text[: match.start("code")].count("\n") + 1, match["language"], textwrap.dedent(match["code"]))
        for match in FENCE.finditer(text)
    ]


def run_session(code: str, names: dict[str, Any], where: str) -> None:
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    test = doctest.DocTestParser().get_doctest(code, names, where, where, 0)
    report: list[str] = []
    doctest.DocTestRunner(optionflags=options, verbose=False).run(test, out=report.append, clear_globs=False)
    assert not report, "".join(report)
    names.update(test.globs)


def write_binary_data() -> None:
    """Write what the ten lines of the README read: images, masks of 0 and 255 for some of them, held-out pairs."""
    for folder, count, labeled in (("", 24, 6), ("test", 4, 4)):
        for index in range(count):
            mask = np.zeros((72, 80), dtype=np.uint8)
            mask[index % 9 * 4 :][:30, 10:50] = 255
            for kind in ("images", "masks") if index < labeled else ("images",):
                (Path(folder) / kind).mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask).save(Path(folder) / kind / f"{index:03d}.png")


@pytest.fixture(autouse=True)
def log_as_before() -> Iterator[None]:
    """Pages set the level of the log and give it handlers."""
    log = logging.getLogger("stseg")
    level, handlers = log.level, log.handlers[:]
    yield
    log.setLevel(level)
    log.handlers[:] = handlers


COMMANDS = re.compile(r"^stseg .*", re.M)
SMALL = "--network FPN --encoder tu-test_resnet --weights none --crop 32 --batch-size 2 --steps 3 --quiet"


@pytest.mark.parametrize(
    "name", ["README.md", "docs/index.md", "docs/guides/command-line.md", "docs/recipes/binary.md"]
)
def test_commands_of_a_page_run_in_order(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small network in place of the one that would be downloaded."""
    monkeypatch.chdir(tmp_path)
    write_binary_data()
    Path("images").joinpath("000.png").rename(Path("new.png"))
    Path("masks/000.png").unlink()
    Path("new").mkdir()
    Path("new.png").rename("new/000.png")
    lines = COMMANDS.findall((ROOT / name).read_text(encoding="utf-8").replace("\\\n", " "))
    assert lines
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        small = SMALL.split() if words[0] in ("check", "train") else ["--quiet"]
        # The first check of the page stops at masks of 0 and 255.
        expected = 1 if words[0] == "check" and "--class-map" not in words else 0
        assert main([*words, *small]) == expected, line
    assert {int(value) for value in np.unique(np.array(Image.open("predicted/000.png")))} <= {0, 255}


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_code_of_a_page_runs_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in NEEDS.findall(page.read_text(encoding="utf-8")):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    if page.name in ("README.md", "command-line.md"):
        write_binary_data()
    names: dict[str, Any] = {"__name__": "page"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for line, language, code in blocks(page):
            where = f"{page.name}, line {line}"
            if language == "pycon":
                run_session(code, names, where)
            else:
                exec(compile(code, where, "exec"), names)


MANY_GPUS = DOCS / "recipes" / "many-gpus.md"


def test_two_processes_run_the_program_of_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("".join(code for _, _, code in blocks(MANY_GPUS)), encoding="utf-8")
    (line,) = re.findall(r'^CUDA_VISIBLE_DEVICES="" torchrun (.*)', MANY_GPUS.read_text(encoding="utf-8"), re.M)
    command = [sys.executable, "-m", "torch.distributed.run", *shlex.split(line)]
    python_path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": python_path}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert stseg.predict_mask(stseg.load(tmp_path / "runs/many"), torch.rand(3, 32, 32)).shape == (32, 32)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_script_of_a_recipe_is_one_for_bash() -> None:
    text = MANY_GPUS.read_text(encoding="utf-8")
    script = text[text.index("#!/bin/bash") :].partition("```")[0]
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_pages_are_skipped_for_known_packages_alone() -> None:
    declared = {path.name: NEEDS.findall(path.read_text(encoding="utf-8")) for path in PAGES}
    assert {name: needs for name, needs in declared.items() if not set(needs) <= {*NOT_INSTALLED}} == {}


@pytest.mark.parametrize("folder", ["guides", "recipes"])
def test_every_guide_and_recipe_has_code(folder: str) -> None:
    pages = list((DOCS / folder).glob("*.md"))
    assert pages
    assert not [path.name for path in pages if not blocks(path)]


def public_names() -> set[str]:
    functions = inspect.getmembers(stseg.functional, inspect.isfunction)
    own = [name for name, f in functions if f.__module__ == "stseg.functional" and not name.startswith("_")]
    modules = {"stseg": stseg.__all__}
    modules |= {module.__name__: module.__all__ for module in (stseg.data, stseg.models, stseg.modules, stseg.loggers)}
    return {f"{module}.{name}" for module, names in {**modules, "stseg.functional": own}.items() for name in names}


def test_the_reference_is_complete() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in (DOCS / "reference").glob("*.md"))
    documented = set(re.findall(r"^::: (\S+)$", text, re.M)) | set(re.findall(r"`(stseg\.\w+)`", text))
    # A name that two modules share is documented once.
    objects = {id(resolved(name)) for name in documented if not inspect.ismodule(resolved(name))}
    missing = {name for name in public_names() - documented if id(resolved(name)) not in objects}
    assert not missing
    assert all(resolved(name) is not None for name in documented)


def resolved(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    if not module:
        return importlib.import_module(name)
    parent = importlib.import_module(module)
    return getattr(parent, attribute)


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    missing = [name for path in DOCS.rglob("*.md") if (name := path.relative_to(DOCS).as_posix()) not in navigation]
    assert not missing


def test_pictures_are_there() -> None:
    for page in DOCS.rglob("*.md"):
        for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).is_file(), f"{page.name}: {target}"
