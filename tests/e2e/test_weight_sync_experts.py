"""A mixture of experts in the policy reaches the real vLLM engine whole, or not at all."""

from __future__ import annotations

import torch

from helpers.spawn import run_ranks
from helpers.tiny import write_tiny_model

PROMPT = [(7 * i) % 250 + 5 for i in range(60)]


class WithoutOneExpert:
    """The exporter, but the last layer's third expert never comes."""

    def __init__(self, exporter):
        self._exporter = exporter

    def fused_groups(self):
        return [group for group in self._exporter.fused_groups() if ".layers.1.mlp.experts.2." not in group[0]]

    def iter_weights(self, dtype):
        names = {name for group in self.fused_groups() for name in group}
        return ((name, tensor) for name, tensor in self._exporter.iter_weights(dtype) if name in names)


@torch.no_grad()
def logprob_error(engine, directory) -> float:
    """Largest |engine - Hugging Face| over a sampled turn after PROMPT."""
    from transformers import AutoModelForCausalLM

    from skyrl_mega.types import GenerationRequest, SamplingParams

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, experts_implementation="eager")
    (completion,) = engine.generate([GenerationRequest("r", PROMPT, SamplingParams(max_new_tokens=12, seed=1))])
    sequence = torch.tensor([*PROMPT, *completion.token_ids])
    logprobs = model(sequence[None]).logits[0, :-1].log_softmax(-1).gather(1, sequence[1:, None])[:, 0]
    return float((torch.tensor(completion.logprobs) - logprobs[len(PROMPT) - 1 :]).abs().max())


def serve_versions(rank: int, folder) -> dict:
    """Runs in a process of its own: engine and policy side by side, as in a run of one process."""
    from helpers.weight_fleet import one_engine_sink
    from skyrl_mega.config.schema import Config, ModelConfig, ParallelConfig, RolloutConfig
    from skyrl_mega.errors import WeightSyncError
    from skyrl_mega.models.build import build_model
    from skyrl_mega.models.hf_io import HFExporter, load_hf_weights, save_hf
    from skyrl_mega.parallel.topology import init_topology
    from skyrl_mega.rollout.vllm_engine import VLLMEngine
    from skyrl_mega.weights.publish import publish

    # Hidden and expert sizes that vLLM's CPU experts take: multiples of 32.
    path = write_tiny_model(folder / "start", "qwen3_moe", tied=False, hidden_size=128, moe_intermediate_size=64)
    rollout = RolloutConfig(dtype="float32", max_model_len=128, max_num_seqs=8)
    topology = init_topology(ParallelConfig(), torch.device("cpu"), seed=0)
    engine = VLLMEngine.start(rollout, model_path=str(path), seed=0, threads=1, in_process=True, device="cpu")
    chunks = build_model(Config(model=ModelConfig(path=str(path), dtype="float32")), topology)
    load_hf_weights(chunks, path, topology)
    exporter, sink = HFExporter(chunks, topology), one_engine_sink(engine)
    observed = {"start": logprob_error(engine, path)}
    for version in (1, 2):
        with torch.no_grad():
            for parameter in chunks[0].parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        save_hf(exporter, path, folder / str(version), torch.float32)
        observed[f"before {version}"] = logprob_error(engine, folder / str(version))
        # Buckets so small that a layer's experts come in several of them.
        publish(exporter, sink, version, torch.float32, bucket_bytes=60_000)
        observed[f"push {version}"] = logprob_error(engine, folder / str(version))
    sink.start(3, exporter.fused_groups())
    sink.abort()
    observed["abandoned"] = logprob_error(engine, folder / "2")
    try:
        publish(WithoutOneExpert(exporter), sink, 4, torch.float32, bucket_bytes=60_000)
    except WeightSyncError as error:
        observed["refused"] = str(error)
    publish(exporter, sink, 5, torch.float32, bucket_bytes=10**9)
    observed["after"] = logprob_error(engine, folder / "2")
    sink.close()
    engine.close()
    return observed


def test_the_policys_experts_are_served_as_pushed(tmp_path):
    (observed,) = run_ranks(serve_versions, 1, tmp_path, timeout_s=150)
    assert "only part of a fused group (RoutedExperts)" in observed.pop("refused")
    changed = [observed.pop("before 1"), observed.pop("before 2")]
    assert min(changed) > 0.1
    assert max(observed.values()) < 1e-3, observed
