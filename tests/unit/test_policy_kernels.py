"""The trainer on its kernels: head and loss fused or not, every backend, truncated samplers; which of them ran is reported."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.lm_head import require
from helpers.policy import make_policy, tiny_config
from skyrl_mega.algorithms.loss import Objective
from skyrl_mega.data.packing import balance_and_pack, unpack
from skyrl_mega.data.synthetic import random_samples
from skyrl_mega.errors import ConfigError
from skyrl_mega.training.policy import fuses_loss


def pack(samples):
    return balance_and_pack(samples, tokens_per_micro_batch=100, dp_rank=0, dp_size=1, skip_zero_advantage=False)


def two_updates(tmp_path, *overrides, family="llama"):
    """The metrics of two updates, and all weights after them."""
    config = tiny_config(tmp_path, "optimizer.lr=1e-3", *overrides, family=family, tied=family == "llama")
    with make_policy(config) as policy:
        metrics = [policy.train_step(pack(random_samples(4, 3, seed=seed))) for seed in (1, 2)]
        weights = torch.cat([parameter.detach().double().flatten() for parameter in policy.chunks[0].parameters()])
    return metrics, weights


def compared(metrics):
    return {name: [row[name] for row in metrics] for name in metrics[0] if not name.startswith(("kernels/", "packing/"))}


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_head_and_loss_in_one_pass_train_as_head_then_loss_do(tmp_path, backend, family):
    require(backend)
    # The samples' rollout logprobs are random: weights on both sides of a bound.
    correction = ("algorithm.off_policy.stages=[{name: icepop, low: 0.05, cap: 2.0}]",)
    common = ("algorithm.entropy_coef=0.02", *correction, f"model.kernels={backend}")
    apart, weights_apart = two_updates(tmp_path, *common, "model.fused_loss=off", family=family)
    fused, weights_fused = two_updates(tmp_path, *common, "model.fused_loss=on", "model.logprob_chunk_tokens=7", family=family)
    for name, values in compared(fused).items():
        assert compared(apart)[name] == pytest.approx(values, rel=2e-5, abs=2e-6), name
    # Chunk by chunk no sequence is whole.
    assert all(name.startswith(("off_policy/sequence/", "weight/")) for name in compared(apart).keys() - compared(fused).keys())
    assert 0.05 < apart[0]["off_policy/icepop_fraction"] < 0.95
    # AdamW's first step is lr * sign(gradient) where a gradient is close to nothing: weights agree to a fraction of lr = 1e-3.
    assert (weights_fused - weights_apart).abs().max() < 2e-5
    assert apart[-1][f"kernels/linear_logprobs/{backend}"] == 1.0
    assert fused[-1][f"kernels/linear_policy_loss/{backend}"] == 1.0
    assert fused[-1][f"kernels/policy_loss/{backend}"] == 1.0


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_another_backend_changes_losses_by_no_more_than_the_dtypes_noise(tmp_path, precision):
    require("cpu")
    runs = {name: two_updates(tmp_path, f"model.kernels={name}", f"precision={precision}")[0] for name in ("reference", "cpu")}
    exact = two_updates(tmp_path, "model.kernels=reference", "precision=float32")[0]
    for name in ("loss/total", "update/grad_norm", "policy/entropy"):
        for reference, ours, true in zip(runs["reference"], runs["cpu"], exact, strict=True):
            noise = abs(reference[name] - true[name])
            assert abs(ours[name] - reference[name]) <= 3 * noise + 1e-5 * abs(true[name]) + 1e-6, name


def test_a_truncated_sampler_is_matched_by_renormalised_logprobs(tmp_path):
    config = tiny_config(tmp_path, "rollout.top_k=40", "rollout.top_p=0.8", "rollout.temperature=0.7")
    samples = random_samples(3, 2, seed=5)
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float64)
    with make_policy(config) as policy:
        batch = pack(samples)
        ours = unpack(policy.compute_logprobs(batch), batch, samples)
        whole = unpack(policy.compute_logprobs(batch, temperature=0.7), batch, samples)
        metrics = policy.train_step(batch)
    assert metrics["update/skipped"] == 0
    # With the sampler's own policy as the old one, every ratio is 1: also over the truncated support.
    assert metrics["policy/ratio"] == pytest.approx(1.0)
    cut = 0
    for sample, truncated, full in zip(samples, ours, whole, strict=True):
        with torch.no_grad():
            logits = model(sample.token_ids[None]).logits[0, :-1] / 0.7
        labels = sample.token_ids[1:, None]
        ordered = logits.sort(dim=-1, descending=True).values
        ordered[:, 40:] = -torch.inf
        last = (ordered.softmax(-1).cumsum(-1) < 0.8).sum(-1, keepdim=True)
        kept = (logits >= ordered.gather(1, last)).scatter(1, labels, True)
        for expected, mine in (
            (logits.masked_fill(~kept, -torch.inf).log_softmax(-1), truncated),
            (logits.log_softmax(-1), full),
        ):
            true = expected.gather(1, labels).squeeze(1)[sample.loss_mask[1:]]
            torch.testing.assert_close(mine[sample.loss_mask].double(), true, rtol=1e-4, atol=1e-4)
        cut += int((~kept).sum())
    assert cut > 0


def test_a_loss_that_is_no_sum_over_tokens_can_not_be_fused(tmp_path):
    def fused(*settings):
        config = tiny_config(tmp_path, *settings)
        return fuses_loss(config, Objective(config.algorithm))

    own = tmp_path / "own_loss.py"
    own.write_text("def whole_sequences(inputs):\n    raise AssertionError('never called')\n")
    assert fused()
    assert not fused("model.fused_loss=off")
    assert not fused(f"algorithm.policy_loss={own}:whole_sequences")
    with pytest.raises(ConfigError, match=r"own_loss.py:whole_sequences\), or a stage of .* is no sum over tokens"):
        fused(f"algorithm.policy_loss={own}:whole_sequences", "model.fused_loss=on")
