"""Training on fixed data: its rules, and what its settings are to the code that builds and updates models.

A model is built, laid out and updated by the same code as in reinforcement learning, which reads a `Config`; `training_config` is
the one place that makes one. Of that configuration's rules those hold here whose sentence names settings of this root only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from skyrl_mega.config.build import numbered
from skyrl_mega.config.layout_rules import data_parallel_size
from skyrl_mega.config.model_files import ModelFiles, inspect_model
from skyrl_mega.config.offline_schema import DatasetConfig, DPOConfig, OfflineConfig, RMConfig, SFTConfig
from skyrl_mega.config.optimizer_rules import schedule_fits
from skyrl_mega.config.ranges import RANGES, Range, value_at
from skyrl_mega.config.rule import Facts, Finding, Rule
from skyrl_mega.config.rules import ALL_COMBINATIONS, ALL_SURROUNDINGS
from skyrl_mega.config.schema import AlgorithmConfig, Config, EvalConfig, LoraConfig, RolloutConfig, TrainerConfig
from skyrl_mega.config.settings import all_settings
from skyrl_mega.config.teacher_files import teacher_problems
from skyrl_mega.errors import ConfigError

_AT_LEAST_0, _AT_LEAST_1, _ABOVE_0 = Range(0), Range(1), Range(0, is_low_open=True)

#: Over `RANGES`, whose other keys hold where the root has them.
OFFLINE_RANGES: dict[str, Range] = {
    "data.eval_share": Range(0, 1, is_high_open=True),
    "data.max_length": Range(2),
    "evaluation.num_rows": _AT_LEAST_0,
    "trainer.batch_size": _AT_LEAST_1,
    "trainer.epochs": _ABOVE_0,
    "trainer.max_steps": _AT_LEAST_0,
    "preference.beta": _ABOVE_0,
    "preference.label_smoothing": Range(0, 0.5, is_high_open=True),
    "preference.margin": _AT_LEAST_0,
    "preference.sft_coef": _AT_LEAST_0,
    "preference.desirable_weight": _AT_LEAST_0,
    "preference.undesirable_weight": _AT_LEAST_0,
    "reward_model.centering_coef": _AT_LEAST_0,
}
#: In the place of the updates that epochs make, before the rows tell them: no schedule is longer. `require_updates` looks again.
_MANY_STEPS = 10**9
_SETTING = re.compile(r"`([a-z_0-9]+(?:\.[a-z_0-9]+)+)(?:=[^`]*)?`")


def training_config(config: OfflineConfig, *, max_steps: int = 0) -> Config:
    """What building and updating a model, and showing a run, read of the settings. `max_steps`: where epochs say it."""
    trainer = config.trainer
    return Config(
        model=config.model,
        lora=LoraConfig(**vars(config.lora)),
        parallel=config.parallel,
        algorithm=AlgorithmConfig(policy_loss="cross_entropy", reduction="token_mean"),
        optimizer=config.optimizer,
        # Plain log-probabilities: temperature 1, nothing truncated.
        rollout=RolloutConfig(dtype=config.model.dtype, max_model_len=config.data.max_length, max_new_tokens=1),
        evaluation=EvalConfig(interval_steps=config.evaluation.interval_steps, num_prompts=config.evaluation.num_rows),
        checkpoint=config.checkpoint,
        telemetry=config.telemetry,
        trainer=TrainerConfig(
            prompts_per_step=trainer.batch_size,
            samples_per_prompt=1,
            tokens_per_micro_batch=trainer.tokens_per_micro_batch,
            share_prompts=trainer.share_prompts,
            max_steps=max_steps or max(1, trainer.max_steps),
            seed=trainer.seed,
            device=trainer.device,
            threads=trainer.threads,
            run_dir=trainer.run_dir,
        ),
    )


def datasets_of(config: OfflineConfig) -> tuple[DatasetConfig, ...]:
    """The datasets, `data.path` among them as one, each with its name."""
    data = config.data
    given = data.datasets or ((DatasetConfig(path=data.path),) if data.path else ())
    return tuple(replace(dataset, name=dataset.name or Path(dataset.path).stem) for dataset in given)


def file_format(dataset: DatasetConfig) -> str:
    """jsonl, parquet or hf_dataset."""
    if dataset.format != "auto":
        return dataset.format
    path = Path(dataset.path)
    return "hf_dataset" if path.is_dir() else "parquet" if path.suffix == ".parquet" else "jsonl"


def validate_offline(config: OfflineConfig, *, world_size: int = 1) -> list[str]:
    """Warnings; raises one ConfigError that lists every broken rule. As `validate.validate`, for training on fixed data."""
    defaults = _defaults(config)
    known = set(defaults)
    problems = list(_range_problems(config, defaults))
    model, model_problems = inspect_model(Path(config.model.path))
    problems.extend(model_problems)
    problems.extend(_own_problems(config, model, world_size))
    warnings: list[str] = []
    derived = training_config(config, max_steps=config.trainer.max_steps or _MANY_STEPS)
    facts = Facts(world_size=world_size, model=model)
    for rule in (*ALL_COMBINATIONS, *ALL_SURROUNDINGS):
        if _is_about(rule, known):
            for message, is_warning in rule.messages(derived, facts):
                message = message.replace("evaluation.num_prompts", "evaluation.num_rows")
                (warnings if is_warning else problems).append(message)
    if problems:
        raise ConfigError(numbered(problems))
    return warnings


def require_updates(derived: Config) -> None:
    """Raises ConfigError where the learning rate's schedule is longer than the run, whose `trainer.max_steps` the rows told."""
    for finding in schedule_fits(derived, Facts(world_size=1, model=None)):
        raise ConfigError(f"A falling learning rate must fit into the updates of the run; {finding.values}. {finding.remedy}")


