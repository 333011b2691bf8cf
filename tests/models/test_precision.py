import json

import pytest
import torch
from torch import nn

import stseg
from stseg.models import precision
from stseg.models.precision import _cpu_flags, autocast, casting_once, computes_bfloat16, resolve_precision

CPU, META = torch.device("cpu"), torch.device("meta")
IMAGES = [torch.rand(3, 20, 20, generator=torch.Generator().manual_seed(0)) for _ in range(6)]
LABELED = [(image, (image[0] > 0.5).byte()) for image in IMAGES[:3]]


@pytest.fixture
def native(monkeypatch):
    """A function that sets of which devices bfloat16 is native."""
    return lambda *types: monkeypatch.setattr(precision, "computes_bfloat16", lambda device: device.type in types)


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Conv2d(3, 2, 1)


class TestAuto:
    def test_is_bfloat16_where_all_devices_compute_it(self, native):
        native("cpu")
        assert resolve_precision("auto", CPU) == "bf16"
        assert resolve_precision("auto", META) == resolve_precision("auto", CPU, META) == "fp32"
        native("cpu", "meta")
        assert resolve_precision("auto", CPU, META) == "bf16"

    @pytest.mark.parametrize("given", ["fp32", "bf16"])
    def test_is_not_asked_for_what_is_said(self, native, given):
        for types in ((), ("cpu",)):
            native(*types)
            assert resolve_precision(given, CPU, META) == given

    def test_is_the_default(self):
        assert stseg.TrainConfig(epochs=1).precision == "auto"

    @pytest.mark.parametrize(("types", "dtype"), [((), torch.float32), (("cpu",), torch.bfloat16)])
    def test_is_what_autocast_does(self, native, types, dtype):
        native(*types)
        with torch.autocast("cpu", torch.bfloat16), autocast(CPU, "auto"):
            assert network()(torch.rand(1, 3, 4, 4)).dtype == dtype

    def test_other_names_are_refused(self):
        with pytest.raises(ValueError, match="precision is 'fp16'; expected 'auto', 'fp32' or 'bf16'"):
            resolve_precision("fp16", CPU)


class TestNativeBfloat16:
    @pytest.mark.parametrize(
        ("flags", "expected"),
        [
            ({"avx512_bf16": True, "amx_bf16": False}, True),
            ({"avx512_bf16": False, "amx_bf16": True}, True),
            ({"avx512_f": True, "avx512_bf16": False}, False),
            ({}, False),
        ],
    )
    def test_of_a_cpu_takes_instructions_for_it(self, monkeypatch, flags, expected):
        monkeypatch.setattr(precision, "_cpu_flags", lambda: flags)
        assert computes_bfloat16(CPU) is expected
        monkeypatch.setattr(torch._C, "_has_mkldnn", False)
        assert not computes_bfloat16(CPU)

    @pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
    def test_of_a_gpu_takes_compute_capability_8(self, monkeypatch, capability, expected):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert computes_bfloat16(torch.device("cuda", 1)) is expected
        monkeypatch.setattr(torch.version, "hip", "6.0")
        assert not computes_bfloat16(torch.device("cuda", 1))

    def test_of_other_devices_is_not_guessed(self):
        assert not computes_bfloat16(META)
        assert not computes_bfloat16(torch.device("mps"))

    def test_is_read_from_the_system_where_pytorch_does_not_tell(self, monkeypatch):
        told = computes_bfloat16(CPU)
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
        _cpu_flags.cache_clear()
        try:
            assert computes_bfloat16(CPU) == told
        finally:
            _cpu_flags.cache_clear()


