"""LoRA beside a Megatron policy: logits and gradients by the chain rule, several adapters, files, checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.hf_oracle import load_oracle, make_micro_batch, make_sequences, oracle_gradients, oracle_logits, probe_loss
from helpers.lora import factors, logits_of, randomise
from helpers.policy import make_policy, tiny_config
from helpers.tiny import write_tiny_model
from helpers.updates import clones, packed, update, variant
from skyrl_mega.checkpoint import state as checkpoint
from skyrl_mega.checkpoint.export import export_run
from skyrl_mega.checkpoint.files import stored_keys
from skyrl_mega.config.load import save_resolved
from skyrl_mega.config.lora_rules import syncs_adapter
from skyrl_mega.config.validate import validate
from skyrl_mega.errors import CheckpointError, ConfigError, ModelLoadError
from skyrl_mega.models.hf_io import save_hf
from skyrl_mega.models.lora import leaf
from skyrl_mega.models.lora_weights import peft_names
from skyrl_mega.training.reference import BaseModel, ReferenceModel
from skyrl_mega.types import TrainState

LORA = ["lora.rank=4", "lora.alpha=6", "optimizer.lr=1e-2"]
#: Projections by the last parts of their names; and what is in the names of experts.
HEADS, FFN, EXPERTS = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj"), ".experts."
LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")

STATE = TrainState(1, 1, {"index": 4}, num_trained_groups=4, num_optimizer_steps=1)


@pytest.mark.parametrize(
    ("family", "shape", "settings", "adapted"),
    [
        ("llama", {}, [], {*HEADS, *FFN}),
        (
            "qwen2",
            {},
            ["lora.targets=[q_proj,v_proj,up_proj,o_proj]", "lora.use_rslora=true"],
            {"q_proj", "v_proj", "up_proj", "o_proj"},
        ),
        ("qwen2_moe", {}, ["model.recompute=full"], {*HEADS, *FFN, EXPERTS}),
        ("qwen3_moe", {}, ["lora.experts=false"], {*HEADS}),
        ("deepseek_v3", {}, [], {*LATENT, *FFN, EXPERTS}),
        ("deepseek_v3", {"q_lora_rank": None}, ["lora.targets=[q_proj,kv_a_proj_with_mqa]"], {"q_proj", "kv_a_proj_with_mqa"}),
    ],
)
def test_logits_are_those_of_the_merged_model_and_gradients_follow_from_its_own(tmp_path, family, shape, settings, adapted):
    """d loss / dB = scale dW A^T and d loss / dA = scale B^T dW, with dW of Hugging Face's model with the merged weights."""
    config = tiny_config(tmp_path, *LORA, *settings, family=family, tied=False, **shape)
    with make_policy(config) as policy:
        randomise(policy)
        sequences = make_sequences([7, 33, 1, 20], 272)
        micro_batch = make_micro_batch(sequences)
        save_hf(policy.weights.exporter, config.model.path, tmp_path / "merged", torch.float32)
        oracle = load_oracle(tmp_path / "merged")
        logits = logits_of(policy, micro_batch)
        torch.testing.assert_close(logits, oracle_logits(oracle, sequences), rtol=0, atol=5e-5)
        base = load_oracle(Path(config.model.path))
        assert (oracle_logits(base, sequences) - logits).abs().mean() > 0.1
        for ddp in policy.ddps:
            ddp.zero_grad_buffer()
        probe_loss(logits, micro_batch).backward()
        got, values, scale = factors(policy, gradients=True), factors(policy), policy.weights.adapter.scale
        want = oracle_gradients(oracle, sequences, micro_batch)
        assert scale == pytest.approx(6 / 2 if "lora.use_rslora=true" in settings else 6 / 4)
        projections = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in got}
        assert {leaf(p) for p in projections} | {EXPERTS for p in projections if EXPERTS in p} == adapted
        for projection in projections:
            name_a, name_b = peft_names(projection)
            dw = want[f"{projection}.weight"]
            for name, expected in ((name_b, scale * dw @ values[name_a].t()), (name_a, scale * values[name_b].t() @ dw)):
                assert (got[name] - expected).abs().max() < 2e-5 * max(1.0, float(expected.abs().max())), name


