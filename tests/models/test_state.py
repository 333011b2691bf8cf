import copy

import pytest
import torch
from torch import nn

from stseg.models.segmenter import Segmenter
from stseg.models.state import cpu_state, device_of, evaluating, fingerprint


def small_network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Conv2d(4, 2, 1))


def modes(model):
    return [module.training for module in model.modules()]


# --- device_of


def test_device_is_that_of_the_parameters():
    assert device_of(nn.Linear(2, 2, device="meta")) == torch.device("meta")


def test_device_of_a_module_without_parameters_is_that_of_its_buffers():
    assert device_of(nn.BatchNorm2d(3, affine=False, device="meta")) == torch.device("meta")


def test_device_of_a_module_without_tensors_is_the_cpu():
    assert device_of(nn.ReLU()) == torch.device("cpu")


# --- frozen


@pytest.mark.parametrize("training", [True, False])
def test_everything_evaluates_inside_and_is_as_before_afterwards(training):
    model = small_network().train(training)
    model[1].train(not training)
    before = modes(model)
    with evaluating(model):
        assert not any(modes(model))
    assert modes(model) == before


def test_modes_are_as_before_after_an_error():
    model = small_network().train()
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert all(modes(model))


def test_several_models_that_share_modules_are_as_before():
    shared = nn.BatchNorm2d(3).eval()
    one, other = nn.Sequential(shared, nn.Dropout()), nn.Sequential(shared)
    before = modes(one), modes(other)
    with evaluating(one, other):
        assert not any(modes(one) + modes(other))
    assert (modes(one), modes(other)) == before


def test_frozen_may_be_nested():
    model = small_network().train()
    with evaluating(model):
        with evaluating(model):
            pass
        assert not any(modes(model))
    assert all(modes(model))


# --- cpu_state


def test_the_copy_stays_as_it_is_when_the_model_changes():
    model = small_network()
    before = copy.deepcopy(model.state_dict())
    state = cpu_state(model)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(1)
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], before[name]) for name in before)


def test_tied_weights_get_memory_of_their_own():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    state = cpu_state(model)
    assert state["0.weight"].data_ptr() != state["1.weight"].data_ptr()


def test_tensors_are_contiguous_whatever_the_memory_format():
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    assert not model.weight.is_contiguous()
    assert cpu_state(model)["weight"].is_contiguous()


def test_what_is_no_tensor_is_left_out():
    class WithExtraState(nn.Linear):
        def get_extra_state(self):
            return {"note": "text"}

        def set_extra_state(self, state):
            pass

    assert set(cpu_state(WithExtraState(2, 2))) == {"weight", "bias"}


# --- digest


def test_equal_networks_have_equal_digests():
    assert fingerprint(small_network()) == fingerprint(small_network())


def test_digest_does_not_change_with_use():
    model = Segmenter(nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Conv2d(4, 2, 1)))
    before = fingerprint(model)
    model(torch.rand(1, 3, 33, 47))
    assert fingerprint(model) == before


def test_digest_does_not_depend_on_mode_or_memory_format():
    model = small_network()
    before = fingerprint(model)
    assert fingerprint(model.eval().to(memory_format=torch.channels_last)) == before


def test_digest_survives_a_round_trip_through_a_state_dict():
    model, other = small_network(0), small_network(1)
    assert fingerprint(other) != fingerprint(model)
    other.load_state_dict(cpu_state(model))
    assert fingerprint(other) == fingerprint(model)


def test_digest_tells_a_single_changed_value_apart():
    model = small_network()
    before = fingerprint(model)
    with torch.no_grad():
        model[3].bias[1] = torch.nextafter(model[3].bias[1], torch.tensor(9.0))
    assert fingerprint(model) != before


def test_digest_tells_batch_statistics_apart():
    model = small_network()
    before = fingerprint(model)
    model(torch.rand(2, 3, 8, 8))
    assert fingerprint(model) != before


def test_digest_tells_dtypes_apart():
    model = nn.Conv2d(3, 2, 1)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    assert len({fingerprint(copy.deepcopy(model).to(d)) for d in (torch.float32, torch.float16, torch.bfloat16)}) == 3


def test_digest_tells_architectures_with_equal_weights_apart():
    convolution = nn.Conv2d(3, 2, 1)
    assert fingerprint(nn.Sequential(convolution, nn.ReLU())) != fingerprint(nn.Sequential(convolution, nn.Tanh()))


def test_digest_tells_normalizations_apart():
    network = nn.Conv2d(3, 2, 1)
    assert fingerprint(Segmenter(network)) != fingerprint(Segmenter(network, mean=None, std=None))


def test_digest_does_not_depend_on_where_things_are_in_memory():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.thing = object()

        def extra_repr(self):
            return f"thing={self.thing!r}"

    assert fingerprint(Holder()) == fingerprint(Holder())
