"""What every training method has to pass: ``class TestX(MethodTester)`` with ``make`` and, where needed, ``plain``."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import stseg
from stseg import Batch, TrainConfig, TrainingDivergedError, WeakAugment, fit
from stseg.engine.step import TrainingSteps
from stseg.models.state import cpu_state

CLASSES = 3


class Network(nn.Module):
    """A small network with an encoder, batch normalization and dropout."""

    def __init__(self, seed: int = 0, classes: int = CLASSES) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
            self.decoder = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2))
            self.head = nn.Conv2d(8, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.decoder(self.encoder(x)))


class Plain(nn.Module):
    """Without batch normalization and dropout: nothing is random, and rows do not see one another."""

    def __init__(self, seed: int = 0, classes: int = CLASSES) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.encoder, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).relu())


def images(count: int, seed: int = 0, size: tuple[int, int] = (20, 18)) -> list[Tensor]:
    return list(torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed)))


def pairs(count: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Images whose class is where the red is, and the green; some pixels without a label."""
    items = [(image, (image[0] > 0.5).byte() + (image[1] > 0.7).byte()) for image in images(count, seed)]
    items[0][1][:7] = 255
    return items


class Untouchable:
    """A mask of an unlabeled image: whoever reads it fails."""

    def __getattr__(self, name):
        raise AssertionError("the mask of an unlabeled image was read")


def config(**changes) -> TrainConfig:
    settings = {"steps": 6, "batch_size": 2, "weak": WeakAugment(16, base_size=20), "lr": 0.05, "head_lr_factor": 1.0}
    return TrainConfig(**{**settings, **changes})


