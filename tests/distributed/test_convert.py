"""Conversions lose nothing, in any layout, and say so; where something is lost they say that."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.policy import make_policy, tiny_config
from helpers.spawn import run_cases
from helpers.tiny import write_tiny_model
from helpers.updates import update
from skyrl_mega.checkpoint.state import save
from skyrl_mega.errors import CheckpointError, ConfigError
from skyrl_mega.launch import cli
from skyrl_mega.launch.convert import REPORT_FILE, run_convert
from skyrl_mega.orchestration import conversion
from skyrl_mega.types import TrainState


def run(source, output, *overrides, world_size=1, **options):
    settings = {"model": None, "dtype": "auto", "check_logprobs": False, "details": False, "as_json": False, **options}
    return run_convert(source, output, overrides, world_size=world_size, **settings)


def report_of(output):
    return json.loads((output / REPORT_FILE).read_text())


def same_files(first, second):
    before, after = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    return before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())


def converted(source, output, layout):
    return run(source, output, f"parallel={layout}", world_size=2, check_logprobs=layout == "tp2_sp")


def test_ranks_convert_there_in_one_layout_and_back_in_another(tmp_path):
    dense = write_tiny_model(tmp_path / "dense", "qwen2", tied=True, dtype="bfloat16")
    experts = write_tiny_model(tmp_path / "experts", "qwen3_moe", tied=False)
    steps = {
        "there": (dense, tmp_path / "dense.megatron", "tp2_sp"),
        "back": (tmp_path / "dense.megatron", tmp_path / "dense.back", "pp2"),
        "experts": (experts, tmp_path / "experts.megatron", "ep2"),
    }
    assert run_cases(converted, 2, steps, timeout_s=200) == 2 * [dict.fromkeys(steps, 0)]
    assert run(tmp_path / "experts.megatron", tmp_path / "experts.back") == 0
    for name, dtype in (("dense", "bfloat16"), ("experts", "float32")):
        assert same_files(tmp_path / name, tmp_path / f"{name}.back")
        stored = load_file(tmp_path / name / "model.safetensors")
        for report in (report_of(tmp_path / f"{name}.megatron"), report_of(tmp_path / f"{name}.back")):
            assert report["agrees"]
            assert {line["name"]: tuple(line["shape"]) for line in report["tensors"]} == {k: v.shape for k, v in stored.items()}
            assert {(line["dtype"], line["source_dtype"], line["max_abs_diff"]) for line in report["tensors"]} == {
                (dtype, dtype, 0)
            }
    assert report_of(tmp_path / "dense.megatron")["layout"] == {"tensor": 2}
    assert report_of(tmp_path / "dense.megatron")["logprob_diff"] < 1e-4


def test_a_checkpoint_of_a_run_becomes_the_model_it_holds(tmp_path, capsys):
    config = tiny_config(tmp_path, "optimizer.lr=1e-2", tied=False)
    with make_policy(config) as policy:
        update(policy, seed=1)
        path = save(config.trainer.run_dir, policy, TrainState(1, 1, {}, 1, 1), policy.topology, keep_last=1)
        trained = {name: value.clone() for name, value in policy.iter_weights(torch.float32)}
    with pytest.raises(ConfigError, match=r"Nothing says what model .* Give `--model DIR`"):
        run(path, tmp_path / "out")
    code = cli.main(["convert", str(path), str(tmp_path / "out"), "--model", config.model.path, "--check-logprobs", "--json"])
    assert code == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == report_of(tmp_path / "out")
    assert printed["logprob_diff"] < 1e-4
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(value, written[name]) for name, value in trained.items())


def test_a_narrower_dtype_is_rounded_and_the_rounding_told(tmp_path, capsys):
    source = write_tiny_model(tmp_path / "model", "llama", tied=True)
    tensors = load_file(source / "model.safetensors")
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
        source / "model.safetensors",
        metadata={"format": "pt"},
    )
    assert run(source, tmp_path / "out", dtype="bfloat16") == 0
    report = report_of(tmp_path / "out")
    name = "model.layers.1.mlp.up_proj.weight"
    rounding = float((tensors[name].double() - tensors[name].bfloat16().double()).abs().max())
    [line] = [line for line in report["tensors"] if line["name"] == name]
    assert (line["source_dtype"], line["dtype"], line["max_abs_diff"], line["is_same"]) == ("float32", "bfloat16", rounding, True)
    assert report["left_out"] == ["lm_head.weight"]
    shown = capsys.readouterr().out
    assert "bfloat16 (was float32)" in shown
    assert "not carried over, since the model needs none of them: lm_head.weight" in shown


def test_a_tensor_that_changed_on_the_way_is_named_and_the_exit_code_is_1(tmp_path, monkeypatch, capsys):
    source = write_tiny_model(tmp_path / "model", "llama", tied=True)
    load = conversion.load_model

    def damaged(path, chunks):
        load(path, chunks)
        chunks[0].decoder.layers[1].mlp.linear_fc2.weight.data[3, 5] += 0.25

    monkeypatch.setattr(conversion, "load_model", damaged)
    assert run(source, tmp_path / "out", check_logprobs=True) == 1
    report = report_of(tmp_path / "out")
    assert [line["name"] for line in report["tensors"] if not line["is_same"]] == ["model.layers.1.mlp.down_proj.weight"]
    assert report["logprob_diff"] > report["logprob_tolerance"]
    shown = capsys.readouterr().out
    assert "model.layers.1.mlp.down_proj.weight" in shown
    assert "max |diff| 0.25  DIFFERS" in shown
    assert "19 of 20 tensors have the same bits after a round trip: BAD" in shown


def test_what_can_not_be_converted_is_refused_with_the_remedy(tmp_path):
    source = write_tiny_model(tmp_path / "model", "llama")
    with pytest.raises(ConfigError, match=r"neither a Hugging Face model .* nor a Megatron checkpoint"):
        run(tmp_path, tmp_path / "out")
    with pytest.raises(ConfigError, match="`OUTPUT` must be a directory that does not exist"):
        run(source, source)
    with pytest.raises(ConfigError, match=r"overrides of the layout only .* got optimizer.lr=1"):
        run(source, tmp_path / "out", "optimizer.lr=1")
    with pytest.raises(ConfigError, match="number of processes must be divisible"):
        run(source, tmp_path / "out", "parallel.tensor=2")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / ".metadata").write_bytes(b"no pickle")
    with pytest.raises(CheckpointError, match="holds no Megatron checkpoint that can be read"):
        run(broken, tmp_path / "out", model=source)
    assert cli.main(["convert", str(tmp_path / "absent"), str(tmp_path / "out")]) == 2
