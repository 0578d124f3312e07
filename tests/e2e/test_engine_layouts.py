"""One engine over several worker processes: tensor parallel on CPU; other layouts need CUDA. Nightly: a start of vLLM.

Every worker gets the whole stream and takes its share; the engine shows a version once all of them confirmed it. Oracle: Hugging
Face in float32 with the weights that were pushed.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from helpers.loop_thread import LoopThread
from helpers.model_source import ModelSource
from helpers.tiny import write_tiny_model
from helpers.weights_push import logprob_errors
from skyrl_mega.config.schema import RolloutConfig
from skyrl_mega.errors import ConfigError
from skyrl_mega.rollout.vllm_arguments import engine_arguments
from skyrl_mega.types import GenerationRequest, SamplingParams

#: Head size 32: vLLM's CPU attention has no kernel for smaller ones.
SHAPE = {"tied": True, "hidden_size": 128, "head_dim": 32}
PROMPT = [(7 * i) % 250 + 5 for i in range(40)]


def worst_error(loop, engine, directory) -> float:
    """Largest |engine - Hugging Face| over turns enough for every worker to get some."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    requests = [GenerationRequest(f"r{i}", PROMPT[i:], SamplingParams(max_new_tokens=12, seed=i)) for i in range(6)]
    running = [loop.start(engine.generate(request)) for request in requests]
    turns = [future.result(120) for future in running]
    errors = [logprob_errors(model, request.prompt_token_ids, turn).max() for request, turn in zip(requests, turns, strict=True)]
    return float(max(errors))


@pytest.mark.parametrize("name", ["engine_pipeline", "engine_data"])
def test_layouts_that_vllm_has_for_cuda_alone_are_refused_on_cpu(name):
    with pytest.raises(ConfigError, match=rf"{name} \(2\) must be 1 on CPU"):
        engine_arguments(RolloutConfig(**{name: 2}), model_path="unused", seed=0, device="cpu")


@pytest.mark.nightly
@pytest.mark.timeout(400)
def test_weights_reach_every_worker_of_an_engine(tmp_path):
    from safetensors.torch import load_file

    from skyrl_mega.rollout.async_engine import AsyncVLLMEngine
    from skyrl_mega.rollout.transport.choose import make_transport
    from skyrl_mega.weights.fleet_sink import FleetSink
    from skyrl_mega.weights.publish import publish

    first, second = (write_tiny_model(tmp_path / f"{seed}", "llama", seed=seed, **SHAPE) for seed in (0, 1))
    rollout = RolloutConfig(dtype="float32", max_model_len=128, max_num_seqs=8, start_timeout_s=200.0, engine_tensor=2)
    loop = LoopThread()
    start = AsyncVLLMEngine.start("e0", rollout, model_path=str(first), seed=0, threads=1, device="cpu")
    engine = loop.run(start, timeout_s=250)
    try:
        assert worst_error(loop, engine, first) < 1e-3
        assert worst_error(loop, engine, second) > 0.05
        for version, transport, directory in ((1, "gloo", second), (2, "shm", first)):
            tensors = load_file(directory / "model.safetensors")
            source = ModelSource(SimpleNamespace(named_parameters=tensors.items))
            sink = FleetSink(lambda: [engine.receiver()], make_transport(transport, delta=False, timeout_s=60.0), timeout_s=60.0)
            published = publish(source, sink, version, torch.float32, bucket_bytes=60_000)
            sink.close()
            assert published.failed == {}
            assert loop.run(engine.policy_version()) == version
            assert worst_error(loop, engine, directory) < 1e-3
    finally:
        loop.run(engine.close())
        loop.close()
