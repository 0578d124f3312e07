"""An engine that shares the trainer's GPU: it gives its memory up, and serves the pushed weights once it has it back."""

from __future__ import annotations

import asyncio

import pytest
import torch

from helpers.model_source import ModelSource
from helpers.tiny import write_tiny_model
from skyrl_mega.config.schema import RolloutConfig
from skyrl_mega.rollout.async_engine import AsyncVLLMEngine
from skyrl_mega.rollout.local_engines import LocalEngine
from skyrl_mega.rollout.transport.choose import make_transport
from skyrl_mega.types import GenerationRequest, SamplingParams
from skyrl_mega.weights.fleet_sink import FleetSink
from skyrl_mega.weights.publish import publish

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("there is no GPU here", allow_module_level=True)

SHARE = 0.2


def free_bytes() -> int:
    return torch.cuda.mem_get_info()[0]


def test_an_engine_sleeps_while_the_trainer_trains_and_wakes_with_its_weights(tmp_path):
    from transformers import AutoModelForCausalLM

    model_dir = write_tiny_model(tmp_path / "model", "qwen2", tied=True, hidden_size=128)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).cuda().eval()
    rollout = RolloutConfig(dtype="bfloat16", max_model_len=128, max_num_seqs=8, gpu_memory_utilization=SHARE)

    async def scenario():
        engine = await AsyncVLLMEngine.start("0", rollout, model_path=str(model_dir), seed=0, threads=1, device="cuda")
        receiver = LocalEngine(engine, is_inline=False).receiver()
        sink = FleetSink(lambda: [receiver], make_transport("cuda_ipc", delta=False, timeout_s=60.0), timeout_s=60.0)
        awake = free_bytes()
        await engine.sleep(2)
        freed = free_bytes() - awake
        await engine.wake(["weights"])
        proof = await asyncio.to_thread(publish, ModelSource(model), sink, 1, torch.bfloat16, bucket_bytes=100_000)
        await engine.wake(["kv_cache"])
        completion = await engine.generate(GenerationRequest("a", [5, 6, 7], SamplingParams(max_new_tokens=4, temperature=0.0)))
        sink.close()
        await engine.close()
        return freed, proof, completion

    freed, proof, completion = asyncio.run(scenario())
    total = torch.cuda.mem_get_info()[1]
    assert freed > 0.5 * SHARE * total, f"sleep freed {freed / 2**30:.1f} GiB"
    assert not proof.failed
    assert set(completion.policy_versions) == {1}
    with torch.no_grad():
        row = torch.tensor([[5, 6, 7, *completion.token_ids]], device="cuda")
        expected = model(row).logits[0, 2:-1].log_softmax(-1).gather(1, row[0, 3:, None])[:, 0].cpu()
    assert (torch.tensor(completion.logprobs) - expected).abs().mean() < 0.05