def _is_about(rule: Rule, known: set[str]) -> bool:
    """Whether a rule of reinforcement learning speaks of settings that this root has, and of no others."""
    named = set(_SETTING.findall(rule.statement))
    return bool(named) and named <= known


def _defaults(config: OfflineConfig) -> dict[str, Any]:
    root: Any = type(config)
    return {setting.key: setting.default for setting in all_settings(root)}


def _range_problems(config: OfflineConfig, defaults: dict[str, Any]) -> Iterator[str]:
    for key, allowed in {**RANGES, **OFFLINE_RANGES}.items():
        if key in defaults and value_at(config, key) not in allowed:
            yield f"`{key}` must be {allowed}; got {value_at(config, key)}. The default is {defaults[key]}."


# ---- rules of fixed data --------------------------------------------------------------------------------------------------

OFFLINE_RULES: dict[str, str] = {
    "rows": "Rows come from `data.path`, or from `data.datasets`: exactly one of the two",
    "files": "Every file of rows must exist",
    "weights": "Either every dataset has a weight, or none (then each counts as many as it has rows)",
    "names": "Datasets need names of their own",
    "held_out": "`data.eval_share` of 0 holds nothing out: with `evaluation.num_rows` > 0, give `data.eval_path`",
    "positions": "`data.max_length` must not exceed the positions the model knows",
    "micro_batch": "`trainer.tokens_per_micro_batch` must hold the longest row: a pair is two sequences of `data.max_length`, and"
    " reward models add a token to each",
    "ranks": "Every data-parallel process needs a row in every update: `trainer.batch_size`",
    "cuda": "`model.fp8`, `model.offload_layers`, `model.offload_frozen`, `optimizer.offload` and `parallel.overlap_tensor` are"
    " for CUDA",
    "routing": "`model.router_replay` is for rollouts: no engine tells what routes the rows of fixed data took",
    "template": "`data.chat_template=true` needs a tokenizer with a chat template",
    "smoothing": "`preference.label_smoothing` is for the losses sigmoid and robust",
    "margin": "`preference.margin` is for the loss simpo",
    "normalised": "`preference.length_normalised=off` does not go with simpo and orpo, which are means over tokens",
    "kto_pass": "`preference.loss=kto` measures a distance anew in every batch: it needs `preference.reference=model`",
    "reference": "The reference model must know the policy's tokens",
    "reference_used": "`preference.reference_path` is for losses with a reference: not simpo, not orpo",
    "pairs_scored": "`reward_model.centering_coef` is for `reward_model.loss=bradley_terry`",
}


def _own_problems(config: OfflineConfig, model: ModelFiles | None, world_size: int) -> Iterator[str]:
    findings = [*_data_findings(config, model), *_batch_findings(config, world_size)]
    if isinstance(config, DPOConfig):
        findings += _preference_findings(config, model)
    if isinstance(config, RMConfig) and config.reward_model.centering_coef > 0 and config.reward_model.loss == "regression":
        coef = config.reward_model.centering_coef
        findings.append(("pairs_scored", Finding(f"it is {coef} with regression", "Set it to 0.")))
    for name, finding in findings:
        yield f"{OFFLINE_RULES[name]}; {finding.values}. {finding.remedy}"


Findings = Iterator[tuple[str, Finding]]


