"""A save beside the training: the same bytes as one in place, none of the steps after it, and safe from any death."""

import errno
import json
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from helpers.policy import make_policy, tiny_config
from helpers.spawn import run_ranks
from helpers.updates import clones, update, variant
from skyrl_mega.checkpoint import files, saver, store
from skyrl_mega.checkpoint import state as checkpoint
from skyrl_mega.checkpoint.resume import checkpoint_to_resume
from skyrl_mega.checkpoint.saver import Checkpointer
from skyrl_mega.errors import CheckpointError, DeadlineError
from skyrl_mega.types import TrainState


def state(step: int, updates: int) -> TrainState:
    return TrainState(step, step, {"index": step}, num_trained_groups=step, num_optimizer_steps=updates)


def make_saver(config, topology, *, asynchronous: bool = True, keep_last: int = 2, run_dir=None, **settings) -> Checkpointer:
    return Checkpointer(
        str(run_dir or config.trainer.run_dir), topology, store.Retention(keep_last), asynchronous=asynchronous, **settings
    )


@pytest.fixture
def policy(tmp_path):
    with make_policy(tiny_config(tmp_path, "precision=bfloat16")) as made:
        yield made


@pytest.fixture
def gate(monkeypatch):
    """Holds every writer until it is set: whatever is done before happens while a save is in flight."""
    opened = threading.Event()
    write = files.write_part

    def held(*arguments):
        assert opened.wait(60)
        return write(*arguments)

    monkeypatch.setattr(files, "write_part", held)
    yield opened
    opened.set()


def test_an_asynchronous_save_writes_the_bytes_of_a_synchronous_one(policy, tmp_path):
    update(policy, 1)
    written = []
    for name, asynchronous in (("beside", True), ("in_place", False)):
        kept = make_saver(policy.config, policy.topology, asynchronous=asynchronous, run_dir=tmp_path / name)
        path = kept.save(policy, state(3, 1))
        kept.finish()
        written.append({file.name: file.read_bytes() for file in path.iterdir()})
    assert written[0].keys() == written[1].keys() >= {"__0_0.distcp", ".metadata", "manifest.json", "train_state.json"}
    assert written[0] == written[1]


def test_steps_that_run_while_it_is_written_do_not_reach_the_checkpoint(policy, gate):
    kept = make_saver(policy.config, policy.topology)
    update(policy, 1)
    before = clones(policy)
    path = kept.save(policy, state(1, 1))
    assert kept.poll() == {}
    metrics = [update(policy, seed) for seed in (2, 3)]
    after = clones(policy)
    assert not path.exists(), "the checkpoint counts before it is written"
    gate.set()
    cost = kept.finish()
    assert cost["checkpoint/step"] == 1.0
    assert 0.0 <= cost["checkpoint/stall_s"] <= cost["checkpoint/write_s"]
    assert cost["checkpoint/bytes"] == (path / "__0_0.distcp").stat().st_size
    assert checkpoint.load(path, policy, policy.topology) == state(1, 1)
    restored = clones(policy)
    assert all(torch.equal(value, before[name]) for name, value in restored.items())
    assert [update(policy, seed) for seed in (2, 3)] == metrics
    assert all(torch.equal(value, after[name]) for name, value in clones(policy).items())


def test_one_save_at_a_time_the_next_waits_and_the_wait_has_a_deadline(policy, gate):
    notes = []
    kept = make_saver(policy.config, policy.topology, timeout_s=0.3, note=notes.append)
    kept.save(policy, state(1, 0))
    with pytest.raises(CheckpointError, match=r"step 1 could not be written .*checkpoint\.timeout_s"):
        kept.save(policy, state(2, 0))
    assert store.list_checkpoints(policy.config.trainer.run_dir) == []


def test_a_save_that_follows_at_once_waits_for_the_one_before_and_both_costs_are_told(policy):
    kept = make_saver(policy.config, policy.topology)
    for step in (1, 2, 3):
        kept.save(policy, state(step, 0))
    assert kept.finish()["checkpoint/step"] == 3.0
    assert [path.name for path in store.list_checkpoints(policy.config.trainer.run_dir)] == ["step_000002", "step_000003"]
    in_place = make_saver(policy.config, policy.topology, asynchronous=False)
    in_place.save(policy, state(4, 0))
    cost = in_place.poll()
    assert (cost["checkpoint/step"], cost["checkpoint/host_copy_bytes"]) == (4.0, 0.0)
    assert cost["checkpoint/stall_s"] >= cost["checkpoint/write_s"]


def test_a_directory_that_can_not_be_made_is_an_error_with_the_remedy(policy, tmp_path):
    (tmp_path / "file").write_text("")
    kept = make_saver(policy.config, policy.topology, run_dir=tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"step 1 can't be begun: .*see to the permissions"):
        kept.save(policy, state(1, 0))


def test_a_writer_that_fails_is_an_error_of_the_run_that_names_step_and_cause(policy, monkeypatch):
    kept = make_saver(policy.config, policy.topology)
    kept.save(policy, state(1, 0))
    kept.finish()

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "write_part", full)
    kept.save(policy, state(2, 0))
    with pytest.raises(CheckpointError, match=r"step 2 could not be written \(rank 0: .*No space left on device.*Make room in"):
        kept.finish()
    assert [path.name for path in store.list_checkpoints(policy.config.trainer.run_dir)] == ["step_000001"]


def test_when_the_training_fails_the_save_in_flight_is_completed(policy, gate):
    notes = []
    kept = make_saver(policy.config, policy.topology, note=notes.append)
    path = kept.save(policy, state(1, 0))
    threading.Timer(0.2, gate.set).start()
    kept.close()
    assert store.damage(path, "checksums") == []
    assert notes == ["completing the checkpoint of step 1"]


