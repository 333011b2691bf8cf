from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from stseg.seeds import derive_seed, fixed_seed, seed_step


class TestSeedOf:
    def test_differs_for_other_seeds_and_other_parts(self):
        parts = [
            (seed, *keys) for seed in range(20) for keys in [("order", 0), ("order", 1), ("sample", 1), ("x",), ()]
        ]
        assert len({derive_seed(*part) for part in parts}) == len(parts)

    def test_is_the_same_in_every_run(self):
        assert derive_seed(0, "teacher") == derive_seed(0, "teacher")
        assert 0 <= derive_seed(-5, "teacher") < 2**64


class TestSeeded:
    def draws(self):
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random() for _ in range(3)]  # noqa: NPY002

    def test_makes_all_three_generators_start_anew(self):
        with fixed_seed(4):
            first = self.draws()
        with fixed_seed(4):
            assert self.draws() == first
        with fixed_seed(5):
            assert self.draws() != first

    def test_gives_the_callers_state_back_even_after_an_error(self):
        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002
        random.seed(1)
        expected = self.draws()
        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002
        random.seed(1)
        with pytest.raises(ZeroDivisionError), fixed_seed(9):
            self.draws()[0][0] / 0
        assert self.draws() == expected


def test_a_step_draws_what_it_draws_after_torchs_own_seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        expected = torch.rand(3)
        seed_step(7, torch.device("cpu"))
        assert torch.equal(torch.rand(3), expected)
