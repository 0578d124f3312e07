"""Our losses beside verl's and TRL's, on the same tokens in float64: equal where both mean the same, else how they differ.

Skipped where the peers are not installed (conftest.py).
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from skyrl_mega.algorithms.kl import KL_ESTIMATORS
from skyrl_mega.algorithms.loss import Objective
from skyrl_mega.algorithms.policy_losses import LossInputs
from skyrl_mega.algorithms.policy_losses.covariance import mark_largest, mark_within
from skyrl_mega.algorithms.policy_losses.inputs import MarkInputs
from skyrl_mega.algorithms.reductions import Totals, reduction_weights
from skyrl_mega.algorithms.sequences import Sequences
from skyrl_mega.config.schema import AlgorithmConfig, KLConfig

ROWS, LENGTH, CONSTANT_LENGTH = 6, 9, 20
CLIP = {"clip_low": 0.1, "clip_high": 0.15}
CLOSE = {"rtol": 1e-6, "atol": 1e-9}  # our weights are float32


class Tokens:
    """Padded [ROWS, LENGTH] responses of several lengths; one advantage for each, or one for each token."""

    def __init__(self, *, advantage_per_token: bool = False, spread: float = 0.3) -> None:
        generator = torch.Generator().manual_seed(7)
        noise = torch.randn(4, ROWS, LENGTH, generator=generator, dtype=torch.float64)
        self.old = -noise[0].abs() - 0.1
        self.logprobs = (self.old + spread * noise[1]).clamp(max=-0.01)
        self.ref = self.old + 0.3 * noise[2]
        self.advantages = noise[3] if advantage_per_token else noise[3][:, :1].expand(-1, LENGTH).contiguous()
        lengths = torch.tensor([9, 1, 5, 7, 3, 8])
        self.mask = torch.arange(LENGTH) < lengths[:, None]


def ours(tokens, name, reduction, *, marked=None, kl_coef=0.0, **options):
    """(loss, gradient [ROWS, LENGTH]); the ratio is to `tokens.old`, the engine's included."""
    logprobs = tokens.logprobs.clone().requires_grad_()
    mask, cu_seqlens = tokens.mask.flatten(), torch.arange(ROWS + 1) * LENGTH
    lengths = tokens.mask.sum(1)
    totals = Totals(int(lengths.sum()), ROWS, ROWS, CONSTANT_LENGTH)
    weights = reduction_weights(reduction, mask, cu_seqlens, lengths.float(), None, totals)
    inputs = LossInputs(
        logprobs=logprobs.flatten(),
        old_logprobs=tokens.old.flatten(),
        rollout_logprobs=tokens.old.flatten(),
        advantages=tokens.advantages.flatten(),
        loss_mask=mask,
        ref_logprobs=tokens.ref.flatten(),
        sequences=Sequences.packed(cu_seqlens),
        marked=marked,
    )
    config = AlgorithmConfig(policy_loss=name, loss_options=options, reduction=reduction, kl=KLConfig(coef=kl_coef))
    loss, _ = Objective(config)(inputs, weights)
    return loss.detach(), torch.autograd.grad(loss, logprobs)[0]


# -- verl ---------------------------------------------------------------------------------------------------------------

VERL_REDUCTIONS = {
    "token_mean": "token-mean",
    "sequence_mean": "seq-mean-token-mean",
    "sequence_sum_norm": "seq-mean-token-sum-norm",
}


@pytest.fixture(scope="module")
def verl():
    return pytest.importorskip("verl.trainer.ppo.core_algos", exc_type=ImportError)


@pytest.fixture(scope="module")
def verl_loss(verl):
    from verl.workers.config.actor import ActorConfig, PolicyLossConfig

    def compute(tokens, name, reduction, *, clip_low=0.1, clip_high=0.15, cap=3.0, policy_loss=None, **settings):
        config = ActorConfig(
            strategy="fsdp",
            rollout_n=1,
            use_dynamic_bsz=True,
            clip_ratio_low=clip_low,
            clip_ratio_high=clip_high,
            clip_ratio_c=cap,
            policy_loss=PolicyLossConfig(**(policy_loss or {})),
            **settings,
        )
        if reduction == "sequence_sum_norm":
            config.global_batch_info["loss_scale_factor"] = CONSTANT_LENGTH
        logprobs = tokens.logprobs.clone().requires_grad_()
        loss, _ = verl.get_policy_loss_fn(name)(
            tokens.old, logprobs, tokens.advantages, tokens.mask.double(), VERL_REDUCTIONS[reduction], config, None
        )
        return loss.detach(), torch.autograd.grad(loss, logprobs)[0]

    return compute


