"""Adapters and learning-rate schedules on fixed data: what is trained, the reference of DPO, resuming, what a run leaves."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from helpers.offline import lines, offline_config, random_examples, run_config
from helpers.tiny import write_tiny_model
from skyrl_mega.checkpoint.export import export_run
from skyrl_mega.config.offline import training_config
from skyrl_mega.errors import ConfigError
from skyrl_mega.models.lora_weights import peft_names
from skyrl_mega.orchestration import offline_tasks
from skyrl_mega.orchestration.offline_assemble import run_on_rows
from skyrl_mega.orchestration.offline_data import read_data
from skyrl_mega.orchestration.offline_tasks import make_task
from skyrl_mega.parallel.topology import init_topology
from skyrl_mega.telemetry.metrics import read_metrics
from skyrl_mega.training.reward_model import random_head

LORA = ("lora.rank=4", "lora.alpha=6", "lora.targets=[q_proj,down_proj]", "optimizer.lr=1e-2")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "llama", "llama", tied=True)


class Killed(Exception):
    pass


def run_in_two_parts(whole, task, run_dir, monkeypatch):
    """The summary of the run `whole` in `run_dir`, which dies in its fifth update and is started again."""
    update, calls = task.update, []

    def dies(self, examples):
        calls.append(examples)
        if len(calls) == 5:
            raise Killed
        return update(self, examples)

    monkeypatch.setattr(task, "update", dies)
    parted = replace(whole, trainer=replace(whole.trainer, run_dir=str(run_dir)))
    with pytest.raises(Killed):
        run_on_rows(parted)
    return run_on_rows(parted)


def test_sft_of_an_adapter_learns_resumes_and_leaves_the_base_and_the_adapter(tmp_path, model, monkeypatch):
    """Killed in step 5: the second start repeats it from the checkpoint of step 4."""
    whole = run_config(tmp_path, model, "sft", "whole", *LORA)
    summary = run_on_rows(whole)
    assert summary["after"]["eval/loss"] < summary["before"]["eval/loss"] - 0.1
    assert run_in_two_parts(whole, offline_tasks.SupervisedTask, tmp_path / "parted", monkeypatch)["after"] == summary["after"]
    assert lines(tmp_path / "parted") == lines(tmp_path / "whole")
    for file in ("hf/model.safetensors", "lora/adapter_model.safetensors"):
        assert (tmp_path / "parted" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    exported = load_file(export_run(str(tmp_path / "whole"), "latest", str(tmp_path / "again")) / "model.safetensors")
    base, merged = load_file(model / "model.safetensors"), load_file(tmp_path / "whole" / "hf" / "model.safetensors")
    adapter = load_file(tmp_path / "whole" / "lora" / "adapter_model.safetensors")
    assert json.loads((tmp_path / "whole" / "lora" / "adapter_config.json").read_text())["r"] == 4
    assert exported.keys() == merged.keys() == base.keys()
    for name, value in merged.items():
        assert torch.equal(exported[name], value)
        name_a, name_b = peft_names(name.removesuffix(".weight"))
        if name_a not in adapter:
            assert torch.equal(value, base[name]), name
            continue
        expected = base[name].double() + 6 / 4 * adapter[name_b].double() @ adapter[name_a].double()
        assert (value - expected).abs().max() < 1e-6
        assert not torch.equal(value, base[name]), name
    assert len(adapter) == 2 * sum(name.endswith(("q_proj.weight", "down_proj.weight")) for name in base)


def test_a_reward_model_of_an_adapter_trains_its_head_too_and_is_what_hugging_face_loads(tmp_path, model, monkeypatch):
    """Killed in step 5; the scores of what the run leaves are those of its last evaluation."""
    whole = run_config(tmp_path, model, "rm", "whole", *LORA)
    summary = run_on_rows(whole)
    assert run_in_two_parts(whole, offline_tasks.RewardTask, tmp_path / "parted", monkeypatch)["after"] == summary["after"]
    for file in ("hf/model.safetensors", "lora/adapter_model.safetensors"):
        assert (tmp_path / "parted" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()

    base, merged = load_file(model / "model.safetensors"), load_file(tmp_path / "whole" / "hf" / "model.safetensors")
    exported = load_file(export_run(str(tmp_path / "whole"), "latest", str(tmp_path / "again")) / "model.safetensors")
    assert merged.keys() == exported.keys() == {*base, "score.weight"}
    assert all(torch.equal(value, exported[name]) for name, value in merged.items())
    assert (merged["score.weight"] - random_head(64, whole.trainer.seed)).abs().max() > 1e-3
    changed = {name for name, value in base.items() if not torch.equal(value, merged[name])}
    assert changed == {name for name in base if name.endswith(("q_proj.weight", "down_proj.weight"))}

    adapter = load_file(tmp_path / "whole" / "lora" / "adapter_model.safetensors")
    assert torch.equal(adapter["base_model.model.score.weight"], merged["score.weight"])
    described = json.loads((tmp_path / "whole" / "lora" / "adapter_config.json").read_text())
    assert (described["task_type"], described["modules_to_save"]) == ("SEQ_CLS", ["score"])
    assert described["target_modules"] == sorted(described["target_modules"])
    assert all("score" not in name for name in described["target_modules"])

    scorer = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole" / "hf", dtype=torch.float64).eval()
    losses = []
    with torch.no_grad():
        for example in read_data(whole, lambda line: None).held_out:
            better, worse = (float(scorer(one.token_ids[:-1].long()[None]).logits[0, 0]) for one in example.sequences)
            losses.append(math.log1p(math.exp(worse - better)))
    assert sum(losses) / len(losses) == pytest.approx(summary["after"]["eval/loss"], abs=1e-5)


def dpo(config, batches):
    """Evaluation before, each update's metrics, whether the base is what it was, and how many models were built."""
    from skyrl_mega.models import build

    built, build_model = [], build.build_model
    derived = training_config(config)
    topology = init_topology(derived.parallel, torch.device("cpu"), seed=0)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(build, "build_model", lambda *a, **k: built.append(a) or build_model(*a, **k))
            task = make_task(config, derived, topology)
        base = {name: value.clone() for name, value in task.trained.weights.base_exporter.iter_weights(torch.float32)}
        task.prepare([example for batch in batches for example in batch])
        before = task.evaluate(batches[0])
        metrics = [task.update(batch) for batch in batches]
        after = dict(task.trained.weights.base_exporter.iter_weights(torch.float32))
        is_untouched = all(torch.equal(value, after[name]) for name, value in base.items())
        return before, metrics, is_untouched, len(built)
    finally:
        topology.destroy()


