from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import stseg
from stseg import Batch
from stseg.augment import ClassMix
from stseg.methods import FixMatch

few = settings(max_examples=25, deadline=None)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


class TestClassMix:
    @few
    @given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.integers(1, 9), st.integers(0, 99))
    def test_moves_half_of_the_classes_to_the_next_image(self, batch, height, width, classes, seed):
        generator = torch.Generator().manual_seed(seed)
        images = torch.rand(batch, 3, height, width, generator=generator)
        labels = torch.randint(-1, classes, (batch, height, width), generator=generator)
        labels[labels == 4] = 255
        mix = ClassMix()
        where = mix.draw(labels, generator)
        mixed, new_labels, other = mix.transform(where, images, labels, images[:, 0])
        for b in range(batch):
            partner = (b + 1) % batch
            present = set(labels[b].flatten().tolist()) - {-1, 255}
            chosen = set(labels[b][where[b]].tolist())
            assert chosen <= present
            assert len(chosen) == len(present) // 2
            for y in range(height):
                for x in range(width):
                    own = int(labels[b, y, x]) in chosen
                    assert where[b, y, x] == own
                    source = b if own else partner
                    assert torch.equal(mixed[b, :, y, x], images[source, :, y, x])
                    assert new_labels[b, y, x] == labels[source, y, x]
                    assert other[b, y, x] == images[source, 0, y, x]

    def test_chooses_every_class_equally_often(self):
        labels = torch.arange(5).view(1, 5, 1).repeat(6000, 1, 1)
        count = ClassMix().draw(labels)[:, :, 0].sum(0).numpy()
        assert count.sum() == 2 * 6000
        assert stats.chisquare(count).pvalue > 1e-3

    def test_a_call_draws_what_draw_draws(self):
        images, labels, generator = torch.rand(3, 3, 6, 6), torch.randint(5, (3, 6, 6)), torch.Generator()
        mix = ClassMix(num_classes=5)
        wanted = mix.transform(mix.draw(labels, generator.manual_seed(3)), images, labels)
        found = mix(images, labels, generator=generator.manual_seed(3))
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))

    def test_labels_of_uint8_are_taken(self):
        labels = torch.randint(3, (2, 6, 6), dtype=torch.uint8)
        assert ClassMix()(torch.rand(2, 3, 6, 6), labels)[1].dtype == torch.uint8

    def test_with_a_number_of_classes_reads_no_value_back_from_the_device(self):
        images, labels = torch.empty(2, 3, 4, 5, device="meta"), torch.empty(2, 4, 5, device="meta", dtype=torch.long)
        assert [x.shape for x in ClassMix(num_classes=3)(images, labels)] == [images.shape, labels.shape]

    def test_refuses_what_it_cannot_mix(self):
        with pytest.raises(ValueError, match="num_classes is 0; expected 1 or more"):
            ClassMix(num_classes=0)
        with pytest.raises(TypeError, match=r"labels is torch.float32; expected integer class indices"):
            ClassMix()(torch.zeros(2, 3, 4, 5), torch.zeros(2, 4, 5))
        with pytest.raises(ValueError, match=r"where has shape \(2, 4, 5\), into \(3, 3, 4, 5\)"):
            ClassMix()(torch.zeros(3, 3, 4, 5), torch.zeros(2, 4, 5, dtype=torch.long))
        with pytest.raises(ValueError, match=r"labels have shape \(2, 1, 4, 5\)"):
            ClassMix()(torch.zeros(2, 3, 4, 5), torch.zeros(2, 1, 4, 5, dtype=torch.long))

    def test_a_batch_without_images_stays_one(self):
        found = ClassMix()(torch.zeros(0, 3, 4, 5), torch.zeros(0, 4, 5, dtype=torch.long))
        assert [x.shape for x in found] == [(0, 3, 4, 5), (0, 4, 5)]


def test_class_mixing_serves_other_methods():
    method = FixMatch(torch.nn.Conv2d(3, 4, 1), threshold=0.0, mix=ClassMix(num_classes=4))
    images, masks = torch.rand(2, 3, 8, 8), torch.randint(4, (2, 8, 8))
    assert method(Batch(images, masks, torch.zeros(2, dtype=torch.bool), images)).total.isfinite()


def test_is_public():
    assert stseg.ClassMix is ClassMix
