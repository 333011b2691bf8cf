"""HTML comparison of several runs, one file: settings that differ, scores and curves, from their work directories."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from stseg.stages.charts import MISSING, Charts, Line
from stseg.stages.page import Html, alert, duration, element, folded, percent, section, table, write_page
from stseg.stages.problems import iou_of
from stseg.stages.summary import RunSummary, read_run
from stseg.stages.wording import count_of_parameters, flatten, method_of, name_method


def compare_runs(folders: Sequence[str | Path], out: str | Path) -> Path:
    """Write a page that compares runs, finished or under way: settings that differ, scores, curves.

    Curves need matplotlib (``pip install stseg[report]``).

    Args:
        folders: work directories of :class:`stseg.SelfTrainer` or :func:`stseg.fit`.
        out: the page, a file whose name ends in ``.html``.

    Returns:
        The path of the page.

    Raises:
        DataError: if a folder is no work directory; names it.
        DamagedFileError: if a file in one is damaged.
        ValueError: if there is no folder, one is given twice, or ``out`` does not end in ``.html``.
        TypeError: if ``folders`` is a single one.

    Example:
        >>> import tempfile, torch, stseg
        >>> data = [(torch.rand(3, 16, 16), torch.randint(2, (16, 16)).byte()) for _ in range(2)]
        >>> folder = Path(tempfile.mkdtemp())
        >>> for lr in (0.1, 0.01):
        ...     config = stseg.TrainConfig(steps=2, batch_size=2, weak=None, lr=lr)
        ...     network = torch.nn.Conv2d(3, 2, 1)
        ...     _ = stseg.fit(network, data, config, workdir=folder / f"lr-{lr}", progress=False)
        >>> compare_runs(sorted(folder.iterdir()), folder / "comparison.html").name
        'comparison.html'
    """
    if isinstance(folders, (str, Path)):
        raise TypeError(f"folders is {str(folders)!r}; expected a list of folders: [{str(folders)!r}, ...]")
    path = Path(out).absolute()
    if path.suffix != ".html":
        raise ValueError(f"out is {str(out)!r}; expected a file that ends in .html, such as 'comparison.html'")
    if not folders:
        raise ValueError("folders is empty; expected the work directories of one or more runs")
    runs = dict(zip(_titles(folders), map(read_run, folders), strict=True))
    title = f"Comparison of {len(runs)} runs" if len(runs) > 1 else f"Comparison of {next(iter(runs))}"
    return write_page(
        path,
        title,
        "Scores are those of the last training of each run.",
        alert("Before comparing", list(_find_differences(runs))),
        section("Runs", _list_runs(runs)),
        section("Settings that differ", _compare_settings(runs)),
        section("IoU by class", _compare_iou(runs)),
        section("Curves", _draw_curves(runs)),
    )


def _titles(folders: Sequence[str | Path]) -> list[str]:
    """Return a title for each folder: its name, and as many of those above as tell it from the others."""
    paths = [Path(folder).absolute() for folder in folders]
    real = [path.resolve() for path in paths]
    for path, place in zip(paths, real, strict=True):
        if real.count(place) > 1:
            raise ValueError(f"{path} is given twice; expected each run once")
    for length in count(1):
        titles = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(titles)) == len(titles):
            break
    return titles


def _last_row(run: RunSummary) -> Mapping[str, float]:
    """Return the row of the weights of the last training; empty before it."""
    training = run.last
    return (None if training is None else training.row(run.keep)) or {}


def _find_differences(runs: Mapping[str, RunSummary]) -> Iterator[str]:
    """Name what the scores of the runs differ by, beside their settings."""
    validated = {title: run for title, run in runs.items() if "miou" in _last_row(run)}
    for name, what in (("validation", "were validated"), ("labeled", "learned")):
        groups: dict[str, list[str]] = {}
        for title, run in (validated if name == "validation" else runs).items():
            groups.setdefault(str(run.data.get(name)), []).append(title)
        if len(groups) > 1:
            sets = "; ".join(", ".join(titles) for titles in groups.values())
            on = "on different images or masks" if name == "validation" else "from different labeled images or masks"
            yield f"They {what} {on}: {sets}."
    chosen = [title for title, run in validated.items() if run.keep == "best"]
    if chosen and len(chosen) < len(validated):
        yield f"The validation images chose the weights of {', '.join(chosen)}, which makes their scores too good."


def _list_runs(runs: Mapping[str, RunSummary]) -> Html:
    rows = []
    for title, run in runs.items():
        images = [run.count(name) for name in ("labeled", "unlabeled", "validation")]
        network = {} if run.last is None else run.last.network
        rows.append(
            (
                title,
                percent(_last_row(run).get("miou")),
                name_method(run),
                *("–" if number is None else f"{number:,}" for number in images),
                duration(sum(run.seconds.values())),
                "finished" if run.is_finished else f"under way: {list(run.seconds)[-1] if run.seconds else 'begun'}",
                " / ".join(filter(None, (network.get("class"), network.get("encoder")))),
                count_of_parameters(network),
            )
        )
    head = ("Run", "mIoU", "Method", "Labeled", "Unlabeled", "Validation", "Duration", "State", "Network", "Parameters")
    return table("Runs, their final mIoU and numbers of images", head, rows, numbers=(1, 3, 4, 5, 6, 9))


def _compare_settings(runs: Mapping[str, RunSummary]) -> Html:
    """Return settings and versions that are not the same in all runs."""
    found = [flatten({**run.settings, "method": method_of(run), "versions": run.versions}) for run in runs.values()]
    names = dict.fromkeys(name for settings in found for name in settings)
    rows = [
        (name, *(settings.get(name, "–") for settings in found))
        for name in names
        if len({settings.get(name) for settings in found}) > 1
    ]
    caption = "Settings that are not the same in all runs"
    return folded(caption, rows, table(caption, ("Setting", *runs), rows))


def _compare_iou(runs: Mapping[str, RunSummary]) -> Html:
    found: dict[str, Sequence[float]] = {title: iou_of(_last_row(run)) for title, run in runs.items()}
    names = {run.class_names for run in runs.values() if run.class_names is not None}
    known: Sequence[Any] = next(iter(names)) if len(names) == 1 else ()
    rows = [
        (
            known[index] if index < len(known) else index,
            *(percent(iou[index] if index < len(iou) else None) for iou in found.values()),
        )
        for index in range(max(map(len, found.values()), default=0))
    ]
    caption = "IoU of each class on the validation images"
    return folded(caption, rows, table(caption, ("Class", *found), rows, numbers=range(1, len(found) + 1)))


def _draw_curves(runs: Mapping[str, RunSummary]) -> Html:
    """Draw mIoU and loss of all runs over the steps of all their trainings, one after another."""
    charts = Charts()
    if not charts.are_drawn:
        return MISSING
    drawn = [
        charts.lines(title, lines, x="step of all trainings", y=y)
        for name, title, y in (("miou", "mIoU on the validation images", "mIoU, %"), ("loss", "loss", "loss"))
        if (lines := {run: line for run, summary in runs.items() if (line := _line(summary, name))[0]})
    ]
    return element("div", *drawn, kind="charts") if drawn else Html("")


def _line(run: RunSummary, name: str) -> Line:
    """Return a value of the history over the steps, with a gap after each training."""
    across: list[float] = []
    up: list[float] = []
    before, factor = 0.0, 100 if name == "miou" else 1
    for training in run.trainings.values():
        rows = [row for row in training.history if name in row]
        across += [before + row["step"] for row in rows]
        up += [factor * row[name] for row in rows]
        before += training.history[-1]["step"] if training.history else 0
        if rows:
            across.append(before)
            up.append(float("nan"))
    return across, up
