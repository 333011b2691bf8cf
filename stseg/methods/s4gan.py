"""S4GAN."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stseg.checks import check_count, check_nonnegative, check_positive, check_probability
from stseg.engine.config import TrainConfig
from stseg.engine.method import Batch, Losses, Method
from stseg.engine.optimizers import build_critic_optimizer, build_optimizer
from stseg.functional import adversarial_loss, cross_entropy, feature_matching, one_hot, supervised_loss
from stseg.models.segmenter import as_segmenter
from stseg.modules import ImageCritic, frozen
from stseg.types import Criterion


class S4GAN(Method):
    """S4GAN (Mittal et al., TPAMI 2019): a critic that tells whole annotated images from predicted ones.

    The critic sees an image together with a mask or with predicted probabilities, and gives a score for the image; high
    means "annotated mask". Before the score it has a feature vector h. With p the probabilities of an image,

    ``L = Ls + matching * mean_c |mean h(one-hot y, x_l) - mean h(p_u, x_u)| + semi * CE(p_u, argmax p_u)``,

    where the means of h are over the labeled (l) and the unlabeled (u) images of the batch, and the last term is
    self-training, from the second step on: the mean over the pixels of those unlabeled images whose score is above
    ``threshold``. The critic learns ``(BCE(D(p_u, x_u), 0) + BCE(D(one-hot y, x_l), 1)) / 2``. Both are updated at the
    same time: the network's loss passes through the critic with fixed parameters, and the critic's loss uses detached
    predictions.

    This is the segmentation branch of the paper. Its other branch, a Mean Teacher that classifies images (MLMT) and
    removes at prediction the classes that it does not see, is a training of its own: ``examples/s4gan.py`` has it.

    Unlike in the authors' code:

    - the critic sees the masks of the same batch, not of another one, and images in [0, 1] as they are: the authors
      rescale them by the least and greatest value of a batch, for real ones of the wrong batch;
    - pixels without a label would tell masks from predictions. What the critic sees of unlabeled image i is therefore 0
      also where labeled image i has no label, and of labeled image i also where unlabeled image i is padding (if the
      numbers differ, the images of the smaller part are repeated; crops of different sizes are left as they are). The
      score by which an image is trusted is that of the pixels seen; where there is none, it is not.

    Args:
        network: a network, bare or in a :class:`stseg.Segmenter`.
        num_classes: number of classes, 2 for a network with one logit.
        image_channels: channels of the images.
        matching: weight of the feature matching, 0 or more.
        semi: weight of the self-training, 0 or more.
        threshold: score of the critic, after a sigmoid, above which an image is learned from, in [0, 1]; 0.6 for Pascal
            VOC, 0.7 for Cityscapes.
        dropout: probability that a channel of the critic is dropped.
        critic_lr: learning rate of the critic's Adam, whose betas are 0.9 and 0.99; 1e-5 for Cityscapes.
        loss: supervised loss, ``(logits, masks) -> scalar``; None for cross-entropy.

    Logged: ``supervised``, ``matching`` and ``semi`` (unweighted), ``critic``, and ``trusted``, the share of unlabeled
    images that are learned from.

    Raises:
        ValueError: if a setting is out of its range; when called, if the network has another number of classes or the
            images another number of channels.

    Example:
        >>> method = S4GAN(nn.Conv2d(3, 2, 1), num_classes=2)
        >>> images, masks = torch.rand(2, 3, 32, 32), torch.randint(2, (2, 32, 32))
        >>> batch = Batch(images, masks, torch.zeros(2, dtype=torch.bool), unlabeled=torch.rand(2, 3, 32, 32))
        >>> sorted(method(batch).logged)
        ['critic', 'matching', 'semi', 'supervised', 'trusted']
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        num_classes: int,
        image_channels: int = 3,
        matching: float = 0.1,
        semi: float = 1.0,
        threshold: float = 0.6,
        dropout: float = 0.5,
        critic_lr: float = 1e-4,
        loss: Criterion | None = None,
    ) -> None:
        super().__init__()
        check_nonnegative("matching", matching)
        check_nonnegative("semi", semi)
        check_probability("threshold", threshold)
        check_count("num_classes", num_classes, least=2)
        check_count("image_channels", image_channels)
        check_positive("critic_lr", critic_lr)
        self.model = as_segmenter(network)
        self.critic = ImageCritic(num_classes + image_channels, dropout=dropout)
        self.num_classes, self.image_channels = num_classes, image_channels
        self.matching, self.semi, self.threshold = matching, semi, threshold
        self.critic_lr, self.loss = critic_lr, loss

    def optimizers(self, config: TrainConfig) -> list[torch.optim.Optimizer]:
        """Build the network's optimizer and the critic's."""
        critic = build_critic_optimizer(self.critic, self.critic_lr)
        return [build_optimizer(self.model, config), critic]

    def forward(self, batch: Batch) -> Losses:
        """Compute the losses; see the class."""
        ignore = batch.ignore_index
        labeled, unlabeled = self.model(batch.images), self.model(batch.unlabeled)
        self._check(labeled, batch.images)
        known = batch.masks != ignore
        valid = torch.ones_like(unlabeled[:, 0], dtype=torch.bool) if batch.valid is None else batch.valid
        at_real, at_fake = _window(known, valid), _window(valid, known)
        real = _seen(one_hot(batch.masks, self.num_classes), batch.images, at_real)
        fake = _seen(unlabeled.softmax(1), batch.unlabeled, at_fake)

        judge = frozen(self.critic)
        score, predicted = judge(fake)
        with torch.no_grad():
            _, annotated = judge(real)
        matching = feature_matching(annotated, predicted)
        trusted = (score.detach().sigmoid() > self.threshold) & at_fake.any((1, 2))
        labels = unlabeled.argmax(1).masked_fill(~(valid & trusted[:, None, None]), ignore)
        semi = cross_entropy(unlabeled, labels, ignore_index=ignore)
        supervised = supervised_loss(labeled, batch.masks, loss=self.loss, ignore_index=ignore)

        critic = _critic_loss(self.critic(fake.detach())[0], at_fake, real=False) / 2
        critic = critic + _critic_loss(self.critic(real)[0], at_real, real=True) / 2

        total = supervised + self.matching * matching + float(batch.step > 0) * self.semi * semi + critic
        parts = {"supervised": supervised, "matching": matching, "semi": semi, "critic": critic}
        logged = {name: part.detach() for name, part in parts.items()}
        return Losses(total, {**logged, "trusted": trusted.float().mean()})

    def _check(self, logits: Tensor, images: Tensor) -> None:
        if logits.shape[1] != self.num_classes:
            raise ValueError(f"num_classes is {self.num_classes}, but the network gives {logits.shape[1]} classes")
        if images.shape[1] != self.image_channels:
            raise ValueError(f"image_channels is {self.image_channels}, but the images have {images.shape[1]} channels")


def _window(own: Tensor, other: Tensor) -> Tensor:
    """Return the pixels that are known in both: row i of ``own`` and row i, modulo their number, of ``other``."""
    if own.shape[1:] != other.shape[1:]:
        return own
    return own & other[torch.arange(len(own), device=own.device) % len(other)]


def _critic_loss(scores: Tensor, where: Tensor, *, real: bool) -> Tensor:
    """Average over the images of which the critic sees a pixel."""
    return adversarial_loss(scores[:, None, None, None], real=real, where=where.any((1, 2))[:, None, None])


def _seen(classes: Tensor, images: Tensor, where: Tensor) -> Tensor:
    """Return what the critic sees: classes and image as channels, 0 outside of ``where``."""
    return torch.cat([classes, images], 1) * where[:, None]