@pytest.mark.parametrize("reduction", VERL_REDUCTIONS)
def test_verl_vanilla_is_our_dual_clip_in_every_reduction(verl_loss, reduction):
    tokens = Tokens(advantage_per_token=True)
    theirs = verl_loss(tokens, "vanilla", reduction, cap=1.3)
    torch.testing.assert_close(ours(tokens, "dual_clip", reduction, cap=1.3, **CLIP), theirs, **CLOSE)


@pytest.mark.parametrize(
    ("name", "their_name", "reduction", "options", "settings"),
    [
        ("gspo_token", "gspo", "sequence_mean", CLIP, {}),
        ("gspo", "gspo", "sequence_mean", CLIP, {}),
        ("sapo", "sapo", "sequence_mean", {"tau_positive": 1.0, "tau_negative": 1.5}, {"tau_pos": 1.0, "tau_neg": 1.5}),
        ("cispo", "cispo", "token_mean", CLIP, {}),
        ("gmpo", "geo_mean", "sequence_mean", CLIP, {}),
        ("gpg", "gpg", "token_mean", {}, {}),
        ("reinforce", "gpg", "token_mean", {}, {}),
    ],
)
def test_losses_equal_verls(verl_loss, name, their_name, reduction, options, settings):
    tokens = Tokens()
    torch.testing.assert_close(
        ours(tokens, name, reduction, **options), verl_loss(tokens, their_name, reduction, **settings), **CLOSE
    )


@pytest.mark.parametrize(("name", "their_name"), [("dppo_tv", "dppo_tv"), ("dppo_kl", "dppo_kl")])
def test_dppo_has_verls_gradient_and_the_papers_value(verl_loss, name, their_name):
    """verl reports weight x A x logprob, whose value means nothing; ours is the paper's ratio x A. The gradient is the same.

    verl takes its trust region around `old_log_prob`, which its recipe sets to the engine's; ours is always the engine's.
    """
    tokens = Tokens(advantage_per_token=True, spread=0.5)
    bounds = {"tv": (0.05, 0.08), "kl": (0.003, 0.005)}[name[-2:]]
    loss, gradient = ours(tokens, name, "token_mean", delta_low=bounds[0], delta_high=bounds[1], cap=1.5)
    their_loss, their_gradient = verl_loss(tokens, their_name, "token_mean", clip_low=bounds[0], clip_high=bounds[1], cap=1.5)
    torch.testing.assert_close(gradient, their_gradient, **CLOSE)
    assert (gradient[tokens.mask] == 0).any()
    torch.testing.assert_close(loss, gradient.sum(), **CLOSE)
    torch.testing.assert_close(their_loss, (gradient * tokens.logprobs).sum(), **CLOSE)


def marks_of_this_batch(tokens, mark, **options):
    """What verl does: marks from the micro-batch's current logprobs (ours: the update's, as sampled)."""
    mask = tokens.mask.flatten()
    inputs = MarkInputs(tokens.logprobs.flatten()[mask], tokens.advantages.flatten()[mask])
    marked = torch.zeros_like(mask)
    marked[mask] = mark(inputs, **options)
    return marked


def test_kl_cov_equals_verls_where_the_micro_batch_is_the_update(verl_loss):
    tokens = Tokens(advantage_per_token=True)
    marked = marks_of_this_batch(tokens, mark_largest, fraction=0.2)
    theirs = verl_loss(tokens, "kl_cov", "token_mean", policy_loss={"kl_cov_ratio": 0.2, "ppo_kl_coef": 0.7})
    torch.testing.assert_close(ours(tokens, "kl_cov", "token_mean", marked=marked, coef=0.7), theirs, **CLOSE)


def test_clip_cov_has_verls_gradient_where_the_micro_batch_is_the_update(verl_loss):
    """With a fraction of 1 nothing is left to chance. verl marks no token that PPO's clipping has stopped already: such a token
    has no gradient either way, and its constant stays in verl's loss."""
    tokens = Tokens(advantage_per_token=True)
    bounds = {"cov_low": 0.1, "cov_high": 2.0}
    marked = marks_of_this_batch(tokens, mark_within, fraction=1.0, **bounds)
    loss, gradient = ours(tokens, "clip_cov", "token_mean", marked=marked, **bounds, **CLIP)
    their_loss, their_gradient = verl_loss(
        tokens, "clip_cov", "token_mean", policy_loss={"clip_cov_ratio": 1.0, "clip_cov_lb": 0.1, "clip_cov_ub": 2.0}
    )
    torch.testing.assert_close(gradient, their_gradient, **CLOSE)
    ratio = (tokens.logprobs - tokens.old).exp()
    bounded = torch.where(tokens.advantages > 0, ratio.clamp(max=1.15), ratio.clamp(min=0.9))
    stopped = marked.view_as(tokens.mask) & (bounded != ratio)
    assert stopped.any()
    constant = -(bounded * tokens.advantages)[stopped].sum() / tokens.mask.sum()
    torch.testing.assert_close(their_loss - loss, constant, **CLOSE)


