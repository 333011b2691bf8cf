"""A method of a user's own, trained by the engine."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from small import Entropic, network, pairs, same
from torch import nn

import stseg
from stseg import Batch, DataError, Losses, Method, Segmenter, TrainConfig, UnreadableImageError, WeakAugment, fit
from stseg.methods import Supervised

IMAGES = [image for image, _ in pairs(6, seed=2)]


def config(**changes) -> TrainConfig:
    return TrainConfig(**{"steps": 6, "batch_size": 2, "weak": WeakAugment(12), "lr": 0.05, **changes})


class Averaged(Entropic):
    """Moves a copy of the weights after the others, counts its steps, and is evaluated by the copy."""

    def __init__(self, *, stop: int | None = None) -> None:
        super().__init__(nn.Sequential(network(), nn.Dropout(0.3)))
        self.average = Segmenter(nn.Sequential(network(), nn.Dropout(0.3))).requires_grad_(False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self._stop = stop

    def after_step(self, batch: Batch) -> None:
        if batch.step == self._stop:
            raise KeyboardInterrupt
        assert not torch.is_grad_enabled()
        for slow, fast in zip(self.average.parameters(), self.model.parameters(), strict=True):
            slow.lerp_(fast, 0.5)
        self.count += 1


def test_the_example_of_the_class_is_the_two_terms_by_hand():
    """One batch is the whole of both data sets, so their order does not matter."""
    result = fit(Entropic(network()), pairs(2), config(steps=5, weak=None), unlabeled=IMAGES[:2], progress=False)
    model = Segmenter(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    images, masks = torch.stack([i for i, _ in pairs(2)]), torch.stack([m for _, m in pairs(2)]).long()
    expected = []
    for step in range(5):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 5) ** 0.9
        supervised = F.cross_entropy(model(images), masks)
        p = model(torch.stack(IMAGES[:2])).softmax(1)
        uncertainty = -(p * p.log()).sum(1).mean()
        loss = supervised + 0.1 * uncertainty
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append((loss.item(), uncertainty.item()))
    assert [(row["loss"], row["entropy"]) for row in result.history] == [pytest.approx(e, rel=1e-4) for e in expected]
    for name, value in result.model.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_after_step_follows_each_step_with_the_new_weights():
    method = Averaged()
    result = fit(method, pairs(4), config(), unlabeled=IMAGES, snapshots=range(1, 7), progress=False)
    assert method.count == 6
    by_hand = [p.clone() for p in Averaged().average.parameters()]
    for snapshot in result.snapshots:
        by_hand = [0.5 * slow + 0.5 * fast for slow, fast in zip(by_hand, snapshot.parameters(), strict=True)]
    for value, expected in zip(method.average.parameters(), by_hand, strict=True):
        torch.testing.assert_close(value, expected)


def test_state_in_buffers_and_averages_resumes_exactly(tmp_path):
    settings = config(save_every=0, optimizer="adamw")
    whole, rest = Averaged(), Averaged()
    fit(whole, pairs(4), settings, unlabeled=IMAGES, workdir=tmp_path / "a", progress=False)
    for stop in (2, 4):
        with pytest.raises(KeyboardInterrupt):
            fit(Averaged(stop=stop), pairs(4), settings, unlabeled=IMAGES, workdir=tmp_path / "b", progress=False)
    saved = torch.load(tmp_path / "b" / "state" / "latest.pt", weights_only=True)
    assert saved["progress"]["step"] == saved["method"]["count"] == 4
    fit(rest, pairs(4), settings, unlabeled=IMAGES, workdir=tmp_path / "b", progress=False)
    assert rest.count == 6
    assert same(whole, rest)


def test_several_optimizers_follow_one_factor():
    rates = []

    class Critical(Entropic):
        def __init__(self) -> None:
            super().__init__(network())
            self.critic = nn.Conv2d(2, 1, 1)

        def forward(self, batch):
            total, logged = super().forward(batch)
            return Losses(total + self.critic(self.model(batch.images).detach()).square().mean(), logged)

        def optimizers(self, config):
            self._made = [
                torch.optim.SGD(self.model.parameters(), lr=config.lr),
                torch.optim.Adam(self.critic.parameters(), lr=1e-3),
            ]
            return self._made

        def after_step(self, batch):
            rates.append([o.param_groups[0]["lr"] for o in self._made])

    before, method = Critical(), Critical()
    method.load_state_dict(before.state_dict())
    result = fit(method, pairs(4), config(power=2.0), unlabeled=IMAGES, progress=False)
    factors = [(1 - step / 6) ** 2 for step in range(6)]
    assert rates[1:] == [pytest.approx([0.05 * factor, 1e-3 * factor]) for factor in factors]  # the first is the trial
    assert [row["lr"] for row in result.history] == pytest.approx([0.05 * factor for factor in factors])
    assert not torch.equal(method.critic.weight, before.critic.weight)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_view_of_its_own_arrives_stacked_and_scaled(workers):
    seen = []

    class Twice(Method):
        """Two crops of each image, where the second comes from, and no validity."""

        def __init__(self) -> None:
            super().__init__()
            self.model = Segmenter(network())

        def view(self, image, weak):
            nothing = torch.zeros(image.shape[-2:], dtype=torch.uint8)
            crops = [weak(image, nothing)[0] for _ in range(2)]
            return {"crops": tuple(crops), "more": {"height": image.shape[-2], "whole": image}}, None

        def forward(self, batch):
            seen.append(batch)
            first, second = batch.unlabeled["crops"]
            return Losses((self.model(first) - self.model(second)).square().mean() + self.model(batch.images).mean())

    data = [(image * 255).to(torch.uint8) for image in IMAGES]
    fit(Twice(), pairs(4), config(unlabeled_batch_size=3, num_workers=workers), unlabeled=data, progress=False)
    for batch in seen:
        assert batch.valid is None
        first, second = batch.unlabeled["crops"]
        assert first.shape == second.shape == (3, 3, 12, 12)
        assert not torch.equal(first, second)
        assert first.dtype == torch.float32
        assert batch.unlabeled["more"]["whole"].max() <= 1
        assert batch.unlabeled["more"]["height"].tolist() == [16, 16, 16]
    assert torch.equal(seen[0].unlabeled["crops"][1], seen[1].unlabeled["crops"][1])  # the trial, and the first step


class TestUnlabeled:
    def test_are_refused_by_a_method_that_does_not_learn_from_them(self):
        for method in (network(), Supervised(network())):
            with pytest.raises(ValueError, match="Supervised does not learn from unlabeled images; expected"):
                fit(method, pairs(4), config(), unlabeled=IMAGES, progress=False)

    def test_are_needed_by_a_method_that_learns_from_them(self):
        with pytest.raises(ValueError, match=r"Entropic learns from unlabeled images; expected fit\("):
            fit(Entropic(network()), pairs(4), config(), progress=False)

    def test_are_not_empty(self):
        with pytest.raises(DataError, match="the unlabeled data set is empty"):
            fit(Entropic(network()), pairs(4), config(), unlabeled=[], progress=False)

    def test_that_cannot_be_read_are_named(self):
        class Broken(list):
            ids = tuple("abcdef")

            def __getitem__(self, index):
                if index == 4:
                    raise UnreadableImageError("e.png cannot be read")
                return super().__getitem__(index)

        with pytest.raises(UnreadableImageError, match=r"e\.png cannot be read"):
            fit(Entropic(network()), pairs(4), config(), unlabeled=Broken(IMAGES), progress=False)

    def test_of_other_channels_are_named(self):
        with pytest.raises(DataError, match="image '6' has 1 channels; expected 3"):
            fit(Entropic(network()), pairs(4), config(), unlabeled=[*IMAGES, IMAGES[0][:1]], progress=False)

    def test_that_are_validated_on_are_refused(self):
        class Named(list):
            ids = ("a", "b", "c")

        held_out, images = Named(pairs(3)), Named(IMAGES[:3])
        images.ids = ("d", "e", "b")
        with pytest.raises(DataError, match="the id 'b' is in both the unlabeled and the validation data set"):
            fit(Entropic(network()), pairs(4), config(), unlabeled=images, val=held_out, progress=False)

    def test_may_be_those_of_the_labeled_images(self):
        class Named(list):
            ids = ("a", "b", "c", "d")

        data = Named(pairs(4))
        assert fit(Entropic(network()), data, config(), unlabeled=data, progress=False).history

    def test_are_read_again_only_for_their_fingerprint_once_the_stage_is_finished(self, tmp_path):
        read = []

        class Counted(list):
            def __getitem__(self, index):
                read.append(index)
                return super().__getitem__(index)

        data = Counted(torch.rand(300, 3, 6, 6, generator=torch.Generator().manual_seed(0)))

        def run():
            return fit(Entropic(network()), pairs(4), config(), unlabeled=data, workdir=tmp_path, progress=False)

        first = run()
        assert set(read) == set(range(300))
        read.clear()
        second = run()
        assert len(read) == len(set(read)) <= 256
        assert same(first.model, second.model)
        data[0] = data[0].flip(-1)
        with pytest.raises(
            stseg.WorkdirMismatchError, match=r"data\.unlabeled is '300 items, .*' there and '300 items"
        ):
            run()

    def test_may_be_fewer_than_a_batch(self):
        result = fit(
            Entropic(network()), pairs(4), config(unlabeled_batch_size=5), unlabeled=IMAGES[:1], progress=False
        )
        assert all(math.isfinite(row["entropy"]) for row in result.history)

    def test_set_the_length_of_an_epoch_where_they_are_more(self):
        settings = TrainConfig(epochs=2, batch_size=2, unlabeled_batch_size=1, weak=None)
        result = fit(Entropic(network()), pairs(4), settings, unlabeled=IMAGES, progress=False)
        assert [(row["epoch"], row["step"]) for row in result.history] == [(1, 6), (2, 12)]