def test_only_the_adapter_has_gradient_buffers_and_optimizer_state(tmp_path):
    with make_policy(tiny_config(tmp_path, *LORA)) as policy:
        trained = sum(p.numel() for p in policy.chunks[0].parameters() if p.requires_grad)
        base = sum(p.numel() for p in policy.chunks[0].parameters() if not p.requires_grad)
        buffers = sum(b.grad_data.numel() for ddp in policy.ddps for b in (*ddp.buffers, *ddp.expert_parallel_buffers))
        assert trained <= buffers < trained + 4096 < base
        assert sum(p.numel() for group in policy.optimizer.param_groups for p in group["params"]) == trained
        assert not any(hasattr(p, "main_grad") for p in policy.chunks[0].parameters() if not p.requires_grad)


def test_the_reference_is_the_base_without_a_second_model(tmp_path):
    config = tiny_config(tmp_path, *LORA)
    with make_policy(config) as policy:
        randomise(policy)
        update(policy, 0)
        batch = packed(policy, 3)
        trained = policy.compute_logprobs(batch)
        expected = ReferenceModel(config, policy.topology).compute_logprobs(batch)
        for got, want, other in zip(BaseModel(policy).compute_logprobs(batch), expected, trained, strict=True):
            assert torch.equal(got, want)
            assert not torch.allclose(got, other, atol=1e-2)
        assert all(torch.equal(a, b) for a, b in zip(policy.compute_logprobs(batch), trained, strict=True))


def test_several_adapters_learn_beside_one_model_as_each_would_alone(tmp_path):
    config = tiny_config(tmp_path, *LORA)
    other = variant(config, "lora.rank=2", "optimizer.lr=3e-3", "lora.targets=[q_proj,down_proj]")
    alone = {}
    for name, settings in (("default", config), ("second", other)):
        with make_policy(config) as policy:
            one = policy if name == "default" else policy.beside(name, settings)
            for seed in (1, 2):
                update(one, seed)
            alone[name] = clones(one)
    with make_policy(config) as policy:
        second = policy.beside("second", other)
        for seed in (1, 2):
            update(policy, seed)
            update(second, seed)
        for name, one in (("default", policy), ("second", second)):
            together = clones(one)
            assert all(torch.equal(together[key], value) for key, value in alone[name].items())
        with pytest.raises(ConfigError, match="must be new"):
            policy.beside("second", other)
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(alone["default"][name], alone["second"][name])


def test_an_adapter_directory_is_read_back_bit_for_bit(tmp_path):
    config = tiny_config(tmp_path, *LORA, family="qwen3_moe", tied=False)
    with make_policy(config) as policy:
        randomise(policy)
        policy.save_adapter(str(tmp_path / "adapter"))
        expected = factors(policy)
    with make_policy(variant(config, *LORA, f"lora.path={tmp_path / 'adapter'}")) as policy:
        got = factors(policy)
        assert got.keys() == expected.keys()
        assert all(torch.equal(value, got[name]) for name, value in expected.items())
        policy.save_adapter(str(tmp_path / "again"))
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "adapter" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    with pytest.raises(ConfigError, match=r"rank 4 where `lora.rank` is 8.*lora.rank=4"):
        validate(variant(config, "lora.rank=8", "lora.alpha=6", f"lora.path={tmp_path / 'adapter'}"))
    narrow = variant(config, *LORA, f"lora.path={tmp_path / 'adapter'}", "lora.experts=false")
    with pytest.raises(ModelLoadError, match=r"only there: .*experts\.0\.down_proj.* and \d+ more"), make_policy(narrow):
        pass