@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_kl_estimators_equal_verls(verl, name):
    tokens = Tokens()
    results = []
    for estimate in (lambda x: KL_ESTIMATORS[name](x, tokens.ref, tokens.mask), lambda x: verl.kl_penalty(x, tokens.ref, name)):
        logprobs = tokens.logprobs.clone().requires_grad_()
        values = torch.where(tokens.mask, estimate(logprobs), 0.0)
        results.append((values.detach(), torch.autograd.grad(values.sum(), logprobs)[0]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-13)


# -- TRL ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grpo_trainer():
    return pytest.importorskip("trl.trainer.grpo_trainer", exc_type=ImportError).GRPOTrainer


@pytest.fixture(scope="module")
def gmpo_trainer():
    return pytest.importorskip("trl.experimental.gmpo.gmpo_trainer", exc_type=ImportError).GMPOTrainer


def trl_loss(trainer_class, tokens, *, loss_type="dapo", low=0.1, high=0.15, level="token", delta=None, beta=0.0):
    """What TRL's `_compute_loss` makes of the tokens; a namespace stands for the trainer and its model."""
    logprobs = tokens.logprobs.clone().requires_grad_()
    accelerator = SimpleNamespace(
        num_processes=1, reduce=lambda x, reduction: x, gather=lambda x: x, gather_for_metrics=lambda x: x
    )
    args = SimpleNamespace(
        delta=delta,
        use_bias_correction_kl=False,
        sapo_temperature_pos=1.0,
        sapo_temperature_neg=1.5,
        steps_per_generation=1,
    )
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros_like(tokens.old), None),
        _metrics={"train": defaultdict(list)},
        _entropy_bonus_enabled=False,
        accelerator=accelerator,
        args=args,
        aux_loss_enabled=False,
        beta=beta,
        current_gradient_accumulation_steps=1,
        epsilon_high=high,
        epsilon_low=low,
        importance_sampling_level=level,
        loss_type=loss_type,
        max_completion_length=CONSTANT_LENGTH,
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
    )
    ids, mask = torch.zeros(ROWS, LENGTH, dtype=torch.long), tokens.mask.double()
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": mask[:, :1],
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": tokens.advantages[:, 0],
        "old_per_token_logps": tokens.old,
        "ref_per_token_logps": tokens.ref,
        "num_items_in_batch": mask.sum(),
    }
    loss = trainer_class._compute_loss(trainer, trainer.model, inputs)
    return loss.detach(), torch.autograd.grad(loss, logprobs)[0]


@pytest.mark.parametrize(
    ("name", "reduction", "options", "settings"),
    [
        ("ppo_clip", "sequence_mean", CLIP, {"loss_type": "grpo"}),
        ("ppo_clip", "token_mean", CLIP, {"loss_type": "bnpo"}),
        ("ppo_clip", "token_mean", CLIP, {"loss_type": "dapo"}),
        ("ppo_clip", "sequence_sum_norm", CLIP, {"loss_type": "dr_grpo"}),
        ("ppo_clip", "sequence_mean", {**CLIP, "kl_coef": 0.3}, {"loss_type": "grpo", "beta": 0.3}),
        ("dual_clip", "token_mean", {**CLIP, "cap": 1.3}, {"loss_type": "dapo", "delta": 1.3}),
        ("gspo", "sequence_mean", CLIP, {"loss_type": "grpo", "level": "sequence"}),
        ("sapo", "sequence_mean", {"tau_positive": 1.0, "tau_negative": 1.5}, {"loss_type": "sapo"}),
        # TRL's epsilon_high is the bound itself, not its distance from 1; there is no lower one.
        ("cispo", "token_mean", {"clip_low": 1.0, "clip_high": 0.2}, {"loss_type": "cispo", "high": 1.2}),
    ],
)
def test_losses_equal_trls(grpo_trainer, name, reduction, options, settings):
    tokens = Tokens()
    torch.testing.assert_close(ours(tokens, name, reduction, **options), trl_loss(grpo_trainer, tokens, **settings), **CLOSE)


def test_gmpo_equals_trls(gmpo_trainer):
    tokens = Tokens()
    torch.testing.assert_close(ours(tokens, "gmpo", "sequence_mean", **CLIP), trl_loss(gmpo_trainer, tokens), **CLOSE)
