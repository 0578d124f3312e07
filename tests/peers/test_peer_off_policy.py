"""Off-policy correction beside verl's rollout correction: the same weights, masks and numbers where both define them.

Where they differ, a test says how. Needs the `peers` extra; skipped without it.
"""

import math

import pytest
import torch

from skyrl_mega.algorithms.log_ratio import MAX_ABS_LOG_RATIO
from skyrl_mega.algorithms.loss import Objective, mean_stats
from skyrl_mega.algorithms.off_policy import bind_stages, off_policy_correction
from skyrl_mega.algorithms.policy_losses import LossInputs
from skyrl_mega.algorithms.sequences import Sequences
from skyrl_mega.config.schema import AlgorithmConfig, OffPolicyConfig

helper = pytest.importorskip("verl.trainer.ppo.rollout_corr_helper", exc_type=ImportError)

ROWS, COLUMNS = 24, 40


def make_batch(noise=0.5):
    """(policy logprobs, engine logprobs, mask) float64 [ROWS, COLUMNS], responses of 1 to 40 tokens with holes, as in verl."""
    generator = torch.Generator().manual_seed(11)
    old = -3 * torch.rand(ROWS, COLUMNS, generator=generator, dtype=torch.float64) - 0.1
    scale = noise * torch.rand(ROWS, 1, generator=generator, dtype=torch.float64)
    rollout = old + scale * torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, COLUMNS + 1, (ROWS, 1), generator=generator)
    mask = (torch.arange(COLUMNS) < lengths) & (torch.rand(ROWS, COLUMNS, generator=generator) < 0.9)
    mask[:, 0] = True
    return old, rollout, mask


def ours(old, rollout, mask, stages):
    """Weights [ROWS, COLUMNS] of the same batch in one pack; 0 where masked out."""
    rows, columns = old.shape
    sequences = Sequences.packed(torch.arange(rows + 1) * columns)
    done = off_policy_correction(old.flatten(), rollout.flatten(), mask.flatten(), bind_stages(stages), sequences)
    return torch.where(mask, done.weights_T.view(rows, columns), 0.0)


def theirs(old, rollout, mask, **settings):
    """(weights x rejection mask, metrics)."""
    settings = {"rollout_is": None, **settings}
    weights, kept, metrics = helper.compute_rollout_correction_and_rejection_mask(old, rollout, mask.double(), **settings)
    weights = weights.batch["rollout_is_weights"] if weights is not None else torch.ones_like(old)
    return weights * kept, {name.removeprefix("rollout_corr/"): value for name, value in metrics.items()}


def mask(name, **options):
    return {"name": name, **options}


SAME = [
    ({"rollout_is": "token", "rollout_is_threshold": 1.5}, [mask("truncated_is", cap=1.5)]),
    ({"rollout_is": "token", "rollout_is_threshold": "0.5_1.5"}, [mask("icepop", low=0.5, cap=1.5)]),
    ({"rollout_is": "sequence", "rollout_is_threshold": 2.0}, [mask("truncated_is", level="sequence")]),
    ({"rollout_is": "sequence", "rollout_is_threshold": "0.5_2.0"}, [mask("icepop", level="sequence", cap=2.0)]),
    ({"rollout_rs": "token_k1", "rollout_rs_threshold": "0.5_2.0"}, [mask("token_mask")]),
    ({"rollout_rs": "seq_sum_k1", "rollout_rs_threshold": "0.5_2.0"}, [mask("sequence_mask")]),
    (
        {"rollout_rs": "seq_mean_k1", "rollout_rs_threshold": "0.97_1.04"},
        [mask("geometric_mask", low=1 / 1.04, high=1 / 0.97)],
    ),
    (
        {"rollout_rs": "token_k2", "rollout_rs_threshold": 0.02},
        [mask("divergence_mask", estimator="k2", level="token", limit=0.02)],
    ),
    ({"rollout_rs": "token_k3", "rollout_rs_threshold": 0.02}, [mask("divergence_mask", level="token", limit=0.02)]),
    (
        {"rollout_rs": "seq_sum_k2", "rollout_rs_threshold": 0.8},
        [mask("divergence_mask", estimator="k2", level="sum", limit=0.8)],
    ),
    ({"rollout_rs": "seq_sum_k3", "rollout_rs_threshold": 0.8}, [mask("divergence_mask", level="sum", limit=0.8)]),
    ({"rollout_rs": "seq_mean_k3", "rollout_rs_threshold": 0.02}, [mask("divergence_mask", limit=0.02)]),
    (
        {"rollout_rs": "seq_max_k2", "rollout_rs_threshold": 0.2},
        [mask("divergence_mask", estimator="k2", level="max", limit=0.2)],
    ),
    ({"rollout_rs": "seq_max_k3", "rollout_rs_threshold": 0.2}, [mask("divergence_mask", level="max", limit=0.2)]),
    (
        {"rollout_is": "token", "rollout_rs": "token_k1,seq_max_k3", "rollout_rs_threshold": "0.5_2.0,0.2"},
        [mask("truncated_is"), mask("token_mask"), mask("divergence_mask", level="max", limit=0.2)],
    ),
]


