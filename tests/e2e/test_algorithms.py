"""Every advantage estimator and every policy loss that has a name makes two steps of the real loop, with real vLLM.

All runs are made by one process around one engine, at the first request for a result.
"""

from __future__ import annotations

import json
import math

import pytest

from helpers.shared_engine import run_all
from helpers.tiny import write_tiny_model
from skyrl_mega.algorithms.advantages import ADVANTAGES
from skyrl_mega.algorithms.policy_losses import POLICY_LOSSES
from skyrl_mega.telemetry.metrics import read_metrics

STEPS = 2
SHAPE = {"hidden_size": 128, "head_dim": 32}
#: What the names that need something besides samples are given.
FURTHER: dict[str, list[str]] = {
    "old_logprobs": [],
    "ref_logprobs": ["algorithm.kl.coef=0.01"],
    "greedy": [],
    "states": [],
    "values": [],
    "components": ["reward.terms=[{{name: brevity, kind: function, path: 'helpers.even_env:brevity', weight: 0.1}}]"],
    "teacher_logprobs": ["teacher.path={home}/teacher"],
    "teacher_topk": ["teacher.path={home}/teacher", "teacher.topk=4"],
}
#: And the names whose defaults want more samples of a prompt than there are here.
OPTIONS = {"pass_at_k": ["algorithm.advantage_options.k=2"]}
CASES = [("advantage", name) for name in ADVANTAGES.built_in] + [("policy_loss", name) for name in POLICY_LOSSES.built_in]
WARMUP_STEPS = 6


def needs_of(kind, name):
    return {"advantage": ADVANTAGES, "policy_loss": POLICY_LOSSES}[kind][name].traits["needs"]


def overrides(home, kind, name):
    needs = needs_of(kind, name)
    return [
        *(f"trainer.run_dir={home / f'{kind}-{name}'}", f"algorithm.{kind}={name}"),
        *(f"trainer.max_steps={STEPS}", "trainer.updates_per_step=2", "checkpoint.interval_steps=0", "optimizer.lr=1e-3"),
        *(text.format(home=home) for need in sorted(needs) for text in FURTHER[need]),
        *OPTIONS.get(name, []),
    ]


def warm_up(home, max_steps):
    rows = [{"prompt": f"train 0 number {n}: ", "response": "22"} for n in range(8)]
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        *(f"trainer.run_dir={home / 'warm-up'}", f"trainer.max_steps={max_steps}", "algorithm.kl.coef=0.01"),
        *(f"warmup.steps={WARMUP_STEPS}", f"warmup.path={home / 'rows.jsonl'}", "warmup.batch_size=8", "warmup.lr=3e-3"),
    ]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    path = tmp_path_factory.mktemp("algorithms")
    write_tiny_model(path / "model", "llama", tied=True, **SHAPE)
    write_tiny_model(path / "teacher", "llama", tied=True, seed=5, **SHAPE)
    return path


@pytest.fixture(scope="module")
def results(home):
    fixed = [
        *("recipe=tiny", f"model.path={home / 'model'}", "env.name=helpers.even_env:EvenEnv", "evaluation.num_prompts=0"),
        *("checkpoint.export_hf=false", "checkpoint.asynchronous=false", "telemetry.trackers=[]"),
    ]
    specs = {f"{kind}-{name}": {"overrides": [*fixed, *overrides(home, kind, name)]} for kind, name in CASES}
    specs["warm-up"] = {"overrides": [*fixed, *warm_up(home, 1)]}
    # Killed after the warm-up's checkpoint: the same command goes on from there.
    lost = [str(home / "warm-up" / "checkpoints" / "step_000001"), str(home / "warm-up" / "summary.json")]
    specs["warm-up again"] = {"overrides": [*fixed, *warm_up(home, 2)], "remove": lost}
    return run_all(specs, home, timeout_s=500)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_every_name_makes_two_steps(kind, name, results):
    result = results[f"{kind}-{name}"]
    assert not result["error"], result["error"]
    rows = result["rows"]
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    updates = rows[1:]
    assert all("nonfinite" not in row for row in updates)
    assert any(row["update/skipped"] < 1.0 and row["update/grad_norm"] > 0.0 for row in updates)
    assert all(math.isfinite(row.get("loss/total", 0.0)) for row in updates)
    # The engine sampled the second step from the weights of the first.
    assert updates[-1]["sync/policy_version"] == STEPS
    assert all(row.get("mismatch/abs_logprob_diff_mean", 0.0) < 1e-3 for row in updates)


def test_reinforcement_begins_where_a_warm_up_ended_and_a_resume_does_not_repeat_it(results, home):
    for name in ("warm-up", "warm-up again"):
        assert not results[name]["error"], results[name]["error"]
    first, again = ({row["step"]: row for row in results[name]["rows"]} for name in ("warm-up", "warm-up again"))
    assert first[0]["warmup/loss"] < 0.7 * first[0]["warmup/first_loss"]
    # What the engine sampled is what the warmed-up policy thinks of it, and the reference is that policy.
    assert first[1]["mismatch/abs_logprob_diff_mean"] < 1e-3
    assert abs(first[1]["policy/kl_ref"]) < 1e-4
    # It was shown to answer 22, whose first character has an even code.
    assert first[1]["reward/mean"] > 0.75

    assert [row["step"] for row in read_metrics(home / "warm-up" / "warmup")] == list(range(1, WARMUP_STEPS + 1))
    assert "warmup/loss" not in again[0]
    assert again[1]["reward/mean"] == first[1]["reward/mean"]
    assert again[2]["mismatch/abs_logprob_diff_mean"] < 1e-3