class TestRecords:
    """They hold what was computed in: elsewhere ``"auto"`` may be something else, which is refused."""

    def refused(self, native, start, path):
        native("cpu")
        start("auto")
        assert '"bf16"' in path.read_text()
        assert '"auto"' not in path.read_text()
        native()
        line = r"precision is 'bf16' there and 'fp32' now \(precision=\"bf16\" goes on with it\)"
        with pytest.raises(stseg.WorkdirMismatchError, match=line):
            start("auto")
        start("bf16")

    def test_of_labels(self, tmp_path, native):
        def start(choice):
            labeler = stseg.PseudoLabeler(network(), num_classes=2, precision=choice, progress=False)
            assert labeler.precision != "auto"
            labeler.label(IMAGES, tmp_path)

        self.refused(native, start, tmp_path / "labels.json")

    def test_of_scores(self, tmp_path, native):
        def start(choice):
            networks = [network(), network()]
            ranker = stseg.StabilityRanker(networks, num_classes=2, precision=choice, progress=False)
            ranker.rank(IMAGES, store=tmp_path / "scores")

        self.refused(native, start, tmp_path / "scores.json")

    def test_of_a_ranker_of_two_devices(self, native):
        native("cpu")
        networks = [network(), network().to("meta")]
        assert stseg.StabilityRanker(networks, num_classes=2).precision == "fp32"

    def test_of_a_training(self, tmp_path, native):
        def start(choice):
            config = stseg.TrainConfig(steps=3, batch_size=2, weak=stseg.WeakAugment(16), precision=choice)
            stseg.fit(network(), LABELED, config, workdir=tmp_path, progress=False)

        self.refused(native, start, tmp_path / "stage.json")

    def test_of_a_run(self, tmp_path, native):
        def start(choice):
            config = stseg.TrainConfig(steps=3, batch_size=2, weak=stseg.WeakAugment(16), precision=choice)
            trainer = stseg.SelfTrainer(
                network, num_classes=2, config=config, method="st", workdir=tmp_path, progress=False
            )
            trainer.fit(LABELED, IMAGES[3:])

        self.refused(native, start, tmp_path / "run.json")
        for record in tmp_path.glob("*/stage.json"):
            assert json.loads(record.read_text())["config"]["precision"] == "bf16"


@pytest.mark.parametrize("old", [False, True], ids=["this PyTorch", "as PyTorch 2.4"])
def test_a_network_that_predicted_without_gradients_learns_in_the_same_autocast(monkeypatch, old):
    if old:
        monkeypatch.setattr(precision, "_rounds_for_gradients", lambda: False)
    model = network()
    with autocast(CPU, "bf16"):
        with torch.no_grad():
            target = model(torch.rand(1, 3, 4, 4)).argmax(1)
        torch.nn.functional.cross_entropy(model(torch.rand(1, 3, 4, 4)), target).backward()
        assert not (old and torch.is_autocast_cache_enabled())
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert torch.is_autocast_cache_enabled()


class TestCastingOnce:
    def casts(self, model, calls=3):
        """How many weights autocast rounds."""
        with torch.profiler.profile() as profile, torch.no_grad():
            for _ in range(calls):
                with autocast(CPU, "bf16"):
                    model(torch.rand(1, 3, 4, 4))
        return sum(event.count for event in profile.key_averages() if event.key == "aten::_to_copy")

    @pytest.mark.parametrize("trained", [True, False])
    def test_rounds_weights_once_also_frozen_ones(self, trained):
        model = network().requires_grad_(trained)
        with torch.autocast("cpu", enabled=False), torch.no_grad(), autocast(CPU, "bf16"):
            expected = model(torch.ones(1, 3, 4, 4))
        every = self.casts(model)
        with casting_once(CPU, model):
            assert self.casts(model) < every
            with autocast(CPU, "bf16"):
                assert torch.equal(model(torch.ones(1, 3, 4, 4)), expected)
        assert {parameter.requires_grad for parameter in model.parameters()} == {trained}

    def test_leaves_gradients_to_the_autocast_of_the_caller(self):
        model = network()
        with torch.autocast("cpu", torch.bfloat16):
            with casting_once(CPU, model), torch.no_grad(), autocast(CPU, "bf16"):
                model(torch.rand(1, 3, 4, 4))
            model(torch.rand(1, 3, 4, 4)).sum().backward()
        assert model.weight.grad is not None
