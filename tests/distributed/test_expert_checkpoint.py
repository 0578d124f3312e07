"""A checkpoint of a mixture of experts goes from one number of expert ranks to another, its moments too, element by element."""

from pathlib import Path

import pytest
import torch

from helpers.policy import make_policy, tiny_config
from helpers.spawn import run_ranks
from helpers.updates import update
from skyrl_mega.checkpoint import state as checkpoint
from skyrl_mega.config.load import load_config
from skyrl_mega.types import TrainState

STATE = TrainState(2, 2, {"index": 8}, num_trained_groups=8, num_optimizer_steps=2, elapsed_train_s=1.0)
SHAPES = {"qwen2_moe": {}, "qwen3_moe": {"num_experts": 6, "mlp_only_layers": [0]}, "deepseek_v3": {}}
#: Routers that are not trained have no moments, and no place in the optimizer's sharding.
FROZEN = "model.freeze_router=true"
#: The biases of sigmoid routers are no parameters, and travel with them.
MOVING = "model.moe_bias_update_rate=0.01"
#: name: (family, how many ranks save in which layout, how many ranks load it in which).
CASES = {
    "expert2-to-single": ("qwen2_moe", (2, ["parallel=ep2"]), (1, [])),
    "single-to-expert2-tensor2-frozen": ("qwen2_moe", (1, [FROZEN]), (2, ["parallel=ep2_tp2", FROZEN])),
    "expert2-to-tensor2": ("qwen3_moe", (2, ["parallel=ep2"]), (2, ["parallel=tp2_sp"])),
    "latent-tensor2-to-single": ("deepseek_v3", (2, ["parallel=ep2_tp2", MOVING]), (1, [MOVING])),
}


def save_and_go_on(rank: int, config) -> tuple[Path, dict]:
    """Two updates, a checkpoint, a third update."""
    with make_policy(config) as policy:
        update(policy, 1, pad_to_multiple=2)
        update(policy, 2, pad_to_multiple=2)
        path = checkpoint.save(config.trainer.run_dir, policy, STATE, policy.topology, keep_last=2)
        return path, update(policy, 3, pad_to_multiple=2)


def restore_save_and_go_on(rank: int, config, path: Path) -> tuple[Path, dict]:
    """The checkpoint, restored and written again by this layout, and a third update."""
    with make_policy(config) as policy:
        assert checkpoint.load(path, policy, policy.topology) == STATE
        again = checkpoint.save(config.trainer.run_dir + "-again", policy, STATE, policy.topology, keep_last=2)
        return again, update(policy, 3, pad_to_multiple=2)


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.FileSystemReader(path)
    stored = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_loads_with_another_number_of_expert_ranks(case, tmp_path):
    family, (savers, saved_by), (loaders, loaded_by) = CASES[case]
    config = tiny_config(tmp_path, family=family, tied=False, **SHAPES[family])
    base = ["recipe=tiny", f"model.path={config.model.path}", f"trainer.run_dir={config.trainer.run_dir}"]
    saving, loading = load_config([*base, *saved_by]), load_config([*base, *loaded_by])
    saved = run_ranks(save_and_go_on, savers, saving) if savers > 1 else [save_and_go_on(0, saving)]
    path, expected = saved[0]
    restored = (
        run_ranks(restore_save_and_go_on, loaders, loading, path) if loaders > 1 else [restore_save_and_go_on(0, loading, path)]
    )
    before, after = tensors_of(path), tensors_of(restored[0][0])
    assert before.keys() == after.keys()
    moments = [name for name in before if ".experts." in name and "exp_avg" in name]
    assert len(moments) >= 4
    assert all(before[name].any() for name in moments)
    assert any(".router." in name and "exp_avg" in name for name in before) == (FROZEN not in saved_by)
    biases = [tensor for name, tensor in before.items() if name.endswith(".expert_bias")]
    assert len(biases) == (family == "deepseek_v3")
    assert all(bias.dtype == torch.float32 and bias.any() for bias in biases)
    different = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    assert different == []
    for _, metrics in restored:
        assert metrics["loss/total"] == pytest.approx(expected["loss/total"], abs=1e-5)
        assert metrics["update/grad_norm"] == pytest.approx(expected["update/grad_norm"], rel=1e-4)
