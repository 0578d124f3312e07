"""A rank that hangs or dies ends the job on every rank, in time, with a message that names it."""

import os
import time

import pytest

from helpers.policy import make_policy, tiny_config
from helpers.spawn import run_ranks
from skyrl_mega.config.schema import ParallelConfig
from skyrl_mega.data.synthetic import random_samples
from skyrl_mega.errors import DeadlineError
from skyrl_mega.orchestration.loop import pack
from skyrl_mega.parallel import watchdog
from skyrl_mega.parallel.watchdog import EXIT_CODE


def join(timeout_s: float, **parallel):
    watchdog.BEAT_S, watchdog.GRACE_S = 0.5, 3.0
    from skyrl_mega.parallel.device import resolve_device
    from skyrl_mega.parallel.topology import init_topology

    return init_topology(ParallelConfig(timeout_s=timeout_s, **parallel), resolve_device("cpu"), seed=0)


def hang_in_a_phase(rank: int, folder) -> str:
    topology = join(3.0)
    topology.enter("rollout", 7)
    topology.barrier("warm-up")
    if rank == 1:
        topology.enter("train", 8)
        time.sleep(100)  # as a hang inside NCCL would, this hears of nothing
    try:
        topology.enter("pack", 8)
        topology.barrier("pack")
    except DeadlineError as error:
        (folder / "message").write_text(str(error))
        time.sleep(12)  # rank 0 keeps the store; under torchrun the agent does
    return ""


def test_a_rank_that_hangs_is_named_and_ended(tmp_path):
    began = time.monotonic()
    with pytest.raises(AssertionError, match=f"rank 1 died with exit code {EXIT_CODE}"):
        run_ranks(hang_in_a_phase, 2, tmp_path, timeout_s=60)
    assert time.monotonic() - began < 55
    message = (tmp_path / "message").read_text()
    assert "phase 'pack', step 8" in message
    assert "Missing: rank 1 (on " in message
    assert "in phase 'train' of step 8 for" in message


def die_in_training(rank: int, config) -> str:
    with make_policy(config) as policy:
        batch = pack(config, policy.topology, random_samples(4, 3), share_prompts=False)
        policy.topology.enter("train", 12)
        policy.train_step(batch)
        policy.topology.enter("train", 13)
        if rank == 1:
            os.kill(os.getpid(), 9)
        with pytest.raises(DeadlineError) as caught:
            policy.train_step(batch)
        print(caught.value, flush=True)
        os._exit(3)


def test_a_stage_that_is_killed_in_training_is_named_by_the_other(tmp_path, capfd):
    """The wait is inside Megatron's pipeline schedule."""
    config = tiny_config(tmp_path, "parallel.pipeline=2", "parallel.timeout_s=20", "algorithm.entropy_coef=0.01")
    with pytest.raises(AssertionError, match="rank 0 died with exit code 3"):
        run_ranks(die_in_training, 2, config, timeout_s=100)
    said = capfd.readouterr().out
    assert "phase 'train', step 13" in said
    assert "rank 1 (on " in said
    assert "is dead" in said


def lose_rank_0(rank: int) -> str:
    topology = join(5.0)
    topology.barrier("warm-up")
    if rank == 0:
        os.kill(os.getpid(), 9)
    with pytest.raises(DeadlineError) as caught:
        topology.broadcast_object(None, "rollout")
    print(caught.value, flush=True)
    os._exit(3)


def test_the_loss_of_the_rank_that_keeps_the_store_is_said(capfd):
    with pytest.raises(AssertionError, match="rank 1 died with exit code 3"):
        run_ranks(lose_rank_0, 2, timeout_s=60)
    assert "the process that keeps it (rank 0, or torchrun's agent) is gone" in capfd.readouterr().out


def go_on_for_long(rank: int) -> str:
    topology = join(60.0)
    topology.barrier("warm-up")
    topology.watchdog.timeout_s = 1.0  # joining may take longer than that
    topology.enter("train", 3)
    for _ in range(14):  # seven times as long as a wait may last, and past the grace
        time.sleep(0.5)
        topology.progress()
    topology.enter("loading a large model", 3, has_deadline=False)
    time.sleep(7)
    topology.destroy()
    return "done"


def test_a_long_phase_that_goes_on_is_no_hang():
    assert run_ranks(go_on_for_long, 2, timeout_s=90) == ["done", "done"]


def stay_too_long(rank: int) -> None:
    topology = join(60.0)
    topology.barrier("warm-up")
    topology.watchdog.timeout_s = 2.0
    topology.enter("rollout", 3)
    time.sleep(100)


def test_ranks_that_all_hang_in_one_phase_end_themselves(capfd):
    with pytest.raises(AssertionError, match=f"died with exit code {EXIT_CODE}"):
        run_ranks(stay_too_long, 2, timeout_s=60)
    said = capfd.readouterr().err
    assert "no progress in phase 'rollout' of step 3 for longer than `parallel.timeout_s` (2 s)" in said
    assert "stay_too_long" in said, "the stacks are shown"
