"""What is trained on: dynamic sampling's budget, shaped rewards, filters, and which groups are replayed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_mega.algorithms.reductions import Totals, reduction_weights
from skyrl_mega.config.schema import Config, OverlongConfig, ReplayConfig, RewardShapingConfig, SamplingConfig, TrainerConfig
from skyrl_mega.data.packing import balance_and_pack
from skyrl_mega.data.samples import to_samples
from skyrl_mega.data.sampling.dynamic import ResampleBudget, has_signal
from skyrl_mega.data.sampling.replay import choose_replayed, interleave, replays_per_step
from skyrl_mega.data.sampling.selection import is_cut_off, select_trained
from skyrl_mega.data.sampling.shaping import overlength, shape_rewards
from skyrl_mega.errors import RolloutError
from skyrl_mega.types import StopReason, Trajectory, TrajectoryGroup, Turn


def episode(reward=0.0, turns=((3, StopReason.STOP),), truncated=False) -> Trajectory:
    """One prompt token before each turn of so many sampled ones."""
    mask, played = [], []
    for length, stop in turns:
        mask += [0] + [1] * length
        played.append(Turn(len(mask) - length, len(mask), stop, 0.0))
    logprobs, versions = [-1.0 * m for m in mask], [m - 1 for m in mask]
    return Trajectory([7] * len(mask), mask, logprobs, versions, tuple(played), reward, not truncated, truncated)


def group(name, *trajectories) -> TrajectoryGroup:
    return TrajectoryGroup(name, f"p{name}", trajectories)


def two_turns(*rewards) -> tuple[Turn, ...]:
    return tuple(Turn(3 * n + 1, 3 * n + 3, StopReason.STOP, reward) for n, reward in enumerate(rewards))


def shaped_rewards(groups, config, *, max_new_tokens):
    samples = to_samples(groups)
    metrics = shape_rewards(samples, groups, config, max_new_tokens=max_new_tokens)
    return [sample.reward for sample in samples], metrics


def rewarded(name, *rewards) -> TrajectoryGroup:
    return group(name, *(episode(reward) for reward in rewards))


# ---- dynamic sampling -----------------------------------------------------------------------------------------------------


def test_only_groups_of_equal_rewards_are_left_out_and_only_where_it_is_asked_for():
    flat, spread = rewarded("a", 0.5, 0.5, 0.5), rewarded("b", 0.5, 0.5, 0.25)
    assert (has_signal(flat), has_signal(spread)) == (False, True)
    on, off = (ResampleBudget(SamplingConfig(dynamic=dynamic), 4) for dynamic in (True, False))
    assert [on.leaves_out(g) for g in (flat, spread)] == [True, False]
    assert not off.leaves_out(flat)


@given(st.lists(st.sampled_from(["flat", "spread", "step"]), max_size=40), st.integers(1, 7))
def test_between_two_steps_at_most_the_budget_is_left_out(events, budget):
    resampling = ResampleBudget(SamplingConfig(dynamic=True, max_resampled=budget / 2, when_exhausted="train"), 2)
    left_out = 0
    for event in events:
        if event == "step":
            resampling.step_taken()
            left_out = 0
            continue
        is_left_out = resampling.leaves_out(rewarded("g", 1.0, 1.0 if event == "flat" else 0.0))
        assert is_left_out == (event == "flat" and left_out < budget)
        left_out += is_left_out


def test_an_exhausted_budget_names_the_numbers_and_the_ways_out():
    budget = ResampleBudget(SamplingConfig(dynamic=True, max_resampled=1.5), 2)
    assert all(budget.leaves_out(rewarded("g", 0.0, 0.0)) for _ in range(3))
    with pytest.raises(RolloutError, match=r"4 groups had equal rewards .* \(1\.5 steps' worth\) .* leave 3 out.*=train, or"):
        budget.leaves_out(rewarded("g", 0.0, 0.0))


# ---- shaped rewards -------------------------------------------------------------------------------------------------------


def test_rewards_are_clipped_then_scaled_then_shifted():
    config = SamplingConfig(reward=RewardShapingConfig(clip=(-1.0, 2.0), scale=3.0, shift=-0.5))
    shaped, metrics = shaped_rewards([rewarded("a", -4.0, 0.25), rewarded("b", 2.0, 9.0)], config, max_new_tokens=8)
    assert shaped == [-3.5, 0.25, 5.5, 5.5]
    assert metrics == {"reward/shaped_mean": 7.75 / 4, "sampling/clipped_share": 0.5}


def test_without_settings_rewards_are_what_they_were():
    shaped, metrics = shaped_rewards([rewarded("a", -4.0, 0.1)], SamplingConfig(), max_new_tokens=8)
    assert (shaped, list(metrics)) == ([-4.0, 0.1], ["reward/shaped_mean"])


@pytest.mark.parametrize(("length", "expected"), [(1, 0.0), (15, 0.0), (16, 0.0), (17, 0.25), (18, 0.5), (19, 0.75), (20, 1.0)])
def test_the_penalty_grows_linearly_over_the_last_tokens(length, expected):
    assert overlength(episode(turns=[(length, StopReason.STOP)]), 20, 4) == expected


@given(st.integers(2, 300), st.data())
def test_the_penalty_is_equation_13_of_dapo(longest, draw):
    cache = draw.draw(st.integers(1, longest - 1))
    length = draw.draw(st.integers(1, longest))
    if length <= longest - cache:
        expected = Fraction(0)
    else:
        expected = Fraction(longest - cache - length, cache)  # R_length, at most 0
    trajectory = episode(1.0, turns=[(length, StopReason.STOP)])
    config = SamplingConfig(overlong=OverlongConfig(penalty_tokens=cache, penalty=0.5))
    [shaped], _ = shaped_rewards([group("a", trajectory)], config, max_new_tokens=longest)
    assert shaped == pytest.approx(float(1 + expected / 2), abs=1e-12)


def test_a_turn_that_a_limit_ended_has_the_whole_penalty_and_the_worst_turn_counts():
    cut_by_the_context = episode(turns=[(5, StopReason.LENGTH)])
    one_long_turn = episode(turns=[(2, StopReason.STOP), (19, StopReason.STOP), (17, StopReason.STOP)])
    assert (overlength(cut_by_the_context, 20, 4), overlength(one_long_turn, 20, 4)) == (1.0, 0.75)
    assert overlength(cut_by_the_context, 20, 0) == 0.0
    config = SamplingConfig(overlong=OverlongConfig(penalty_tokens=4, penalty=2.0))
    shaped, metrics = shaped_rewards([group("a", cut_by_the_context, one_long_turn, episode(1.0))], config, max_new_tokens=20)
    assert shaped == [-2.0, -1.5, 1.0]
    assert metrics["sampling/overlong_penalty_mean"] == pytest.approx(3.5 / 3)
    assert metrics["sampling/overlong_penalized_share"] == pytest.approx(2 / 3)


def test_turns_are_scaled_and_greedy_baselines_shaped_alike():
    played = group("a", replace(episode(3.0, turns=[(2, StopReason.STOP)] * 2), turns=two_turns(1.0, 2.0)))
    samples = to_samples([played])
    samples[0].baseline_reward = 7.0
    config = SamplingConfig(
        reward=RewardShapingConfig(clip=(0.0, 2.5), scale=2.0, shift=0.5), overlong=OverlongConfig(penalty_tokens=2, penalty=0.25)
    )
    shape_rewards(samples, [played], config, max_new_tokens=3)
    [sample] = samples
    assert sample.turns == ((1, 3, 2.0), (4, 6, 4.0))
    assert sample.reward == 2.0 * 2.5 + 0.5 - 0.25 * 0.5
    assert sample.baseline_reward == 2.0 * 2.5 + 0.5, "how long the greedy answer was is not known"
    assert played.trajectories[0].reward == 3.0


def test_the_numbers_are_of_the_steps_own_groups():
    groups = [rewarded("a", 1.0, 0.0), replace(rewarded("b", 5.0, 5.0), is_replayed=True)]
    shaped, metrics = shaped_rewards(groups, SamplingConfig(reward=RewardShapingConfig(scale=2.0)), max_new_tokens=8)
    assert (shaped, metrics) == ([2.0, 0.0, 10.0, 10.0], {"reward/shaped_mean": 1.0})


# ---- which samples are trained --------------------------------------------------------------------------------------------


def test_a_trajectory_is_cut_off_by_a_length_limit_of_its_last_turn_or_by_any_limit_on_the_episode():
    assert is_cut_off(episode(turns=[(3, StopReason.LENGTH)]))
    assert is_cut_off(episode(truncated=True))
    assert not is_cut_off(episode(turns=[(3, StopReason.LENGTH), (3, StopReason.STOP)]))


def prepared(groups, advantages):
    samples = to_samples(groups)
    for sample, advantage in zip(samples, advantages, strict=True):
        sample.advantages = sample.loss_mask.float() * advantage
    return samples


GROUPS = [
    group("a", episode(1.0), episode(0.0, turns=[(9, StopReason.LENGTH)])),
    group("b", episode(1.0), episode(1.0)),
    group("c", episode(0.0, truncated=True), episode(1.0)),
]
ADVANTAGES = [0.7, -0.7, 0.0, 0.0, -0.7, 0.7]


@pytest.mark.parametrize(
    ("sampling", "kept", "metrics"),
    [
        (SamplingConfig(), [0, 1, 2, 3, 4, 5], {}),
        (
            SamplingConfig(overlong=OverlongConfig(filter=True)),
            [0, 2, 3, 5],
            {"sampling/overlong_filtered_share": pytest.approx(1 / 3)},
        ),
        (
            SamplingConfig(zero_variance="drop"),
            [0, 1, 4, 5],
            {"sampling/zero_variance_dropped_share": pytest.approx(1 / 3)},
        ),
        (
            SamplingConfig(zero_variance="drop", overlong=OverlongConfig(filter=True)),
            [0, 5],
            {
                "sampling/overlong_filtered_share": pytest.approx(1 / 3),
                "sampling/zero_variance_dropped_share": pytest.approx(1 / 3),
            },
        ),
    ],
)
def test_what_the_filters_leave(sampling, kept, metrics):
    samples = prepared(GROUPS, ADVANTAGES)
    before = [sample.advantages.clone() for sample in samples]
    [first, second], numbers = select_trained([samples[:4], samples[4:]], GROUPS, sampling)
    assert [sample.sample_index for sample in first] == [index for index in kept if index < 4]
    assert [sample.sample_index for sample in second] == [index for index in kept if index >= 4]
    assert numbers == metrics
    assert all(torch.equal(sample.advantages, old) for sample, old in zip(samples, before, strict=True))


def test_a_group_keeps_its_signal_if_one_token_has_an_advantage():
    samples = prepared([GROUPS[1]], [0.0, 0.0])
    samples[1].advantages[-1] = 1e-9
    [trained], numbers = select_trained([samples], [GROUPS[1]], SamplingConfig(zero_variance="drop"))
    assert (len(trained), numbers) == (2, {"sampling/zero_variance_dropped_share": 0.0})


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "prompt_mean"])
def test_the_loss_averages_over_what_is_left_alone(reduction):
    samples = prepared(GROUPS, ADVANTAGES)
    [kept], _ = select_trained([samples], GROUPS, SamplingConfig(overlong=OverlongConfig(filter=True)))
    batch = balance_and_pack(kept, tokens_per_micro_batch=16, dp_rank=0, dp_size=1, skip_zero_advantage=True)
    totals = Totals(batch.num_loss_tokens, batch.num_sequences, batch.num_groups, 0)
    found = sum(
        float((reduction_weights(reduction, m.loss_mask, m.cu_seqlens, *tokens_of(m), totals) * m.advantages).sum())
        for m in batch.micro_batches
    )
    # Samples 0, 2, 3 and 5 of three tokens each, of the groups a, b, b and c, have the advantages 0.7, 0, 0 and 0.7.
    expected = {"token_mean": 1.4 / 4, "sequence_mean": 1.4 / 4, "prompt_mean": 1.4 / 3}
    assert found == pytest.approx(expected[reduction], rel=1e-6)


def tokens_of(micro_batch):
    return micro_batch.loss_tokens_per_sequence, micro_batch.loss_tokens_per_group


# ---- replay ---------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 40), st.integers(0, 12), st.integers(1, 4), st.integers(0, 10), st.integers(0, 1000))
def test_replayed_groups_are_distinct_in_order_and_fill_every_update_alike(available, count, updates, seed, step):
    candidates = [f"g{n}" for n in range(available)]
    chosen = choose_replayed(candidates, count, updates=updates, seed=seed, step=step)
    assert len(chosen) == min(count, available) // updates * updates
    assert sorted(set(chosen), key=candidates.index) == chosen
    assert chosen == choose_replayed(candidates, count, updates=updates, seed=seed, step=step)


def test_every_candidate_is_replayed_as_often_as_every_other():
    candidates = [f"g{n}" for n in range(12)]
    counts = Counter(name for step in range(3000) for name in choose_replayed(candidates, 4, updates=1, seed=5, step=step))
    assert sum(counts.values()) == 12_000
    assert all(880 < count < 1120 for count in counts.values()), counts  # 1000, standard deviation 26
    assert choose_replayed(candidates, 4, updates=1, seed=5, step=1) != choose_replayed(candidates, 4, updates=1, seed=5, step=2)


@settings(max_examples=50)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 5))
def test_every_update_gets_its_share_of_own_and_of_replayed_groups(updates, own, replayed):
    mixed = interleave(range(own * updates), range(1000, 1000 + replayed * updates), updates)
    parts = [mixed[u * (own + replayed) : (u + 1) * (own + replayed)] for u in range(updates)]
    assert [sum(n >= 1000 for n in part) for part in parts] == [replayed] * updates
    assert [n for n in mixed if n < 1000] == list(range(own * updates))
    assert [n for n in mixed if n >= 1000] == list(range(1000, 1000 + replayed * updates))


def test_the_share_is_of_the_steps_own_groups():
    config = Config(sampling=SamplingConfig(replay=ReplayConfig(share=0.25)), trainer=TrainerConfig(prompts_per_step=32))
    assert replays_per_step(config) == 8
