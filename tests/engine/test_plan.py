from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stseg import TrainConfig
from stseg.engine.plan import Plan

QUICK = settings(max_examples=25, deadline=None)


@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 40))
@QUICK
def test_of_epochs_has_a_row_each_so_many_of_them_and_at_the_end(epochs, per_epoch, every):
    plan = Plan.of(TrainConfig(epochs=epochs, eval_every=every), per_epoch)
    assert plan.steps == epochs * per_epoch
    wanted = [epoch * per_epoch for epoch in range(1, epochs + 1) if epoch % every == 0 or epoch == epochs]
    assert sorted(plan.rows) == wanted


@given(st.integers(1, 200), st.integers(1, 12), st.integers(1, 250))
@QUICK
def test_of_steps_has_a_row_each_so_many_of_them_and_at_the_end(steps, per_epoch, every):
    plan = Plan.of(TrainConfig(steps=steps, eval_every=every), per_epoch)
    assert plan.steps == steps
    assert sorted(plan.rows) == [step for step in range(1, steps + 1) if step % every == 0 or step == steps]


@given(st.integers(1, 30), st.integers(1, 12))
@QUICK
def test_of_epochs_has_a_row_for_each_of_them_by_default(epochs, per_epoch):
    plan = Plan.of(TrainConfig(epochs=epochs), per_epoch)
    assert sorted(plan.rows) == [epoch * per_epoch for epoch in range(1, epochs + 1)]


@given(st.integers(1, 10_000), st.integers(1, 12))
@QUICK
def test_of_steps_has_about_twenty_rows_by_default_evenly_spread(steps, per_epoch):
    rows = sorted(Plan.of(TrainConfig(steps=steps), per_epoch).rows)
    assert len(rows) == min(20, steps)
    assert rows[-1] == steps
    gaps = [after - before for before, after in zip([0, *rows], rows, strict=False)]
    assert max(gaps) - min(gaps) <= 1


@given(st.integers(1, 12), st.integers(1, 7), st.data())
@QUICK
def test_snapshots_are_due_once_after_their_epochs_or_steps(length, per_epoch, data):
    wanted = data.draw(st.lists(st.integers(1, length)))
    for config, unit in ((TrainConfig(epochs=length), per_epoch), (TrainConfig(steps=length), 1)):
        plan = Plan.of(config, per_epoch, wanted)
        assert plan.snapshots == tuple(sorted(set(wanted)))
        due = {step: plan.snapshot_at(step) for step in range(1, plan.steps + 1)}
        assert {step: at for step, at in due.items() if at is not None} == {at * unit: at for at in wanted}


@pytest.mark.parametrize("at", [0, -1, 4])
def test_snapshots_outside_the_training_are_refused(at):
    for config in (TrainConfig(epochs=3), TrainConfig(steps=3)):
        with pytest.raises(ValueError, match=r"snapshots are .*; expected values in 1\.\.3"):
            Plan.of(config, 5, [1, at])
