from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from stseg.functional import directional_contrast


def drawn(rows: int = 5, others: int = 7, width: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    vectors = [F.normalize(torch.randn(count, width, generator=generator), dim=1) for count in (rows, rows, others)]
    return {
        **dict(zip(("anchors", "positives", "negatives"), vectors, strict=True)),
        "labels": torch.randint(0, 3, (rows,), generator=generator),
        "negative_labels": torch.randint(-1, 3, (others,), generator=generator),
        "where": torch.tensor([True, False, True, True, False]),
    }


@pytest.mark.parametrize("block", [1, 3, 8000])
def test_is_the_formula(block):
    given = drawn()
    losses = []
    for row, counts in enumerate(given["where"].tolist()):
        if counts:
            own = math.exp(float(given["anchors"][row] @ given["positives"][row]) / 0.5)
            others = sum(
                math.exp(float(given["anchors"][row] @ vector) / 0.5)
                for vector, label in zip(given["negatives"], given["negative_labels"], strict=True)
                if label >= 0 and label != given["labels"][row]
            )
            losses.append(-math.log(own / (own + others)))
    assert directional_contrast(**given, temperature=0.5, block=block).item() == pytest.approx(
        sum(losses) / len(losses), rel=1e-5
    )


def test_gradients_do_not_depend_on_the_block_and_reach_the_anchors_alone():
    gradients = []
    for block in (2, 8000):
        given = {name: x.requires_grad_() if x.is_floating_point() else x for name, x in drawn().items()}
        directional_contrast(**given, block=block).backward()
        gradients.append(given["anchors"].grad)
        assert given["positives"].grad is given["negatives"].grad is None
        assert not given["anchors"].grad[[1, 4]].any()
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("empty", ["where", "negatives", "classes"])
def test_is_0_and_has_a_gradient_of_0_where_nothing_counts(empty):
    given = drawn()
    if empty == "where":
        given["where"][:] = False
    elif empty == "negatives":
        given["negatives"], given["negative_labels"] = given["negatives"][:0], given["negative_labels"][:0]
    else:
        given["negative_labels"][:] = -1
    loss = directional_contrast(**{**given, "anchors": given["anchors"].requires_grad_()})
    loss.backward()
    assert loss == 0
    assert not given["anchors"].grad.any()


def test_is_computed_in_float32_under_autocast():
    given = drawn()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = directional_contrast(**given)
    assert torch.equal(found, directional_contrast(**given))


def test_names_shapes_that_do_not_match():
    with pytest.raises(ValueError, match=r"anchors have shape \(5, 4\).*labels \(4,\)"):
        directional_contrast(**{**drawn(), "labels": torch.zeros(4)})


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"block": 0}])
def test_checks_its_settings(settings):
    with pytest.raises(ValueError, match="above 0"):
        directional_contrast(**drawn(), **settings)
