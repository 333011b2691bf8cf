"""Trackers: what they write, at which step, when a run resumes, and when their package is missing."""

from __future__ import annotations

import math
import sys
import time
from types import ModuleType, SimpleNamespace

import pytest
from small import Stopped, network, pairs

import stseg
from stseg.loggers import MLflow, TensorBoard, WandB

CONFIG = stseg.TrainConfig(steps=6, batch_size=2, weak=stseg.WeakAugment(16), eval_every=2)


def rows(*steps, training="", shift=0.0):
    """Rows as those of a history."""
    prefix = f"{training}/" if training else ""
    return [
        {
            f"{prefix}epoch": step / 2,
            f"{prefix}step": float(step),
            f"{prefix}loss": 1 / step + shift,
            f"{prefix}seconds": 2.0,
        }
        for step in steps
    ]


def curves(folder):
    """Step and value of each point in the event files of a folder, by name."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = event_accumulator.EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def wait_a_second():
    """Files are read in the order of their names, which hold the second."""
    time.sleep(1.01)


class TestTensorBoard:
    @pytest.fixture(autouse=True)
    def needs_tensorboard(self):
        pytest.importorskip("tensorboard")

    def test_writes_every_number_at_its_step(self, tmp_path):
        with TensorBoard(tmp_path) as log:
            result = stseg.fit(network(), pairs(4), CONFIG, val=pairs(2, seed=1), log=log, progress=False)
        found = curves(tmp_path)
        assert set(found) == set(result.history[0]) - {"step"}
        for name, points in found.items():
            assert points == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in result.history]

    def test_has_a_run_for_each_training(self, tmp_path):
        trainer = stseg.SelfTrainer(
            network, num_classes=2, config=CONFIG, method="st", log=TensorBoard(tmp_path), progress=False
        )
        result = trainer.fit(pairs(3), [image for image, _ in pairs(4, seed=1)])
        assert sorted(path.name for path in tmp_path.iterdir()) == ["student", "teacher"]
        for step, stage in result.stages.items():  # all is on disk without close()
            points = [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in stage.history]
            assert curves(tmp_path / step)["loss"] == points

    def test_of_a_run_that_resumes_repeats_no_point(self, tmp_path):
        def run(after):  # nothing is saved so early: it starts again, and repeats its rows
            method = Stopped(network(), after=after)
            with TensorBoard(tmp_path / "log") as log:
                return stseg.fit(method, pairs(4), CONFIG, workdir=tmp_path / "run", log=log, progress=False)

        for after in (3, 5):
            with pytest.raises(KeyboardInterrupt):
                run(after)
            wait_a_second()
        result = run(None)
        assert [step for step, _ in curves(tmp_path / "log")["loss"]] == [row["step"] for row in result.history]

    @pytest.mark.parametrize("again", [True, False], ids=["another tracker", "the same one"])
    def test_replaces_steps_that_are_repeated(self, tmp_path, again):
        log = TensorBoard(tmp_path)
        for row in rows(1, 2, 3, training="t") + rows(1, training="other"):
            log(row)
        if again:
            wait_a_second()
            log = TensorBoard(tmp_path)
        for row in rows(2, 3, 4, training="t", shift=1):
            log(row)
        found = [(1, 1), (2, 1.5), (3, pytest.approx(4 / 3)), (4, 1.25)]
        assert curves(tmp_path / "t")["loss"] == found
        assert curves(tmp_path / "other")["loss"] == [(1, 1)]

    def test_takes_numbers_that_are_not_finite(self, tmp_path):
        with TensorBoard(tmp_path) as log:
            log({"step": 1.0, "miou": math.nan, "loss": math.inf})
        assert math.isnan(curves(tmp_path)["miou"][0][1])
        assert curves(tmp_path)["loss"] == [(1, math.inf)]

    def test_of_a_folder_that_is_none_does_not_end_the_training(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.warns(RuntimeWarning, match="log=TensorBoard raised"):
            stseg.fit(network(), pairs(4), CONFIG, log=TensorBoard(tmp_path / "file"), progress=False)

    def test_that_is_closed_says_so(self, tmp_path):
        log = TensorBoard(tmp_path)
        log.close()
        log.close()
        with pytest.raises(RuntimeError, match="this TensorBoard is closed"):
            log(rows(1)[0])

    @pytest.mark.parametrize("row", [{}, {"loss": 1.0}, {"mystep": 1.0}])
    def test_of_what_is_no_row(self, tmp_path, row):
        with pytest.raises(ValueError, match="expected a row of a history, with its step"):
            TensorBoard(tmp_path)(row)


class FakeRun:
    """What the tracker uses of ``wandb.Run``; drops what wandb would drop."""

    def __init__(self, summary=None):
        self.calls, self.metrics, self.summary, self.resumed = [], {}, dict(summary or {}), summary is not None
        self.finished = None

    def define_metric(self, name, step_metric=None):
        self.metrics[name] = step_metric

    def log(self, values, step=None):
        assert self.finished is None
        assert step is None
        self.calls.append(values)
        self.summary |= values

    def finish(self, exit_code=None):
        self.finished = exit_code


@pytest.fixture
def wandb(monkeypatch):
    module = ModuleType("wandb")
    module.run, module.inits, module.summary = None, [], None

    def init(**options):
        module.inits.append(options)
        module.run = FakeRun(module.summary)
        return module.run

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


class TestWandB:
    def test_logs_rows_with_the_steps_of_each_training(self, wandb):
        with WandB(project="p", config={"lr": 1}) as log:
            assert wandb.inits == []  # none in processes that get no row
            for row in rows(1, 2, training="teacher") + rows(1, training="student"):
                log(row)
        assert wandb.inits == [{"project": "p", "config": {"lr": 1}}]
        assert wandb.run.calls == [
            {"teacher/step": 1, "teacher/epoch": 0.5, "teacher/loss": 1.0, "teacher/seconds": 2.0},
            {"teacher/step": 2, "teacher/epoch": 1.0, "teacher/loss": 0.5, "teacher/seconds": 2.0},
            {"student/step": 1, "student/epoch": 0.5, "student/loss": 1.0, "student/seconds": 2.0},
        ]
        assert wandb.run.metrics == {
            **{"teacher/step": None, "teacher/*": "teacher/step"},
            **{"student/step": None, "student/*": "student/step"},
        }
        assert wandb.run.finished == 0

    def test_takes_rows_of_fit(self, wandb):
        result = stseg.fit(network(), pairs(4), CONFIG, log=WandB(), progress=False)
        assert wandb.run.calls == [dict(row) for row in result.history]
        assert wandb.run.metrics == {"step": None, "*": "step"}
        assert wandb.run.finished is None

    @pytest.mark.parametrize("active", [True, False])
    def test_leaves_a_run_of_others_open(self, wandb, active):
        run = FakeRun()
        if active:
            wandb.run = run
        with WandB() if active else WandB(run) as log:
            log(rows(1)[0])
        assert len(run.calls) == 1
        assert run.finished is None
        assert wandb.inits == []

    def test_leaves_out_what_a_resumed_run_holds(self, wandb):
        wandb.summary = {"t/step": 4, "t/loss": 0.25}
        with WandB(id="x", resume="allow") as log:
            for row in rows(2, 4, 6, training="t") + rows(1, training="next"):
                log(row)
        assert [call.get("t/step", call.get("next/step")) for call in wandb.run.calls] == [6, 1]

    def test_repeats_no_row_but_logs_another_training_of_the_same_name(self, wandb):
        log = WandB()
        for row in rows(1, 2, 3) + rows(2, 3, 4) + rows(1, 2, shift=1):
            log({**row, "miou": float("nan")})
        assert [(call["step"], call["loss"] > 1) for call in wandb.run.calls] == [
            *((step, False) for step in (1, 2, 3, 4)),
            *((step, True) for step in (1, 2)),
        ]

    def test_of_a_failed_training_has_failed(self, wandb):
        def fail(log):
            with log:
                log(rows(1)[0])
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fail(WandB())
        assert wandb.run.finished == 1

    def test_that_got_no_row_starts_no_run(self, wandb):
        WandB(project="p").close()
        assert wandb.inits == []

    def test_refuses_what_is_no_run(self, wandb):
        with pytest.raises(TypeError, match="run is 'crops'; expected a run of"):
            WandB("crops")
        with pytest.raises(ValueError, match="got a run and project, which are for a new one"):
            WandB(FakeRun(), project="p")


@pytest.fixture
def mlflow(monkeypatch):
    """A module with one run, which keeps all points as MLflow does."""
    module = ModuleType("mlflow")
    module.active, module.starts, module.ended, module.points = None, [], None, []

    class Client:
        def get_metric_history(self, run_id, key):
            return [point for of, point in module.points if of == run_id and point.key == key]

        def log_batch(self, run_id, metrics):
            module.points += [(run_id, metric) for metric in metrics]

    def start_run(**options):
        module.starts.append(options)
        module.active = SimpleNamespace(info=SimpleNamespace(run_id=options.get("run_id", "new")))
        return module.active

    def end_run(status):
        module.active, module.ended = None, status

    def metric(key, value, timestamp, step):
        assert type(timestamp) is int
        assert type(step) is int
        return SimpleNamespace(key=key, value=value, step=step)

    module.MlflowClient, module.start_run, module.end_run = Client, start_run, end_run
    module.active_run, module.entities = lambda: module.active, SimpleNamespace(Metric=metric)
    monkeypatch.setitem(sys.modules, "mlflow", module)
    return module


class TestMLflow:
    def points(self, mlflow, name):
        return [(point.step, point.value) for _, point in mlflow.points if point.key == name]

    def test_logs_every_number_at_its_step(self, mlflow):
        trainer_log = MLflow(run_name="crops")
        assert mlflow.starts == []
        with trainer_log as log:
            trainer = stseg.SelfTrainer(network, num_classes=2, config=CONFIG, method="st", log=log, progress=False)
            result = trainer.fit(pairs(3), [image for image, _ in pairs(4, seed=1)])
        assert mlflow.starts == [{"run_name": "crops"}]
        assert mlflow.ended == "FINISHED"
        for step, stage in result.stages.items():
            for name in set(stage.history[0]) - {"step"}:
                assert self.points(mlflow, f"{step}/{name}") == [(row["step"], row[name]) for row in stage.history]
        assert not self.points(mlflow, "teacher/step")

    def test_leaves_out_rows_that_the_run_holds(self, mlflow):
        for steps in ((1, 2, 3), (2, 3, 4)):
            with MLflow(run_id="same") as log:
                for row in rows(*steps, training="t"):
                    log(row)
        assert [step for step, _ in self.points(mlflow, "t/loss")] == [1, 2, 3, 4]
        log = MLflow(run_id="same")
        for row in rows(1, 2, shift=1, training="t") + rows(2, shift=1, training="t"):
            log(row)
        assert [step for step, _ in self.points(mlflow, "t/loss")] == [1, 2, 3, 4, 1, 2]

    def test_takes_the_active_run_and_leaves_it_open(self, mlflow):
        mlflow.start_run(run_id="mine")
        with MLflow() as log:
            log(rows(1)[0])
        assert {run_id for run_id, _ in mlflow.points} == {"mine"}
        assert mlflow.ended is None

    def test_of_a_failed_training_has_failed(self, mlflow):
        def fail(log):
            with log:
                log(rows(1)[0])
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fail(MLflow())
        assert mlflow.ended == "FAILED"

    def test_that_got_no_row_starts_no_run(self, mlflow):
        MLflow().close()
        assert (mlflow.starts, mlflow.ended) == ([], None)


@pytest.mark.parametrize(
    ("make", "package", "extra"),
    [
        (lambda folder: TensorBoard(folder), "tensorboard", "tensorboard"),
        (lambda folder: WandB(project="p"), "wandb", "wandb"),
        (lambda folder: MLflow(), "mlflow", "mlflow"),
    ],
)
def test_without_the_package_the_extra_is_named_before_training(make, package, extra, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"needs {package}, which is not installed: pip install stseg\[{extra}\]"):
        make(tmp_path / "log")
    assert list(tmp_path.iterdir()) == []
