from __future__ import annotations

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from small import SIZES, Named, Pooled
from torch import nn
from torch.utils.data import Subset

from stseg import (
    ConfidenceRanker,
    DataError,
    MultiScaleFlip,
    NetworkError,
    PseudoLabeler,
    Segmenter,
    SelfTrainer,
    StabilityRanker,
    TrainConfig,
    UnreadableImageError,
    WeakAugment,
    WorkdirMismatchError,
    fit,
)
from stseg.functional import (
    expected_iou,
    mean_certainty,
    mean_confidence,
    pixel_agreement,
    stability,
    weighted_stability,
)
from stseg.methods import Labeling, STPlusPlus


def pictures(count=13, seed=0):
    generator = np.random.default_rng(seed)
    sizes = generator.permutation(SIZES * math.ceil(count / 3))[:count]
    return Named([torch.from_numpy(generator.integers(0, 256, (3, *size)).astype(np.uint8)) for size in sizes])


def checkpoints(count=3):
    """Networks that differ a little more from the last one the earlier they are."""
    networks = [Pooled() for _ in range(count)]
    for i, network in enumerate(networks):
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for p in network.parameters():
                p += 0.03 * (count - 1 - i) * torch.randn(p.shape, generator=generator)
    return networks


def ranker(networks=None, **options):
    options = {"num_classes": 4, "progress": False} | options
    return StabilityRanker(checkpoints() if networks is None else networks, **options)


def scores_by_loops(networks, data, num_classes=4):
    """The formula, one image at a time, on the arg max of the logits."""
    scores = []
    for image in data:
        with torch.no_grad():
            logits = [Segmenter(network).eval()(image[None])[0].numpy() for network in networks]
        *earlier, reference = (values.argmax(0) for values in logits)
        values = []
        for mask in earlier:
            ratios = []
            for c in range(num_classes):
                union = np.sum((mask == c) | (reference == c))
                if union:
                    ratios.append(np.sum((mask == c) & (reference == c)) / union)
            values.append(sum(ratios) / len(ratios))
        scores.append(sum(values) / len(values))
    return scores


def by_image(ranking):
    return [score for _, score in sorted(zip(ranking.indices, ranking.scores, strict=True))]


