from __future__ import annotations

import numpy as np
import pytest
import torch

from stseg.functional import feature_matching


def test_is_the_mean_over_channels_of_the_distance_of_the_means():
    generator = torch.Generator().manual_seed(0)
    real, fake = torch.rand(3, 5, generator=generator), torch.rand(2, 5, generator=generator)
    wanted = sum(abs(np.mean(real.numpy()[:, c]) - np.mean(fake.numpy()[:, c])) for c in range(5)) / 5
    assert feature_matching(real, fake).item() == pytest.approx(wanted, rel=1e-6)


def test_has_the_gradient_of_the_formula():
    generator = torch.Generator().manual_seed(0)
    real, fake = (torch.rand(2, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x: feature_matching(real, x), (fake.requires_grad_(),))


def test_half_precision_is_averaged_in_float32():
    assert feature_matching(torch.ones(2, 4).bfloat16(), torch.zeros(1, 4)).dtype == torch.float32


@pytest.mark.parametrize("shapes", [((2, 3), (2, 4)), ((0, 3), (2, 3)), ((2, 3, 1), (2, 3))])
def test_names_shapes_that_do_not_match(shapes):
    with pytest.raises(ValueError, match="real has shape"):
        feature_matching(*(torch.zeros(shape) for shape in shapes))
