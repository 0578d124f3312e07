"""The loop's weight pushes when engines die under them: a version that no engine took is told, and a run of them ends the run."""

from types import SimpleNamespace

import pytest
import torch

from skyrl_mega.config.schema import Config
from skyrl_mega.errors import WeightSyncError
from skyrl_mega.orchestration.coordinator import Taken
from skyrl_mega.orchestration.loop import MAX_FAILED_PUSHES, collect, push_weights
from skyrl_mega.types import WeightVersion


class Policy:
    def fused_groups(self):
        return [("w",)]

    def iter_weights(self, dtype):
        yield "w", torch.zeros(4, dtype=dtype)


class Sink:
    """Fails versions as told; `failed` are engines that a version that went well did not reach."""

    def __init__(self, failures=0, failed=None):
        self.failures, self.failed = failures, failed or {}
        self.aborted = 0

    def start(self, version, groups):
        self.version = version

    def put(self, tensors):
        list(tensors)

    def finish(self):
        if self.failures:
            self.failures -= 1
            raise WeightSyncError(f"no engine received weight version {self.version}: engine 0: it died.")
        return WeightVersion(self.version, 1, 16, "c", failed=self.failed)

    def abort(self):
        self.aborted += 1


class Host:
    """The coordinator as the loop calls it; `answers` to take."""

    def __init__(self, *answers, engines=("0", "1")):
        self.answers, self.calls, self.engines = list(answers), [], engines

    def call(self, method, *args, timeout_s, **kwargs):
        self.calls.append((method, *args, *kwargs.items()))
        if method == "receivers":
            return [SimpleNamespace(name=name) for name in self.engines]
        return self.answers.pop(0) if method == "take" else None

    def of(self, method):
        return [call[1:] for call in self.calls if call[0] == method]


def parts(sink, host):
    notes = []
    topology = SimpleNamespace(
        broadcast_object=lambda value, phase: value, progress=lambda: None, rank=0, enter=lambda *a, **k: None
    )
    return SimpleNamespace(
        config=Config(),
        topology=topology,
        policy=Policy(),
        sink=sink,
        rollout=host,
        engine_dtype=torch.float32,
        receivers=[],
        failed_pushes=0,
        syncs_adapter=False,
        recorder=SimpleNamespace(note=notes.append),
        notes=notes,
        state=SimpleNamespace(policy_version=6),
    )


def test_an_engine_that_did_not_take_a_version_is_told_and_not_among_those_that_serve():
    run = parts(Sink(failed={"1": "it died"}), Host())
    proof = push_weights(run, 7)
    assert run.rollout.of("published") == [(7, proof, ["0"])]
    assert run.notes == ["warning: engine 1 did not take weight version 7: it died"]


def test_a_version_that_no_engine_took_is_told_and_the_next_one_that_arrives_forgives_it():
    run = parts(Sink(failures=MAX_FAILED_PUSHES - 1), Host())
    for version in range(1, MAX_FAILED_PUSHES):
        assert push_weights(run, version) is None
        assert run.rollout.of("published")[-1] == (version, None, [])
    assert push_weights(run, MAX_FAILED_PUSHES).version == MAX_FAILED_PUSHES
    assert len(run.notes) == MAX_FAILED_PUSHES - 1
    assert all("engine 0: it died" in note for note in run.notes)
    assert run.failed_pushes == 0
    assert run.sink.aborted == MAX_FAILED_PUSHES - 1


def test_a_run_whose_pushes_go_on_failing_ends_with_the_reason():
    run = parts(Sink(failures=MAX_FAILED_PUSHES), Host())
    for version in range(1, MAX_FAILED_PUSHES):
        push_weights(run, version)
    with pytest.raises(WeightSyncError, match="engine 0: it died"):
        push_weights(run, MAX_FAILED_PUSHES)


def test_pushes_while_all_engines_are_being_replaced_do_not_end_the_run():
    """Asynchronous steps go on meanwhile, on what was sampled before."""
    run = parts(Sink(failures=9), Host(engines=()))
    for version in range(1, 9):
        assert push_weights(run, version) is None
        assert run.rollout.of("published")[-1] == (version, None, [])
    run.rollout.engines = ("engine 0",)
    push_weights(run, 9)
    assert run.failed_pushes == 1


def test_an_engine_that_came_up_while_the_trainer_waits_gets_the_current_weights_before_the_step_goes_on():
    groups = [object()]
    run = parts(Sink(), Host(Taken(num_finished=1), Taken(needs_weights=True), Taken(groups, {"flight/wait_s": 1.0})))
    assert collect(run, 7) == (groups, {"flight/wait_s": 1.0})
    assert run.rollout.of("receivers") == [(("stale_only", True),)]
    [(version, proof, served)] = run.rollout.of("published")
    assert (version, proof.version, served) == (6, 6, ["0", "1"])
