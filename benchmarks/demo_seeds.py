"""Is the gain of the demo real? The quickstart over several seeds, between what bounds it from below and above.

    python benchmarks/demo_seeds.py --out runs/demo_seeds

Beside supervised, ST and ST++ as in ``examples/quickstart.py``, each seed trains a supervised network for three times
as many steps, which is as long as ST++ takes in all, and one with the masks of all scenes. A run that was
killed goes on when started again. With ``--page`` the table also replaces what stands between the page's
``demo-table`` marks.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path

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
    "ST": "ST, 20 masks and 400 images",
    "ST++": "ST++, 20 masks and 400 images",
    "all": "supervised, all 420 masks",
}


def scores(steps: int, seed: int, out: Path) -> dict[str, float]:
    """Held-out mIoU of each row of the table, in per cent."""
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
    """Markdown: each seed, mean and standard deviation, and what was measured where."""
    lines = ["| mIoU on held-out scenes, % | " + " | ".join(f"seed {i}" for i in range(len(found))) + " | mean |"]
    lines.append("|---|" + "---:|" * (len(found) + 1))
    for name, title in ROWS.items():
        values = [score[name] for score in found]
        mean = f"**{statistics.mean(values):.1f}** ± {statistics.stdev(values):.1f}"
        lines.append(f"| {title} | " + " | ".join(f"{value:.1f}" for value in values) + f" | {mean} |")
    gains = sum(score["ST++"] > score["supervised"] for score in found)
    lines += [
        "",
        f"ST++ is above the supervised network for {gains} of {len(found)} seeds. Every stage took {steps} steps; ± is "
        "the standard deviation over seeds, which draw other scenes and other weights. "
        f"`benchmarks/demo_seeds.py`, {conditions()}.",
    ]
    return "\n".join(lines)


def main() -> None:
    """All seeds, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="work directories of all runs")
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0")
    parser.add_argument("--steps", type=int, default=quickstart.STEPS, help="length of every training stage")
    parser.add_argument("--page", type=Path, help="Markdown page to put the table into")
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error("a mean and a deviation need two seeds or more")
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
