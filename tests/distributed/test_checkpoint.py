"""A checkpoint restores everything, into another layout too."""

import json
import os
from dataclasses import asdict, replace

import pytest
import torch

from helpers.policy import make_policy, tiny_config
from helpers.spawn import free_port, run_ranks
from helpers.updates import clones, update, variant
from skyrl_mega.checkpoint import state as checkpoint
from skyrl_mega.checkpoint import store
from skyrl_mega.checkpoint.pieces import pieces_to_write
from skyrl_mega.checkpoint.resume import checkpoint_to_resume
from skyrl_mega.errors import CheckpointError
from skyrl_mega.models.build import sharded_state
from skyrl_mega.types import TrainState

STATE = TrainState(7, 7, {"index": 28}, num_trained_groups=28, num_optimizer_steps=2, elapsed_train_s=1.5)


def save_and_go_on(config) -> dict:
    """Two updates, a checkpoint, a third update: what a restored run must continue to."""
    with make_policy(config) as policy:
        update(policy, 1)
        update(policy, 2)
        path = checkpoint.save(config.trainer.run_dir, policy, STATE, policy.topology, keep_last=2)
        return {"path": path, "metrics": update(policy, 3), "weights": clones(policy)}


def restore_and_go_on(config) -> dict:
    with make_policy(config) as policy:
        state = checkpoint.load(store.find_checkpoint(config.trainer.run_dir), policy, policy.topology)
        assert policy.num_updates == STATE.num_optimizer_steps
        return {"state": state, "metrics": update(policy, 3), "weights": clones(policy)}


def save_on_rank(rank: int, config) -> dict:
    return save_and_go_on(config)


def restore_on_rank(rank: int, config) -> dict:
    return restore_and_go_on(config)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_restored_run_goes_on_bit_for_bit(tmp_path, precision):
    config = tiny_config(tmp_path, f"precision={precision}")
    expected = save_and_go_on(config)
    restored = restore_and_go_on(config)
    assert restored["state"] == STATE
    assert restored["metrics"] == expected["metrics"]
    assert all(torch.equal(value, expected["weights"][name]) for name, value in restored["weights"].items())


@pytest.mark.parametrize(
    ("saved_by", "restored_by", "tied"),
    [
        (["parallel.tensor=2"], None, False),
        (None, ["parallel.tensor=2"], False),
        ([], ["parallel.tensor=2"], False),
        (["parallel.pipeline=2"], ["parallel.tensor=2"], True),
        ([], ["parallel.pipeline=2"], False),
    ],
    ids=["tensor2-to-single", "single-to-tensor2", "data2-to-tensor2", "pipeline2-to-tensor2", "data2-to-pipeline2"],
)
def test_a_checkpoint_loads_into_another_layout(tmp_path, saved_by, restored_by, tied):
    config = tiny_config(tmp_path, family="llama" if tied else "qwen3", tied=tied)
    if saved_by is None:
        expected = save_and_go_on(config)
    else:
        expected = run_ranks(save_on_rank, 2, variant(config, *saved_by))[0]
    if restored_by is None:
        restored = [restore_and_go_on(config)]
    else:
        restored = run_ranks(restore_on_rank, 2, variant(config, *restored_by))
    for result in restored:
        assert result["metrics"]["loss/total"] == pytest.approx(expected["metrics"]["loss/total"], abs=1e-5)
        assert result["metrics"]["update/grad_norm"] == pytest.approx(expected["metrics"]["update/grad_norm"], rel=1e-4)
        for name, value in result["weights"].items():
            assert (value - expected["weights"][name]).abs().max() < 1e-5, name


def dense_state(policy) -> dict[str, list]:
    """This rank's boxes of optimizer state and blocks of weights: key -> [(offset, values)], and the whole sizes."""
    boxes: dict[str, list] = {}
    for piece in pieces_to_write({"optimizer_state": policy.sharded_state()["optimizer_state"]}):
        boxes.setdefault(piece.key, []).append((piece.offset, piece.global_size, piece.value.clone()))
    return boxes