def batch(
    rows: int = 2, size: int = 8, *, step: int = 3, steps: int = 6, seed: int = 0, classes: int = CLASSES
) -> Batch:
    """Some pixels have no label, some are padding."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.randint(0, CLASSES, (rows, size, size), generator=generator)
    masks[0, :2] = 255
    valid = torch.ones(rows, size, size, dtype=torch.bool)
    valid[-1, :, -3:] = False
    return Batch(
        images=torch.rand(rows, 3, size, size, generator=generator),
        masks=masks,
        is_pseudo=torch.zeros(rows, dtype=torch.bool),
        unlabeled=torch.rand(rows, 3, size, size, generator=generator),
        valid=valid,
        step=step,
        steps=steps,
    )


def rows_seen(part: nn.Module) -> list[int]:
    """How many images a part of a network sees in each forward pass in training mode."""
    seen: list[int] = []
    part.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])) if module.training else None)
    return seen


def interrupt(method: stseg.Method, at: int) -> stseg.Method:
    """Stop a method after the step ``at``, as Ctrl+C would."""
    kind = type(method)

    class Interrupted(kind):
        def after_step(self, batch: Batch) -> None:
            super().after_step(batch)
            if batch.step == at:
                raise KeyboardInterrupt

    Interrupted.__name__, Interrupted.__qualname__, Interrupted.__module__ = (
        kind.__name__,
        kind.__qualname__,
        kind.__module__,
    )
    method.__class__ = Interrupted
    return method


class Waits(TorchDispatchMode):
    """Notes the operations for which the host would wait for a GPU: those that read values or choose shapes by them."""

    READING = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "unique",
        "unique_dim",
        "_unique2",
        "bincount",
        "equal",
    )

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_values = name in ("index", "index_put", "index_put_") and any(
            each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1]
        )
        if name in self.READING or by_values:
            self.operations.append(name)
        return function(*args, **(kwargs or {}))


class MethodTester:
    """Tests of one method; a subclass says how it is made."""

    waits = False
    """Whether a step cannot but read values from the device."""

    def make(self) -> stseg.Method:
        """The method with its defaults on :class:`Network`."""
        raise NotImplementedError

    def plain(self) -> stseg.Method:
        """The method on :class:`Plain`, with nothing random in it."""
        raise NotImplementedError

    def train(self, method: stseg.Method | None = None, settings: TrainConfig | None = None, **options):
        method = self.make() if method is None else method
        unlabeled = [(image, Untouchable()) for image in images(5, seed=1)] if method.uses_unlabeled else None
        options = {"unlabeled": unlabeled, "progress": False, **options}
        return fit(method, pairs(4), settings or config(), **options)

    def test_trains_and_logs_what_it_says(self):
        method = self.make()
        before = cpu_state(method)
        result = self.train(method, val=pairs(3, seed=2))
        assert result.model is method.model
        assert any(not torch.equal(value, before[name]) for name, value in cpu_state(method).items())
        logged = set(method(batch()).logged)
        names = {"epoch", "step", "lr", "loss", "miou", *(f"iou/{index}" for index in range(CLASSES)), "seconds"}
        assert all(set(row) == names | logged for row in result.history)
        assert all(math.isfinite(value) for row in result.history for value in row.values())

    @pytest.mark.parametrize("stop", [1, 3])
    def test_interrupted_and_resumed_comes_to_the_same_state(self, tmp_path, stop):
        settings = config(save_every=0, optimizer="adamw", lr=0.01)
        whole = self.make()
        result = self.train(whole, settings, snapshots=[2, 5])
        interrupted = interrupt(self.make(), at=stop)
        with pytest.raises(KeyboardInterrupt):
            self.train(interrupted, settings, snapshots=[2, 5], workdir=tmp_path)
        resumed = self.make()
        again = self.train(resumed, settings, snapshots=[2, 5], workdir=tmp_path)
        for name, value in cpu_state(whole).items():
            assert torch.equal(value, cpu_state(resumed)[name]), name
        for one, other in zip(result.snapshots, again.snapshots, strict=True):
            assert all(torch.equal(value, cpu_state(other)[name]) for name, value in cpu_state(one).items())
        for one, other in zip(result.history, again.history, strict=True):
            assert {**one, "seconds": 0} == {**other, "seconds": 0}

    def test_does_not_depend_on_workers(self):
        one, two = self.make(), self.make()
        self.train(one)
        self.train(two, config(num_workers=2))
        assert all(torch.equal(value, cpu_state(two)[name]) for name, value in cpu_state(one).items())

    def test_finished_gives_the_deployed_weights_back(self, tmp_path):
        first = self.train(workdir=tmp_path)
        second = self.train(workdir=tmp_path)
        assert all(torch.equal(v, cpu_state(second.model)[name]) for name, v in cpu_state(first.model).items())

    def test_of_other_settings_is_refused(self, tmp_path):
        self.train(workdir=tmp_path)
        with pytest.raises(stseg.WorkdirMismatchError):
            self.train(self.plain(), workdir=tmp_path)

    def test_in_bfloat16_keeps_float32_weights(self):
        method = self.make()
        self.train(method, config(precision="bf16"))
        assert {p.dtype for p in method.parameters()} == {torch.float32}

    @pytest.mark.parametrize("lag", [False, True])
    @pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
    def test_whose_loss_is_not_finite_is_left_as_it_was(self, optimizer, lag):
        method = self.make().train()
        settings = config(precision="fp32", optimizer=optimizer)
        optimizers = list(method.optimizers(settings))
        steps = TrainingSteps(method, method, optimizers, settings, lag=lag)
        assert len(list(steps(batch(16, 16)))) == 1
        before = copy.deepcopy((method.state_dict(), [o.state_dict() for o in optimizers]))
        spoiled = batch(16, 16)
        spoiled.images[0, 0, 8, 8] = math.nan
        if lag:  # the step after it is launched before it is known
            assert list(steps(spoiled, settle=False)) == []
        with pytest.raises(FloatingPointError):
            list(steps(batch(16, 16) if lag else spoiled))
        assert all(torch.equal(value, before[0][name]) for name, value in method.state_dict().items())
        for optimizer, state in zip(optimizers, before[1], strict=True):
            after = optimizer.state_dict()["state"]
            assert after.keys() == state["state"].keys()
            for key, values in after.items():
                tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
                assert tensors
                assert all(torch.equal(value, state["state"][key][name]) for name, value in tensors.items())

    def test_comes_to_the_same_state_if_the_host_lags_behind(self):
        settings, found = config(optimizer="adamw"), []
        for lag in (False, True):
            torch.manual_seed(0)
            method = self.make().train()
            steps = TrainingSteps(method, method, list(method.optimizers(settings)), settings, lag=lag)
            rows = [[*steps(batch(2, 16, step=step, seed=step), settle=step == 4)] for step in range(5)]
            assert [len(each) for each in rows] == ([1, 0, 1, 1, 2] if lag else [1] * 5)
            found.append(([numbers for each in rows for numbers in each], cpu_state(method)))
        (one, state), (two, other) = found
        assert one == two
        assert all(torch.equal(value, other[name]) for name, value in state.items())

    def test_waits_for_no_device_in_a_step(self):
        if self.waits:
            pytest.skip("its algorithm does")
        method, settings = self.make().train(), config()
        for module in method.modules():  # the range of images is looked at on the CPU only
            getattr(module, "_checked_on", set()).add("cpu")
        steps = TrainingSteps(method, method, list(method.optimizers(settings)), settings, lag=True)
        one = batch(2, 16)
        list(steps(one))
        with Waits() as waits:
            assert list(steps(one, settle=False)) == []
        assert waits.operations == []

    def test_diverging_names_the_step(self):
        with pytest.raises(TrainingDivergedError, match="at step"):
            self.train(self.plain(), config(steps=60, lr=1e20))

    def test_ignores_what_is_not_valid(self):
        method = self.plain().train()
        if not method.uses_unlabeled:
            pytest.skip("the method does not use unlabeled images")
        nothing = batch()._replace(valid=torch.zeros(2, 8, 8, dtype=torch.bool))
        other = nothing._replace(unlabeled=torch.rand(2, 3, 8, 8))
        losses = [method(each).total for each in (nothing, other)]
        assert all(loss.isfinite() for loss in losses)
        assert torch.equal(*losses)
        losses[0].backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in method.parameters())

    def test_ignores_what_has_no_label(self):
        method = self.plain().train()
        unknown = batch()._replace(masks=torch.full((2, 8, 8), 255))
        loss = method(unknown).total
        assert loss.isfinite()
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in method.parameters())

    def test_its_state_is_its_state_dict(self):
        one, other = self.make(), self.make()
        self.train(one)
        other.load_state_dict(one.state_dict())
        for method in (one, other):
            method.train().to(memory_format=torch.channels_last)  # rounding depends on the layout
        torch.manual_seed(0)
        expected = one(batch()).total
        torch.manual_seed(0)
        assert torch.equal(other(batch()).total, expected)

    def test_takes_another_ignore_index(self):
        method = self.plain().train()
        one = batch()
        other = one._replace(masks=one.masks.masked_fill(one.masks == 255, 77), ignore_index=77)
        assert torch.equal(method(one).total, method(other).total)
