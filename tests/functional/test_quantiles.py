from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stseg.functional import quantile_over_processes


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(-100, 100, width=32), st.booleans()), min_size=1), st.floats(0, 1))
def test_is_the_percentile_of_numpy(pairs, share):
    values, where = (torch.tensor(column) for column in zip(*pairs, strict=True))
    found = quantile_over_processes(values, share, where=where)
    if where.any():
        assert found.item() == pytest.approx(np.percentile(values[where].numpy(), 100 * share), rel=1e-4, abs=1e-4)
    else:
        assert found == torch.inf


def test_checks_its_arguments():
    with pytest.raises(ValueError, match="share is 2"):
        quantile_over_processes(torch.zeros(2), 2, where=torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="where has shape"):
        quantile_over_processes(torch.zeros(2), 1, where=torch.ones(3, dtype=torch.bool))


def test_reads_no_value_back_from_the_device():
    values = torch.zeros(9, device="meta")
    assert quantile_over_processes(values, 0.4, where=values == 0).shape == ()