class TestRanker:
    @pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (3, 0), (64, 0), (2, 2)])
    def test_scores_and_orders_as_the_formula_says(self, batch_size, num_workers):
        data = pictures()
        ranking = ranker(batch_size=batch_size, num_workers=num_workers).rank(data)
        expected = scores_by_loops(checkpoints(), data)
        assert len({round(score, 6) for score in expected}) > 10, "the scores tell nothing apart"
        np.testing.assert_allclose(by_image(ranking), expected, rtol=0, atol=1e-12)
        assert list(ranking.indices) == sorted(range(13), key=lambda i: (-expected[i], i))
        assert ranking.ids == tuple(data.ids[i] for i in ranking.indices)
        assert all(type(score) is float for score in ranking.scores)

    def test_scores_a_batch(self):
        images = torch.rand(3, 3, 9, 12, generator=torch.Generator().manual_seed(0))
        scores = ranker()(images)
        assert scores.dtype == torch.float64
        np.testing.assert_allclose(scores.numpy(), scores_by_loops(checkpoints(), images), rtol=0, atol=1e-12)

    def test_scores_are_those_of_single_precision_whatever_goes_on_around(self):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ranking = ranker().rank(pictures())
        assert by_image(ranking) == by_image(ranker().rank(pictures()))
        assert by_image(ranking) != by_image(ranker(precision="bf16").rank(pictures()))

    def test_takes_the_last_checkpoint_as_the_reference(self):
        data, (first, second, last) = pictures(), checkpoints()
        scores = by_image(ranker([first, second, last]).rank(data))
        np.testing.assert_allclose(by_image(ranker([second, first, last]).rank(data)), scores, rtol=0, atol=1e-12)
        others = by_image(ranker([last, second, first]).rank(data))
        assert max(abs(a - b) for a, b in zip(scores, others, strict=True)) > 0.01
        np.testing.assert_allclose(others, scores_by_loops([last, second, first], data), rtol=0, atol=1e-12)

    def test_keeps_the_order_of_the_data_set_where_scores_are_equal(self):
        same = [Pooled(), Pooled()]
        ranking = ranker(same, batch_size=3).rank(pictures())
        assert ranking.scores == (1.0,) * 13
        assert ranking.indices == tuple(range(13))

    def test_keeps_the_order_of_equal_images_among_others(self):
        a, b, c = pictures(3)
        data = Named([b, a, c, a, b, a])
        ranking = ranker(batch_size=2).rank(data)
        place = {index: position for position, index in enumerate(ranking.indices)}
        assert place[1] < place[3] < place[5]
        assert place[0] < place[4]
        assert len(set(ranking.scores)) == 3

    def test_takes_networks_with_and_without_wrapper_and_as_a_module_list(self):
        data, (first, second, last) = pictures(4), checkpoints()
        expected = ranker([first, second, last]).rank(data)
        assert ranker([Segmenter(first), second, Segmenter(last)]).rank(data) == expected
        assert ranker(nn.ModuleList(checkpoints())).rank(data) == expected
        assert ranker(checkpoints(), device="cpu").rank(data) == expected

    def test_ignores_what_comes_after_the_image(self):
        data = pictures(4)
        items = [(image, torch.zeros(1, 1), "not looked at") for image in data]
        assert by_image(ranker().rank(items)) == by_image(ranker().rank(data))

    def test_ranks_a_subset_by_its_own_places_and_the_ids_of_the_whole(self):
        data = pictures()
        ranking = ranker().rank(Subset(data, [7, 2, 11]))
        assert sorted(ranking.indices) == [0, 1, 2]
        assert {ranking.ids[ranking.indices.index(0)]} == {"city/img_07"}

    def test_leaves_modes_gradients_and_random_numbers_alone(self):
        networks = [network.train() for network in checkpoints()]
        networks[1].norm.eval()
        made = ranker(networks)
        torch.manual_seed(0)
        expected = torch.rand(3)
        torch.manual_seed(0)
        made.rank(pictures(4))
        scores = made(torch.rand(1, 3, 9, 12, generator=torch.Generator()))
        assert torch.equal(torch.rand(3), expected)
        modes = [[m.training for m in (n, n.near, n.norm, n.drop)] for n in networks]
        assert modes == [[True] * 4, [True, True, False, True], [True] * 4]
        assert not scores.requires_grad
        assert torch.is_grad_enabled()

    @pytest.mark.parametrize("count", [0, 1])
    def test_needs_two_checkpoints(self, count):
        with pytest.raises(ValueError, match=f"got {count} checkpoints; expected two or more"):
            ranker(checkpoints()[:count])

    @pytest.mark.parametrize("network", [Pooled(), nn.Sequential(Pooled(), nn.Identity())])
    def test_refuses_a_single_network(self, network):
        with pytest.raises(TypeError, match=f"checkpoints is one network .{type(network).__name__}.; expected two"):
            ranker(network)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_classes": 1}, "num_classes is 1"),
            ({"batch_size": 0}, "batch_size is 0"),
            ({"precision": "fp16"}, "precision is 'fp16'"),
        ],
    )
    def test_refuses_arguments_that_make_no_sense(self, options, message):
        with pytest.raises(ValueError, match=message):
            ranker(**options)

    def test_refuses_an_empty_data_set_and_networks_of_other_classes(self):
        with pytest.raises(DataError, match="the data set to rank is empty"):
            ranker().rank([])
        with pytest.raises(NetworkError, match="gives 5 classes; num_classes is 4"):
            ranker([Pooled(), Pooled(classes=5)]).rank(pictures(2))

    def test_names_images_that_cannot_be_read_or_lists_them_by_choice(self):
        class Failing(Named):
            def __getitem__(self, index):
                if index in (1, 4):
                    raise OSError("disk on fire")
                return super().__getitem__(index)

        data = Failing(pictures())
        with pytest.raises(UnreadableImageError, match="item 'city/img_01': disk on fire"):
            ranker().rank(data)
        ranking = ranker().rank(data, skip_unreadable=True)
        assert [(s.index, s.id) for s in ranking.skipped] == [(1, "city/img_01"), (4, "city/img_04")]
        assert sorted(ranking.indices) == [i for i in range(13) if i not in (1, 4)]
        whole = dict(enumerate(by_image(ranker().rank(pictures()))))
        assert all(whole[i] == score for i, score in zip(ranking.indices, ranking.scores, strict=True))
        with pytest.raises(DataError, match="none of the 1 images could be read"):
            ranker().rank(Subset(data, [1]), skip_unreadable=True)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_an_error_whichever_checkpoint_gives_them(value, place):
    class Poisoned(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            logits = self.conv(x).clone()
            logits[x[:, 0, 0, 0] > 2, 1, -1, -1] = value
            return logits

    networks = checkpoints()
    networks[place] = Poisoned()
    images = torch.zeros(4, 3, 7, 7)
    assert len(ranker(networks).rank(Named(images))) == 4
    images[2] = 1.0
    with pytest.raises(NetworkError, match="NaN or infinite logits for image 'city/img_02'"):
        ranker(networks).rank(Named(images))
    with pytest.raises(NetworkError, match="NaN or infinite logits for a batch"):
        ranker(networks)(images)


class Interrupted(Named):
    """Stops the process, as it were, at one image, once there are scores."""

    def __init__(self, items, at, file):
        super().__init__(items)
        self.at, self.file = at, file

    def __getitem__(self, index):
        if index == self.at and self.file.exists() and self.file.stat().st_size:
            raise KeyboardInterrupt
        return super().__getitem__(index)


class TestResume:
    def test_does_only_what_is_not_done(self, tmp_path):
        data, file = pictures(), tmp_path / "logs" / "scores"
        with pytest.raises(KeyboardInterrupt):
            ranker(batch_size=1).rank(Interrupted(data, at=7, file=file), store=file)
        again = checkpoints()
        ranking = ranker(again).rank(data, store=file)
        assert [network.images_seen() for network in again] == [6, 6, 6]
        assert ranking == ranker().rank(data)
        once_more = checkpoints()
        assert ranker(once_more).rank(data, store=str(file)) == ranking
        assert [network.seen for network in once_more] == [[], [], []]

    def test_takes_scores_line_by_line_in_the_file_that_was_named(self, tmp_path):
        file = tmp_path / "scores[1].jsonl"
        ranking = ranker().rank(pictures(4), store=file)
        lines = file.read_text().splitlines()
        assert {tuple(json.loads(line)[:2]) for line in lines} == set(zip(ranking.ids, ranking.scores, strict=True))
        assert set(tmp_path.iterdir()) == {file, tmp_path / "scores[1].jsonl.json"}

    def test_tolerates_a_line_cut_short_wherever_it_is_cut(self, tmp_path):
        data, file = pictures(4), tmp_path / "scores"
        expected = ranker(batch_size=1).rank(data, store=file)
        whole = file.read_bytes()
        lines = whole.splitlines(keepends=True)
        first, last = len(lines[0]), len(whole) - len(lines[-1])
        for length in {0, 1, first - 1, first, first + 3, last - 1, last, last + 1, len(whole) - 1}:
            file.write_bytes(whole[:length])
            again = checkpoints()
            assert ranker(again, batch_size=1).rank(data, store=file) == expected
            assert again[0].images_seen() == 4 - whole[:length].count(b"\n")
            assert file.read_bytes() == whole

    def test_starts_over_once_the_scores_are_deleted(self, tmp_path):
        file = tmp_path / "scores"
        ranker().rank(pictures(4), store=file)
        file.unlink()
        assert len(ranker(precision="bf16").rank(pictures(4), store=file)) == 4

    def test_refuses_scores_of_others(self, tmp_path):
        file = tmp_path / "scores"
        ranker().rank(pictures(4), store=file)
        before = file.read_bytes()
        first, second, last = checkpoints()
        others = [
            ranker([second, first, last]),
            ranker([first, last]),
            ranker([first, second, Pooled(seed=1)]),
            ranker(precision="bf16"),
        ]
        for other in others:
            with pytest.raises(WorkdirMismatchError, match="was made with other settings or data"):
                other.rank(pictures(4), store=file)
        assert file.read_bytes() == before

    def test_refuses_scores_of_other_images_where_numbers_are_their_names(self, tmp_path):
        file = tmp_path / "scores"
        ranker().rank(list(pictures(4)), store=file)
        ranker().rank(list(pictures(4)), store=file)
        with pytest.raises(WorkdirMismatchError):
            ranker().rank(list(pictures(4, seed=1)), store=file)

    @pytest.mark.parametrize("content", [b"index,id,score\n0,a,0.5\n", b"notes", b"\x89PNG\r\n\x1a\n"])
    def test_refuses_a_file_of_something_else_and_leaves_it_alone(self, tmp_path, content):
        file = tmp_path / "scores"
        file.write_bytes(content)
        with pytest.raises(WorkdirMismatchError, match=r"is of unknown origin, as there is no scores\.json"):
            ranker().rank(pictures(4), store=file)
        assert file.read_bytes() == content

    @pytest.mark.parametrize("line", [b"\0\0\0\n", b'["a"]\n', b'["a", "high"]\n', b"3\n", b"\xff\n"])
    def test_refuses_broken_lines_before_any_work(self, tmp_path, line):
        file, networks = tmp_path / "scores", checkpoints()
        ranker().rank(pictures(4), store=file)
        file.write_bytes(file.read_bytes() + line)
        with pytest.raises(DataError, match="scores holds a line that is no score"):
            ranker(networks).rank(pictures(4), store=file)
        assert networks[0].seen == []

    def test_takes_no_notice_of_files_with_like_names(self, tmp_path):
        data = pictures(4)
        ranking = ranker().rank(data, store=tmp_path / "ranking")
        ranking.to_csv(tmp_path / "ranking.csv")
        assert ranker().rank(data, store=tmp_path / "ranking") == ranking

    def test_refuses_scores_of_other_images_under_the_same_ids(self, tmp_path):
        ranker().rank(pictures(4), store=tmp_path / "scores")
        with pytest.raises(WorkdirMismatchError, match="results of other images: the one called 'city/img_00' differs"):
            ranker().rank(pictures(4, seed=1), store=tmp_path / "scores")

    def test_goes_by_id_when_the_data_set_has_changed(self, tmp_path):
        data, again = pictures(), checkpoints()
        ranker().rank(Subset(data, [3, 5, 7]), store=tmp_path / "scores")
        ranking = ranker(again).rank(data, store=tmp_path / "scores")
        assert again[0].images_seen() == 10
        assert ranking == ranker().rank(data)


def of_red(masks, reference, num_classes):
    """A score of one's own, from the masks."""
    return (reference == 1).double().mean((1, 2))


class TestScores:
    def test_of_checkpoints_may_be_others(self):
        data = pictures()
        found = by_image(ranker(score=pixel_agreement, batch_size=3).rank(data))
        for image, score in zip(data, found, strict=True):
            with torch.no_grad():
                masks = [Segmenter(network).eval()(image[None])[0].argmax(0).numpy() for network in checkpoints()]
            *earlier, reference = masks
            assert score == pytest.approx(np.mean([np.mean(mask == reference) for mask in earlier]), abs=1e-12)
        assert found != by_image(ranker().rank(data))

    def test_of_ones_own_rank(self):
        ranking = ranker(score=of_red).rank(pictures())
        with torch.no_grad():
            masks = [Segmenter(checkpoints()[-1]).eval()(image[None]).argmax(1) for image in pictures()]
        expected = [float((mask == 1).double().mean()) for mask in masks]
        assert by_image(ranking) == pytest.approx(expected, abs=1e-12)

    def test_that_are_named_give_what_the_default_gives(self):
        data = pictures(4)
        assert ranker(score=stability).rank(data) == ranker().rank(data)
        assert ranker(score=partial(weighted_stability, power=0)).rank(data) == ranker().rank(data)

    def test_in_a_file_are_refused_where_they_are_others(self, tmp_path):
        data, plain, weighted = pictures(4), tmp_path / "plain", tmp_path / "weighted"
        ranker().rank(data, store=plain)
        owner = json.loads((tmp_path / "plain.json").read_text())
        assert set(owner) == {"networks", "num_classes", "precision", "score", "images", "seal"}
        ranker(score=stability).rank(data, store=plain)
        ranking = ranker(score=partial(weighted_stability, power=0.5)).rank(data, store=weighted)
        assert ranker(score=partial(weighted_stability, power=0.5)).rank(data, store=weighted) == ranking
        for file, score in [
            (plain, partial(weighted_stability, power=0.5)),
            (plain, pixel_agreement),
            (weighted, stability),
            (weighted, weighted_stability),
            (weighted, partial(weighted_stability, power=0.25)),
            (weighted, of_red),
        ]:
            with pytest.raises(WorkdirMismatchError, match="was made with other settings or data"):
                ranker(score=score).rank(data, store=file)

    @pytest.mark.parametrize(
        ("score", "message"),
        [
            (lambda *_: torch.tensor([0.5, 1.5]), "score gave 1.5 for {}; expected a number in"),
            (lambda *_: torch.tensor([0.5, -0.1], dtype=torch.float64), "score gave -0.1 for {}; expected a number in"),
            (lambda *_: torch.tensor([0.5, math.nan]), "score gave nan for {}; expected a number in"),
            (lambda *_: torch.tensor([0.5]), "score gave shape .1,. for a batch of 2 images; expected"),
            (lambda *_: torch.zeros(2, 7, 7), "score gave shape .2, 7, 7. for a batch of 2 images"),
            (lambda *_: [0.5, 0.5], "score gave list for a batch of 2 images"),
        ],
    )
    def test_that_are_none_are_refused(self, score, message):
        images = Named([torch.rand(3, 7, 7), torch.rand(3, 7, 7)])
        for made in (ranker(score=score), confident(score=score)):
            with pytest.raises(ValueError, match=message.format("image 'city/img_01'")):
                made.rank(images)
            with pytest.raises(ValueError, match=message.format("a batch of shape .2, 3, 7, 7.")):
                made(torch.stack(list(images)))

    def test_must_be_functions(self):
        for make in (ranker, confident):
            with pytest.raises(TypeError, match="score is 'entropy'; expected a function"):
                make(score="entropy")


def confident(network=None, **options):
    options = {"num_classes": 4, "progress": False} | options
    return ConfidenceRanker(Pooled() if network is None else network, **options)


class TestConfidenceRanker:
    @pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (3, 0), (2, 2)])
    def test_scores_and_orders_as_the_formula_says(self, batch_size, num_workers):
        data, network = pictures(), Segmenter(Pooled()).eval()
        ranking = confident(batch_size=batch_size, num_workers=num_workers).rank(data)
        expected = []
        for image in data:
            with torch.no_grad():
                logits = network(image[None])[0].double().numpy()
            p = np.exp(logits - logits.max(0))
            expected.append(float((p / p.sum(0)).max(0).mean()))
        assert len({round(score, 6) for score in expected}) > 10, "the scores tell nothing apart"
        np.testing.assert_allclose(by_image(ranking), expected, rtol=0, atol=1e-6)
        assert list(ranking.indices) == sorted(range(13), key=lambda i: (-expected[i], i))
        assert ranking.ids == tuple(data.ids[i] for i in ranking.indices)

    def test_of_views_is_that_of_the_mean_probability(self):
        images = torch.rand(3, 3, 9, 12, generator=torch.Generator().manual_seed(0))
        views = MultiScaleFlip(Pooled(), scales=(0.5, 1.0))
        found = confident(views)(images)
        assert found.dtype == torch.float64
        with torch.no_grad():
            probability = views.eval()(images).exp()
        torch.testing.assert_close(found, probability.amax(1).double().mean((1, 2)), rtol=0, atol=1e-6)
        _, confidence = PseudoLabeler(views, num_classes=4)(images)
        torch.testing.assert_close(found, confidence.double().mean((1, 2)), rtol=0, atol=1e-6)

    def test_ranks_by_another_score(self):
        data = pictures(4)
        for score in (mean_certainty, expected_iou, partial(expected_iou, power=0.5)):
            with torch.no_grad():
                expected = [float(score(Segmenter(Pooled()).eval()(image[None]))) for image in data]
            assert by_image(confident(score=score).rank(data)) == pytest.approx(expected, abs=1e-6)

    def test_leaves_modes_and_gradients_alone(self):
        network = Pooled().train()
        network.norm.eval()
        assert not confident(network)(torch.rand(1, 3, 9, 12)).requires_grad
        assert [m.training for m in (network, network.near, network.norm, network.drop)] == [True, True, False, True]

    def test_goes_on_where_it_was_killed_and_refuses_scores_of_others(self, tmp_path):
        data, file, again = pictures(), tmp_path / "scores", Pooled()
        with pytest.raises(KeyboardInterrupt):
            confident(batch_size=1).rank(Interrupted(data, at=7, file=file), store=file)
        ranking = confident(again).rank(data, store=file)
        assert again.images_seen() == 6
        assert by_image(ranking) == pytest.approx(by_image(confident().rank(data)), abs=1e-6)
        others = [
            confident(Pooled(seed=1)),
            confident(MultiScaleFlip(Pooled())),
            confident(score=mean_certainty),
            confident(precision="bf16"),
            ranker(),
        ]
        for other in others:
            with pytest.raises(WorkdirMismatchError, match="was made with other settings or data"):
                other.rank(data, store=file)

    def test_names_images_whose_logits_are_not_finite(self):
        class Poisoned(nn.Module):
            def __init__(self, value):
                super().__init__()
                self.conv, self.value = nn.Conv2d(3, 4, 1), value

            def forward(self, x):
                logits = self.conv(x).clone()
                logits[x[:, 0, 0, 0] > 2, 1, -1, -1] = self.value
                return logits

        images = torch.zeros(4, 3, 7, 7)
        images[2] = 1.0
        for value in (math.nan, math.inf):
            with pytest.raises(NetworkError, match="NaN or infinite logits for image 'city/img_02'"):
                confident(Poisoned(value)).rank(Named(images))
            with pytest.raises(NetworkError, match="NaN or infinite logits for a batch"):
                confident(Poisoned(value))(images)
        assert len(confident(Poisoned(-math.inf)).rank(Named(images))) == 4  # a class that is ruled out

    def test_lists_what_cannot_be_read_by_choice(self):
        class Failing(Named):
            def __getitem__(self, index):
                if index == 1:
                    raise OSError("disk on fire")
                return super().__getitem__(index)

        data = Failing(pictures(4))
        with pytest.raises(UnreadableImageError, match="item 'city/img_01': disk on fire"):
            confident().rank(data)
        assert [s.id for s in confident().rank(data, skip_unreadable=True).skipped] == ["city/img_01"]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_classes": 1}, "num_classes is 1"),
            ({"batch_size": 0}, "batch_size is 0"),
            ({"precision": "fp16"}, "precision is 'fp16'"),
        ],
    )
    def test_refuses_arguments_that_make_no_sense(self, options, message):
        with pytest.raises(ValueError, match=message):
            confident(**options)

    def test_refuses_what_is_no_network_and_networks_of_other_classes(self):
        with pytest.raises(TypeError, match="expected a network"):
            confident([Pooled()])
        with pytest.raises(NetworkError, match="gives 5 classes; num_classes is 4"):
            confident(Pooled(classes=5)).rank(pictures(2))
        with pytest.raises(DataError, match="the data set to rank is empty"):
            confident().rank([])


