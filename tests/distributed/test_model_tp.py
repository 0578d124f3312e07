"""Tensor and sequence parallelism change nothing: two ranks against Hugging Face and against one process."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from helpers.hf_oracle import (
    load_oracle,
    make_micro_batch,
    make_sequences,
    oracle_gradients,
    oracle_logits,
    probe_loss,
    to_megatron,
)
from helpers.spawn import run_ranks
from helpers.tiny import write_tiny_model
from skyrl_mega.errors import CheckpointError, ConfigError, ModelLoadError

#: name: (family, tied, sequence parallel, settings). 271 tokens: the second rank holds a padded row. 2 + 9 + 30 tokens are odd.
CASES = {
    "llama_tied_tp": ("llama", True, False, {}),
    "llama_tied_sp_ragged_vocabulary": ("llama", True, True, {"vocab_size": 271}),
    "qwen2_untied_sp_ragged_vocabulary": ("qwen2", False, True, {"vocab_size": 271}),
    "qwen3_tied_tp": ("qwen3", True, False, {}),
    "qwen3_untied_sp": ("qwen3", False, True, {}),
    "gemma3_text_tied_sp": ("gemma3_text", True, True, {}),
    "llama_biases_sp": ("llama", False, True, {"attention_bias": True}),
    "deepseek_v3_dense_tp": ("deepseek_v3", False, False, {"first_k_dense_replace": 2}),
    "deepseek_v3_sp": ("deepseek_v3", False, True, {}),
    "deepseek_v3_sp_without_query_latent": ("deepseek_v3", True, True, {"q_lora_rank": None}),
    "glm4_moe_sp": ("glm4_moe", False, True, {}),
}
LENGTHS = [2, 9, 30]


def _shard(full, name, parameter, rank):
    """This rank's part of a full Megatron tensor."""
    if not parameter.tensor_model_parallel or ".experts." in name:  # experts are whole on every rank
        return full
    if "linear_fc1" in name:
        gate, up = full.chunk(2)
        return torch.cat([gate.chunk(2)[rank], up.chunk(2)[rank]])
    if full.size(parameter.partition_dim) % 2:
        full = torch.cat([full, full.new_zeros(1, full.size(1))])
    return full.chunk(2, parameter.partition_dim)[rank]


def _run_case(path, family, sequence_parallel, topology, out):
    """Forward, backward through Megatron's DDP, export; returns errors against the oracle and what the rank holds."""
    from megatron.core import tensor_parallel
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    from skyrl_mega.config.schema import Config, ModelConfig, ParallelConfig
    from skyrl_mega.models.build import build_model, forward_hidden, output_weight, vocab_range
    from skyrl_mega.models.hf_io import HFExporter, load_hf_weights, save_hf

    parallel = ParallelConfig(tensor=2, sequence_parallel=sequence_parallel)
    config = Config(model=ModelConfig(path=str(path), dtype="float32"), parallel=parallel)
    [policy] = build_model(config, topology)
    load_hf_weights([policy], path, topology)
    model = DistributedDataParallel(policy.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), policy)
    sequences = make_sequences(LENGTHS, policy.vocab_size)
    micro_batch = make_micro_batch(sequences)

    hidden = forward_hidden(model, micro_batch)
    copied = tensor_parallel.copy_to_tensor_model_parallel_region(hidden)
    local = copied @ output_weight(model).t()
    logits = tensor_parallel.gather_from_tensor_model_parallel_region(local)[:, : policy.vocab_size]
    model.zero_grad_buffer()
    probe_loss(logits, micro_batch).backward()
    finalize_model_grads([model], None)

    oracle = load_oracle(path)
    gradients = oracle_gradients(oracle, sequences, micro_batch)
    errors = {"logits": (logits - oracle_logits(oracle, sequences)).abs().max().item()}
    for name, parameter in policy.named_parameters():
        full = to_megatron(gradients, name, policy.architecture)
        difference = parameter.main_grad - _shard(full, name, parameter, topology.tp_rank)
        errors[name] = (difference.abs().max() / full.abs().max()).item()
    exporter = HFExporter([policy], topology)
    exported = {name: tensor.clone() for name, tensor in exporter.iter_weights(torch.float32)}
    save_hf(exporter, path, out, torch.float32)
    return errors, hidden.detach(), exported, vocab_range(model), exporter.fused_groups()


