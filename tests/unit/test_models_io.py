"""Hugging Face directories in and out: bit-identical round trips, and every tensor accounted for."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.hf_oracle import load_oracle, make_sequences, oracle_logits, to_megatron
from helpers.tiny import write_tiny_model
from skyrl_mega.config.schema import Config, ModelConfig, ParallelConfig
from skyrl_mega.errors import CheckpointError, ModelLoadError
from skyrl_mega.models import hf_io
from skyrl_mega.models.build import build_model
from skyrl_mega.models.hf_io import HFExporter, load_hf_weights, save_hf
from skyrl_mega.parallel.device import resolve_device
from skyrl_mega.parallel.topology import init_topology

FAMILIES = [("llama", True), ("llama", False), ("qwen2", True), ("qwen2", False), ("qwen3", True), ("qwen3", False)]
FAMILIES += [("mistral", False), ("gemma2", True), ("gemma3_text", True), ("gemma3_text", False)]
FAMILIES += [("qwen3_moe", False), ("qwen2_moe", True), ("mixtral", False), ("deepseek_v3", False), ("glm4_moe", True)]


@pytest.fixture(scope="module")
def topology():
    topology = init_topology(ParallelConfig(), resolve_device("cpu"), seed=0)
    yield topology
    topology.destroy()


def _build(path, topology, dtype="float32"):
    [model] = build_model(Config(model=ModelConfig(path=str(path), dtype=dtype)), topology)
    return model


def _policy(path, topology, dtype="float32"):
    model = _build(path, topology, dtype)
    load_hf_weights([model], path, topology)
    return model


def _rewrite(path, change):
    """Edits the tensors of a written model in place."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_loaded_parameters_equal_an_independent_converter(family, tied, topology, tmp_path):
    path = write_tiny_model(tmp_path, family, tied=tied)
    model, tensors = _policy(path, topology), load_file(path / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, to_megatron(tensors, name, model.architecture)), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_an_untouched_model_is_written_bit_for_bit(family, tied, dtype, topology, tmp_path):
    path = write_tiny_model(tmp_path / "source", family, tied=tied, dtype=dtype)
    out = tmp_path / "out"
    save_hf(HFExporter([_policy(path, topology, dtype)], topology), path, out, getattr(torch, dtype))
    source, written = load_file(path / "model.safetensors"), load_file(out / "model.safetensors")
    assert source.keys() == written.keys()
    for name, tensor in source.items():
        assert tensor.dtype == written[name].dtype
        assert torch.equal(tensor, written[name]), name
    assert json.loads((out / "config.json").read_text()) == json.loads((path / "config.json").read_text())
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / file).read_bytes() == (path / file).read_bytes()
    sequences = make_sequences([13], 272)
    with torch.no_grad():
        assert torch.equal(oracle_logits(load_oracle(out), sequences), oracle_logits(load_oracle(path), sequences))


def test_an_untied_model_keeps_its_head_after_a_tied_one_was_loaded_in_the_same_process(topology, tmp_path):
    _policy(write_tiny_model(tmp_path / "tied", "qwen2", tied=True), topology)
    path = write_tiny_model(tmp_path / "untied", "qwen2", tied=False)
    model = _policy(path, topology)
    assert torch.equal(model.output_layer.weight, load_file(path / "model.safetensors")["lm_head.weight"])
    assert dict(HFExporter([model], topology).iter_weights(torch.float32))["lm_head.weight"].shape == (272, 64)