class TestInARun:
    """A ranker that needs the teacher: train that first, then hand both in."""

    config = TrainConfig(steps=3, batch_size=2, weak=WeakAugment(8))

    def trainer(self, ranker, **options):
        method = STPlusPlus(ranker=ranker, labeling=Labeling(tta=None))
        options |= {"num_classes": 4, "config": self.config, "progress": False}
        return SelfTrainer(lambda: nn.Conv2d(3, 4, 1), method=method, **options)

    def test_takes_the_place_of_stability_and_is_part_of_the_record(self, tmp_path):
        images = [torch.rand(3, 9, 12, generator=torch.Generator().manual_seed(seed)) for seed in range(8)]
        labeled = Named([(image, (image[0] > 0.5).byte()) for image in images[:2]], ["a", "b"])
        unlabeled = Named(images[2:])
        teacher = fit(nn.Conv2d(3, 4, 1), labeled, self.config, snapshots=[1, 2, 3], progress=False)

        def run(ranker):
            return self.trainer(ranker, workdir=tmp_path).fit(labeled, unlabeled, teacher=teacher)

        chosen = confident(teacher.model, score=expected_iou)
        result = run(chosen)
        assert result.ranking == chosen.rank(unlabeled)
        assert result.labels["reliable"].ids == list(result.ranking.ids[:3])
        assert run(confident(teacher.model, score=expected_iou)).ranking == result.ranking
        for other in (
            confident(teacher.model),
            confident(nn.Conv2d(3, 4, 1), score=expected_iou),
            ranker(teacher.snapshots),
            ranker(teacher.snapshots, score=pixel_agreement),
        ):
            with pytest.raises(WorkdirMismatchError, match=r"method\.ranker\.\w+ is .* there and .* now"):
                run(other)

    def test_rankers_are_told_apart_by_their_provenance(self):
        assert ranker().provenance() == ranker().provenance()
        assert confident().provenance() == confident().provenance()
        made = [ranker(), ranker(score=pixel_agreement), ranker(checkpoints(2)), confident(), confident(score=of_red)]
        assert len({json.dumps(one.provenance()) for one in made}) == len(made)

    def test_repr_shows_settings_without_reading_weights(self, monkeypatch):
        one = confident(score=mean_confidence)
        monkeypatch.setattr(type(one), "provenance", None)
        assert "score=stseg.functional.confidence.mean_confidence" in repr(one)
