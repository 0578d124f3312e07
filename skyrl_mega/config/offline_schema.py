"""Every setting of training on fixed data (`skyrl-mega sft`, `dpo` and `rm`), as `schema.py` has those of `skyrl-mega train`.

Each command has a root of its own, so that `--print-config` shows what matters to it. The sections that say the same as in
reinforcement learning are the same classes.

The batch words:

- row: one line of a file: a conversation, a pair of answers, a scored answer.
- `batch_size`: rows of one optimizer update.
- `tokens_per_micro_batch`: packed tokens in one forward/backward on one data-parallel rank. Changes memory and speed, never
  the result.
- epoch: as many rows drawn as there are training rows. With the datasets' own sizes as weights, each of them once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from skyrl_mega.config.schema import (
    REQUIRED,
    AdapterConfig,
    CheckpointConfig,
    Config,
    Device,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TelemetryConfig,
    opt,
)


@dataclass(frozen=True)
class DatasetConfig:
    """One file or directory of rows."""

    path: str = opt(REQUIRED, "File (jsonl, parquet) or directory (datasets.save_to_disk).")
    name: str = opt("", "What metrics call it; empty: the file's name without its ending.")
    weight: float = opt(0.0, "Its share of the rows drawn, relative to the other datasets; 0: as many as it has training rows.")
    format: Literal["auto", "jsonl", "parquet", "hf_dataset"] = opt("auto", "auto: by the ending; a directory: hf_dataset.")
    limit: int = opt(0, "Use only the first rows; 0: all.")


@dataclass(frozen=True)
class OfflineDataConfig:
    """What is learned from; docs/training_modes.md has the kinds of rows."""

    path: str = opt("", "One file or directory of rows; short for one dataset.")
    datasets: tuple[DatasetConfig, ...] = opt(
        None, "Several, mixed by weight, each a mapping {path, name, weight, format, limit}.", factory=tuple
    )
    eval_path: str = opt("", "Held-out rows; empty: eval_share of the rows of each dataset.")
    eval_share: float = opt(0.05, "Share of the rows held out, chosen by a hash of the row, where eval_path is empty.")
    max_length: int = opt(1024, "Most tokens of one sequence, prompt included.")
    too_long: Literal["error", "drop", "truncate"] = opt(
        "error", "What becomes of a longer one: end the run, leave its row out, or cut off its end. Both are counted."
    )
    chat_template: bool = opt(True, "Render prompts and messages through the tokenizer's chat template; False: raw text.")


@dataclass(frozen=True)
class SFTObjectiveConfig:
    """Supervised fine-tuning: mean cross-entropy over the trained tokens of the whole batch."""

    train_on: Literal["assistant", "last", "all"] = opt(
        "assistant", "Trained tokens of a row: every assistant's turn (a response), the last one only, or prompts too."
    )


@dataclass(frozen=True)
class PreferenceConfig:
    """Which of two answers is better, or whether one is good; docs/training_modes.md has the formulas."""

    loss: Literal["sigmoid", "robust", "ipo", "hinge", "simpo", "orpo", "kto"] = opt(
        "sigmoid", "sigmoid is DPO; kto takes single answers with a label instead of pairs; simpo and orpo need no reference."
    )
    beta: float = opt(0.1, "How much a log-ratio weighs: small values let the policy go far from the reference (ipo: tau).")
    label_smoothing: float = opt(0.0, "Probability that a label is wrong, for sigmoid (conservative DPO) and robust.")
    margin: float = opt(0.0, "By how much simpo wants the better answer's reward above the other's (its gamma).")
    length_normalised: Literal["auto", "on", "off"] = opt(
        "auto", "Log-probabilities of an answer as the mean over its tokens instead of the sum; auto: for ipo, simpo and orpo."
    )
    sft_coef: float = opt(0.0, "Weight of the better answers' cross-entropy beside the loss (RPO, arXiv:2404.19733).")
    desirable_weight: float = opt(1.0, "Weight of good answers in kto.")
    undesirable_weight: float = opt(1.0, "Weight of bad answers in kto.")
    reference: Literal["model", "precomputed"] = opt(
        "model", "Keep the reference model in memory, or compute its log-probabilities of all rows once and drop it."
    )
    reference_path: str = opt(
        "", "Directory of the reference model; empty: model.path (of an adapter its base, without a second copy)."
    )


@dataclass(frozen=True)
class RewardModelConfig:
    """A number for every answer, from pairs of which one is better or from scores."""

    loss: Literal["bradley_terry", "regression"] = opt(
        "bradley_terry", "Pairs of answers (log-sigmoid of the difference), or answers with a score (squared error)."
    )
    centering_coef: float = opt(0.0, "Weight of (r_chosen + r_rejected)^2, which keeps rewards around 0 (arXiv:2312.09244).")


@dataclass(frozen=True)
class OfflineTrainerConfig:
    """The loop."""

    batch_size: int = opt(32, "Rows of one optimizer update; a pair is one row.")
    epochs: float = opt(1.0, "How often the rows are gone through, where max_steps is 0.")
    max_steps: int = opt(0, "Optimizer updates; 0: as many as epochs say.")
    max_nonfinite_updates: int = opt(
        3,
        "Updates in a row that are left out because loss or gradient is not finite; one more ends the run. 0: the first does.",
    )
    tokens_per_micro_batch: int = opt(4096, "Packed tokens in one forward/backward on one data-parallel rank.")
    share_prompts: Literal["auto", "on", "off"] = opt(
        "auto", "Compute what the answers of a pair have in common once (exact); auto: unless attention is TransformerEngine's."
    )
    seed: int = opt(0, "Seed of the rows' order.")
    device: Device = opt("auto", "auto: cuda where it exists, else cpu.")
    threads: int = opt(1, "torch threads of each process on CPU; more help only on idle cores.")
    run_dir: str = opt("runs/default", "Everything the run writes goes here.")


@dataclass(frozen=True)
class OfflineEvalConfig:
    """The loss on held-out rows."""

    interval_steps: int = opt(0, "Evaluate every so many steps; 0: only before the first and after the last.")
    num_rows: int = opt(256, "Most held-out rows looked at; 0 turns evaluation off.")


@dataclass(frozen=True)
class OfflineConfig:
    """What the three commands have in common."""

    command: ClassVar[str] = ""

    model: ModelConfig = opt(None, "What is trained.", factory=ModelConfig)
    parallel: ParallelConfig = opt(None, "Sharding.", factory=ParallelConfig)
    data: OfflineDataConfig = opt(None, "What is learned from.", factory=OfflineDataConfig)
    optimizer: OptimizerConfig = opt(None, "How it is optimised.", factory=OptimizerConfig)
    evaluation: OfflineEvalConfig = opt(None, "Held-out rows.", factory=OfflineEvalConfig)
    checkpoint: CheckpointConfig = opt(None, "Saving and resuming.", factory=CheckpointConfig)
    telemetry: TelemetryConfig = opt(None, "Metrics.", factory=TelemetryConfig)
    trainer: OfflineTrainerConfig = opt(None, "The loop.", factory=OfflineTrainerConfig)
    lora: AdapterConfig = opt(None, "An adapter instead of the whole model.", factory=AdapterConfig)


@dataclass(frozen=True)
class SFTConfig(OfflineConfig):
    """The whole configuration of `skyrl-mega sft`."""

    command: ClassVar[str] = "sft"

    sft: SFTObjectiveConfig = opt(None, "Supervised fine-tuning.", factory=SFTObjectiveConfig)


@dataclass(frozen=True)
class DPOConfig(OfflineConfig):
    """The whole configuration of `skyrl-mega dpo`."""

    command: ClassVar[str] = "dpo"

    preference: PreferenceConfig = opt(None, "Learning from preferences.", factory=PreferenceConfig)


@dataclass(frozen=True)
class RMConfig(OfflineConfig):
    """The whole configuration of `skyrl-mega rm`."""

    command: ClassVar[str] = "rm"

    reward_model: RewardModelConfig = opt(None, "Reward models.", factory=RewardModelConfig)


#: The root of each command's configuration.
ROOTS: dict[str, type] = {"train": Config, **{root.command: root for root in (SFTConfig, DPOConfig, RMConfig)}}
#: The section that no other root has.
OWN_SECTION = {"sft": SFTConfig, "preference": DPOConfig, "reward_model": RMConfig}


def command_of(root: type) -> str:
    """The command whose configuration `root` is."""
    return next(command for command, known in ROOTS.items() if known is root)