def test_export_in_another_dtype_rounds_and_says_so_in_the_config(topology, tmp_path):
    path = write_tiny_model(tmp_path / "source")
    save_hf(HFExporter([_policy(path, topology)], topology), path, tmp_path / "out", torch.bfloat16)
    source, written = load_file(path / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(tensor.bfloat16(), written[name]) for name, tensor in source.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_large_models_are_written_in_shards_with_an_index_and_read_back(topology, tmp_path):
    path = write_tiny_model(tmp_path / "source", "qwen2")
    save_hf(HFExporter([_policy(path, topology)], topology), path, tmp_path / "out", torch.float32, max_shard_bytes=100_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert sorted(file.name for file in (tmp_path / "out").glob("*.safetensors")) == files
    assert all((tmp_path / "out" / file).stat().st_size < 110_000 for file in files)
    source = load_file(path / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in source.values())
    again = dict(HFExporter([_policy(tmp_path / "out", topology)], topology).iter_weights(torch.float32))
    assert all(torch.equal(tensor, again[name]) for name, tensor in source.items())
    load_oracle(tmp_path / "out")


def test_saving_replaces_a_directory_whole_and_leaves_nothing_else_behind(topology, tmp_path):
    path = write_tiny_model(tmp_path / "source")
    exporter = HFExporter([_policy(path, topology)], topology)
    out = tmp_path / "out"
    out.mkdir()
    (out / "stale.txt").write_text("old")
    save_hf(exporter, path, out, torch.float32)
    assert not (out / "stale.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(CheckpointError, match=r"export to .*file/out failed"):
        save_hf(exporter, path, tmp_path / "file" / "out", torch.float32)


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_fused_groups_are_whole_consecutive_and_in_export_order(family, tied, topology, tmp_path):
    path = write_tiny_model(tmp_path, family, tied=tied)
    exporter = HFExporter([_policy(path, topology)], topology)
    groups = exporter.fused_groups()
    exported = [name for name, _ in exporter.iter_weights(torch.float32)]
    assert [name for group in groups for name in group] == exported == [name for name, _ in exporter.iter_weights(torch.float32)]
    assert sorted(exported) == sorted(load_file(path / "model.safetensors"))
    attention = [f"model.layers.1.self_attn.{x}_proj.weight" for x in "qkv"]
    if family.startswith(("qwen2", "glm4")):
        attention += [f"model.layers.1.self_attn.{x}_proj.bias" for x in "qkv"]
    if family == "deepseek_v3":  # nothing but its two latents, which have a parameter each
        attention = ["model.layers.1.self_attn.kv_a_proj_with_mqa.weight"]
    assert tuple(attention) in groups
    gate_and_up = {
        "mixtral": ("block_sparse_moe.experts.3.w1", "block_sparse_moe.experts.3.w3"),
        "qwen3_moe": ("mlp.experts.3.gate_proj", "mlp.experts.3.up_proj"),
        "qwen2_moe": ("mlp.experts.3.gate_proj", "mlp.experts.3.up_proj"),
    }.get(family, ("mlp.gate_proj", "mlp.up_proj"))
    assert tuple(f"model.layers.0.{name}.weight" for name in gate_and_up) in groups


def test_exported_tensors_carry_no_gradient_and_leave_the_consumers_grad_mode_alone(topology, tmp_path):
    path = write_tiny_model(tmp_path)
    for _, tensor in HFExporter([_policy(path, topology)], topology).iter_weights(torch.bfloat16):
        assert not tensor.requires_grad
        assert tensor.is_contiguous()
        assert tensor.dtype == torch.bfloat16
        assert torch.is_grad_enabled()


def test_a_parameter_without_a_row_and_a_row_without_a_parameter_are_named(topology, tmp_path, monkeypatch):
    path = write_tiny_model(tmp_path, "qwen3")
    model = _policy(path, topology)
    model.decoder.layers[1].extra = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ModelLoadError, match=r"has no row for these parameters of the model: decoder\.layers\.1\.extra;"):
        load_hf_weights([model], path, topology)
    del model.decoder.layers[1].extra
    del model.decoder.layers[0].self_attention.q_layernorm.weight
    with pytest.raises(ModelLoadError, match=r"no parameters for these rows .*: decoder\.layers\.0\..*q_layernorm\.weight\."):
        HFExporter([model], topology)


def _drop(name):
    return lambda tensors: tensors.pop(name)


def _add(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


BAD_FILES = {
    "missing": (_drop("model.layers.1.self_attn.k_proj.weight"), r"missing: model.layers.1.self_attn.k_proj.weight \(\d+, 64\)"),
    "unexpected": (_add("model.layers.2.mlp.up_proj.weight", torch.zeros(2)), r"unexpected: model.layers.2.mlp.up_proj.weight"),
    "unexpected bias": (_add("model.layers.0.self_attn.q_proj.bias", torch.zeros(8)), r"unexpected: .*q_proj.bias \(8,\)"),
    "misshaped": (_add("model.norm.weight", torch.ones(65)), r"wrong shape: model.norm.weight is \(65,\), .* \(64,\)"),
    "integers": (_add("model.norm.weight", torch.ones(64, dtype=torch.int8)), r"not floating point: model.norm.weight is I8"),
    "another head": (_add("lm_head.weight", torch.ones(272, 64)), r"lm_head.weight differs from model.embed_tokens.weight"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_checkpoint_that_does_not_fit_is_refused_with_the_tensors_names(name, topology, tmp_path):
    change, message = BAD_FILES[name]
    path = write_tiny_model(tmp_path, "llama", tied=True)
    model = _build(path, topology)
    _rewrite(path, change)
    with pytest.raises(ModelLoadError, match=message):
        load_hf_weights([model], path, topology)


def test_all_problems_are_named_at_once(topology, tmp_path):
    path = write_tiny_model(tmp_path)
    _rewrite(path, lambda t: (t.pop("model.norm.weight"), t.update({"extra": torch.zeros(1)})))
    with pytest.raises(ModelLoadError, match=r"(?s)2 problems.*missing: model.norm.weight.*unexpected: extra"):
        load_hf_weights([_build(path, topology)], path, topology)


def test_fused_experts_are_refused_and_ten_thousand_names_are_not_listed(topology, tmp_path):
    """transformers 5 can also write experts as it holds them in memory; vLLM and this library read them one by one."""
    path = write_tiny_model(tmp_path, "qwen3_moe", tied=False, num_experts=8)

    def fuse(tensors):
        for name in [name for name in tensors if ".experts." in name and "down_proj" in name]:
            tensors.pop(name)
            for matrix in ("gate_proj", "up_proj"):
                tensors.pop(name.replace("down_proj", matrix))
        tensors["model.layers.0.mlp.experts.down_proj"] = torch.zeros(8, 64, 48)

    _rewrite(path, fuse)
    with pytest.raises(ModelLoadError, match=r"(?s)49 problems.*missing: .*experts\.0\.gate_proj.*and 9 more$"):
        load_hf_weights([_build(path, topology)], path, topology)


def test_layers_that_predict_further_tokens_are_left_out_in_one_warning(topology, tmp_path):
    path = write_tiny_model(tmp_path / "source", "glm4_moe", num_nextn_predict_layers=1)
    extra = {"model.layers.2.eh_proj.weight": torch.ones(64, 128), "model.layers.2.input_layernorm.weight": torch.ones(64)}
    _rewrite(path, lambda tensors: tensors.update(extra))
    with pytest.warns(UserWarning, match=f"2 tensors .* neither trained nor exported: {', '.join(sorted(extra))}"):
        model = _policy(path, topology)
    save_hf(HFExporter([model], topology), path, tmp_path / "out", torch.float32)
    assert not extra.keys() & load_file(tmp_path / "out" / "model.safetensors").keys()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    _rewrite(path, lambda tensors: tensors.update({"model.layers.3.eh_proj.weight": torch.ones(64, 128)}))
    with pytest.raises(ModelLoadError, match=r"1 problems.*\n *unexpected: model\.layers\.3\.eh_proj\.weight"):
        _policy(path, topology)


def test_a_routers_bias_is_float32_in_a_bfloat16_model_and_its_export(topology, tmp_path):
    path = write_tiny_model(tmp_path, "deepseek_v3", dtype="bfloat16")
    model = _policy(path, topology, "bfloat16")
    [bias] = [buffer for name, buffer in model.named_buffers() if name.endswith("expert_bias")]
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    exporter = HFExporter([model], topology)
    exported = dict(exporter.iter_weights(torch.bfloat16))
    source = load_file(path / "model.safetensors")
    assert exported[name].dtype == bias.dtype == source[name].dtype == torch.float32
    assert torch.equal(exported[name], source[name])
    assert not torch.equal(bias, bias.bfloat16().float())  # or rounding would not show
    assert {tensor.dtype for key, tensor in exported.items() if key != name} == {torch.bfloat16}


def test_an_equal_tied_head_and_old_rotary_buffers_are_accepted(topology, tmp_path):
    path = write_tiny_model(tmp_path)

    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    _rewrite(path, add)
    _policy(path, topology)


def test_unreadable_directories_are_refused(topology, tmp_path):
    path = write_tiny_model(tmp_path / "a")
    model = _build(path, topology)
    (path / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(ModelLoadError, match="can't be read"):
        load_hf_weights([model], path, topology)
    (path / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"no \*.safetensors"):
        load_hf_weights([model], path, topology)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": "gone.safetensors"}}))
    with pytest.raises(ModelLoadError, match=r"gone.safetensors"):
        load_hf_weights([model], path, topology)
    source = write_tiny_model(tmp_path / "b")
    shutil.copyfile(source / "model.safetensors", source / "copy.safetensors")
    with pytest.raises(ModelLoadError, match=r"is in copy.safetensors and in model.safetensors"):
        load_hf_weights([model], source, topology)


def test_a_reader_opens_each_file_once_and_keeps_few_open(tmp_path, monkeypatch):
    for number in range(hf_io.MAX_OPEN_FILES + 2):
        save_file({f"{number}.{i}": torch.full((2, 3), 10.0 * number + i) for i in range(3)}, tmp_path / f"{number}.safetensors")
    opened, open_file = [], hf_io.safe_open
    stored = hf_io.read_headers(tmp_path)
    monkeypatch.setattr(hf_io, "safe_open", lambda file, **how: opened.append(file.name) or open_file(file, **how))
    with hf_io.TensorReader(stored) as reader:
        for name in sorted(stored):
            number, i = map(int, name.split("."))
            assert torch.equal(reader.read(name), torch.full((2, 3), 10.0 * number + i))
            assert torch.equal(reader.read(name, (slice(1, 2), slice(0, 2))), torch.full((1, 2), 10.0 * number + i))
        assert opened == [f"{number}.safetensors" for number in range(hf_io.MAX_OPEN_FILES + 2)]
        reader.read("0.0")
        assert opened[-1] == "0.safetensors", "it had been closed"
        reader.read(f"{hf_io.MAX_OPEN_FILES + 1}.0")
        assert len(opened) == hf_io.MAX_OPEN_FILES + 3, "it was still open"


def test_an_export_removes_what_killed_ones_left_and_nothing_else(tmp_path, topology):
    path = write_tiny_model(tmp_path / "model", "llama", tied=True)
    for name in (".out.ab12_cd3", ".out.old.ab12_cd3", ".out.keep", ".output.ab12_cd3", ".another"):
        (tmp_path / name).mkdir()
    save_hf(HFExporter([_policy(path, topology)], topology), path, tmp_path / "out", torch.float32)
    assert {p.name for p in tmp_path.iterdir()} == {"model", "out", ".out.keep", ".output.ab12_cd3", ".another"}


def test_a_model_that_a_killed_export_moved_aside_comes_back(tmp_path):
    """Whatever becomes of the next export."""
    for name in (".out.old.ab12_cd3", ".out.xy12_cd3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
    hf_io._remove_leftovers(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "config.json").read_text() == ".out.old.ab12_cd3"
