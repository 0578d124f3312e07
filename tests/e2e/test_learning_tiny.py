"""Every estimator and every loss learns a tiny task: a random model comes to begin its answers with an even character, nightly.

    LEADERBOARD=docs/benchmarks/leaderboard_tiny.json pytest -m nightly tests/e2e/test_learning_tiny.py

writes by how much. One seed of one easy task: it shows what learns and what does not, not which is best.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from helpers.shared_engine import run_all
from helpers.tiny import write_tiny_model
from skyrl_mega.algorithms.advantages import ADVANTAGES
from skyrl_mega.algorithms.policy_losses import POLICY_LOSSES
from skyrl_mega.telemetry.versions import collect_versions, git_commit, hardware

STEPS = 30
SHAPE = {"hidden_size": 128, "head_dim": 32}
NAMES = [("advantage", name) for name in ADVANTAGES.built_in] + [("policy_loss", name) for name in POLICY_LOSSES.built_in]
#: These imitate what they are shown, whatever it is worth: a teacher, or the policy's own answers.
IMITATE = {"distill", "distill_topk", "cross_entropy"}
CASES = [(kind, name) for kind, name in NAMES if name not in IMITATE]

COMMON = [
    *("recipe=tiny", "env.name=helpers.even_env:EvenEnv", "evaluation.num_prompts=0", f"trainer.max_steps={STEPS}"),
    *("trainer.prompts_per_step=8", "trainer.samples_per_prompt=8", "trainer.updates_per_step=2", "optimizer.lr=1e-3"),
    *("rollout.max_new_tokens=4", "rollout.max_num_seqs=64", "checkpoint.interval_steps=0", "checkpoint.export_hf=false"),
    *("checkpoint.asynchronous=false", "telemetry.trackers=[]"),
]
FURTHER = {
    "gdpo": ["reward.terms=[{name: brevity, kind: function, path: 'helpers.even_env:brevity', weight: 0.1}]"],
    "gae": ["critic.optimizer.lr=1e-3"],
    "gspo": ["algorithm.reduction=sequence_mean"],
    "gspo_token": ["algorithm.reduction=sequence_mean"],
    "gmpo": ["algorithm.reduction=sequence_mean"],
    "sapo": ["algorithm.reduction=sequence_mean"],
}


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    """ "kind name" -> mean reward of each step."""
    home = tmp_path_factory.mktemp("tiny_leaderboard")
    write_tiny_model(home / "model", "llama", tied=True, **SHAPE)
    specs = {}
    for kind, name in CASES:
        own = [f"model.path={home / 'model'}", f"trainer.run_dir={home / f'{kind}-{name}'}", f"algorithm.{kind}={name}"]
        specs[f"{kind} {name}"] = {"overrides": [*COMMON, *own, *FURTHER.get(name, [])]}
    results = run_all(specs, home, timeout_s=3000)
    errors = {name: result["error"] for name, result in results.items() if result["error"]}
    assert not errors, errors
    curves = {name: [row["reward/mean"] for row in result["rows"] if row["step"] > 0] for name, result in results.items()}
    if path := os.environ.get("LEADERBOARD"):
        write_leaderboard(Path(path), curves)
    return curves


def before_and_after(curve):
    """Mean reward of the first three steps, which the policy has hardly moved in, and of the last five."""
    return sum(curve[:3]) / 3, sum(curve[-5:]) / 5


def write_leaderboard(path, curves):
    rows = {}
    for name, curve in curves.items():
        before, after = before_and_after(curve)
        rows[name] = {"reward_before": round(before, 3), "reward_after": round(after, 3), "gain": round(after - before, 3)}
    content = {
        "task": "a random 2-layer model; reward 1 if an answer begins with an even character; 8 prompts x 8 samples a step",
        "steps": STEPS,
        "note": "one seed; standard error of a mean of five steps about 0.03; all other settings are the defaults of the name",
        "settings": COMMON,
        "further": FURTHER,
        "hardware": hardware(),
        "versions": collect_versions(),
        "git_commit": git_commit(),
        "results": dict(sorted(rows.items(), key=lambda item: -item[1]["reward_after"])),
        "reward_by_step": curves,
    }
    path.write_text(json.dumps(content, indent=2) + "\n")


@pytest.mark.nightly  # ten minutes for all of them
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_name_learns_the_tiny_task(kind, name, curves):
    before, after = before_and_after(curves[f"{kind} {name}"])
    assert after > before + 0.15, f"{before:.2f} -> {after:.2f}"
