"""Losses of two processes that have different numbers of pixels. This file is also the program that they run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from stseg.functional import (
    adversarial_loss,
    confident_share,
    consistency_loss,
    cross_entropy,
    entropy,
    ohem_cross_entropy,
    squared_difference,
    sure_share,
)


def losses(logits: torch.Tensor, masks: torch.Tensor) -> dict[str, torch.Tensor]:
    where = masks != 255
    confidence = logits.softmax(1).amax(1).detach()
    return {
        "cross-entropy": cross_entropy(logits, masks),
        "weighted": cross_entropy(logits, masks, weight=torch.tensor(0.5)),
        "hard pixels": ohem_cross_entropy(logits, masks, min_kept=1),
        "difference": squared_difference(logits, F.one_hot(masks % 3, 3).movedim(-1, 1).float(), where=where),
        "entropy": entropy(logits),
        "adversarial": adversarial_loss(logits[:, :1], real=True, where=where),
        "consistency": consistency_loss(logits, torch.where(masks == 2, 3, masks)),
        "confident": confident_share(confidence, threshold=0.5, where=where),
        "share": sure_share(torch.where(masks == 2, 3, masks), 3),
    }


def run(folder: Path, number: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=number, world_size=2)
    logits, masks = torch.load(folder / "data.pt")
    logits = logits[number::2].requires_grad_()
    found = losses(logits, masks[number::2])
    sum(found.values()).backward()
    values = {name: float(value) for name, value in found.items()}
    (folder / f"{number}.json").write_text(json.dumps({"values": values, "gradient": logits.grad.tolist()}))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_the_losses_and_gradients_of_one(tmp_path):
    torch.manual_seed(0)
    logits, masks = torch.randn(4, 3, 5, 6), torch.randint(3, (4, 5, 6))
    masks[0], masks[1, :2] = 255, 255
    torch.save((logits, masks), tmp_path / "data.pt")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    started = [
        subprocess.Popen([sys.executable, __file__, str(tmp_path), str(number)], env=environment) for number in (0, 1)
    ]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    one, two = (json.loads((tmp_path / f"{number}.json").read_text()) for number in (0, 1))
    logits.requires_grad_()
    wanted = losses(logits, masks)
    sum(wanted.values()).backward()
    for name, value in wanted.items():
        assert (one["values"][name] + two["values"][name]) / 2 == pytest.approx(float(value.detach()), rel=1e-5), name
    # Each process has the gradient of its own rows, times the two by which DistributedDataParallel divides.
    for process, found in enumerate((one, two)):
        torch.testing.assert_close(torch.tensor(found["gradient"]) / 2, logits.grad[process::2])


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]))
