"""Data that several test files use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

from stseg.data import SyntheticScenes

# The same examples in every run; with --hypothesis-profile=default it looks for others.
settings.register_profile("same", derandomize=True)
settings.load_profile("same")


@pytest.fixture(scope="session", autouse=True)
def auto_is_float32() -> Iterator[None]:
    """Tests compare numbers: on any hardware ``precision="auto"`` is ``"fp32"`` in them, unless they patch it.

    Programs that tests start say ``precision="fp32"`` where their numbers are compared.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stseg.models.precision.computes_bfloat16", lambda device: False)
        yield


@pytest.fixture
def camvid_like(tmp_path: Path) -> Path:
    """A folder laid out as CamVid, with drawn scenes."""
    scenes = SyntheticScenes(12, size=(48, 64), seed=3)
    for index, (image, mask) in enumerate(scenes):
        part = tmp_path / "camvid" / ("train" if index < 8 else "val")
        for kind, pixels in (("images", image.permute(1, 2, 0)), ("masks", mask)):
            (part / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.asarray(pixels)).save(part / kind / f"{index:03d}.png")
    split = tmp_path / "camvid" / "splits" / "1_8" / "seed_0"
    split.mkdir(parents=True)
    (split / "labeled.txt").write_text("000\n001\n")
    (split / "unlabeled.txt").write_text("".join(f"{i:03d}\n" for i in range(2, 8)))
    return tmp_path / "camvid"
