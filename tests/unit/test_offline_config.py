"""Configurations of training on fixed data: what each command takes, and what is said about bad settings."""

from __future__ import annotations

from dataclasses import replace

import pytest

from helpers.model_dir import write_model_dir
from skyrl_mega.config.distillation import as_distillation
from skyrl_mega.config.load import load_config, load_saved, save_resolved, to_yaml
from skyrl_mega.config.offline import OFFLINE_RULES, datasets_of, file_format, kind_of_rows, training_config, validate_offline
from skyrl_mega.config.offline_schema import ROOTS, DatasetConfig
from skyrl_mega.config.schema import Config
from skyrl_mega.errors import ConfigError
from skyrl_mega.launch.cli import main

COMMANDS = ("sft", "dpo", "rm")


@pytest.fixture
def base(tmp_path):
    """Overrides that break no rule."""
    (tmp_path / "rows.jsonl").write_text("{}\n")
    model = write_model_dir(tmp_path / "model")
    return [f"model.path={model}", f"data.path={tmp_path / 'rows.jsonl'}", f"trainer.run_dir={tmp_path / 'run'}"]


def load(command, overrides, **how):
    return load_config(overrides, config_name=command, root=ROOTS[command], **how)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_its_own_settings_and_none_of_reinforcement_learning(command, base, capsys):
    assert validate_offline(load(command, base)) == []
    assert main([command, *base, "--print-config"]) == 0
    shown = capsys.readouterr().out
    assert shown == to_yaml(load(command, base))
    for absent in ("rollout:", "env:", "algorithm:", "samples_per_prompt", "critic:"):
        assert absent not in shown
    assert load(command, base).trainer.run_dir == base[2].partition("=")[2]
    for override in ("rollout.temperature=1", "recipe=tiny", "precision=float32", "trainer=smoke"):
        with pytest.raises(ConfigError, match=rf"skyrl-mega {command} --print-config|Set its parts"):
            load(command, [*base, override])


def test_a_saved_configuration_is_of_its_own_root(base, tmp_path):
    for command in COMMANDS:
        config = load(command, base)
        save_resolved(config, tmp_path / "config.yaml")
        assert load_saved(tmp_path / "config.yaml") == config
        assert load_saved(tmp_path / "config.yaml", ["parallel=tp2"]).parallel.tensor == 2
        with pytest.raises(ConfigError, match="`recipe`"):
            load_saved(tmp_path / "config.yaml", ["recipe=tiny"])


def test_what_models_are_built_from_is_derived(base):
    config = load("dpo", [*base, "model.dtype=float32", "trainer.batch_size=6", "data.max_length=33", "optimizer.lr=0.5"])
    derived = training_config(config, max_steps=9)
    assert (derived.model, derived.optimizer, derived.parallel) == (config.model, config.optimizer, config.parallel)
    assert (derived.trainer.max_steps, derived.trainer.prompts_per_step) == (9, 6)
    assert (derived.rollout.dtype, derived.rollout.max_model_len, derived.rollout.temperature) == ("float32", 33, 1.0)
    assert derived.algorithm.policy_loss == "cross_entropy"


def test_datasets_have_names_formats_and_kinds(base, tmp_path):
    (tmp_path / "dir").mkdir()
    several = f"data.datasets=[{{path: {tmp_path / 'rows.jsonl'}, weight: 2}}, {{path: {tmp_path / 'dir'}, weight: 1, name: hf}}]"
    config = load("sft", [base[0], base[2], several])
    one, other = datasets_of(config)
    assert (one.name, one.weight, file_format(one)) == ("rows", 2.0, "jsonl")
    assert (other.name, file_format(other)) == ("hf", "hf_dataset")
    assert file_format(DatasetConfig(path="x.parquet")) == "parquet"
    assert [kind_of_rows(load(command, base)) for command in COMMANDS] == ["sft", "pairs", "pairs"]
    assert kind_of_rows(load("dpo", [*base, "preference.loss=kto"])) == "labelled"
    assert kind_of_rows(load("rm", [*base, "reward_model.loss=regression"])) == "scored"