def test_the_reference_of_an_adapter_is_its_base_and_no_second_model(model):
    def found(*overrides):
        config = offline_config("dpo", model, *LORA, *overrides)
        return dpo(config, [random_examples(config, 6, seed=seed) for seed in (1, 2, 3)])

    before, metrics, is_untouched, num_models = found()
    assert (is_untouched, num_models) == (True, 1)
    assert before["margin"] == 0.0
    first = metrics[0]
    assert (first["rewards/chosen"], first["rewards/rejected"], first["rewards/margins"]) == (0.0, 0.0, 0.0)
    assert all(abs(later["rewards/margins"]) > 1e-4 for later in metrics[1:])
    for overrides, models in ((["preference.reference=precomputed"], 1), ([f"preference.reference_path={model}"], 2)):
        _, same, _, num_models = found(*overrides)
        assert num_models == models
        for one, other in zip(metrics, same, strict=True):
            assert one == pytest.approx(other, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("settings", [("optimizer.name=muon", "parallel.distributed_optimizer=false"), LORA[:3]])
def test_the_learning_rate_falls_over_the_updates_that_the_epochs_make(tmp_path, model, settings):
    """Two epochs of about 24 rows in batches of six, of which the first two updates are warm-up."""
    how = ("trainer.max_steps=0", "trainer.epochs=2", "checkpoint.interval_steps=0", "evaluation.num_rows=0", "data.eval_share=0")
    config = run_config(
        tmp_path,
        model,
        "sft",
        "run",
        *settings,
        *how,
        "optimizer.lr=1e-3",
        "optimizer.schedule=linear",
        "optimizer.warmup_updates=2",
    )
    assert run_on_rows(config)["steps"] == 10
    rows = read_metrics(tmp_path / "run")
    rates = [row["update/lr"] for row in rows if "update/lr" in row]
    assert rates == pytest.approx([5e-4, 1e-3, *(1e-3 * (1 - step / 8) for step in range(8))])
    assert rows[-1]["loss/total"] < rows[1]["loss/total"]


def test_a_warm_up_longer_than_the_epochs_ends_the_run_before_a_model_is_loaded(tmp_path, model, monkeypatch):
    from skyrl_mega.models import build

    monkeypatch.setattr(build, "build_model", lambda *_: pytest.fail("a model was built"))
    schedule = ("optimizer.schedule=cosine", "optimizer.warmup_updates=40", "trainer.max_steps=0", "trainer.epochs=2")
    with pytest.raises(
        ConfigError, match=r"40 updates of warm-up and at least 1 of decay, of \d+\. Lower `optimizer.warmup_updates`"
    ):
        run_on_rows(run_config(tmp_path, model, "sft", "run", *schedule))
