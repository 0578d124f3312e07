"""Every transport from GPU memory into a real engine on a GPU. cuda_ipc, shm and gloo need one GPU, nccl two."""

from __future__ import annotations

import multiprocessing
import os

import pytest
import torch

from helpers.model_source import ModelSource
from helpers.tiny import write_tiny_model

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("there is no GPU here", allow_module_level=True)

PROMPT = [(7 * i) % 250 + 5 for i in range(60)]


def start_engine(model_dir, gpu):
    """An engine in a child process that sees GPU `gpu` alone."""
    from skyrl_mega.config.schema import RolloutConfig
    from skyrl_mega.rollout.vllm_engine import VLLMEngine

    rollout = RolloutConfig(dtype="bfloat16", max_model_len=128, max_num_seqs=8, gpu_memory_utilization=0.2)
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
    try:
        return VLLMEngine.start(rollout, model_path=str(model_dir), seed=0, threads=1, in_process=False, device="cuda")
    finally:
        os.environ.pop("CUDA_VISIBLE_DEVICES")
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


@torch.no_grad()
def logprob_error(engine, model) -> float:
    """Mean |engine - Hugging Face in float32| over a scored sequence."""
    logprobs = model.float()(torch.tensor([PROMPT], device="cuda")).logits[0, :-1].log_softmax(-1)
    expected = logprobs.gather(1, torch.tensor(PROMPT[1:], device="cuda")[:, None])[:, 0].cpu()
    return float((torch.tensor(engine.score([PROMPT])[0][1:]) - expected).abs().mean())


def serve_versions(transport, delta, model_dir, results):
    """Runs in a process of its own, whose first GPU is the trainer's."""
    from transformers import AutoModelForCausalLM

    from helpers.weight_fleet import one_engine_sink
    from skyrl_mega.weights.publish import publish

    torch.cuda.set_device(0)
    engine = start_engine(model_dir, gpu=1 if transport == "nccl" else 0)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).cuda().eval()
    sink = one_engine_sink(engine, transport, delta=delta, timeout_s=60.0)
    observed = {}
    for version in (1, 2, 3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * parameter.std() * 0.3)
        observed[f"before {version}"] = logprob_error(engine, model)
        # Buckets so small that layers come in several of them.
        publish(ModelSource(model), sink, version, torch.bfloat16, bucket_bytes=30_000)
        observed[f"after {version}"] = logprob_error(engine, model)
    sink.close()
    engine.close()
    results.put(observed)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("transport", "delta"),
    [("cuda_ipc", False), ("nccl", False), ("shm", False), ("gloo", False), ("shm", True)],
    ids=["cuda_ipc", "nccl", "shm", "gloo", "shm-delta"],
)
def test_every_version_is_served_as_pushed(transport, delta, tied, tmp_path):
    if transport == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("nccl can't join two processes on one GPU, and there is one here")
    model_dir = write_tiny_model(tmp_path / "model", "qwen2", tied=tied, hidden_size=128)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=serve_versions, args=(transport, delta, model_dir, results))
    process.start()
    observed = results.get(timeout=500)
    process.join(timeout=60)
    assert min(observed[f"before {version}"] for version in (1, 2, 3)) > 0.1
    assert max(observed[f"after {version}"] for version in (1, 2, 3)) < 0.05, observed
