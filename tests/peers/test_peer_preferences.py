"""Our losses of preferences and reward models beside TRL's lines, on the same numbers in float64.

Skipped where TRL is not installed: `pip install --no-deps --target DIRECTORY trl`, with DIRECTORY on PYTHONPATH.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from helpers.peer_source import run_between, source_of
from skyrl_mega.algorithms.preference.answers import Answers
from skyrl_mega.algorithms.preference.losses import preference_loss
from skyrl_mega.algorithms.preference.reward_losses import reward_loss
from skyrl_mega.config.offline_schema import PreferenceConfig, RewardModelConfig

PAIRS, LENGTH = 6, 9


class Pairs:
    """Log-probabilities of answers of several lengths under a policy and a reference, padded as TRL has them."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        lengths = torch.randint(1, LENGTH + 1, (2 * PAIRS,), generator=generator)
        self.mask = torch.arange(LENGTH) < lengths[:, None]  # better ones first, then the others
        values = -torch.rand(2, 2 * PAIRS, LENGTH, generator=generator, dtype=torch.float64) * 2 * self.mask
        self.policy, self.reference = values.sum(-1)
        self.lengths = lengths.double()

    def answers(self) -> Answers:
        def in_turns(values: torch.Tensor) -> torch.Tensor:
            return values.view(2, PAIRS).T.reshape(-1)

        targets = torch.zeros(2 * PAIRS, dtype=torch.float64)
        return Answers(in_turns(self.policy), in_turns(self.lengths), targets, in_turns(self.reference))

    def names(self, trainer, **more) -> dict:
        """What TRL's lines look at."""
        chosen, rejected = (self.policy - self.reference).chunk(2)
        averages = ((self.policy - self.reference) / self.lengths).chunk(2)
        return {
            "self": trainer,
            "torch": torch,
            "F": nn.functional,
            "nn": nn,
            "chosen_scores": chosen,
            "rejected_scores": rejected,
            "delta_score": chosen - rejected,
            "completion_mask": self.mask,
            "chosen_avg_score": averages[0],
            "rejected_avg_score": averages[1],
            **more,
        }


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo"])
def test_losses_of_pairs_are_trls(loss):
    source = source_of("trl.trainer.dpo_trainer")
    pairs = Pairs()
    names = pairs.names(SimpleNamespace(beta=0.3), loss_type=loss)
    theirs = run_between(source, 'if loss_type == "sigmoid":', 'elif loss_type == "exo_pair"', names)["per_sequence_loss"]
    ours, _ = preference_loss(PreferenceConfig(loss=loss, beta=0.3), pairs.answers())
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("settings", "first"),
    [
        (PreferenceConfig(loss="robust", beta=0.3, label_smoothing=0.2), "clean_loss_term ="),
        (PreferenceConfig(beta=0.3, length_normalised="on"), "delta = chosen_avg_score"),
    ],
    ids=["robust", "sigmoid_norm"],
)
def test_robust_and_length_normalised_dpo_are_trls(settings, first):
    source = source_of("trl.trainer.dpo_trainer")
    pairs = Pairs()
    trainer = SimpleNamespace(beta=settings.beta, label_smoothing=settings.label_smoothing)
    theirs = run_between(source, first, "el", pairs.names(trainer))["per_sequence_loss"]
    ours, _ = preference_loss(settings, pairs.answers())
    torch.testing.assert_close(ours, theirs)


def test_simpo_is_trls():
    source = source_of("trl.experimental.cpo.cpo_trainer")
    pairs = Pairs()
    means = (pairs.policy / pairs.lengths).chunk(2)
    trainer = SimpleNamespace(beta=2.0, simpo_gamma=0.7, label_smoothing=0.0)
    names = pairs.names(trainer, logits=means[0] - means[1])
    theirs = run_between(source, "gamma_logratios =", "elif", names)["losses"]
    ours, _ = preference_loss(PreferenceConfig(loss="simpo", beta=2.0, margin=0.7), pairs.answers())
    torch.testing.assert_close(ours, theirs)


def test_the_odds_ratio_of_orpo_is_trls():
    """They add the cross-entropy elsewhere, over prompts too; and take the odds in float32."""
    source = source_of("trl.experimental.orpo.orpo_trainer")
    pairs = Pairs()
    means = (pairs.policy / pairs.lengths).chunk(2)
    names = pairs.names(
        SimpleNamespace(beta=0.3),
        policy_chosen_logps=means[0],
        policy_rejected_logps=means[1],
        log1mexp=lambda x: torch.log1p(-torch.exp(x)),
    )
    theirs = run_between(source, "log_odds = (policy", "chosen_rewards", names)["losses"]
    loss_R, sums = preference_loss(PreferenceConfig(loss="orpo", beta=0.3), pairs.answers())
    torch.testing.assert_close(loss_R + means[0], -theirs)
    assert float(sums["loss/sft"]) == pytest.approx(-float(means[0].sum()))


@pytest.mark.parametrize("margin", [True, False])
def test_reward_modelling_is_trls(margin):
    source = source_of("trl.trainer.reward_trainer")
    generator = torch.Generator().manual_seed(5)
    scores, margins = (torch.randn(PAIRS, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    margins = margins * margin
    trainer = SimpleNamespace(args=SimpleNamespace(center_rewards_coefficient=0.05))
    names = {"nn": nn, "torch": torch, "self": trainer, "rewards_chosen": scores[:, 0], "rewards_rejected": scores[:, 1]}
    names["inputs"] = {"margin": margins[:, 0]} if margin else {}
    theirs = run_between(source, 'if "margin" in inputs:', "if mode ==", names)["loss"]
    answers = Answers(scores.reshape(-1), torch.ones(2 * PAIRS), margins.reshape(-1))
    ours, _ = reward_loss(RewardModelConfig(centering_coef=0.05), answers)
    torch.testing.assert_close(ours.mean(), theirs)
