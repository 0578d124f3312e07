"""An adapter is the same in every layout: gradients, updates, files, and checkpoints that go from one layout to another."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from helpers.lora import randomise
from helpers.policy import make_policy, tiny_config
from helpers.spawn import run_cases
from helpers.updates import clones, update, variant
from skyrl_mega.checkpoint import state as checkpoint
from skyrl_mega.training.reference import BaseModel
from skyrl_mega.types import TrainState

SETTINGS = ["lora.rank=4", "lora.alpha=8", "optimizer.lr=1e-3", "optimizer.eps=1e-4"]
STATE = TrainState(1, 1, {"index": 4}, num_trained_groups=4, num_optimizer_steps=1)
#: Family -> its shape. Latent attention without experts: Megatron trains none over tensor ranks without sequence parallelism.
FAMILIES = {"qwen2": {"num_hidden_layers": 4}, "qwen2_moe": {}, "deepseek_v3": {"first_k_dense_replace": 2}}
LAYOUTS = {
    "tensor": ("qwen2", ["parallel=tp2"]),
    "sequence": ("qwen2", ["parallel=tp2_sp"]),
    "pipeline": ("qwen2", ["parallel=pp2", "model.recompute=full"]),
    "interleaved": ("qwen2", ["parallel=pp2_vpp2"]),
    "context": ("qwen2", ["parallel=cp2"]),
    "data": ("qwen2", ["parallel=dp2", "parallel.overlap_grad_reduce=true"]),
    "latent": ("deepseek_v3", ["parallel=tp2"]),
    "latent_sequence": ("deepseek_v3", ["parallel=tp2_sp"]),
    "expert": ("qwen2_moe", ["parallel=ep2"]),
    "expert_tensor": ("qwen2_moe", ["parallel=ep2_tp2"]),
}


def updates_and_files(config, folder: str, restore: str = "") -> dict:
    """Two updates with a checkpoint between them, from the adapter of `config` or the checkpoint `restore`."""
    from helpers.updates import packed

    results = {}
    with make_policy(config) as policy:
        if restore:
            checkpoint.load(restore, policy, policy.topology)
        else:
            results["first"] = update(policy, 1, pad_to_multiple=2)
            results["path"] = checkpoint.save(f"{folder}/run", policy, STATE, policy.topology, keep_last=2)
        results["second"] = update(policy, 2, pad_to_multiple=2)
        batch = packed(policy, 3, pad_to_multiple=2)
        if policy.topology.dp_size == 1:
            results["base"] = BaseModel(policy).compute_logprobs(batch)
            results["adapted"] = policy.compute_logprobs(batch)
        results["merged"] = clones(policy)
        policy.save_adapter(f"{folder}/adapter")
    return results


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("lora")


@pytest.fixture(scope="module")
def configs(home) -> dict:
    """For each family a configuration whose adapter has random values."""
    made = {}
    for family, shape in FAMILIES.items():
        config = tiny_config(home / family, *SETTINGS, family=family, tied=family == "qwen2", **shape)
        with make_policy(config) as policy:
            randomise(policy)
            policy.save_adapter(str(home / family / "adapter"))
        made[family] = (config, [*SETTINGS, f"lora.path={home / family / 'adapter'}"])
    return made


@pytest.fixture(scope="module")
def single(configs, home) -> dict:
    return {
        family: updates_and_files(variant(config, *settings), str(home / "single" / family))
        for family, (config, settings) in configs.items()
    }


@pytest.fixture(scope="module")
def sharded(configs, single, home) -> list[dict]:
    cases = {}
    for name, (family, layout) in LAYOUTS.items():
        config, settings = configs[family]
        cases[name] = (variant(config, *settings, *layout), str(home / name))
    for name in ("sequence", "expert"):
        family, layout = LAYOUTS[name]
        config, settings = configs[family]
        cases[f"restored_{name}"] = (variant(config, *settings, *layout), str(home / f"restored_{name}"), single[family]["path"])
    return run_cases(updates_and_files, 2, cases, timeout_s=240)


@pytest.mark.parametrize("layout", [*LAYOUTS, "restored_sequence", "restored_expert"])
def test_an_adapter_learns_in_every_layout_what_it_learns_in_one_process(single, sharded, home, layout):
    family = LAYOUTS[layout.removeprefix("restored_")][0]
    expected = single[family]
    for results in sharded:
        got = results[layout]
        for which in ("first", "second"):
            if which in got:
                for name in ("update/grad_norm", "loss/total"):
                    assert got[which][name] == pytest.approx(expected[which][name], rel=2e-5, abs=1e-6), (which, name)
        for name in ("base", "adapted"):
            for mine, theirs in zip(got.get(name, []), expected[name] if name in got else [], strict=True):
                assert (mine - theirs).abs().max() < 2e-4, name
        for name, value in got["merged"].items():
            assert (value - expected["merged"][name]).abs().max() < 2e-4, name
    stored, alone = (load_file(home / where / "adapter" / "adapter_model.safetensors") for where in (layout, f"single/{family}"))
    assert stored.keys() == alone.keys()
    for name, value in stored.items():
        assert (value - alone[name]).abs().max() < 5e-5, name  # a twentieth of the learning rate


def test_a_checkpoint_of_another_layout_goes_on_in_one_process(single, sharded, configs, home):
    for name in ("pipeline", "expert_tensor"):
        family = LAYOUTS[name][0]
        config, settings = configs[family]
        got = updates_and_files(variant(config, *settings), str(home / f"back_{name}"), sharded[0][name]["path"])
        assert got["second"]["update/grad_norm"] == pytest.approx(single[family]["second"]["update/grad_norm"], rel=2e-5)
        assert all((value - single[family]["merged"][key]).abs().max() < 2e-4 for key, value in got["merged"].items())
