"""Families with windows are served by the real vLLM engine as the policy computes them, before and after a push. Nightly."""

from __future__ import annotations

import pytest
import torch

from helpers.hf_oracle import make_micro_batch, policy_logits
from helpers.spawn import run_ranks
from helpers.tiny import write_tiny_model

#: Family -> what its config has beside the sizes. Prompt and answer are several windows long.
FAMILIES = {
    "mistral": {},
    "gemma2": {},
    "gemma3_text": {},
    "llama": {"attention_bias": True},
    # vLLM derives the head size from the hidden size, and has no kernels for 16.
    "qwen2": {"hidden_size": 128, "use_sliding_window": True, "sliding_window": 12, "max_window_layers": 0},
    # Sizes of experts that vLLM's CPU kernels take; it ties no head of these families.
    "glm4_moe": {"tied": False, "hidden_size": 128, "moe_intermediate_size": 64},
    # And the one size of latents that its CPU kernel for multi-latent attention has.
    "deepseek_v3": {
        **{"tied": False, "hidden_size": 128, "moe_intermediate_size": 64, "rms_norm_eps": 1e-6, "kv_lora_rank": 512},
        **{"qk_rope_head_dim": 64, "head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 32},
    },
}
PROMPT = [(7 * i) % 250 + 5 for i in range(60)]


@torch.no_grad()
def logprob_error(engine, model) -> float:
    """Largest |engine - policy| over a sampled turn after PROMPT."""
    from skyrl_mega.models.build import forward_hidden, output_weight
    from skyrl_mega.types import GenerationRequest, SamplingParams

    (completion,) = engine.generate([GenerationRequest("r", PROMPT, SamplingParams(max_new_tokens=12, seed=1))])
    sequence = torch.tensor([*PROMPT, *completion.token_ids])
    hidden = forward_hidden(model, make_micro_batch([sequence]))
    logits = policy_logits(hidden, output_weight(model), model.architecture)
    logprobs = logits[:-1].log_softmax(-1).gather(1, sequence[1:, None])[:, 0]
    return float((torch.tensor(completion.logprobs) - logprobs[len(PROMPT) - 1 :]).abs().max())


def serve(rank: int, folder, family: str) -> dict[str, float]:
    """Runs in a process of its own: engine and policy side by side, as in a run of one process."""
    from helpers.weight_fleet import one_engine_sink
    from skyrl_mega.config.schema import Config, ModelConfig, ParallelConfig, RolloutConfig
    from skyrl_mega.models.build import build_model
    from skyrl_mega.models.hf_io import HFExporter, load_hf_weights
    from skyrl_mega.parallel.topology import init_topology
    from skyrl_mega.rollout.vllm_engine import VLLMEngine
    from skyrl_mega.weights.publish import publish

    path = write_tiny_model(folder / "model", family, **{"head_dim": 32, **FAMILIES[family]})
    rollout = RolloutConfig(dtype="float32", max_model_len=128, max_num_seqs=8)
    topology = init_topology(ParallelConfig(), torch.device("cpu"), seed=0)
    engine = VLLMEngine.start(rollout, model_path=str(path), seed=0, threads=1, in_process=True, device="cpu")
    [model] = build_model(Config(model=ModelConfig(path=str(path), dtype="float32")), topology)
    load_hf_weights([model], path, topology)
    observed = {"start": logprob_error(engine, model)}
    with torch.no_grad():
        for parameter in (*model.parameters(), *model.buffers()):  # a router's bias is a buffer
            parameter.add_(torch.randn_like(parameter) * 0.05)
    observed["changed"] = logprob_error(engine, model)
    sink = one_engine_sink(engine)
    publish(HFExporter([model], topology), sink, 1, torch.float32, bucket_bytes=60_000)
    observed["pushed"] = logprob_error(engine, model)
    sink.close()
    engine.close()
    return observed


@pytest.mark.nightly  # an engine for each family: a minute and a half
@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_computes_what_the_policy_computes(family, tmp_path):
    (observed,) = run_ranks(serve, 1, tmp_path, family, timeout_s=150)
    assert observed.pop("changed") > 0.05
    assert max(observed.values()) < 1e-3, observed