def reshard_on_rank(rank: int, saved_by, restored_by, second_port: int) -> tuple[dict, dict]:
    """Optimizer state as held before the save in one layout, and after the load in the other, of the same four ranks."""
    with make_policy(saved_by) as policy:
        update(policy, 1)
        update(policy, 2)
        checkpoint.save(saved_by.trainer.run_dir, policy, STATE, policy.topology, keep_last=2)
        before = dense_state(policy)
    # The same processes, another world: its store must not meet what the first one left.
    os.environ["MASTER_PORT"] = str(second_port)
    with make_policy(restored_by) as policy:
        checkpoint.load(store.find_checkpoint(restored_by.trainer.run_dir), policy, policy.topology)
        return before, dense_state(policy)


def assembled(of_ranks: list[dict[str, list]]) -> dict[str, torch.Tensor]:
    """Whole tensors from the boxes of all ranks; every element must come exactly once."""
    whole: dict[str, torch.Tensor] = {}
    for boxes in of_ranks:
        for key, parts in boxes.items():
            for offset, size, values in parts:
                target = whole.setdefault(key, torch.full(size, float("nan")))
                place = tuple(slice(low, low + length) for low, length in zip(offset, values.shape, strict=True))
                assert target[place].isnan().all(), f"{key} is held twice at {offset}"
                target[place] = values
    assert not any(tensor.isnan().any() for tensor in whole.values())
    return whole


def test_masters_and_moments_are_equal_element_by_element_after_resharding(tmp_path):
    config = tiny_config(tmp_path, "precision=bfloat16", tied=False)
    layouts = (variant(config, "parallel.tensor=2"), variant(config, "parallel.pipeline=2"))
    of_ranks = run_ranks(reshard_on_rank, 4, *layouts, free_port(), timeout_s=300)
    before, after = (assembled([rank[index] for rank in of_ranks]) for index in (0, 1))
    kinds = {key.split(".")[2] for key in before}
    assert kinds == {"param", "exp_avg", "exp_avg_sq"}
    assert before.keys() == after.keys()
    assert all(tensor.abs().sum() > 0 for key, tensor in before.items() if "embedding" not in key)
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]), key


def test_a_run_may_change_its_precision_and_keeps_every_master(tmp_path):
    config = tiny_config(tmp_path, "precision=bfloat16")
    save_and_go_on(config)
    whole = {}
    run_dir = config.trainer.run_dir
    for name in ("bfloat16", "float32"):
        with make_policy(tiny_config(tmp_path, f"precision={name}")) as policy:
            checkpoint.load(store.find_checkpoint(run_dir), policy, policy.topology)
            whole[name] = assembled([dense_state(policy)])
            if name == "float32":
                weights = {piece.key: piece for piece in pieces_to_write({"model": policy.sharded_state()["model"]})}
                embedding = weights["embedding.word_embeddings.weight"].value.clone()
                checkpoint.save(run_dir, policy, replace(STATE, step=8), policy.topology, keep_last=2)
    assert torch.equal(embedding, whole["bfloat16"]["optimizer.state.param.embedding.word_embeddings.weight"])
    with make_policy(config) as policy:
        checkpoint.load(store.find_checkpoint(run_dir, "8"), policy, policy.topology)
        again = assembled([dense_state(policy)])
    assert all(torch.equal(tensor, again[key]) for key, tensor in whole["bfloat16"].items())


