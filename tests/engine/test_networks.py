"""Networks that train other than they predict, are frozen in part, or come in a wrapper."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import pytest
import segmentation_models_pytorch as smp
import torch
from safetensors.torch import load_file
from torch import nn

import stseg
from stseg import NetworkError
from stseg.engine.optimizers import parameter_groups
from stseg.errors import NetworkWarning
from stseg.methods import CPS, FixMatch, MeanTeacher, Supervised, UniMatch
from stseg.models.state import train_unfrozen

CONFIG = stseg.TrainConfig(steps=3, batch_size=2, weak=stseg.WeakAugment(16), optimizer="adamw", lr=1e-2)
GENERATOR = torch.Generator().manual_seed(0)
IMAGES = [torch.rand(3, 20, 20, generator=GENERATOR) for _ in range(6)]
LABELED = [(image, (image[0] > 0.5).byte()) for image in IMAGES[:4]]


class Net(nn.Module):
    """An encoder with batch normalization and dropout, and a head."""

    def __init__(self, channels=3):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout())
        self.head = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))

    def forward(self, x):
        return self.head(self.encoder(x))


class TwoHeads(Net):
    def __init__(self, give):
        super().__init__()
        self.aux, self.give = nn.Conv2d(4, 2, 1), give

    def forward(self, x):
        features = self.encoder(x)
        return self.give(self.training, self.aux(features), self.head(features))


def fit(network, config=CONFIG, **options):
    return stseg.fit(network, LABELED, config, progress=False, **options)


def run(make_model, method="supervised", **options):
    trainer = stseg.SelfTrainer(make_model, num_classes=2, config=CONFIG, method=method, progress=False, **options)
    return trainer.fit(LABELED, IMAGES[2:])


class TestWhatTrainsIsWhatPredicts:
    @pytest.mark.parametrize(
        "give",
        [
            lambda training, aux, main: (aux, main) if training else main,
            lambda training, aux, main: [main, aux] if training else main,
            lambda training, aux, main: [aux, main],
            lambda training, aux, main: (main, [aux]) if training else main,
            lambda training, aux, main: (main, {"aux": aux}) if training else main,
        ],
    )
    def test_several_maps_need_select(self, give):
        for attempt in (lambda make: fit(make()), run):
            with pytest.raises(NetworkError, match=r"2 maps, .*select=[01]\)"):
                attempt(lambda: TwoHeads(give))

    def test_select_picks_the_one_that_learns(self):
        network = TwoHeads(lambda training, aux, main: (aux, main) if training else main)
        before = copy.deepcopy(network.state_dict())
        model = stseg.Segmenter(network, select=1)
        with pytest.warns(NetworkWarning, match=r"2 trainable parameters .*'model\.network\.aux\.weight'"):
            fit(model)
        assert not torch.equal(network.head[1].weight, before["head.1.weight"])
        assert torch.equal(network.aux.weight, before["aux.weight"])

    def test_another_map_in_training_is_warned_of(self):
        """It returns one map, but not the one that predicts."""
        network = TwoHeads(lambda training, aux, main: aux if training else main)
        with pytest.warns(NetworkWarning, match=r"what trains is not what predicts"):
            fit(network)

    def test_what_is_named_out_is_the_logits(self):
        network = TwoHeads(lambda training, aux, main: {"out": main, "aux": aux})
        with pytest.warns(NetworkWarning, match="get no gradient"):
            fit(network)
        network.aux.requires_grad_(False)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fit(network)


class TestFrozenLayers:
    def frozen(self):
        network = Net()
        network.encoder.requires_grad_(False)
        network.encoder.eval()
        return network

    @pytest.mark.parametrize(
        "make", [lambda net: net, lambda net: FixMatch(net, threshold=0.1), MeanTeacher, lambda net: CPS(net, Net())]
    )
    def test_stay_as_they_are(self, make):
        network = self.frozen()
        before = copy.deepcopy(network.encoder.state_dict())
        method = make(network)
        unlabeled = IMAGES if isinstance(method, stseg.Method) else None
        fit(method, unlabeled=unlabeled)
        for name, value in network.encoder.state_dict().items():
            assert torch.equal(value, before[name]), name
        assert network.head[0].num_batches_tracked >= 3

    @pytest.mark.parametrize("method", ["supervised", "st", "st++"])
    def test_stay_as_they_are_in_every_training_of_a_run(self, method):
        made = []

        def make_model():
            made.append(self.frozen())
            return made[-1]

        result = run(make_model, method)
        for stage in result.stages.values():
            for model in (stage.model, *stage.snapshots):
                assert model.network.encoder[1].num_batches_tracked == 0
                assert model.network.head[0].num_batches_tracked > 0

    def test_of_a_network_that_was_loaded_in_evaluation_mode(self):
        network = Net().eval()
        network.encoder.requires_grad_(False)
        fit(network)
        assert network.encoder[1].num_batches_tracked == 0
        assert network.head[0].num_batches_tracked == 3

    def test_batch_normalization_alone(self):
        network = Net()
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eval()
        fit(network)
        assert network.encoder[1].num_batches_tracked == network.head[0].num_batches_tracked == 0

    def test_modes_in_training(self):
        modes = {}

        class Watched(Net):
            def forward(self, x):
                if self.training:
                    modes.update({name: layer.training for name, layer in self.named_modules()})
                return super().forward(x)

        network = Watched()
        network.encoder[3].eval()
        fit(network)
        assert [name for name, training in modes.items() if not training] == ["encoder.3"]

    def test_a_network_in_evaluation_mode_is_trained(self):
        network = Net().eval()
        train_unfrozen(network)
        assert all(layer.training for layer in network.modules())

    def test_the_averaged_teacher_of_a_loaded_network_trains_like_it(self):
        network = Net().eval()
        network.encoder.requires_grad_(False)
        method = MeanTeacher(network)
        train_unfrozen(method)
        teacher = next(each for name, each in method.named_modules() if name.endswith("module"))
        modes = {name: layer.training for name, layer in teacher.network.named_modules()}
        assert not modes["encoder.1"]
        assert modes["head.0"]


WRAPPERS = {
    "compile": lambda net: torch.compile(net, backend="eager"),
    "DataParallel": nn.DataParallel,
    "both": lambda net: torch.compile(nn.DataParallel(net), backend="eager"),
}


class TestWrappers:
    @pytest.fixture(autouse=True)
    def clean(self):
        torch.compiler.reset()

    @pytest.mark.parametrize("kind", WRAPPERS)
    def test_give_the_weights_and_groups_of_the_bare_network(self, tmp_path, kind):
        network = Net()
        wrapped = stseg.Segmenter(WRAPPERS[kind](network))
        assert wrapped.network is network
        rates = [
            [(len(group["params"]), group["lr"]) for group in parameter_groups(stseg.Segmenter(each), CONFIG)]
            for each in (network, WRAPPERS[kind](network))
        ]
        assert rates[0] == rates[1]
        assert len(rates[0]) == 2
        fit(WRAPPERS[kind](network), workdir=tmp_path)
        state = load_file(tmp_path / "model.safetensors")
        assert state.keys() == Net().state_dict().keys()
        Net().load_state_dict(state)
        again = Net()
        again.load_state_dict(network.state_dict())
        fit(WRAPPERS[kind](again), workdir=tmp_path)  # finished: loaded
        assert torch.equal(again.head[1].weight, state["head.1.weight"])

    @pytest.mark.parametrize("kind", WRAPPERS)
    def test_run_and_train_as_without_them(self, kind):
        results = []
        for wrap in (lambda net: net, WRAPPERS[kind]):
            torch.manual_seed(0)
            network = Net()
            # What is compiled is laid out otherwise: it rounds otherwise, which AdamW blows up where there is no
            # gradient, and drops other features.
            network.encoder[-1].p = 0.0
            fit(wrap(network), replace(CONFIG, optimizer="sgd"))
            results.append(network.state_dict())
        for name, value in results[0].items():
            torch.testing.assert_close(results[1][name], value)

    def test_are_what_runs(self):
        calls = []

        def backend(module, inputs):
            calls.append(1)
            return module.forward

        model = stseg.Segmenter(torch.compile(Net(), backend=backend))
        model(torch.rand(1, 3, 16, 16))
        assert calls

    def test_a_student_starts_from_a_bare_teacher(self):
        teacher = run(Net, "st").stages["teacher"]
        trainer = stseg.SelfTrainer(
            lambda: torch.compile(Net(), backend="eager"),
            num_classes=2,
            config=CONFIG,
            method=stseg.methods.ST(student_init="teacher"),
            progress=False,
        )
        trainer.fit(LABELED, IMAGES[2:], teacher=teacher)

    def test_features_are_perturbed_in_compiled_networks(self):
        fit(UniMatch(torch.compile(Net(), backend="eager")), unlabeled=IMAGES)

    def test_of_ones_own_have_the_backbone_of_their_only_child(self):
        class Wrapper(nn.Module):
            def __init__(self, network):
                super().__init__()
                self.model = network

            def forward(self, x):
                return self.model(x)

        network = Wrapper(Net())
        assert stseg.models.backbone_of(network) is network.model.encoder
        assert len(parameter_groups(stseg.Segmenter(network), CONFIG)) == 2

    @pytest.mark.parametrize("make", [torch.jit.script, lambda net: nn.Sequential(torch.jit.script(net))])
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_script_modules_are_refused(self, make):
        for attempt in (lambda made: fit(made()), run):
            with pytest.raises(NetworkError, match="script module"):
                attempt(lambda: make(nn.Conv2d(3, 2, 1)))

    @pytest.mark.parametrize(("kind", "name"), [("compile", r"torch\.compile"), ("DataParallel", "DataParallel")])
    def test_around_the_wrapper_are_refused_with_the_line_to_write(self, kind, name):
        with pytest.raises(NetworkError, match=rf"expected stseg\.Segmenter\({name}\(network\)\)"):
            fit(WRAPPERS[kind](stseg.Segmenter(Net())))

    def test_lazy_layers_are_refused_until_they_have_a_shape(self):
        network = nn.Sequential(nn.LazyConv2d(4, 3, padding=1), nn.Conv2d(4, 2, 1))
        for attempt in (lambda: fit(network), lambda: run(lambda: copy.deepcopy(network))):
            with pytest.raises(NetworkError, match=r"called once, such as network\(torch\.zeros\(1, 3, 64, 64\)\)"):
                attempt()
        network(torch.zeros(1, 3, 64, 64))
        fit(network)


class TestOutputsThatAreNoLogits:
    @pytest.mark.parametrize("classes", [1, 2, 3])
    @pytest.mark.parametrize("last", [nn.Sigmoid(), nn.Softmax(1), nn.Tanh(), nn.Hardsigmoid()], ids=repr)
    @pytest.mark.parametrize("hidden", [False, True])
    def test_are_refused(self, classes, last, hidden):
        class Hidden(nn.Module):
            """Calls the activation as a function, so that no submodule tells."""

            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(3, classes, 3, padding=1)

            def forward(self, x):
                return type(last)(*([1] if isinstance(last, nn.Softmax) else []))(self.conv(x))

        network = Hidden() if hidden else nn.Sequential(nn.Conv2d(3, classes, 3, padding=1), last)
        with pytest.raises(NetworkError, match=r"cannot leave \[-?\d, 1\].*activation=None"):
            stseg.fit(network, LABELED, CONFIG, progress=False)

    @pytest.mark.parametrize("scale", [0.0, 1e-3, 0.1, 1.0])
    @pytest.mark.parametrize("norm", [nn.Identity, lambda: nn.GroupNorm(2, 4)])
    def test_small_logits_are_none_of_them(self, scale, norm):
        network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), norm(), nn.Conv2d(4, 2, 1))
        with torch.no_grad():
            network[2].weight.mul_(scale)
            network[2].bias.fill_(0.3 if scale else 0.0)
        fit(network)

    def test_deep_networks_do_not_overflow(self):
        layers = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()) for _ in range(60)]
        network = nn.Sequential(nn.Conv2d(3, 4, 1), *layers, nn.Conv2d(4, 2, 1))
        fit(network)
        with pytest.raises(NetworkError, match="cannot leave"):
            fit(nn.Sequential(network, nn.Sigmoid()))


class TestImagesThatAreNoImages:
    @pytest.mark.parametrize(
        "change",
        [lambda x: 255 * x, lambda x: (x - 0.45) / 0.225, lambda x: 2 * x - 1, lambda x: x + torch.inf],
        ids=["of 0..255", "normalized", "of -1..1", "infinite"],
    )
    def test_are_refused(self, change):
        images = change(torch.rand(2, 3, 16, 16))
        model = fit(Net()).model
        for use in (
            model,
            stseg.MultiScaleFlip(model),
            stseg.PseudoLabeler(model, num_classes=2),
            lambda x: stseg.StrongAugment()(x, torch.zeros(2, 16, 16, dtype=torch.uint8)),
        ):
            with pytest.raises(ValueError, match=r"images hold values from .*expected floats in \[0, 1\]"):
                use(images)

    def test_uint8_and_small_overshoots_are_taken(self):
        model = fit(Net()).model
        model(torch.randint(256, (1, 3, 16, 16), dtype=torch.uint8))
        model(torch.rand(1, 3, 16, 16) * 1.1 - 0.05)


def test_a_batch_of_one_is_found_out_before_training():
    class Pooled(Net):
        def forward(self, x):
            return self.head(self.encoder(x).mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[-2:])

    config = stseg.TrainConfig(steps=3, batch_size=1, weak=stseg.WeakAugment(16))
    for attempt in (
        lambda: stseg.fit(Pooled(), LABELED, config, progress=False),
        lambda: stseg.SelfTrainer(Pooled, num_classes=2, config=config, progress=False).fit(LABELED, IMAGES),
    ):
        with pytest.raises(stseg.MethodError, match="batch_size=2 or more"):
            attempt()


def test_random_numbers_in_evaluation_mode_are_warned_of():
    class Noisy(Net):
        def forward(self, x):
            return super().forward(x + 0.1 * torch.rand(()))

    with pytest.warns(NetworkWarning, match="other logits for the same image in evaluation mode"):
        fit(Noisy())


def test_an_augmentation_that_writes_in_place_leaves_the_data_alone():
    def relabel(image, mask):
        image.mul_(0.5)
        mask[mask == 1] = 0
        return image[:, :16, :16], mask[:16, :16]

    data = [(image.clone(), mask.clone()) for image, mask in LABELED]
    config = stseg.TrainConfig(steps=3, batch_size=2, weak=relabel)
    stseg.fit(Net(), data, config, progress=False)
    for (image, mask), (before, classes) in zip(data, LABELED, strict=True):
        assert torch.equal(image, before)
        assert torch.equal(mask, classes)


@pytest.mark.parametrize(
    "loss",
    [smp.losses.FocalLoss("multiclass"), smp.losses.LovaszLoss("multiclass"), lambda z, y: (z.sum(1) * (y > 0)).mean()],
    ids=["focal", "lovasz", "own"],
)
def test_losses_that_learn_from_ignored_pixels_are_refused(loss):
    with pytest.raises(stseg.MethodError, match=r"learns from pixels with the ignore index[\s\S]*without_ignored\("):
        fit(Supervised(Net(), loss=loss))
    fit(Supervised(Net(), loss=stseg.functional.without_ignored(loss)))


@pytest.mark.parametrize(
    "loss",
    [
        smp.losses.FocalLoss("multiclass", ignore_index=255),
        smp.losses.LovaszLoss("multiclass", ignore_index=255),
        smp.losses.DiceLoss("multiclass", ignore_index=255),
        nn.CrossEntropyLoss(ignore_index=255),
        stseg.functional.ohem_cross_entropy,
    ],
    ids=["focal", "lovasz", "dice", "cross-entropy", "OHEM"],
)
def test_losses_that_ignore_them_are_taken(loss):
    fit(Supervised(Net(), loss=loss))


def test_probabilities_in_training_mode_alone_are_refused():
    class Probabilities(Net):
        def forward(self, x):
            return super().forward(x).softmax(1) if self.training else super().forward(x)

    with pytest.raises(NetworkError, match="sum to 1 at every pixel in training mode"):
        fit(Probabilities())
