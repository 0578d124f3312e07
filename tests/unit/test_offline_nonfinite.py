"""Updates on fixed data that are not finite: left out as if they had never been, told, counted, and their rows written down."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from helpers.offline import lines, run_config
from helpers.tiny import write_tiny_model
from skyrl_mega.checkpoint import store
from skyrl_mega.errors import NonFiniteUpdateError
from skyrl_mega.orchestration import offline_tasks
from skyrl_mega.orchestration.nonfinite import BATCHES_FILE, record_batch
from skyrl_mega.orchestration.offline_assemble import run_on_rows

TASKS = {"sft": "SupervisedTask", "dpo": "PreferenceTask", "rm": "RewardTask"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "llama", "llama", tied=True)


def infinite_gradient(update, task, examples):
    weight = task.trained.chunks[0].decoder.layers[0].mlp.linear_fc2.weight
    hook = weight.register_hook(lambda gradient: gradient * float("inf"))
    try:
        return update(task, examples)
    finally:
        hook.remove()


def infinite_loss(update, task, examples):
    """A pair with an infinite margin."""
    return update(task, [replace(examples[0], target=float("inf")), *examples[1:]])


def never_made(update, task, examples):
    return {"update/skipped": 1.0}


def run_with(monkeypatch, config, second_update):
    """(the run's summary, the rows of each of its updates). Its second update is made by `second_update`."""
    task = getattr(offline_tasks, TASKS[config.command])
    update, calls = task.update, []

    def patched(self, examples):
        calls.append(examples)
        return second_update(update, self, examples) if len(calls) == 2 else update(self, examples)

    with monkeypatch.context() as patch:
        patch.setattr(task, "update", patched)
        return run_on_rows(config), calls


@pytest.mark.parametrize(
    ("command", "broken", "words"),
    [
        ("sft", infinite_gradient, "the gradient norm of update 1 is"),
        ("dpo", infinite_gradient, "the gradient norm of update 1 is"),
        ("rm", infinite_loss, "the loss of update 1 is not finite"),
    ],
)
def test_a_run_goes_on_as_if_the_update_had_never_been(command, broken, words, tmp_path, model, monkeypatch, capsys):
    with_it, without = (
        run_config(tmp_path, model, command, name, "trainer.max_steps=4", "evaluation.interval_steps=0")
        for name in ("broken", "never")
    )
    summary, calls = run_with(monkeypatch, with_it, broken)
    assert "The run goes on without it (number 1 in a row of the 3" in " ".join(capsys.readouterr().out.split())
    run_with(monkeypatch, without, never_made)
    found, expected = lines(tmp_path / "broken"), lines(tmp_path / "never")
    assert [row.get("update/nonfinite_skipped") for row in found] == [None, 0.0, 1.0, 0.0, 0.0]
    assert [row["update/skipped"] for row in found[1:]] == [0.0, 1.0, 0.0, 0.0]
    for one, other in zip(found, expected, strict=True):
        assert {**one, "update/nonfinite_skipped": 0.0} == {**other, "update/nonfinite_skipped": 0.0}
    weights = [(tmp_path / name / "hf" / "model.safetensors").read_bytes() for name in ("broken", "never")]
    assert weights[0] == weights[1]
    assert (summary["steps"], summary["optimizer_steps"], summary["nonfinite_skipped"]) == (4, 3, 1)
    state, _ = store.read_state(store.find_checkpoint(str(tmp_path / "broken")))
    assert (state.num_nonfinite_skipped, state.num_optimizer_steps) == (1, 3)
    [line] = [json.loads(text) for text in (tmp_path / "broken" / BATCHES_FILE).read_text().splitlines()]
    assert (line["step"], line["rows"]) == (2, [example.place for example in calls[1]])
    assert words in line["reason"]
    assert all(f"{command}.jsonl:" in place for place in line["rows"])
    assert not (tmp_path / "never" / BATCHES_FILE).exists()


def test_one_more_than_allowed_ends_the_run_and_is_written_down_too(tmp_path, model, monkeypatch):
    config = run_config(tmp_path, model, "rm", "run", "trainer.max_nonfinite_updates=0")
    with pytest.raises(NonFiniteUpdateError, match="the loss of update 1"):
        run_with(monkeypatch, config, infinite_loss)
    assert [json.loads(text)["step"] for text in (tmp_path / "run" / BATCHES_FILE).read_text().splitlines()] == [2]


def test_a_repeated_step_takes_the_place_of_what_was_written_of_it(tmp_path):
    for step, reason in ((2, "a"), (5, "b"), (7, "c"), (5, "d")):
        record_batch(tmp_path, step, reason, ["rows.jsonl:1"])
    found = [json.loads(text) for text in (tmp_path / BATCHES_FILE).read_text().splitlines()]
    assert [(line["step"], line["reason"]) for line in found] == [(2, "a"), (5, "d")]
