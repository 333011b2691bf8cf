from __future__ import annotations

import shutil

import pytest
import segmentation_models_pytorch as smp
import torch
from small import network, pairs
from torch import nn

import stseg
from stseg import DamagedFileError, DataError, TrainConfig, WorkdirMismatchError
from stseg.methods import ST, U2PL, FixMatch, MeanTeacher, STPlusPlus

CONFIG = TrainConfig(steps=3, batch_size=2, weak=stseg.WeakAugment(16))
IMAGES = [image for image, _ in pairs(6, seed=1)]


def equal(one, other):
    image = torch.rand(2, 3, 18, 21)
    with torch.no_grad():
        return torch.equal(one(image), other(image))


def run(folder, *, make=network, method="st", **options):
    trainer = stseg.SelfTrainer(make, num_classes=2, config=CONFIG, method=method, workdir=folder, progress=False)
    return trainer.fit(pairs(3), IMAGES, **options)


def fpn(**options):
    return smp.FPN("tu-test_resnet", encoder_weights=None, classes=2, **options)


class TestRuns:
    def test_give_their_last_network_or_that_of_a_step(self, tmp_path):
        result = run(tmp_path)
        model = stseg.load(tmp_path, network(seed=3))
        assert equal(model, result.model)
        assert not model.training
        for step in ("teacher", "student"):
            assert equal(stseg.load(str(tmp_path), network(), step=step), result.stages[step].model)

    def test_of_one_training_and_of_fit_do_too(self, tmp_path):
        result = run(tmp_path / "run", method=lambda make: MeanTeacher(make()))
        assert equal(stseg.load(tmp_path / "run", network()), result.model)
        method = FixMatch(network())
        found = stseg.fit(method, pairs(3), CONFIG, unlabeled=IMAGES, workdir=tmp_path / "fit", progress=False)
        assert equal(stseg.load(tmp_path / "fit", network(seed=5)), found.model)

    def test_can_be_moved(self, tmp_path):
        result = run(tmp_path / "run")
        shutil.move(tmp_path / "run", tmp_path / "elsewhere")
        assert equal(stseg.load(tmp_path / "elsewhere", network()), result.model)

    @pytest.mark.parametrize("deploy", ["teacher", "student"])
    def test_of_a_network_inside_another_module_do_too(self, tmp_path, deploy):
        def method(make):
            return U2PL(make(), num_classes=2, channels=4, features="0", width=4, memory=9, deploy=deploy)

        result = run(tmp_path, method=method)
        assert equal(stseg.load(tmp_path, network()), result.model)

    def test_that_are_not_finished_name_what_there_is(self, tmp_path):
        run(tmp_path)
        (tmp_path / "report.html").unlink()
        shutil.rmtree(tmp_path / "student")
        with pytest.raises(DataError, match=r"is not finished; expected step=, one of its .*: 'teacher'"):
            stseg.load(tmp_path, network())
        with pytest.raises(DataError, match="has no finished training 'student'; expected one of 'teacher'"):
            stseg.load(tmp_path, network(), step="student")
        assert stseg.load(tmp_path, network(), step="teacher")

    def test_elsewhere_are_missed(self, tmp_path):
        with pytest.raises(DataError, match=r"is not a work directory: it has neither run\.json nor stage\.json"):
            stseg.load(tmp_path, network())
        stseg.fit(network(), pairs(3), CONFIG, workdir=tmp_path, progress=False)
        with pytest.raises(DataError, match="holds a single training; expected no step, got 'teacher'"):
            stseg.load(tmp_path, network(), step="teacher")
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(DataError, match="holds no finished training"):
            stseg.load(tmp_path, network())


