"""Quickstart over several seeds, with a lower and an upper bound.

    python benchmarks/demo_seeds.py --out runs/demo_seeds

In addition to supervised training, FixMatch and ST++ as in ``examples/quickstart.py``, each seed trains a supervised
network for three times as many steps, the total of ST++, and one with the masks of all scenes. A killed run resumes
when the same command is given again. With ``--page``, the table also replaces what is between the ``demo-table`` marks
of the page.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch
from pages import put
from timing import conditions
from torch.utils.data import Subset

import stseg
from stseg.data import SyntheticScenes

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import quickstart

ROWS = {
    "supervised": "supervised, 20 masks",
    "long": "supervised, 20 masks, three times the steps",
    "FixMatch": "FixMatch, 20 masks and 400 images",
    "ST++": "ST++, 20 masks and 400 images",
    "all": "supervised, all 420 masks",
}


def scores(steps: int, seed: int, out: Path) -> dict[str, float]:
    """Compute the held-out mIoU of each row of the table, in percent."""
    results = quickstart.run(steps, seed, out)
    scenes = quickstart.scenes(seed)
    few = Subset(scenes, range(quickstart.LABELED))
    config = quickstart.settings(steps, seed)
    for name, data, settings in (("long", few, replace(config, steps=3 * steps)), ("all", scenes, config)):
        trainer = stseg.SelfTrainer(
            quickstart.make_network,
            num_classes=len(quickstart.CLASSES),
            config=settings,
            method="supervised",
            workdir=out / name,
        )
        results[name] = trainer.fit(data)
    held_out = SyntheticScenes(quickstart.HELD_OUT, size=quickstart.SIZE, seed=quickstart.HELD_OUT_SEED)
    return {
        name: 100
        * stseg.evaluate(result.model, held_out, num_classes=len(quickstart.CLASSES), progress=False).compute()
        for name, result in results.items()
    }


def table(found: list[dict[str, float]], steps: int) -> str:
    """Format a Markdown table: each seed, mean and standard deviation, and the conditions."""
    lines = ["| mIoU on held-out scenes, % | " + " | ".join(f"seed {i}" for i in range(len(found))) + " | mean |"]
    lines.append("|---|" + "---:|" * (len(found) + 1))
    for name, title in ROWS.items():
        values = [score[name] for score in found]
        mean = f"**{statistics.mean(values):.1f}** ± {statistics.stdev(values):.1f}"
        lines.append(f"| {title} | " + " | ".join(f"{value:.1f}" for value in values) + f" | {mean} |")
    gains = {name: sum(score[name] > score["supervised"] for score in found) for name in ("FixMatch", "ST++")}
    lines += [
        "",
        f"FixMatch is above the supervised network for {gains['FixMatch']} of {len(found)} seeds, ST++ for "
        f"{gains['ST++']}. Every training took {steps} steps; ± is "
        "the standard deviation over seeds, which draw other scenes and other weights. "
        f"`benchmarks/demo_seeds.py`, {conditions()}.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run all seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="work directories of all runs")
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0")
    parser.add_argument("--steps", type=int, default=quickstart.STEPS, help="length of every training stage")
    parser.add_argument("--page", type=Path, help="Markdown page to put the table into")
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error("a mean and a deviation need two seeds or more")
    torch.set_num_threads(1)
    found = []
    for seed in range(arguments.seeds):
        found.append(scores(arguments.steps, seed, arguments.out / f"seed_{seed}"))
        print(f"seed {seed}: " + ", ".join(f"{name} {score:.1f}" for name, score in found[-1].items()), flush=True)
    text = table(found, arguments.steps)
    print(text)
    if arguments.page is not None:
        put(arguments.page, "demo-table", text)


if __name__ == "__main__":
    main()