def _run_all(rank, folder, paths):
    from skyrl_mega.config.schema import Config, ModelConfig, ParallelConfig
    from skyrl_mega.models.build import build_model
    from skyrl_mega.models.hf_io import HFExporter, load_hf_weights, save_hf
    from skyrl_mega.parallel.device import resolve_device
    from skyrl_mega.parallel.topology import init_topology

    topology = init_topology(ParallelConfig(tensor=2), resolve_device("cpu"), seed=0)
    results = {}
    for name, (family, _, sequence_parallel, _) in CASES.items():
        results[name] = _run_case(paths[name], family, sequence_parallel, topology, folder / f"out-{name}")

    refusals = []
    config = Config(model=ModelConfig(path=str(folder / "three_heads"), dtype="float32"))
    with pytest.raises(ConfigError) as caught:
        build_model(config, topology)
    refusals.append(str(caught.value))
    path = paths["llama_tied_tp"]
    [policy] = build_model(Config(model=ModelConfig(path=str(path), dtype="float32")), topology)
    with pytest.raises(ModelLoadError) as caught:
        load_hf_weights([policy], paths["qwen2_untied_sp_ragged_vocabulary"], topology)
    refusals.append(str(caught.value))
    load_hf_weights([policy], path, topology)
    with pytest.raises(CheckpointError) as caught:
        save_hf(HFExporter([policy], topology), path, path / "config.json" / "out", torch.float32)
    refusals.append(str(caught.value))
    topology.destroy()
    return results, refusals


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tp")
    paths = {
        name: write_tiny_model(folder / name, family, tied=tied, **settings)
        for name, (family, tied, _, settings) in CASES.items()
    }
    write_tiny_model(folder / "three_heads", num_attention_heads=3, num_key_value_heads=3, hidden_size=96)
    return folder, paths, run_ranks(_run_all, 2, folder, paths, timeout_s=240)


@pytest.mark.parametrize("name", CASES)
def test_two_tensor_ranks_give_hugging_faces_logits_and_gradients(name, ranks):
    for results, _ in ranks[2]:
        errors = results[name][0]
        assert len(errors) >= 15
        assert errors.pop("logits") < 2e-5
        assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("name", CASES)
def test_both_ranks_get_the_same_hidden_states_of_every_token(name, ranks):
    first, second = (results[name][1] for results, _ in ranks[2])
    assert first.shape == (sum(LENGTHS), 64)
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", CASES)
def test_both_ranks_export_the_source_bit_for_bit(name, ranks):
    folder, paths, outcomes = ranks
    source = load_file(paths[name] / "model.safetensors")
    written = load_file(folder / f"out-{name}" / "model.safetensors")
    for results, _ in outcomes:
        exported = results[name][2]
        assert [n for group in results[name][4] for n in group] == list(exported)
        for copy in (exported, written):
            assert copy.keys() == source.keys()
            assert all(torch.equal(tensor, copy[key]) for key, tensor in source.items())


def test_a_ragged_vocabulary_is_padded_and_the_padding_is_marked(ranks):
    for name, (_, _, _, settings) in CASES.items():
        vocab_size = settings.get("vocab_size", 272)
        assert [results[name][3] for results, _ in ranks[2]] == [(0, 136), (136, vocab_size)]


def test_layouts_and_weights_that_do_not_fit_are_refused_on_every_rank(ranks):
    for _, (layout, weights, unwritable) in ranks[2]:
        assert "`parallel.tensor` (2) must divide the model's attention heads (3)" in layout
        assert "unexpected: lm_head.weight" in weights or "lm_head.weight differs" in weights
        assert "wrong shape: model.embed_tokens.weight is (271, 64)" in weights
        assert "export to" in unwritable
