from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import stseg
from stseg.models import as_segmenter
from stseg.modules import EMA

few = settings(max_examples=25, deadline=None)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))


def moved(model, seed):
    """The model after what an optimizer would have done."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    return model


class TestDecay:
    @pytest.mark.parametrize(
        ("decay", "values"),
        [
            (0.99, {0: 0, 1: 0.5, 9: 0.9, 98: 0.989899, 99: 0.99, 10_000: 0.99}),
            (0.996, {248: 0.995984, 249: 0.996, 250: 0.996}),
            (0.999, {998: 0.998999, 999: 0.999}),
        ],
    )
    def test_warms_up(self, decay, values):
        ema = EMA(nn.Linear(1, 1), decay)
        assert {step: ema.decay_at(step) for step in values} == pytest.approx(values, abs=5e-7)

    def test_is_constant_without_a_warmup(self):
        ema = EMA(nn.Linear(1, 1), 0.97, warmup=False)
        assert {ema.decay_at(step) for step in (0, 1, 1000)} == {0.97}


class TestUpdate:
    @few
    @given(st.floats(0, 1), st.booleans(), st.integers(1, 6))
    def test_is_the_weighted_mean_of_average_and_weights(self, decay, warmup, steps):
        student = network()
        ema = EMA(student, decay, warmup=warmup)
        wanted = [p.detach().double().numpy() for p in student.parameters()]
        for step in range(steps):
            moved(student, step)
            d = min(1 - 1 / (step + 1), decay) if warmup else decay
            wanted = [
                d * mine + (1 - d) * p.detach().double().numpy()
                for mine, p in zip(wanted, student.parameters(), strict=True)
            ]
            ema.update(student, step)
        for found, value in zip(ema.model.parameters(), wanted, strict=True):
            np.testing.assert_allclose(found.numpy(), value, rtol=1e-4, atol=1e-5)

    def test_the_first_one_copies_the_weights_bit_for_bit(self):
        student = network()
        ema = EMA(student, 0.999)
        ema.update(moved(student, 1), 0)
        for mine, other in zip(ema.model.parameters(), student.parameters(), strict=True):
            assert torch.equal(mine, other)

    def test_does_not_change_the_student(self):
        student = network()
        ema = EMA(student)
        before = copy.deepcopy(student.state_dict())
        for step in range(3):
            ema.update(student, step)
        assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())

    def test_takes_parameters_of_several_dtypes_and_none_at_all(self):
        mixed = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2).double(), nn.Linear(2, 2).bfloat16()])
        ema = EMA(mixed, 0.5, warmup=False)
        before = copy.deepcopy(ema.model)
        ema.update(moved(mixed, 0), 0)
        for mine, other, old in zip(ema.model.parameters(), mixed.parameters(), before.parameters(), strict=True):
            torch.testing.assert_close(mine, (other + old) / 2, check_dtype=True, rtol=1e-2, atol=1e-2)
        EMA(nn.ReLU()).update(nn.ReLU(), 0)

    def test_refuses_another_network_and_a_negative_step(self):
        ema = EMA(nn.Linear(2, 2))
        with pytest.raises(ValueError, match="other parameters or buffers than the average"):
            ema.update(nn.Linear(2, 1), 0)
        with pytest.raises(ValueError, match="step is -1; expected 0 or more"):
            ema.update(nn.Linear(2, 2), -1)

    def test_is_not_done_without_the_step(self):
        ema = EMA(nn.Linear(2, 2))
        with pytest.raises(NotImplementedError, match=r"update\(model, step\)"):
            ema.update_parameters(nn.Linear(2, 2))


class TestBuffers:
    def test_of_its_own_are_gathered_in_training_mode(self):
        student = network()
        ema = EMA(student)
        images = torch.rand(2, 3, 8, 8)
        student(images + 5)
        ema.update(student, 0)
        assert not ema.model[1].running_mean.any()
        with torch.no_grad():
            ema(images)
        assert ema.model[1].running_mean.any()
        assert ema.model[1].num_batches_tracked == 1
        assert not torch.equal(ema.model[1].running_mean, student[1].running_mean)

    def test_are_averaged_as_weights_are_and_integers_copied(self):
        student = network()
        ema = EMA(student, 0.9, warmup=False, buffers="average")
        before = ema.model[1].running_mean.clone()
        for _ in range(3):
            student(torch.rand(2, 3, 8, 8))
        ema.update(student, 0)
        torch.testing.assert_close(ema.model[1].running_mean, 0.9 * before + 0.1 * student[1].running_mean)
        assert ema.model[1].num_batches_tracked == 3


class TestModule:
    def test_has_no_gradients_and_a_copy_of_its_own(self):
        student = network()
        ema = EMA(student)
        assert not any(p.requires_grad for p in ema.parameters())
        assert all(p.requires_grad for p in student.parameters())
        moved(student, 0)
        assert not torch.equal(next(ema.parameters()), next(student.parameters()))
        assert not ema(torch.rand(2, 3, 8, 8)).requires_grad

    def test_goes_on_from_its_state_bit_for_bit(self):
        student, one, two = network(), EMA(network(), 0.9), EMA(network(9), 0.9)
        for step in range(3):
            one.update(moved(student, step), step)
        two.load_state_dict(one.state_dict())
        for ema in (one, two):
            ema.update(moved(copy.deepcopy(student), 3), 3)
        found, wanted = two.state_dict(), one.state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)

    def test_of_a_wrapped_network_takes_images_as_it_does(self):
        student = stseg.Segmenter(network())
        ema = EMA(student)
        assert as_segmenter(ema) is ema
        assert ema.model is ema.module
        assert ema.eval()(torch.zeros(1, 3, 9, 7, dtype=torch.uint8)).shape == (1, 2, 9, 7)

    def test_says_what_it_is(self):
        assert "decay=0.9, warmup=False, buffers='average'" in repr(
            EMA(nn.ReLU(), 0.9, warmup=False, buffers="average")
        )

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"decay": 1.1}, "decay is 1.1"),
            ({"decay": -0.1}, "decay is -0.1"),
            ({"buffers": "copy"}, "buffers is 'copy'"),
        ],
    )
    def test_refuses_settings_that_are_none(self, settings, message):
        with pytest.raises(ValueError, match=message):
            EMA(nn.ReLU(), **settings)


@pytest.mark.parametrize("buffers", ["own", "average"])
def test_an_update_reads_no_value_back_from_the_device(buffers):
    student = network().to("meta")  # where tensors have no values: reading one raises
    ema = EMA(student, buffers=buffers).to("meta")
    ema.update(student, 0)
    ema.update(student, 7)
    with pytest.raises(RuntimeError):
        ema.n_averaged.item()
