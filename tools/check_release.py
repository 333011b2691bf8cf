"""Check what would be published: install it in fresh environments, with the lowest and the newest dependencies.

    python tools/check_release.py            # both
    python tools/check_release.py lowest     # the lower bounds of setup.cfg, from the wheel
    python tools/check_release.py newest     # the newest releases, from the source distribution

Each environment takes about 6 GB and some minutes, below the folder of temporary files ($TMPDIR), and is removed
afterwards. ``lowest`` needs a Python that those releases have wheels for: 3.10 or 3.11.
"""

from __future__ import annotations

import argparse
import configparser
import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ["pytest", "hypothesis", "scipy", "opencv-python-headless"]  # what the tests need beside stseg[report]
TESTS = ["data", "functional", "models", "augment", "modules", "storage", "engine", "inference"]


def main() -> None:
    """Check the kinds of environments that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="lowest|newest", help="default: both")
    kinds = parser.parse_args().kinds or ["lowest", "newest"]
    if unknown := [kind for kind in kinds if kind not in ("lowest", "newest")]:
        parser.error(f"{unknown[0]!r} is neither 'lowest' nor 'newest'")
    with tempfile.TemporaryDirectory(prefix="stseg-release-") as folder:
        tree, temporary = Path(folder) / "tree", Path(folder)
        copy_tree(tree)
        run(sys.executable, "-m", "build", "--outdir", str(temporary / "dist"), str(tree), show=False)
        (source,), (wheel,) = (temporary / "dist").glob("*.tar.gz"), (temporary / "dist").glob("*.whl")
        for kind in kinds:
            check(kind, wheel if kind == "lowest" else source, tree, temporary)


def copy_tree(tree: Path) -> None:
    """Copy the files under version control: what changes meanwhile is not checked in part."""
    for name in run("git", "ls-files", "-z", cwd=ROOT, show=False).split("\0"):
        if name and (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())


def check(kind: str, package: Path, tree: Path, folder: Path) -> None:
    """Install the package in an environment of its own, use it, and run tests against it."""
    print(f"== {kind}: {package.name} on Python {sys.version.split()[0]}", flush=True)
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(lower_bounds(tree / "setup.cfg")) if kind == "lowest" else "")
    with tempfile.TemporaryDirectory(prefix=f"{kind}-", dir=folder) as environment:
        venv.create(environment, with_pip=True)
        python = str(Path(environment) / "bin" / "python")
        install = (python, "-m", "pip", "install", "--quiet", "--no-cache-dir", "--constraint", str(constraints))
        run(*install, str(package))
        run(python, "-m", "pip", "check")
        run(python, "-I", str(tree / "tools" / "smoke.py"), cwd=folder)
        run(*install, f"{package}[report]", *TOOLS)
        suite = Path(environment) / "suite"
        copy_tests(tree, suite)
        tests = [f"tests/{name}" for name in TESTS]
        run(python, "-m", "pytest", "-m", "not slow", "-p", "no:cacheprovider", *tests, cwd=suite)


def lower_bounds(setup: Path) -> list[str]:
    """Return the dependencies of the package and of its extra ``report``, each pinned to its lower bound.

    Raises:
        ValueError: if one has no lower bound.
    """
    options = configparser.ConfigParser()
    options.read(setup)
    listed = options["options"]["install_requires"] + options["options.extras_require"]["report"]
    pins = []
    for line in filter(None, (line.split("#")[0].strip() for line in listed.splitlines())):
        found = re.fullmatch(r"([A-Za-z0-9._-]+)>=([0-9.]+)(,.*)?", line)
        if found is None:
            raise ValueError(f"{setup}: {line!r} has no lower bound; expected name>=version")
        pins.append(f"{found[1]}=={found[2]}")
    return pins


def copy_tests(tree: Path, suite: Path) -> None:
    """Copy the tests and their settings to where the package is not, so that they import the installed one."""
    for path in [tree / "setup.cfg", *(tree / "tests").rglob("*.py")]:
        to = suite / path.relative_to(tree)
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(path.read_bytes())


def run(*command: str, cwd: Path | None = None, show: bool = True) -> str:
    """Run a command; end this program if it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1"}
    if show:
        print("$", " ".join(command), flush=True)
    done = subprocess.run(command, cwd=cwd, env=environment, text=True, stdout=None if show else subprocess.PIPE)
    if done.returncode:
        sys.exit(f"{done.stdout or ''}\n{command[0]} ended with {done.returncode}: {' '.join(command)}")
    return done.stdout or ""


if __name__ == "__main__":
    main()
