from __future__ import annotations

import pytest
import torch

from stseg.modules import representation_head


def test_has_as_many_parameters_as_the_authors():
    assert sum(p.numel() for p in representation_head(512).parameters()) == 1_836_800


def test_keeps_the_size():
    assert representation_head(4, 8)(torch.rand(2, 4, 5, 7)).shape == (2, 8, 5, 7)


def test_checks_its_dropout():
    with pytest.raises(ValueError, match="dropout is 2"):
        representation_head(4, dropout=2)
