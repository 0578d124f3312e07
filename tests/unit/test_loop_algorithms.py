"""The real loop over scripted rollouts: the policy and its reference on a tiny model, what they are trained on given."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from helpers.policy import make_policy, tiny_config
from skyrl_mega.data.synthetic import random_samples
from skyrl_mega.orchestration.coordinator import Taken
from skyrl_mega.orchestration.loop import Parts, train
from skyrl_mega.training.reference import ReferenceModel
from skyrl_mega.types import StopReason, TrainState, Trajectory, TrajectoryGroup, Turn, WeightVersion

STEPS, GROUPS, SAMPLES = 4, 2, 2
COEF, TARGET, HORIZON = 0.5, 1e-3, 16


def scripted_groups(step):
    """Random tokens that the policy might have sampled; the greedy answer to group g of step s earned s + g / 10."""
    samples = random_samples(GROUPS, SAMPLES, seed=step)
    groups = []
    for number in range(GROUPS):
        trajectories = []
        for sample in samples[number * SAMPLES : (number + 1) * SAMPLES]:
            length, start = sample.num_tokens, sample.num_tokens - sample.num_loss_tokens
            turns = (Turn(start, length, StopReason.STOP, sample.reward),)
            versions = [-1] * start + [step - 1] * (length - start)
            columns = (sample.token_ids.tolist(), sample.loss_mask.int().tolist(), sample.rollout_logprobs.tolist(), versions)
            trajectories.append(Trajectory(*columns, turns, sample.reward, True, False))
        groups.append(TrajectoryGroup(f"{step}/{number}", "p", tuple(trajectories), baseline_reward=step + number / 10))
    return groups


class Rollout:
    """The coordinator as the loop calls it."""

    def call(self, method, *args, **_):
        if method == "take":
            return Taken(scripted_groups(args[0]), {})
        return [SimpleNamespace(name="0")] if method == "receivers" else {}


class Sink:
    def start(self, version, groups):
        self.version = version

    def put(self, tensors):
        list(tensors)

    def finish(self):
        return WeightVersion(self.version, 1, 1, "c")


class Recorder:
    """Keeps each step's numbers and samples."""

    def __init__(self):
        self.metrics, self.samples = {}, {}

    def phase(self, name):
        return nullcontext()

    def record(self, step, metrics, *, samples=None, version=None):
        self.metrics[step], self.samples[step] = metrics, samples

    def step_seconds(self):
        return 1.0


def run(tmp_path, *overrides, state=None):
    """Trains to STEPS; (recorder, state after the last step)."""
    config = tiny_config(
        tmp_path,
        *(f"algorithm.kl.coef={COEF}", f"algorithm.kl.target={TARGET}", f"algorithm.kl.horizon={HORIZON}"),
        *(f"trainer.prompts_per_step={GROUPS}", f"trainer.samples_per_prompt={SAMPLES}", "trainer.updates_per_step=1"),
        *(f"trainer.max_steps={STEPS}", "evaluation.num_prompts=0", "checkpoint.interval_steps=0", "optimizer.lr=3e-3"),
        *overrides,
    )
    with make_policy(config) as policy:
        recorder = Recorder()
        parts = Parts(
            config=config,
            topology=policy.topology,
            policy=policy,
            reference=ReferenceModel(config, policy.topology),
            recorder=recorder,
            state=state or TrainState(0, 0, {}, num_trained_groups=0, num_optimizer_steps=0),
            engine_dtype=torch.float32,
            share_prompts=True,
            checkpointer=SimpleNamespace(poll=lambda: {}, finish=lambda: {}),
            rollout=Rollout(),
            sink=Sink(),
        )
        return recorder, train(parts)


def expected_coefficients(distances):
    """arXiv:1909.08593, step by step."""
    coefficients = [COEF]
    for distance in distances:
        error = min(max(distance / TARGET - 1, -0.2), 0.2)
        coefficients.append(coefficients[-1] * (1 + error * GROUPS * SAMPLES / HORIZON))
    return coefficients


def test_the_kl_term_of_the_loss_has_the_coefficient_that_earlier_steps_steered(tmp_path):
    recorder, state = run(tmp_path, "algorithm.advantage=reinforce_plus_plus")
    metrics = [recorder.metrics[step] for step in range(1, STEPS + 1)]
    *coefficients, after = expected_coefficients([m["policy/kl_ref"] for m in metrics])
    assert [m["policy/kl_coef"] for m in metrics] == pytest.approx(coefficients)
    assert state.kl_coef == pytest.approx(after)
    assert len(set(coefficients)) == STEPS
    for step, coef in zip(metrics, coefficients, strict=True):
        assert step["loss/kl"] == pytest.approx(coef * step["policy/kl_ref"], rel=1e-4, abs=1e-9)
    # A run that goes on from there begins with it.
    resumed, _ = run(tmp_path, state=TrainState(STEPS - 1, STEPS - 1, {}, 0, 0, kl_coef=state.kl_coef))
    assert resumed.metrics[STEPS]["policy/kl_coef"] == state.kl_coef


def test_remax_with_kl_in_the_reward_takes_both_from_what_the_loop_knows(tmp_path):
    recorder, state = run(tmp_path, "algorithm.advantage=remax", "algorithm.kl.place=reward", "algorithm.kl.estimator=k1")
    metrics = [recorder.metrics[step] for step in range(1, STEPS + 1)]
    *coefficients, after = expected_coefficients([m["reward/kl"] for m in metrics])
    assert [m["policy/kl_coef"] for m in metrics] == pytest.approx(coefficients)
    assert state.kl_coef == pytest.approx(after)
    assert any(abs(m["reward/kl"]) > 1e-6 for m in metrics), "the policy has moved away from its reference"
    for step, coef in enumerate(coefficients, start=1):
        assert recorder.metrics[step]["reward/baseline_mean"] == pytest.approx(step + 0.05)
        for sample in recorder.samples[step]:
            distance = float((sample.old_logprobs - sample.ref_logprobs)[sample.loss_mask].double().sum())
            advantage = sample.reward - coef * distance - (step + sample.group_index / 10)
            trained = sample.advantages[sample.loss_mask]
            assert trained.tolist() == pytest.approx([advantage] * len(trained), abs=1e-5)
