"""`skyrl-mega eval --checkpoint` on a directory that `convert` wrote: the answers of the weights in it, not of model.path."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from helpers.tiny import write_tiny_model
from skyrl_mega.launch.cli import main

#: Sampled answers, since the likeliest tokens of a random model may stand for no text; seeds are the same in every evaluation.
SETTINGS = (
    *("recipe=tiny", "rollout.dtype=float32", "model.dtype=float32", "telemetry.trackers=[]"),
    *("evaluation.num_prompts=6", "evaluation.samples_per_prompt=4", "evaluation.temperature=1.0"),
)


def answers(tmp_path, name, *arguments):
    """(prompt, sample) -> answer of an evaluation in a process of its own, as a user starts it."""
    output = tmp_path / name
    command = [sys.executable, "-m", "skyrl_mega", "eval", *SETTINGS, f"trainer.run_dir={tmp_path / 'run'}", *arguments]
    ended = subprocess.run([*command, "--output", str(output)], capture_output=True, text=True, timeout=280, check=False)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    rows = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    return {(row["prompt"], row["sample"]): row["response"] for row in rows}


@pytest.mark.nightly  # vLLM comes up twice
@pytest.mark.timeout(600)
def test_a_converted_checkpoint_answers_as_the_model_it_was_made_of(tmp_path):
    other = write_tiny_model(tmp_path / "other", "llama", tied=True, seed=1)
    model = write_tiny_model(tmp_path / "model", "llama", tied=True)
    assert main(["convert", str(model), str(tmp_path / "checkpoint")]) == 0
    expected = answers(tmp_path, "from_hf", f"model.path={model}")
    found = answers(tmp_path, "from_checkpoint", f"model.path={other}", "--checkpoint", str(tmp_path / "checkpoint"))
    assert found == expected
    assert len(set(expected.values())) > 1, "answers that are all alike tell nothing"
