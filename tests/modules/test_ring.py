from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stseg.modules import Ring


@settings(max_examples=100, deadline=None)
@given(size=st.integers(0, 7), wanted=st.lists(st.lists(st.booleans(), max_size=10), max_size=6), given=st.booleans())
def test_holds_the_latest_of_those_that_are_wanted(size, wanted, given):
    ring, added, seen = Ring(size, width=2), [], 0
    for where in wanted:
        numbers = torch.arange(seen, seen + len(where))
        added += [n for n, want in zip(numbers.tolist(), where, strict=True) if want or not given]
        seen += len(where)
        options = {"where": torch.tensor(where, dtype=torch.bool)} if given else {}
        ring.add(torch.stack([numbers.float(), -numbers.float()], 1), numbers, **options)
    kept = [label for label in ring.labels.tolist() if label >= 0]
    assert sorted(kept) == added[len(added) - min(size, len(added)) :]
    for vector, label in zip(ring.vectors.tolist(), ring.labels.tolist(), strict=True):
        assert vector == ([label, -label] if label >= 0 else [0, 0])


def test_its_state_is_its_state_dict():
    ring, other = Ring(3, 1), Ring(3, 1)
    ring.add(torch.ones(2, 1), torch.tensor([4, 5]))
    other.load_state_dict(ring.state_dict())
    for each in (ring, other):
        each.add(torch.full((2, 1), 2.0), torch.tensor([6, 7]))
    assert torch.equal(ring.labels, other.labels)
    assert ring.labels.tolist() == [7, 5, 6]


def test_keeps_no_gradient():
    ring = Ring(2, 1)
    ring.add(torch.ones(1, 1, requires_grad=True) * 2, torch.tensor([0]))
    assert not ring.vectors.requires_grad


@pytest.mark.parametrize(("size", "width"), [(-1, 2), (2, 0), (1.5, 2)])
def test_checks_its_settings(size, width):
    with pytest.raises(ValueError, match="size is"):
        Ring(size, width)


def test_names_shapes_that_do_not_match():
    with pytest.raises(ValueError, match=r"vectors have shape \(2, 3\)"):
        Ring(2, 2).add(torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(ValueError, match=r"where \(1,\)"):
        Ring(2, 2).add(torch.zeros(2, 2), torch.zeros(2), where=torch.ones(1, dtype=torch.bool))