BAD: dict[str, tuple[str, list[str], str, str]] = {
    "no rows": ("sft", ["data.path="], "rows", "neither is given"),
    "two ways": ("sft", ["data.datasets=[{path: x}]"], "rows", "both are given"),
    "no file": ("sft", ["data.path=nowhere.jsonl"], "files", "`nowhere.jsonl` is not there"),
    "no held-out file": ("sft", ["data.eval_path=nowhere.jsonl"], "files", "`nowhere.jsonl` is not there"),
    "some weights": ("sft", ["data.path=", "data.datasets=[{path: ., weight: 1}, {path: /}]"], "weights", "has none"),
    "negative weight": ("sft", ["data.path=", "data.datasets=[{path: ., name: x, weight: -1}]"], "weights", "x is negative"),
    "names": ("sft", ["data.path=", "data.datasets=[{path: /}, {path: /}]"], "names", "Give `name`"),
    "nothing held out": ("sft", ["data.eval_share=0"], "held_out", "num_rows=0"),
    "positions": ("sft", ["data.max_length=9000", "trainer.tokens_per_micro_batch=90000"], "positions", "9000 of 2048"),
    "micro-batch": ("sft", ["trainer.tokens_per_micro_batch=1000"], "micro_batch", "1000 for up to 1024"),
    "micro-batch of pairs": ("dpo", ["trainer.tokens_per_micro_batch=2000"], "micro_batch", "2000 for up to 2048"),
    "micro-batch of scores": ("rm", ["trainer.tokens_per_micro_batch=2049"], "micro_batch", "for up to 2050"),
    "cuda": ("sft", ["model.fp8=blockwise", "trainer.device=cpu"], "cuda", "model.fp8 with"),
    "routing": ("sft", ["model.router_replay=old"], "routing", "it is old"),
    "smoothing": ("dpo", ["preference.label_smoothing=0.1", "preference.loss=ipo"], "smoothing", "ipo"),
    "margin": ("dpo", ["preference.margin=1"], "margin", "sigmoid"),
    "normalised": ("dpo", ["preference.loss=orpo", "preference.length_normalised=off"], "normalised", "orpo"),
    "kto": ("dpo", ["preference.loss=kto", "preference.reference=precomputed"], "kto_pass", "precomputed"),
    "unused reference": ("dpo", ["preference.loss=simpo", "preference.reference_path=x"], "reference_used", "simpo"),
    "absent reference": ("dpo", ["preference.reference_path=nowhere"], "reference", "preference.reference_path"),
    "centering": ("rm", ["reward_model.loss=regression", "reward_model.centering_coef=0.1"], "pairs_scored", "regression"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_broken_rule_is_told_with_values_and_remedy(case, base):
    command, overrides, rule, words = BAD[case]
    with pytest.raises(ConfigError) as caught:
        validate_offline(load(command, [*base, *overrides]))
    assert OFFLINE_RULES[rule] in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("command", "override", "words"),
    [
        ("sft", "trainer.batch_size=0", "`trainer.batch_size` must be >= 1; got 0"),
        ("sft", "trainer.epochs=0", "`trainer.epochs` must be > 0; got 0"),
        ("sft", "trainer.max_steps=-1", "`trainer.max_steps` must be >= 0; got -1"),
        ("sft", "data.eval_share=1", "`data.eval_share` must be in [0, 1); got 1"),
        ("sft", "data.max_length=1", "`data.max_length` must be >= 2; got 1"),
        ("sft", "evaluation.num_rows=-1", "`evaluation.num_rows` must be >= 0"),
        ("sft", "optimizer.lr=0", "`optimizer.lr` must be > 0; got 0"),
        ("sft", "trainer.max_nonfinite_updates=-1", "`trainer.max_nonfinite_updates` must be >= 0; got -1"),
        ("sft", "lora.rank=-1", "`lora.rank` must be >= 0; got -1"),
        ("dpo", "lora.path=ADAPTER", "`lora.path` needs `lora.rank` > 0"),
        ("dpo", "lora.rank=8 lora.path=ADAPTER", "`lora.path` must be a PEFT adapter"),
        ("sft", "lora.rank=8 lora.targets=[]", "`lora.targets` must name projections"),
        (
            "sft",
            "optimizer.min_lr_ratio=0.5",
            "`optimizer.schedule` is constant, and `optimizer.min_lr_ratio` would change nothing",
        ),
        ("rm", "optimizer.schedule=cosine optimizer.warmup_updates=9 trainer.max_steps=9", "of decay, of 9"),
        ("rm", "optimizer.name=muon", "Set `parallel.distributed_optimizer=false`"),
        ("dpo", "preference.beta=0", "`preference.beta` must be > 0; got 0"),
        ("dpo", "preference.label_smoothing=0.5", "`preference.label_smoothing` must be in [0, 0.5); got 0.5"),
        ("rm", "reward_model.centering_coef=-1", "`reward_model.centering_coef` must be >= 0"),
        ("sft", "parallel.tensor=5", "`parallel.tensor` must divide the model's attention heads"),
        ("sft", "checkpoint.resume=must", "must needs a checkpoint"),
        ("sft", "telemetry.trackers=[nobody]", "`telemetry.trackers` must be known"),
    ],
)
def test_numbers_and_the_shared_rules_are_checked(command, override, words, base):
    with pytest.raises(ConfigError) as caught:
        validate_offline(load(command, [*base, *override.split()]))
    assert words in str(caught.value)
    assert "rollout" not in str(caught.value)


def test_adapters_are_for_every_command_and_have_no_engine_to_go_to(base):
    for command in ("sft", "dpo", "rm"):
        adapter = training_config(load(command, [*base, "lora.rank=8", "lora.targets=[q_proj]"])).lora
        assert (adapter.rank, adapter.targets, adapter.sync) == (8, ("q_proj",), "auto")
        assert training_config(load(command, base)).lora.rank == 0
        with pytest.raises(ConfigError, match=r"`lora\.sync` is not a setting"):
            load(command, [*base, "lora.sync=merged"])


def test_a_schedule_may_wait_for_the_rows_to_tell_the_number_of_updates(base):
    assert validate_offline(load("sft", [*base, "optimizer.schedule=cosine", "optimizer.warmup_updates=9"])) == []


def test_every_process_needs_a_row(base):
    with pytest.raises(ConfigError, match="4 rows for 8 of them"):
        validate_offline(load("sft", [*base, "trainer.batch_size=4"]), world_size=8)


def test_a_misspelt_key_of_a_dataset_is_named(base):
    with pytest.raises(ConfigError, match=r"`data\.datasets\[0\]\.wieght` is not a setting of this item; did you mean `weight`"):
        load("sft", [base[0], "data.datasets=[{path: x, wieght: 1}]"])
    with pytest.raises(ConfigError, match=r"`data\.datasets\[0\]` must be a mapping"):
        load("sft", [base[0], "data.datasets=[x]"])


def test_distill_makes_the_teachers_word_the_objective():
    config = Config()
    with pytest.raises(ConfigError, match=r"`teacher\.path` is empty"):
        as_distillation(config)
    config = replace(config, teacher=replace(config.teacher, path="teacher"))
    assert as_distillation(config).algorithm.advantage == "distill"
    topk = as_distillation(replace(config, teacher=replace(config.teacher, topk=8)))
    assert (topk.algorithm.advantage, topk.algorithm.policy_loss) == ("grpo", "distill_topk")
    assert as_distillation(topk) == topk
    with pytest.raises(ConfigError, match=r"sets `algorithm\.advantage` itself; it is rloo"):
        as_distillation(replace(config, algorithm=replace(config.algorithm, advantage="rloo")))


def test_the_distill_command_takes_everything_that_train_takes(capsys):
    assert main(["distill", "recipe=tiny", "teacher.path=TEACHER", "teacher.topk=4", "--print-config"]) == 0
    shown = capsys.readouterr().out
    assert "policy_loss: distill_topk" in shown
    assert "prompts_per_step: 4" in shown
    assert main(["distill", "recipe=tiny", "model.path=MODEL"]) == 2
    assert "`teacher.path` is empty" in capsys.readouterr().err
