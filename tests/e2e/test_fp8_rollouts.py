"""Engines with 8-bit weights: real vLLM computes with what was sent, and a run trains by what they sample.

The oracle is Hugging Face in float32 with the rounded weights. It can't follow the rounding of inputs: the engine rounds what
bfloat16 has rounded before, and whatever lies near the middle of two 8-bit numbers goes the other way.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers import even_env
from helpers.model_source import ModelSource
from helpers.tiny import write_tiny_model
from helpers.weight_fleet import one_engine_sink
from helpers.weights_push import perturbed
from skyrl_mega.telemetry.metrics import read_metrics
from skyrl_mega.weights.fp8 import Fp8Source, quantize
from skyrl_mega.weights.publish import publish

SHAPE = {"hidden_size": 128, "head_dim": 32, "num_hidden_layers": 1}
TOKENS = [(7 * i) % 250 + 5 for i in range(250)]


def logprobs(model):
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0, :-1].log_softmax(-1).gather(1, torch.tensor(TOKENS[1:])[:, None])[:, 0]


@torch.no_grad()
def rounded(model):
    """A copy whose linear layers have the numbers that 8 bits leave of theirs."""
    model = perturbed(model, seed=0, scale=0.0)
    for name, weight in model.named_parameters():
        if name.endswith("_proj.weight"):
            quantized, scale = quantize(weight.to(torch.bfloat16))
            weight.copy_(quantized.float() * scale)
    return model


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("fp8") / "qwen2", "qwen2", tied=True, **SHAPE)


def test_an_engine_computes_with_the_8_bit_weights_of_each_version(model_dir):
    """Qwen2 has biases; its q, k and v are one tensor in the engine, as gate and up are. Each push comes in many buckets."""
    from transformers import AutoModelForCausalLM

    from skyrl_mega.config.schema import RolloutConfig
    from skyrl_mega.rollout.vllm_engine import VLLMEngine

    rollout = RolloutConfig(dtype="bfloat16", quantization="fp8", max_model_len=256, max_num_seqs=8)
    engine = VLLMEngine.start(rollout, model_path=str(model_dir), seed=0, threads=1, in_process=False, device="cpu")
    try:
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
        for version, road in enumerate(("shm", "gloo"), start=1):
            model = perturbed(model, seed=version, scale=0.3)
            sink = one_engine_sink(engine, road)
            published = publish(Fp8Source(ModelSource(model)), sink, version, torch.bfloat16, bucket_bytes=20_000)
            sink.close()
            assert published.failed == {}
            assert engine.policy_version == version
            served, whole = torch.tensor(engine.score([TOKENS])[0][1:]), logprobs(model)
            # What 8-bit weights do to each token's logprob, in the engine and in the oracle. The engine's has its rounded inputs'
            # part besides, which is as large and knows nothing of the weights'.
            in_engine, right = served - whole, logprobs(rounded(model)) - whole
            slope = float((in_engine * right).sum() / (right * right).sum())
            assert 0.6 < slope < 1.4, (slope, in_engine.std(), right.std())
            assert float(in_engine.std()) < 3 * float(right.std())
    finally:
        engine.close()


def test_a_run_trains_by_what_8_bit_engines_sample_and_is_evaluated_with_them(model_dir, tmp_path):
    settings = ["recipe=tiny", "precision=bfloat16", "rollout.quantization=fp8", "env.name=even_env:EvenEnv"]
    settings += [f"model.path={model_dir}", f"trainer.run_dir={tmp_path / 'run'}", "trainer.max_steps=2"]
    settings += ["checkpoint.interval_steps=2", "rollout.probe_after_sync=true"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "RANK", "WORLD_SIZE"))}
    environment["PYTHONPATH"] = str(Path(even_env.__file__).parent)

    def command(*words):
        done = subprocess.run(
            [sys.executable, "-m", *words], env=environment, capture_output=True, text=True, timeout=400, check=False
        )
        assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        return done.stdout

    command("skyrl_mega.train", *settings)
    rows = {row["step"]: row for row in read_metrics(tmp_path / "run")}
    assert "eval/accuracy" in rows[0], "engines had weights before the first step"
    for step in (1, 2):
        # More than bfloat16 alone would differ, and less than unrelated weights.
        assert 0.01 < rows[step]["probe/logprob_diff_mean"] < 0.3
        assert rows[step]["sync/policy_version"] == step
        assert rows[step]["update/grad_norm"] > 0.0
    evaluated = [*settings, "rollout.probe_after_sync=false", "evaluation.num_prompts=4"]
    assert "accuracy" in command("skyrl_mega", "eval", *evaluated)