@pytest.mark.parametrize(("settings", "stages"), SAME, ids=["-".join(map(str, settings.values())) for settings, _ in SAME])
def test_the_same_weights_and_masks(settings, stages):
    batch = make_batch()
    weights, _ = theirs(*batch, **settings)
    torch.testing.assert_close(ours(*batch, stages), weights, rtol=1e-6, atol=1e-12)
    plain = batch[2].double()
    assert not torch.allclose(weights, plain)
    assert int((weights > 0).sum()) > 0


def test_the_same_statistics():
    old, rollout, trained = make_batch()
    weights_T = trained.flatten().double() / trained.sum()
    stages = ({"name": "truncated_is", "cap": 1.5}, {"name": "sequence_mask"})
    inputs = LossInputs(
        old.flatten(),
        old.flatten(),
        rollout.flatten(),
        torch.ones(ROWS * COLUMNS, dtype=torch.float64),
        trained.flatten(),
        sequences=Sequences.packed(torch.arange(ROWS + 1) * COLUMNS),
    )

    def metrics(*stages):
        sums = Objective(AlgorithmConfig(off_policy=OffPolicyConfig(stages)))(inputs, weights_T)[1].sums
        return {name: float(value) for name, value in sums.items()}

    sums = metrics(*stages)
    mine = mean_stats(sums)
    _, verl = theirs(old, rollout, trained, rollout_is="token", rollout_is_threshold=1.5)
    _, rejected = theirs(old, rollout, trained, rollout_rs="seq_sum_k1", rollout_rs_threshold="0.5_2.0")
    weighed = mean_stats(metrics(stages[0]))
    assert {
        "kl": mine["mismatch/kl_k1"],
        "k3_kl": mine["mismatch/kl"],
        "chi2_token": sums["off_policy/weight_square"] - 1,
        "chi2_seq": sums["off_policy/sequence/weight_square"] / sums["weight/sequences"] - 1,
        "rollout_is_mean": weighed["off_policy/bounded_weight"],
        "rollout_is_eff_sample_size": weighed["off_policy/bounded_effective_sample_share"],
        "rollout_is_ratio_fraction_high": weighed["off_policy/truncated_is_fraction"],
        "rollout_rs_masked_fraction": mine["off_policy/sequence_mask_fraction"],
        "rollout_rs_seq_masked_fraction": mine["off_policy/sequence/masked_fraction"],
    } == pytest.approx({name: value for name, value in (verl | rejected).items() if name in _COMPARED}, rel=1e-6)


_COMPARED = {
    "kl",
    "k3_kl",
    "chi2_token",
    "chi2_seq",
    "rollout_is_mean",
    "rollout_is_eff_sample_size",
    "rollout_is_ratio_fraction_high",
    "rollout_rs_masked_fraction",
    "rollout_rs_seq_masked_fraction",
}


def test_bounds_of_a_rejection_by_k1_are_those_of_the_inverse_ratio_in_verl():
    # verl holds k1 = log(engine / policy) against the logs of its bounds: bounds of engine / policy. Ours are of policy / engine.
    old, rollout = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[-math.log(2.5), math.log(2.5)]], dtype=torch.float64)
    trained = torch.ones(1, 2, dtype=torch.bool)
    weights, _ = theirs(old, rollout, trained, rollout_rs="token_k1", rollout_rs_threshold="0.1_2.0")
    assert weights.tolist() == [[1, 0]]
    assert ours(old, rollout, trained, [mask("token_mask", low=0.1, high=2.0)]).tolist() == [[0, 1]]
    assert ours(old, rollout, trained, [mask("token_mask", low=0.5, high=10.0)]).tolist() == [[1, 0]]


def test_a_token_beyond_e_to_the_20_counts_as_that_in_our_sums_and_in_full_in_verls():
    # Only a broken engine gives such tokens. Ours: every log-ratio is kept within +-20, then their sum; in verl the sum only.
    rollout = torch.tensor([[-30.0, 29.0]], dtype=torch.float64)
    old, trained = torch.zeros(1, 2, dtype=torch.float64), torch.ones(1, 2, dtype=torch.bool)
    weights, _ = theirs(old, rollout, trained, rollout_is="sequence", rollout_is_threshold=1e9)
    assert weights.tolist() == [[pytest.approx(math.exp(1))] * 2]
    assert ours(old, rollout, trained, [mask("truncated_is", level="sequence", cap=1e9)]).tolist() == [[pytest.approx(1.0)] * 2]
    assert MAX_ABS_LOG_RATIO == helper.SAFETY_BOUND


def test_rejected_tokens_stay_in_our_average_and_leave_verls():
    # verl takes rejected tokens out of the mask that the loss is averaged over, so that the others weigh more; here a step with
    # many rejected tokens is a smaller step, as with IcePop, whose masked tokens stay in verl's average too.
    old, rollout, trained = make_batch()
    stages = [mask("token_mask")]
    kept, _ = theirs(old, rollout, trained, rollout_rs="token_k1", rollout_rs_threshold="0.5_2.0")
    losses = torch.arange(ROWS * COLUMNS, dtype=torch.float64).view(ROWS, COLUMNS)
    average = float((losses * ours(old, rollout, trained, stages)).sum() / trained.sum())
    assert float(helper.verl_F.masked_mean(losses, kept)) * float(kept.sum() / trained.sum()) == pytest.approx(average, rel=1e-9)
    assert float(kept.sum()) < float(trained.sum())
