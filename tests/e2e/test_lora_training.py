"""Runs that train an adapter, as a user starts them: resumed, asynchronous, with merged weights; minutes each, nightly."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from helpers.tiny import write_tiny_model
from skyrl_mega.telemetry.metrics import read_metrics

TESTS = Path(__file__).parents[1]
LORA = ["lora.rank=4", "lora.alpha=8", "optimizer.lr=5e-3", "algorithm.kl.coef=0.05", "rollout.probe_after_sync=true"]
#: Everything that is computed, as opposed to timed.
COMPUTED = ("reward/", "loss/", "policy/", "eval/", "update/", "response/")


def train(model: Path, run_dir: Path, *overrides: str) -> list[dict]:
    command = [sys.executable, "-m", "skyrl_mega.train", "recipe=tiny", f"model.path={model}", f"trainer.run_dir={run_dir}"]
    command += [*LORA, "env.name=helpers.even_env:EvenEnv", "checkpoint.interval_steps=2", "evaluation.interval_steps=2"]
    command += overrides
    ended = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, timeout=280, check=False)
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-6000:]
    return read_metrics(run_dir)


def computed(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key.startswith(COMPUTED)} for row in rows]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("lora") / "model", "llama", tied=True)


@pytest.mark.nightly  # a start of vLLM each
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "settings", [["rollout=async"], ["lora.sync=merged", "rollout.placement=child_process"]], ids=["async", "merged"]
)
def test_an_engine_beside_the_trainer_serves_the_adapter(model, tmp_path, settings):
    rows = train(model, tmp_path / "run", "trainer.max_steps=3", *settings)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(row["probe/logprob_diff_mean"] < 1e-3 for row in rows[1:])


@pytest.mark.nightly  # four starts of vLLM
@pytest.mark.timeout(900)
def test_a_run_with_an_adapter_resumes_exactly_and_leaves_it_and_the_merged_model(model, tmp_path):
    whole = train(model, tmp_path / "whole", "trainer.max_steps=4")
    train(model, tmp_path / "parts", "trainer.max_steps=2")
    parts = train(model, tmp_path / "parts", "trainer.max_steps=4")
    assert computed(whole) == computed(parts)
    assert all(row["policy/kl_ref"] > 0 for row in whole[2:])
    assert all(row["probe/logprob_diff_mean"] < 1e-3 for row in whole[1:])
    adapter = load_file(tmp_path / "whole" / "lora" / "adapter_model.safetensors")
    assert len(adapter) == 2 * 7 * 2
    merged, base = (load_file(folder / "model.safetensors") for folder in (tmp_path / "whole" / "hf", model))
    assert {name for name in base if not merged[name].equal(base[name])} == {
        name.removeprefix("base_model.model.").replace(".lora_A", "") for name in adapter if ".lora_A" in name
    }
    # Begun with that adapter: the engine has it before the first step.
    begun = train(model, tmp_path / "begun", "trainer.max_steps=1", f"lora.path={tmp_path / 'whole' / 'lora'}")
    assert begun[0]["eval/accuracy"] == whole[-1]["eval/accuracy"]