def test_the_optimizer_need_not_be_distributed_to_take_over_from_one_that_is(tmp_path):
    config = tiny_config(tmp_path, "precision=bfloat16")
    expected = save_and_go_on(config)["metrics"]
    states = []
    for distributed in ("true", "false"):
        config = variant(config, f"parallel.distributed_optimizer={distributed}")
        with make_policy(config) as policy:
            checkpoint.load(store.find_checkpoint(config.trainer.run_dir), policy, policy.topology)
            states.append(assembled([dense_state(policy)]))
            metrics = update(policy, 3)
        # They sum the gradient norm in different orders.
        assert metrics["loss/total"] == expected["loss/total"]
        assert metrics["update/grad_norm"] == pytest.approx(expected["update/grad_norm"], rel=1e-6)
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())


def test_a_checkpoint_in_megatrons_own_format_still_loads(tmp_path):
    """As this library wrote them before: gathered by Megatron's `fully_reshardable`, without a manifest."""
    from megatron.core import dist_checkpointing

    config = tiny_config(tmp_path, "precision=bfloat16")
    with make_policy(config) as policy:
        update(policy, 1)
        update(policy, 2)
        model_state = sharded_state(policy.chunks)
        metadata = {"distrib_optim_sharding_type": "fully_reshardable", "distrib_optim_fully_reshardable_mem_efficient": False}
        optimizer_state = policy.optimizer.sharded_state_dict(model_state, is_loading=False, metadata=metadata)
        rng = checkpoint.sharded_state(policy, policy.topology)["rng"]
        path = store.checkpoint_path(config.trainer.run_dir, 7)
        path.mkdir(parents=True)
        dist_checkpointing.save({"model": model_state, "optimizer": optimizer_state, "rng": rng}, str(path))
        expected = {"metrics": update(policy, 3), "weights": clones(policy)}
    layout = {"tensor": 1, "pipeline": 1, "data": 1}
    (path / store.STATE_FILE).write_text(json.dumps({"state": asdict(STATE), "layout": layout}))
    assert store.damage(path, "checksums") == []
    restored = restore_and_go_on(config)
    assert restored["metrics"] == expected["metrics"]
    assert all(torch.equal(value, expected["weights"][name]) for name, value in restored["weights"].items())


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 16
    path.write_bytes(content)


def test_a_run_goes_on_from_the_newest_checkpoint_that_is_whole_and_says_so(tmp_path):
    config = tiny_config(tmp_path)
    run_dir, warnings = config.trainer.run_dir, []

    def resumed(**settings):
        return checkpoint_to_resume(run_dir, replace(config.checkpoint, **settings), policy.topology, warn=warnings.append)

    with make_policy(config) as policy:
        assert resumed() is None
        for step in (1, 2, 3, 4):
            path = checkpoint.save(run_dir, policy, replace(STATE, step=step), policy.topology, keep_last=9)
        assert resumed() == resumed(resume="must") == path
        flip_a_bit(path / "__0_0.distcp")
        (store.checkpoint_path(run_dir, 3) / "common.pt").unlink()
        assert resumed(verify="sizes") == path, "sizes alone can't see a flipped bit"
        with pytest.raises(CheckpointError, match=r"step_000004 is damaged: __0_0\.distcp has other content"):
            resumed(resume="must")
        assert warnings == []
        assert store.step_of(resumed()) == 2
        assert [line[:42] for line in warnings] == [f"warning: checkpoint step_00000{step} is damaged" for step in (4, 3)]
        assert sorted(path.name for path in store.checkpoints_dir(run_dir).glob("*.damaged")) == [
            "step_000003.damaged",
            "step_000004.damaged",
        ]
        for step in (1, 2):
            (store.checkpoint_path(run_dir, step) / store.STATE_FILE).unlink()
        with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged"):
            resumed()


def test_a_damaged_checkpoint_is_refused_with_the_way_out(tmp_path):
    config = tiny_config(tmp_path)
    path = save_and_go_on(config)["path"]
    (path / "metadata.json").write_text(json.dumps({"sharded_backend": "nothing", "sharded_backend_version": 1}))
    with make_policy(config) as policy, pytest.raises(CheckpointError, match="Remove it to use an older one"):
        checkpoint.load(path, policy, policy.topology)
