"""Two processes train as one by every method. This file is also the program that they run."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))

import test_adv_ssl
import test_cct
import test_class_mix
import test_cps
import test_cutmix_seg
import test_dcc
import test_ecs
import test_fixmatch
import test_gct
import test_mean_teacher
import test_s4gan
import test_s4l
import test_supervised
import test_u2pl
import test_unimatch
import test_unimatch_v2
from tester import config, images, pairs

import stseg

TESTERS = [
    test_supervised.TestSupervised,
    test_fixmatch.TestFixMatch,
    test_unimatch.TestUniMatch,
    test_mean_teacher.TestMeanTeacher,
    test_cps.TestCPS,
    test_cps.TestCPSWithCutMix,
    test_adv_ssl.TestAdvSSL,
    test_cutmix_seg.TestCutMixSeg,
    test_class_mix.TestClassMix,
    test_unimatch_v2.TestUniMatchV2,
    test_s4l.TestS4L,
    test_s4gan.TestS4GAN,
    test_ecs.TestECS,
    test_gct.TestGCT,
    test_cct.TestCCT,
    test_dcc.TestDCC,
    test_u2pl.TestU2PL,
]


def run(out: Path) -> None:
    for tester in TESTERS:
        method = tester().plain()
        unlabeled = images(6, seed=1) if method.uses_unlabeled else None
        settings = config(steps=8, batch_size=4, lr=0.05, sync_batchnorm=True, precision="fp32")
        stseg.fit(
            method,
            pairs(6),
            settings,
            unlabeled=unlabeled,
            val=pairs(3, seed=2),
            workdir=out / tester.__name__,
            progress=False,
        )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    alone, two = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "OMP_NUM_THREADS": "1"}
    group = {**shared, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    command = [sys.executable, __file__]
    processes = [subprocess.Popen([*command, str(alone)], env=shared)]
    processes += [subprocess.Popen([*command, str(two)], env={**group, "RANK": r, "LOCAL_RANK": r}) for r in "01"]
    assert [process.wait(timeout=240) for process in processes] == [0, 0, 0]
    return alone, two


@pytest.mark.slow
@pytest.mark.parametrize("tester", TESTERS)
def test_two_processes_come_to_the_weights_of_one(folders, tester):
    alone, two = (load_file(folder / tester.__name__ / "model.safetensors") for folder in folders)
    start = tester().plain().model.network.state_dict()
    for name, value in alone.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)
        assert not torch.equal(value, start[name])


if __name__ == "__main__":
    run(Path(sys.argv[1]))
