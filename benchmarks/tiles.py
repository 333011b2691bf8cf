"""Memory and time of one huge image, and of a large one as a whole and by tiles, on Linux.

    python benchmarks/tiles.py --publish      a few minutes
    python benchmarks/tiles.py --side 5000

The huge image is a memory-mapped file of noise, labeled by one convolution of 1 x 1, so that what is measured is what
the package itself needs. The large one is labeled by a U-Net. Each row is a program of its own on one thread. Memory is
the highest sum of what the program allocated (RssAnon of Linux), looked at every 10 ms; pages of memory-mapped files,
which the system takes back when it needs them, are not in it. Time is that of the processor, so that other programs
change it little.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import segmentation_models_pytorch as smp
import torch
from pages import publish
from timing import conditions
from torch import nn

import stseg

SIDE, LARGE, TILE, OVERLAP = 20_000, (3000, 4000), 1024, 0.25
HUGE_CLASSES, CLASSES = 4, 21
MIB = 2**20


def allocated() -> int:
    """Return the bytes of memory that this program allocated."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def measure(work: Callable[[], object]) -> dict[str, float]:
    """Run a function; return the seconds that it computed, and the memory before it and at most, in bytes."""
    done = threading.Event()
    before = most = allocated()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.01):
            most = max(most, allocated())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.process_time()
    try:
        work()
    finally:
        seconds = time.process_time() - began
        done.set()
        watcher.join()
    return {"seconds": seconds, "before": before, "most": most}


def label_huge(side: int, classes: int, folder: Path) -> dict[str, float]:
    """Label a memory-mapped image of a file to another."""
    image = np.memmap(folder / "image", np.uint8, "w+", shape=(side, side, 3))
    for top in range(0, side, 500):
        rows = image[top : top + 500]
        rows[:] = np.random.default_rng(top).integers(0, 256, rows.shape, dtype=np.uint8)
    image.flush()
    image = np.memmap(folder / "image", np.uint8, "r", shape=(side, side, 3)).transpose(2, 0, 1)
    mask = np.memmap(folder / "mask", np.uint8, "w+", shape=(side, side))
    torch.manual_seed(0)
    network = nn.Conv2d(3, classes, 1)
    stseg.predict_array(network, image[:, :64, :64], tile=TILE, progress=False)
    found = measure(
        lambda: stseg.predict_array(network, image, mask, tile=TILE, overlap=OVERLAP, precision="fp32", progress=False)
    )
    window = slice(side // 2, side // 2 + 100)
    pixels = torch.from_numpy(np.array(image[:, window, window]))[None]
    with torch.no_grad():
        expected = stseg.Segmenter(network)(pixels)[0].argmax(0).numpy()
    if (mask[window, window] != expected).mean() > 0.001:
        raise RuntimeError("the labels are not those of the network")
    return found


def label_large(tile: int) -> dict[str, float]:
    """Label a large image by a U-Net, as a whole (tile 0) or by tiles."""
    torch.manual_seed(0)
    network = stseg.Segmenter(smp.Unet("resnet18", encoder_weights=None, classes=CLASSES), stride=32)
    model = stseg.Tiled(network, tile, OVERLAP) if tile else network
    labeler = stseg.PseudoLabeler(model, num_classes=CLASSES, batch_size=1, precision="fp32", progress=False)
    generator = torch.Generator().manual_seed(0)
    small, large = (torch.randint(256, (3, *s), generator=generator, dtype=torch.uint8) for s in ((64, 64), LARGE))
    data: Any = [small]
    labeler.label(data)
    data = [large]
    return measure(lambda: labeler.label(data))


def start(side: int, what: str, number: int) -> dict[str, float]:
    """Measure in a program of one thread."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--side", str(side), "--run", what, str(number), folder]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        ran = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(ran.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure and print the tables; with ``--publish``, put them into the documentation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--publish", action="store_true", help="put the tables into docs/speed.md")
    parser.add_argument("--side", type=int, default=SIDE)
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        torch.set_num_threads(1)
        what, number, folder = args.run
        found = label_large(int(number)) if what == "large" else label_huge(args.side, int(number), Path(folder))
        print(json.dumps(found))
        return
    figures: dict[str, Any] = {"conditions": conditions()}
    lines = ["| image | network | labeled | memory above the start | CPU, s |", "|---|---|---|---:|---:|"]
    height, width = LARGE
    rows = [
        (f"{args.side:,} x {args.side:,}", f"1 x 1, {HUGE_CLASSES} classes", "huge", HUGE_CLASSES),
        *((f"{height:,} x {width:,}", f"U-Net, ResNet-18, {CLASSES} classes", "large", tile) for tile in (0, TILE)),
    ]
    for image, network, what, number in rows:
        found = figures[f"{what} {number}"] = start(args.side, what, number)
        how = "`predict_array`" if what == "huge" else f"`Tiled`, {number}" if number else "as a whole"
        memory = f"{(found['most'] - found['before']) / MIB:,.0f} MiB"
        lines.append(f"| {image} | {network} | {how} | {memory} | {found['seconds']:.0f} |")
        print(lines[-1], flush=True)
    if args.publish:
        how = (
            f"`python benchmarks/tiles.py --publish`: tiles of {TILE} that overlap by {OVERLAP}, one thread, float32; "
            f"the huge image and its mask are memory-mapped; {conditions()}."
        )
        publish("tiles", "\n\n".join([how, "\n".join(lines)]), figures)


if __name__ == "__main__":
    main()
