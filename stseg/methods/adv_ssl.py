"""Adversarial learning for semi-supervised segmentation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from stseg.checks import check_count, check_nonnegative, check_positive, check_probability
from stseg.engine.config import TrainConfig
from stseg.engine.method import Batch, Losses, Method
from stseg.engine.optimizers import build_critic_optimizer, build_optimizer
from stseg.functional import adversarial_loss, cross_entropy, one_hot, supervised_loss
from stseg.models.segmenter import as_segmenter
from stseg.modules import conv_critic, frozen
from stseg.types import Criterion


class AdvSSL(Method):
    """AdvSSL (Hung et al., BMVC 2018): a critic that distinguishes masks from predictions.

    The critic maps class probabilities to a score for each pixel; high means "annotated mask". With p the
    probabilities of labeled (l) and unlabeled (u) images and D the critic,

    ``L = Ls + adversarial[0] * BCE(D(p_l), 1) + adversarial[1] * BCE(D(p_u), 1) + semi * CE(p_u, argmax p_u)``,

    where the last term starts after the share ``semi_from`` of the training and is the mean over the pixels whose
    score is at least ``threshold``. The critic learns ``(BCE(D(p), 0) + BCE(D(one-hot masks), 1)) / 2``, with
    predictions of labeled and unlabeled images as one batch. Both are updated at the same time: the network's loss
    passes through the critic with fixed parameters, and the critic's loss uses detached predictions. Pixels without a
    label and padding are ignored.

    Unlike in the authors' code, the critic sees the masks of the same batch, not of another one, and padded pixels of
    unlabeled images are ignored.

    Args:
        network: a network, bare or in a :class:`stseg.Segmenter`.
        num_classes: number of classes, 2 for a network with one logit.
        adversarial: weights of the adversarial terms of labeled and unlabeled images.
        semi: weight of the cross-entropy on unlabeled images.
        threshold: least score of the critic, after a sigmoid, of a pixel to learn from.
        semi_from: share of the training after which that term starts: 5,000 of 20,000 steps in the paper.
        critic_lr: learning rate of the critic's Adam, whose betas are 0.9 and 0.99.
        loss: supervised loss, ``(logits, masks) -> scalar``; None for cross-entropy.

    Logged: ``supervised``, ``adversarial`` (weighted), ``semi`` (unweighted), ``critic``.

    Example:
        >>> method = AdvSSL(nn.Conv2d(3, 2, 1), num_classes=2)
        >>> images, masks = torch.rand(2, 3, 32, 32), torch.randint(2, (2, 32, 32))
        >>> batch = Batch(images, masks, torch.zeros(2, dtype=torch.bool), unlabeled=torch.rand(2, 3, 32, 32))
        >>> sorted(method(batch).logged)
        ['adversarial', 'critic', 'semi', 'supervised']
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        num_classes: int,
        adversarial: tuple[float, float] = (0.01, 0.001),
        semi: float = 0.1,
        threshold: float = 0.2,
        semi_from: float = 0.25,
        critic_lr: float = 1e-4,
        loss: Criterion | None = None,
    ) -> None:
        super().__init__()
        check_probability("threshold", threshold)
        check_probability("semi_from", semi_from)
        check_count("num_classes", num_classes, least=2)
        if not (isinstance(adversarial, Sequence) and len(adversarial) == 2):
            raise TypeError(f"adversarial is {adversarial!r}; expected the weights of labeled and of unlabeled images")
        for name, value in (("adversarial", adversarial[0]), ("adversarial", adversarial[1]), ("semi", semi)):
            check_nonnegative(name, value)
        check_positive("critic_lr", critic_lr)
        self.model = as_segmenter(network)
        self.critic = conv_critic(num_classes)
        self.num_classes, self.adversarial, self.semi = num_classes, tuple(adversarial), semi
        self.threshold, self.semi_from, self.critic_lr, self.loss = threshold, semi_from, critic_lr, loss

    def optimizers(self, config: TrainConfig) -> list[torch.optim.Optimizer]:
        """Build the network's optimizer and the critic's."""
        critic = build_critic_optimizer(self.critic, self.critic_lr)
        return [build_optimizer(self.model, config), critic]

    def forward(self, batch: Batch) -> Losses:
        """Compute the losses; see the class."""
        ignore = batch.ignore_index
        labeled, unlabeled = self.model(batch.images), self.model(batch.unlabeled)
        if labeled.shape[1] != self.num_classes:
            raise ValueError(f"num_classes is {self.num_classes}, but the network gives {labeled.shape[1]} classes")
        known = batch.masks != ignore
        valid = torch.ones_like(unlabeled[:, 0], dtype=torch.bool) if batch.valid is None else batch.valid

        judge = frozen(self.critic)
        score = judge(unlabeled.softmax(1))
        adversarial = self.adversarial[0] * adversarial_loss(judge(labeled.softmax(1)), real=True, where=known)
        adversarial = adversarial + self.adversarial[1] * adversarial_loss(score, real=True, where=valid)
        trusted = valid & (score.detach()[:, 0].sigmoid() >= self.threshold)
        semi = cross_entropy(unlabeled, unlabeled.argmax(1).masked_fill(~trusted, ignore), ignore_index=ignore)
        supervised = supervised_loss(labeled, batch.masks, loss=self.loss, ignore_index=ignore)
        begun = batch.step >= self.semi_from * batch.steps

        fake = self.critic(torch.cat([labeled, unlabeled]).detach().softmax(1))
        real = self.critic(one_hot(batch.masks, self.num_classes))
        critic = adversarial_loss(fake, real=False, where=torch.cat([known, valid])) / 2
        critic = critic + adversarial_loss(real, real=True, where=known) / 2

        total = supervised + adversarial + (self.semi if begun else 0.0) * semi + critic
        parts = {"supervised": supervised, "adversarial": adversarial, "semi": semi, "critic": critic}
        return Losses(total, {name: part.detach() for name, part in parts.items()})