class TestNetworks:
    def test_of_smp_are_made_again(self, tmp_path):
        def make():
            return stseg.Segmenter(fpn(decoder_dropout=0.1), mean=(0.5,), std=(0.25,), stride=32, select="out")

        result = run(tmp_path, make=make)
        model = stseg.load(tmp_path)
        assert equal(model, result.model)
        assert (model.mean, model.std, model.stride, model.select) == ((0.5,), (0.25,), 32, "out")
        assert equal(stseg.load(tmp_path, make()), result.model)

    @pytest.mark.parametrize(
        "make",
        [network, lambda: stseg.Segmenter(fpn(), select=lambda output: output), lambda: changed(fpn())],
        ids=["own", "function", "changed"],
    )
    def test_of_others_are_asked_for(self, tmp_path, make):
        run(tmp_path, make=make, method="supervised")
        with pytest.raises((DataError, WorkdirMismatchError), match=r"stseg\.load\(.*, network\)|another network"):
            stseg.load(tmp_path)

    @pytest.mark.parametrize(
        ("other", "message"),
        [
            (lambda: nn.Conv2d(3, 2, 1), "was trained with another network: .*Missing key"),
            (lambda: network(classes=3), "was trained with another network: .*size mismatch"),
            (lambda: stseg.Segmenter(network(), mean=None, std=None), r"settings of its stseg\.Segmenter, differ"),
            (lambda: nn.Sequential(*list(network())[:2], nn.SiLU(), network()[3]), "its layers, or the settings"),
        ],
    )
    def test_that_are_others_are_refused(self, tmp_path, other, message):
        run(tmp_path, method="supervised")
        with pytest.raises(WorkdirMismatchError, match=message):
            stseg.load(tmp_path, other())

    def test_in_damaged_files_are_refused(self, tmp_path):
        run(tmp_path, method="supervised")
        path = tmp_path / "teacher" / "model.safetensors"
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(DamagedFileError, match=f"{path} is damaged; delete {path} to train"):
            stseg.load(tmp_path, network())


def changed(net):
    net.segmentation_head[0] = nn.Conv2d(128, 2, 5, padding=2)
    return net


class TestTeachers:
    def test_of_any_method_label_for_st(self, tmp_path):
        teacher = run(tmp_path / "fixmatch", method=lambda make: FixMatch(make()))
        loaded = stseg.load(tmp_path / "fixmatch", network())
        one = run(None, teacher=loaded)
        other = run(None, teacher=teacher.stages["train"])
        assert equal(one.model, other.model)
        labels = stseg.PseudoLabeler(stseg.MultiScaleFlip(teacher.model), num_classes=2, progress=False).label(IMAGES)
        assert all(torch.equal(a[1], b[1]) for a, b in zip(labels, one.labels["labels"], strict=True))

    def test_may_be_larger_than_the_student(self, tmp_path):
        large = fpn()
        result = run(tmp_path, teacher=large)
        assert len(list(result.model.parameters())) == len(list(network().parameters()))
        assert not large.training
        again = run(tmp_path, teacher=large)
        assert equal(again.model, result.model)
        with pytest.raises(WorkdirMismatchError, match=r"teacher is '.*' there and '.*' now"):
            run(tmp_path, teacher=fpn())

    def test_without_snapshots_are_refused_where_they_rank(self):
        with pytest.raises(ValueError, match="ranks by the teacher's snapshots; the teacher has 0"):
            run(None, method=STPlusPlus(), teacher=network())
        ranker = stseg.ConfidenceRanker(net := network(), num_classes=2, progress=False)
        assert run(None, method=STPlusPlus(ranker=ranker), teacher=net).ranking

    def test_that_are_methods_name_their_network(self):
        with pytest.raises(TypeError, match=r"teacher is the method FixMatch; expected its network: teacher\.model"):
            run(None, method=ST(), teacher=FixMatch(network()))

    def test_that_students_cannot_start_from_are_refused_before_labeling(self, monkeypatch):
        monkeypatch.setattr(stseg.PseudoLabeler, "label", None)
        with pytest.raises(ValueError, match="student_init is 'teacher', but its weights do not fit"):
            run(None, method=ST(student_init="teacher"), teacher=fpn())

    @pytest.mark.parametrize("teacher", ["runs/first", 3, nn.Conv2d])
    def test_that_are_no_networks_are_refused(self, teacher):
        with pytest.raises(TypeError, match=r"expected a FitResult, such as .* or a network"):
            run(None, method=ST(), teacher=teacher)