@pytest.mark.parametrize(
    ("settings", "states"),
    [
        (["model.recompute=selective", "model.recompute_modules=[core_attn,mlp]"], 2),
        (["model.dtype=bfloat16", "rollout.dtype=bfloat16"], 3),
        (["model.dtype=bfloat16", "rollout.dtype=bfloat16", "parallel.distributed_optimizer=false"], 3),
    ],
)
def test_a_checkpoint_holds_the_adapter_alone_and_goes_on_as_if_never_stopped(tmp_path, settings, states):
    config = tiny_config(tmp_path, *LORA, "lora.targets=[q_proj,down_proj]", *settings)
    with make_policy(config) as policy:
        update(policy, 1)
        path = checkpoint.save(config.trainer.run_dir, policy, STATE, policy.topology, keep_last=2)
        update(policy, 2)
        expected = clones(policy)
    tensors = [name for name in stored_keys(path) if name.startswith(("lora.", "optimizer.state"))]
    assert len(tensors) == 1 + 2 * 4 * (1 + states)  # what it belongs to; A and B of four layers, moments and masters
    assert not any("decoder" in name or "embedding" in name for name in stored_keys(path))
    with make_policy(config) as policy:
        checkpoint.load(path, policy, policy.topology)
        update(policy, 2)
        assert all(torch.equal(value, expected[name]) for name, value in clones(policy).items())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ([], "trained a LoRA adapter, and this one trains the whole model"),
        ([*LORA, "lora.rank=2"], "rank was 4 and is 2"),
        ([*LORA, "model.path=OTHER"], "another base"),
    ],
)
def test_a_checkpoint_of_another_kind_is_refused(tmp_path, settings, words):
    config = tiny_config(tmp_path, *LORA)
    with make_policy(config) as policy:
        path = checkpoint.save(config.trainer.run_dir, policy, STATE, policy.topology, keep_last=2)
    other = write_tiny_model(tmp_path / "other", seed=5)
    settings = [text.replace("OTHER", str(other)) for text in settings]
    with make_policy(variant(config, *settings)) as policy, pytest.raises(CheckpointError, match=words):
        checkpoint.load(path, policy, policy.topology)


def test_an_exported_run_is_the_merged_model(tmp_path):
    config = tiny_config(tmp_path, *LORA)
    with make_policy(config) as policy:
        update(policy, 1)
        checkpoint.save(config.trainer.run_dir, policy, STATE, policy.topology, keep_last=2)
        expected = clones(policy)
    save_resolved(config, Path(config.trainer.run_dir) / "config.yaml")
    exported = load_file(export_run(config.trainer.run_dir, "latest", str(tmp_path / "out")) / "model.safetensors")
    assert exported.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in exported.items())


def test_a_target_that_the_model_lacks_is_explained(tmp_path):
    config = tiny_config(tmp_path, *LORA, "lora.targets=[q_proj,qkv_proj]")
    words = r"\(down_proj, gate_proj, .*v_proj\) or be \[all\]; it has no qkv_proj"
    with pytest.raises(ConfigError, match=words), make_policy(config):
        pass


def test_engines_get_a_model_with_latent_attention_merged(tmp_path):
    settings = [*LORA, "lora.experts=false"]
    config = tiny_config(tmp_path, *settings, family="deepseek_v3", tied=False)
    assert not syncs_adapter(config)
    assert syncs_adapter(tiny_config(tmp_path / "dense", *settings))
    with pytest.raises(ConfigError, match=r"latent attention, which vLLM computes with copies .*lora\.sync=auto"):
        validate(variant(config, *settings, "lora.sync=adapter"))


def test_a_recorded_steps_weights_are_base_and_adapter_apart(tmp_path):
    config = tiny_config(tmp_path, *LORA)
    micro_batch = make_micro_batch(make_sequences([7, 20], 272))
    with make_policy(config) as policy:
        randomise(policy)
        policy.save_apart(str(tmp_path / "apart"))
        expected, adapter = logits_of(policy, micro_batch), factors(policy)
    apart = variant(config, *LORA, f"model.path={tmp_path / 'apart'}", f"lora.path={tmp_path / 'apart' / 'lora'}")
    with make_policy(apart) as policy:
        assert torch.equal(logits_of(policy, micro_batch), expected)
        assert all(torch.equal(value, adapter[name]) for name, value in factors(policy).items())
