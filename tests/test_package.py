"""The package as it is installed: what a wheel holds, what an import does, what is documented."""

from __future__ import annotations

import ast
import importlib
import inspect
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import stseg
from stseg import augment

ROOT = Path(__file__).parents[1]
PUBLIC = [
    *(getattr(stseg, name) for name in stseg.__all__),
    *(
        getattr(module, name)
        for module in (stseg.data, stseg.models, stseg.functional, stseg.methods, stseg.modules, augment, stseg.loggers)
        for name in module.__all__
    ),
]


@pytest.mark.slow
def test_a_wheel_holds_the_package_and_the_source_distribution_all_that_tests_read(tmp_path):
    # Of a copy: what earlier builds left in the folder would go into the wheel.
    left = shutil.ignore_patterns(".git", ".venv*", "build", "dist", "*.egg-info", "runs", "demo", "site", ".*_cache")
    tree = shutil.copytree(ROOT, tmp_path / "tree", ignore=left)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(tree)]
    built = subprocess.run(command, capture_output=True, text=True)  # the wheel, out of the source distribution
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,), (source,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")} <= files
    assert {"CHANGELOG.md", "CITATION.cff", "LICENSE", "Makefile", "README.md", "mkdocs.yml", "setup.cfg"} <= files
    assert {"docs/index.md", "docs/images/demo.png", "tools/smoke.py", ".github/workflows/release.yml"} <= files
    assert not [name for name in files if name.endswith(".pyc") or "__pycache__" in name]
    names = set(zipfile.ZipFile(wheel).namelist())
    information = f"stseg-{stseg.__version__}.dist-info/"
    code = {path.relative_to(ROOT).as_posix() for path in (ROOT / "stseg").rglob("*.py")}
    assert {name for name in names if not name.startswith(information)} == code | {"stseg/py.typed"}
    assert any(name.endswith("LICENSE") for name in names)
    metadata = zipfile.ZipFile(wheel).read(information + "METADATA").decode()
    assert "Requires-Python: >=3.10" in metadata
    assert "# stseg" in metadata  # the README


IMPORT = """
import random, sys, logging, warnings
import numpy as np, torch
before = torch.get_rng_state(), np.random.get_state()[1].tobytes(), random.getstate(), torch.get_num_threads()
handlers, dtype, filters = list(logging.root.handlers), torch.get_default_dtype(), None
import torchvision, kornia
filters, threads = list(warnings.filters), torch.get_num_threads()
import stseg
assert torch.equal(before[0], torch.get_rng_state()), "torch random state"
assert before[1:3] == (np.random.get_state()[1].tobytes(), random.getstate()), "random state"
assert threads == torch.get_num_threads() and handlers == logging.root.handlers and dtype == torch.get_default_dtype()
assert torch.is_grad_enabled() and not torch.distributed.is_initialized() and not torch.cuda.is_initialized()
heavy = {"matplotlib", "segmentation_models_pytorch", "transformers", "scipy"} & set(sys.modules)
print(sorted(heavy))
"""


def test_an_import_has_no_side_effects(tmp_path):
    ran = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    assert "matplotlib" not in ran.stdout
    assert "segmentation_models_pytorch" not in ran.stdout
    assert list(tmp_path.iterdir()) == []


def test_every_public_name_is_there_and_documented():
    for name in stseg.__all__:
        assert hasattr(stseg, name), name
    for thing in PUBLIC:
        if inspect.isclass(thing) or inspect.isfunction(thing) or inspect.ismodule(thing):
            assert inspect.getdoc(thing), thing


def test_every_public_class_and_function_shows_an_example():
    without = [
        thing.__name__
        for thing in PUBLIC
        if (inspect.isclass(thing) or inspect.isfunction(thing))
        and thing.__module__.startswith("stseg")
        and not thing.__name__.startswith("_")
        and not (inspect.isclass(thing) and issubclass(thing, Exception))
        and ">>>" not in (inspect.getdoc(thing) or "")
    ]
    # What stands in the example of the function or class that makes or takes it.
    made = {"FitResult", "SelfTrainingResult", "Skipped", "PseudoLabels", "PseudoLabeled", "Batch"}
    made |= {"Losses", "StrongParameters", "FolderCheck", "Estimate"}
    assert set(without) <= made


def not_public(folder: str) -> list[str]:
    """What the files of a folder import from the package that is not in the ``__all__`` of a public module."""
    faces = (
        "stseg",
        *(f"stseg.{name}" for name in ("methods", "functional", "data", "models", "modules", "augment", "loggers")),
    )
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            imports = []
            if isinstance(node, ast.Import):
                imports = [(alias.name, None) for alias in node.names if alias.name.split(".")[0] == "stseg"]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "stseg":
                imports = [(node.module, alias.name) for alias in node.names]
            for module, name in imports:
                if module not in faces or (name and name not in importlib.import_module(module).__all__):
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {module}.{name}")
    return found


@pytest.mark.parametrize("folder", ["examples", "benchmarks"])
def test_what_is_outside_the_package_uses_public_names_alone(folder):
    assert list((ROOT / folder).rglob("*.py"))
    assert not_public(folder) == []


def test_every_public_module_says_what_is_public():
    for name in ("methods", "functional", "data", "models", "modules", "augment", "loggers"):
        module = importlib.import_module(f"stseg.{name}")
        assert sorted(module.__all__, key=str.lower) == sorted(set(module.__all__), key=str.lower)
        for each in module.__all__:
            assert hasattr(module, each), each


def test_the_citation_names_the_version_and_the_paper():
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()  # what its format requires
    assert (citation["type"], citation["license"]) == ("software", "MIT")
    assert citation["version"] == stseg.__version__
    assert citation["authors"] == [{"name": "The stseg authors"}]
    (paper,) = citation["references"]
    assert paper["title"].startswith("ST++: Make Self-training Work Better")
    assert [author["family-names"] for author in paper["authors"]] == ["Yang", "Zhuo", "Qi", "Shi", "Gao"]
    assert paper["year"] == 2022


def test_a_release_is_built_checked_and_published_in_this_order():
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8"))
    jobs = workflow["jobs"]
    assert workflow[True] == {"push": {"tags": ["v*"]}}  # YAML 1.1 reads the key "on" as true
    assert (jobs["check"]["needs"], jobs["publish"]["needs"]) == ("build", "check")
    assert workflow["permissions"] == {"contents": "read"}
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert jobs["check"]["strategy"]["matrix"]["kind"] == ["lowest", "newest"]


def test_every_required_package_has_a_lower_bound(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    pins = importlib.import_module("check_release").lower_bounds(ROOT / "setup.cfg")
    assert {"torch==2.4", "timm==1.0.10", "safetensors==0.4.3", "matplotlib==3.7"} <= set(pins)
    assert len(pins) == 11


def test_types_ship():
    assert (Path(stseg.__file__).parent / "py.typed").exists()
