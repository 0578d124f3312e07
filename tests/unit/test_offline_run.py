"""Runs on fixed data: updates against float64 on Hugging Face models, resuming, exports, held-out rows, the command line."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from helpers.offline import LR, lines, offline_config, random_examples, run_config, updates, write_rows
from helpers.oracle import token_logprobs
from helpers.tiny import write_tiny_model
from skyrl_mega.checkpoint.export import export_run
from skyrl_mega.errors import CheckpointError, DataError
from skyrl_mega.launch.cli import main
from skyrl_mega.orchestration.layout_check import COMPARED_EPS
from skyrl_mega.orchestration.offline_assemble import run_on_rows
from skyrl_mega.orchestration.offline_data import read_data
from skyrl_mega.telemetry.metrics import read_metrics
from skyrl_mega.training.reward_model import random_head


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "llama", "llama", tied=True)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "other", "llama", tied=True, seed=1)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.999), eps=COMPARED_EPS, weight_decay=0.0)


def trained_logprob(model, sequence) -> torch.Tensor:
    return token_logprobs(model, sequence.token_ids.long(), 1.0)[0][sequence.loss_mask[1:]].sum()


def score(model, sequence) -> torch.Tensor:
    """Of the last real token: the one before the last."""
    hidden = model.base_model(sequence.token_ids[:-1].long()[None]).last_hidden_state[0, -1]
    return model.score(hidden)[0]


def compare_weights(ours, theirs):
    theirs = {name.removeprefix("model."): value for name, value in theirs.named_parameters()}
    assert len(ours) == len(theirs)
    for name, value in ours.items():
        assert (value.double() - theirs[name.removeprefix("model.")].detach()).abs().max() < 0.05 * LR, name


def test_two_updates_of_dpo_are_those_of_its_formula_in_float64(model, other):
    config = offline_config("dpo", model, f"preference.reference_path={other}", "optimizer.clip_grad_norm=0")
    batches = [random_examples(config, 4, seed=seed) for seed in (1, 2)]
    got = updates(config, batches, batches[0])
    policy, reference = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64) for path in (model, other))
    optimizer = adamw(policy)
    for metrics, batch in zip(got["metrics"], batches, strict=True):
        optimizer.zero_grad()
        losses = []
        for example in batch:
            better, worse = (trained_logprob(policy, one) - trained_logprob(reference, one).detach() for one in example.sequences)
            losses.append(-logsigmoid(0.1 * (better - worse)))
        loss = torch.stack(losses).mean()
        loss.backward()
        optimizer.step()
        assert metrics["loss/total"] == pytest.approx(float(loss.detach()), abs=5e-6)
    compare_weights(got["weights"], policy)


def test_two_updates_of_a_reward_model_are_those_of_bradley_terry_in_float64(model):
    config = offline_config("rm", model, "optimizer.clip_grad_norm=0")
    batches = [random_examples(config, 4, seed=seed) for seed in (1, 2)]
    got = updates(config, batches, batches[0])
    classifier = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float64, num_labels=1)
    classifier.score.weight.data.copy_(random_head(64, config.trainer.seed))
    optimizer = adamw(classifier)
    for metrics, batch in zip(got["metrics"], batches, strict=True):
        optimizer.zero_grad()
        scores = [[score(classifier, one) for one in example.sequences] for example in batch]
        loss = torch.stack([-logsigmoid(better - worse) for better, worse in scores]).mean()
        loss.backward()
        optimizer.step()
        assert metrics["loss/total"] == pytest.approx(float(loss.detach()), abs=5e-6)
    compare_weights(got["weights"], classifier)


def test_the_distance_of_kto_is_that_of_answers_to_other_prompts(model, other):
    config = offline_config("dpo", model, "preference.loss=kto", "preference.beta=1.0", f"preference.reference_path={other}")
    batch = random_examples(config, 4, seed=7)
    got = updates(config, [batch], batch)
    policy, reference = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64) for path in (model, other))
    with torch.no_grad():
        ratios = {}
        for one, asked in zip(batch, [*batch, batch[0]][1:], strict=True):
            for key, prompt in (("own", one), ("other", asked)):
                question = prompt.sequences[0].token_ids[~prompt.sequences[0].loss_mask].long()
                answer = one.sequences[0].token_ids[one.sequences[0].loss_mask].long()
                ids = torch.cat([question, answer])
                both = [token_logprobs(m, ids, 1.0)[0][len(question) - 1 :].sum() for m in (policy, reference)]
                ratios.setdefault(key, []).append(float(both[0] - both[1]))
        baseline = max(0.0, sum(ratios["other"]) / 4)
        signs = [1 if example.target > 0.5 else -1 for example in batch]
        expected = [1 - 1 / (1 + math.exp(-sign * (r - baseline))) for sign, r in zip(signs, ratios["own"], strict=True)]
    assert got["metrics"][0]["loss/total"] == pytest.approx(sum(expected) / 4, abs=1e-5)


def test_a_precomputed_reference_gives_the_same_updates(model, other):
    settings = ("dpo", model, f"preference.reference_path={other}", "preference.loss=ipo")
    batches = [random_examples(offline_config(*settings), 5, seed=seed) for seed in (1, 2)]
    one, two = (
        updates(offline_config(*settings, f"preference.reference={how}"), batches, batches[1]) for how in ("model", "precomputed")
    )
    assert one["after"] == pytest.approx(two["after"], rel=1e-6)
    assert all(torch.allclose(value, two["weights"][name], atol=1e-3 * LR) for name, value in one["weights"].items())


# ---- runs -----------------------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


@pytest.mark.parametrize("command", ["sft", "dpo", "rm"])
def test_a_run_that_dies_goes_on_as_if_nothing_had_happened(command, tmp_path, model, monkeypatch):
    """Killed in step 5, in the middle of an epoch: the second start repeats it from the checkpoint of step 4."""
    from skyrl_mega.orchestration import offline_tasks

    whole = run_config(tmp_path, model, command, "whole")
    summary = run_on_rows(whole)
    assert summary["steps"] == 6
    assert abs(summary["after"]["eval/loss"] - summary["before"]["eval/loss"]) > 1e-4
    task = {"sft": "SupervisedTask", "dpo": "PreferenceTask", "rm": "RewardTask"}[command]
    update = getattr(offline_tasks, task).update
    calls = []

    def dies(self, examples):
        calls.append(examples)
        if len(calls) == 5:
            raise Killed
        return update(self, examples)

    monkeypatch.setattr(getattr(offline_tasks, task), "update", dies)
    parted = replace(whole, trainer=replace(whole.trainer, run_dir=str(tmp_path / "parted")))
    with pytest.raises(Killed):
        run_on_rows(parted)
    assert len(lines(tmp_path / "parted")) == 5
    assert run_on_rows(parted)["after"] == summary["after"]
    assert lines(tmp_path / "parted") == lines(tmp_path / "whole")
    names = {path.name for path in (tmp_path / "parted").iterdir()}
    assert {"curves.png", "summary.json", "config.yaml", "hf", "checkpoints", "metrics.jsonl"} <= names
    assert run_on_rows(parted) == {}, "the run is finished"


def test_what_a_run_leaves_is_a_hugging_face_model_and_can_be_exported_again(tmp_path, model):
    config = run_config(tmp_path, model, "rm", "run", "trainer.max_steps=3")
    run_on_rows(config)
    export_run(str(tmp_path / "run"), "latest", str(tmp_path / "again"))
    data = read_data(config, lambda line: None)
    found = []
    for folder in ("run/hf", "again"):
        classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / folder, dtype=torch.float64)
        assert classifier.config.num_labels == 1
        with torch.no_grad():
            # The class's own forward, as rewards of `kind: model` call it.
            scores = [
                [float(classifier(one.token_ids[:-1].long()[None]).logits[0, 0]) for one in example.sequences]
                for example in data.held_out
            ]
        found.append(sum(math.log1p(math.exp(worse - better)) for better, worse in scores) / len(scores))
    recorded = [row["eval/loss"] for row in read_metrics(tmp_path / "run") if "eval/loss" in row][-1]
    assert found == pytest.approx([recorded] * 2, abs=1e-5)
    assert abs(recorded - math.log(2)) > 1e-4


def test_an_epoch_is_every_training_row_once_and_datasets_are_counted(tmp_path, model):
    paths = [write_rows(tmp_path / f"{name}.jsonl", "sft", count) for name, count in (("a", 30), ("b", 11))]
    several = "data.datasets=[" + ",".join(f"{{path: {path}}}" for path in paths) + "]"
    config = offline_config(
        "sft", model, several, f"trainer.run_dir={tmp_path / 'run'}", "checkpoint.interval_steps=0", "data.eval_share=0.1"
    )
    summary = run_on_rows(config)
    last = read_metrics(tmp_path / "run")[-1]
    assert summary["rows"] + summary["held_out_rows"] == 41
    assert summary["steps"] == math.ceil(summary["rows"] / 6)
    assert last["data/epoch"] >= 1.0
    assert last["data/rows/a"] + last["data/rows/b"] == 6 * summary["steps"]


def test_held_out_rows_are_never_trained_and_are_the_same_whatever_else_is_in_the_file(tmp_path, model):
    config = run_config(tmp_path, model, "sft", "run", "data.eval_share=0.3")
    data = read_data(config, lambda line: None)
    trained = {tuple(e.sequences[0].token_ids.tolist()) for e in data.stream.examples}
    held_out = {tuple(e.sequences[0].token_ids.tolist()) for e in data.held_out}
    assert held_out
    assert not trained & held_out
    assert len(trained | held_out) == 30
    write_rows(tmp_path / "sft.jsonl", "sft", 40)
    more = {tuple(e.sequences[0].token_ids.tolist()) for e in read_data(config, lambda line: None).held_out}
    assert held_out <= more


def test_a_bad_row_ends_the_command_before_a_model_is_loaded(tmp_path, model, monkeypatch, capsys):
    from skyrl_mega.models import build

    monkeypatch.setattr(build, "build_model", lambda *_: pytest.fail("a model was built"))
    config = run_config(tmp_path, model, "dpo", "run")
    rows = tmp_path / "dpo.jsonl"
    rows.write_text(rows.read_text() + '{"prompt": "1+1=", "chosen": "2"}\n')
    with pytest.raises(DataError, match=r"dpo\.jsonl:31 must be"):
        run_on_rows(config)
    code = main(["dpo", f"model.path={model}", f"data.path={rows}", "data.max_length=60", "data.chat_template=false"])
    assert code == 2
    assert "dpo.jsonl:31 must be" in capsys.readouterr().err


def test_a_run_that_goes_on_with_other_rows_is_refused(tmp_path, model):
    config = run_config(tmp_path, model, "sft", "run", "trainer.max_steps=2")
    run_on_rows(config)
    write_rows(tmp_path / "sft.jsonl", "sft", 20)
    with pytest.raises(DataError, match="does not belong to these rows"):
        run_on_rows(replace(config, trainer=replace(config.trainer, max_steps=4)))


def test_an_export_of_a_run_without_checkpoints_is_an_error(tmp_path, model):
    run_on_rows(run_config(tmp_path, model, "sft", "run", "trainer.max_steps=1", "checkpoint.interval_steps=0"))
    with pytest.raises(CheckpointError):
        export_run(str(tmp_path / "run"), "latest", str(tmp_path / "again"))