def test_twenty_saves_do_not_let_memory_creep_and_leave_nothing_running(policy):
    kept = make_saver(policy.config, policy.topology)
    process, resident = psutil.Process(), []
    children = process.children(recursive=True)
    for step in range(1, 21):
        update(policy, 1)  # the same shapes: oneDNN keeps a kernel for every new one
        kept.save(policy, state(step, step))
        kept.finish()
        resident.append(process.memory_info().rss)
    # One copy of the state per save that is not given back would add its size fifteen times.
    copy = kept._host_copy.size_bytes
    assert copy > 10**6
    assert resident[-1] - resident[4] < 3 * copy
    assert [path.name for path in store.list_checkpoints(policy.config.trainer.run_dir)] == ["step_000019", "step_000020"]
    assert process.children(recursive=True) == children
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint-")]


# ---- kill -9 --------------------------------------------------------------------------------------------------------------


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def die_after(function, calls: int):
    """The function, until it was called so often; then the process is killed, as by kill -9."""
    made = []

    def counted(*arguments, **settings):
        made.append(arguments)
        return die() if len(made) > calls else function(*arguments, **settings)

    return counted


#: What the writer of step 2 is doing when it dies: (module, function, calls before), and the step that is resumed.
MOMENTS = {
    "in-the-middle-of-its-file": (files, "own_storage", 5, 1),
    "before-the-rename": (store, "give_final_name", 0, 1),
    "while-it-removes-the-oldest": (store.shutil, "rmtree", 0, 2),
}


def train_until_killed(rank: int, config, module_name: str, function: str, calls: int) -> None:
    modules = {"files": files, "store": store, "shutil": store.shutil}
    with make_policy(config) as policy:
        kept = make_saver(config, policy.topology, keep_last=1)
        update(policy, 1)
        kept.save(policy, state(1, 1))
        kept.finish()
        update(policy, 2)
        module = modules[module_name]
        setattr(module, function, die_after(getattr(module, function), calls))
        kept.save(policy, state(2, 2))
        for _ in range(300):
            update(policy, 3)
    raise AssertionError("the writer was not killed")


def losses_from(policy, done: int) -> list[float]:
    return [update(policy, seed)["loss/total"] for seed in range(done + 1, 5)]


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_any_moment_of_a_save_the_run_goes_on_to_equal_losses(tmp_path, moment):
    module, function, calls, expected = MOMENTS[moment]
    config = tiny_config(tmp_path, "precision=bfloat16")
    with make_policy(config) as policy:
        undisturbed = losses_from(policy, 0)
    arguments = (config, module.__name__.rpartition(".")[2], function, calls)
    with pytest.raises(AssertionError, match="died with exit code -9"):
        run_ranks(train_until_killed, 1, *arguments)
    warnings = []
    with make_policy(config) as policy:
        path = checkpoint_to_resume(config.trainer.run_dir, config.checkpoint, policy.topology, warn=warnings.append)
        assert checkpoint.load(path, policy, policy.topology) == state(expected, expected)
        assert losses_from(policy, expected) == undisturbed[expected:]
        update(policy, 9)
        make_saver(config, policy.topology, asynchronous=False).save(policy, state(5, 5))
    left = os.listdir(store.checkpoints_dir(config.trainer.run_dir))
    assert not [name for name in left if name.endswith(store.TEMPORARY)]
    assert warnings == ([] if expected == 2 else ["removed what an interrupted save left behind: step_000002.tmp"])


def fail_or_die_on_rank_1(rank: int, config) -> None:
    """A save that fails on rank 1, then one in which rank 1 is killed; what rank 0 heard of each."""
    heard = {}
    with make_policy(config) as policy:
        kept = make_saver(config, policy.topology, timeout_s=20.0)
        update(policy, 1)
        kept.save(policy, state(1, 1))
        kept.finish()
        write = files.write_part
        if rank == 1:
            files.write_part = lambda *_: files.part_file(Path("/nowhere/at/all"), rank).touch()
        kept.save(policy, state(2, 1))
        with pytest.raises(CheckpointError) as failed:
            kept.finish()
        heard["failed"] = str(failed.value)
        files.write_part = write
        if rank == 1:
            files.own_storage = die_after(files.own_storage, 5)
        kept.save(policy, state(3, 1))
        with pytest.raises((DeadlineError, CheckpointError)) as died:
            kept.finish()
        heard["died"] = str(died.value)
        saver.GRACE_S = 0.5
        kept.close()
        heard["checkpoints"] = ",".join(path.name for path in store.list_checkpoints(config.trainer.run_dir))
        # Written, not returned: with its peer dead this rank may not be able to leave the process groups in good order.
        (Path(config.trainer.run_dir) / "heard").write_text(json.dumps(heard))


def test_all_ranks_hear_of_a_rank_that_fails_and_a_dead_rank_costs_no_checkpoint(tmp_path):
    config = variant(tiny_config(tmp_path), "parallel.timeout_s=20")
    with pytest.raises(AssertionError, match="rank 1 died with exit code -9"):
        run_ranks(fail_or_die_on_rank_1, 2, config)
    heard = json.loads((Path(config.trainer.run_dir) / "heard").read_text())
    assert "step 2 could not be written (rank 0: the files of rank 1 are not complete; rank 1: FileNotFound" in heard["failed"]
    assert "checkpoint/" in heard["died"] or "rank 1" in heard["died"]
    assert heard["checkpoints"] == "step_000001"