def _data_findings(config: OfflineConfig, model: ModelFiles | None) -> Findings:
    data, datasets = config.data, datasets_of(config)
    if bool(data.path) == bool(data.datasets):
        what = "both are given" if data.path else "neither is given"
        yield "rows", Finding(what, "Set `data.path=FILE`, or `'data.datasets=[{path: FILE, weight: 1}, ...]'`.")
    for path in (*(dataset.path for dataset in datasets), *filter(None, [data.eval_path])):
        if not Path(path).exists():
            yield "files", Finding(f"`{path}` is not there (from `{Path.cwd()}`)", "Correct the path.")
    negative = [dataset.name for dataset in datasets if dataset.weight < 0 or dataset.limit < 0]
    if negative:
        yield "weights", Finding(f"weight or limit of {', '.join(negative)} is negative", "Set it to 0 or more.")
    if len({dataset.weight > 0 for dataset in datasets}) > 1:
        without = [dataset.name for dataset in datasets if dataset.weight == 0]
        yield "weights", Finding(f"{', '.join(without)} has none", "Give it one.")
    names = [dataset.name for dataset in datasets]
    if len(set(names)) < len(names):
        yield "names", Finding(f"they are {', '.join(names)}", "Give `name` to those alike.")
    if config.evaluation.num_rows > 0 and not data.eval_path and data.eval_share == 0:
        yield "held_out", Finding("it is empty", "Set it, or `evaluation.num_rows=0`.")
    if model is not None:
        longest = model.max_position_embeddings
        if data.max_length > longest:
            yield "positions", Finding(f"{data.max_length} of {longest}", f"Set `data.max_length={longest}` or less.")
        if data.chat_template and not model.has_chat_template:
            yield "template", Finding(f"`{model.path}` has none", "Set it to false, or use an instruction-tuned model.")


def _batch_findings(config: OfflineConfig, world_size: int) -> Findings:
    trainer, longest = config.trainer, config.data.max_length + isinstance(config, RMConfig)
    needed = longest * (2 if is_paired(config) else 1)
    if trainer.tokens_per_micro_batch < needed:
        yield (
            "micro_batch",
            Finding(
                f"{trainer.tokens_per_micro_batch} for up to {needed}", f"Set it to {needed} or more, or lower `data.max_length`."
            ),
        )
    ranks = data_parallel_size(training_config(config), world_size)
    if trainer.batch_size < ranks:
        yield "ranks", Finding(f"{trainer.batch_size} rows for {ranks} of them", f"Set it to {ranks} or more.")
    if config.model.router_replay != "off":
        yield "routing", Finding(f"it is {config.model.router_replay}", "Set `model.router_replay=off`.")
    asked = {
        "model.fp8": config.model.fp8 != "off",
        "model.offload_layers": config.model.offload_layers > 0,
        "model.offload_frozen": config.model.offload_frozen,
        "optimizer.offload": config.optimizer.offload,
        "parallel.overlap_tensor": config.parallel.overlap_tensor,
    }
    named = [name for name, is_asked in asked.items() if is_asked]
    if named and trainer.device == "cpu":
        yield "cuda", Finding(f"{', '.join(named)} with `trainer.device=cpu`", "Leave it out.")


def _preference_findings(config: DPOConfig, model: ModelFiles | None) -> Findings:
    settings = config.preference
    loss = f"`preference.loss` is {settings.loss}"
    if settings.label_smoothing > 0 and settings.loss not in ("sigmoid", "robust"):
        yield "smoothing", Finding(f"it is {settings.label_smoothing} and {loss}", "Set it to 0.")
    if settings.margin > 0 and settings.loss != "simpo":
        yield "margin", Finding(f"it is {settings.margin} and {loss}", "Set it to 0.")
    if settings.length_normalised == "off" and settings.loss in ("simpo", "orpo"):
        yield "normalised", Finding(loss, "Set it to auto.")
    if settings.loss == "kto" and settings.reference == "precomputed":
        yield "kto_pass", Finding("it is precomputed", "Set `preference.reference=model`.")
    if settings.reference_path and settings.loss in ("simpo", "orpo"):
        yield "reference_used", Finding(loss, "Leave it out.")
    elif settings.reference_path and model is not None:
        for problem in teacher_problems(Path(settings.reference_path), model, max_model_len=config.data.max_length):
            values, _, remedy = problem.rpartition(". ")
            yield "reference", Finding(values.replace("teacher.path", "preference.reference_path"), remedy)


def is_paired(config: OfflineConfig) -> bool:
    """Whether a row is a pair of answers."""
    if isinstance(config, DPOConfig):
        return config.preference.loss != "kto"
    return isinstance(config, RMConfig) and config.reward_model.loss == "bradley_terry"


def kind_of_rows(config: OfflineConfig) -> str:
    """sft, pairs, labelled or scored: what `agents.row_encoder` is to read."""
    if isinstance(config, SFTConfig):
        return "sft"
    return "pairs" if is_paired(config) else "labelled" if isinstance(config, DPOConfig) else "scored"
