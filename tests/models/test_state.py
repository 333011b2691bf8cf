import copy

import pytest
import torch
from small import network
from torch import nn

import stseg
from stseg.models.segmenter import Segmenter
from stseg.models.state import cpu_state, device_of, evaluating, fingerprint, laid_out, place


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


# --- place


class Views(nn.Module):
    """Reads its feature maps channel by channel, as ``view`` can only if they lie so."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        y = self.first(x)
        return self.last(y.view(y.shape[0], -1).sin().view(y.shape))


def channels_last(weight):
    return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def test_a_placed_network_is_the_same_but_for_the_layout():
    model, images = small_network().eval(), torch.rand(2, 3, 9, 9)
    before, mark, weight = cpu_state(model), fingerprint(model), model[0].weight
    expected = model(images)
    assert place(model, "cpu") is model
    assert model[0].weight is weight
    assert channels_last(weight)
    assert fingerprint(model) == mark
    after = cpu_state(model)
    assert all(torch.equal(before[name], after[name]) and after[name].is_contiguous() for name in before)
    torch.testing.assert_close(model(images), expected)
    assert model[0](images).is_contiguous(memory_format=torch.channels_last)


def test_inside_a_sweep_alone_networks_are_laid_out():
    model, images = network().eval(), [torch.rand(3, 9, 9) for _ in range(3)]
    pointer, expected = model[0].weight.data_ptr(), model(images[0][None])
    seen = []
    model.register_forward_hook(lambda *_: seen.append(channels_last(model[0].weight)))
    stseg.PseudoLabeler(Segmenter(model, mean=None, std=None, stride=1), num_classes=2, progress=False).label(images)
    assert seen
    assert all(seen)
    assert model[0].weight.data_ptr() == pointer
    assert model[0].weight.is_contiguous()
    assert torch.equal(model(images[0][None]), expected)


def test_weights_have_their_memory_back_after_an_error():
    model, tied = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
    tied.weight = model.weight
    pointer = model.weight.data_ptr()

    def fail():
        with laid_out(nn.ModuleList([model, tied]), model):
            assert channels_last(tied.weight)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert model.weight.data_ptr() == tied.weight.data_ptr() == pointer
    assert model.weight.is_contiguous()


def test_other_weights_than_those_of_convolutions_of_images_stay_as_they_are():
    model = nn.ModuleDict({"3d": nn.Conv3d(3, 2, 3), "1d": nn.Conv1d(3, 2, 3), "linear": nn.Linear(3, 2)})
    model.register_parameter("position", nn.Parameter(torch.rand(1, 4, 3, 3)))
    place(model)
    assert all(each.is_contiguous() for each in model.parameters())


def test_memory_that_others_use_is_left_to_them():
    shared, part = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
    shared.share_memory()
    flat = torch.rand(200)
    part.weight.data = flat[:108].view(4, 3, 3, 3)
    for model in (shared, part):
        pointer = model.weight.data_ptr()
        assert place(model).weight.data_ptr() == pointer


def test_compiled_networks_are_left_to_the_compiler():
    for wrap in (lambda net: torch.compile(net), lambda net: Segmenter(torch.compile(net))):
        model = nn.Conv2d(3, 4, 3)
        place(wrap(model))
        assert model.weight.is_contiguous()
    model = nn.Conv2d(3, 4, 3)
    model.compile()
    place(Segmenter(model))
    assert model.weight.is_contiguous()


def test_a_network_in_parallel_is_laid_out():
    model = small_network()
    place(Segmenter(nn.DataParallel(model)))
    assert channels_last(model[0].weight)


@pytest.mark.parametrize("stride", [None, 1])
def test_a_network_that_views_feature_maps_gets_them_channels_first(stride):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Views()
    images = torch.rand(2, 3, 8, 8)
    expected = Segmenter(copy.deepcopy(model), stride=stride)(images)
    placed = place(Segmenter(model, stride=stride))
    assert channels_last(model.first.weight)
    assert torch.equal(placed(images), expected)
    assert model.first.weight.is_contiguous()


def test_other_errors_of_a_network_are_raised_as_they_are():
    class Fails(nn.Conv2d):
        def forward(self, x):
            raise RuntimeError("out of paper")

    model = place(Segmenter(Fails(3, 2, 3), stride=1))
    with pytest.raises(RuntimeError, match="out of paper"):
        model(torch.rand(1, 3, 8, 8))
    assert channels_last(model.network.weight)
