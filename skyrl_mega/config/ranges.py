"""Which values a single number may take. Combinations are in `combinations.py`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from skyrl_mega.config.critic import SIZES
from skyrl_mega.config.schema import Config
from skyrl_mega.config.settings import all_settings


@dataclass(frozen=True)
class Range:
    """An interval; an open end excludes its bound."""

    low: float
    high: float | None = None
    is_low_open: bool = False
    is_high_open: bool = False

    def __contains__(self, value: float) -> bool:
        is_above = value > self.low if self.is_low_open else value >= self.low
        is_below = self.high is None or (value < self.high if self.is_high_open else value <= self.high)
        return is_above and is_below

    def __str__(self) -> str:
        if self.high is None:
            return f"{'>' if self.is_low_open else '>='} {self.low}"
        return f"in {'(' if self.is_low_open else '['}{self.low}, {self.high}{')' if self.is_high_open else ']'}"


_AT_LEAST_0, _AT_LEAST_1, _ABOVE_0 = Range(0), Range(1), Range(0, is_low_open=True)
_OPEN_UNIT = Range(0, 1, is_low_open=True, is_high_open=True)

RANGES: dict[str, Range] = {
    "model.logprob_chunk_tokens": _AT_LEAST_1,
    "model.recompute_layers": _AT_LEAST_0,
    "model.offload_layers": _AT_LEAST_0,
    "model.moe_aux_loss_coef": _AT_LEAST_0,
    "model.moe_z_loss_coef": _AT_LEAST_0,
    "lora.rank": _AT_LEAST_0,
    "lora.alpha": _ABOVE_0,
    "model.moe_bias_update_rate": _AT_LEAST_0,
    "parallel.tensor": _AT_LEAST_1,
    "parallel.pipeline": _AT_LEAST_1,
    "parallel.virtual_pipeline": _AT_LEAST_1,
    "parallel.context": _AT_LEAST_1,
    "parallel.expert": _AT_LEAST_1,
    "parallel.expert_tensor": _AT_LEAST_1,
    "parallel.timeout_s": _ABOVE_0,
    "algorithm.reduction_length": _AT_LEAST_0,
    "algorithm.entropy_coef": _AT_LEAST_0,
    "algorithm.kl.coef": _AT_LEAST_0,
    "algorithm.kl.target": _AT_LEAST_0,
    "algorithm.kl.horizon": _AT_LEAST_1,
    "sampling.max_resampled": _ABOVE_0,
    "sampling.reward.scale": _ABOVE_0,
    "sampling.reward.shift": Range(-1e6, 1e6),
    "sampling.overlong.penalty_tokens": _AT_LEAST_0,
    "sampling.overlong.penalty": _ABOVE_0,
    "sampling.replay.share": _AT_LEAST_0,
    "sampling.replay.max_age": _AT_LEAST_1,
    "teacher.topk": _AT_LEAST_0,
    "teacher.timeout_s": _ABOVE_0,
    "teacher.retries": _AT_LEAST_0,
    "warmup.steps": _AT_LEAST_0,
    "warmup.batch_size": _AT_LEAST_1,
    "warmup.lr": _AT_LEAST_0,
    "optimizer.lr": _ABOVE_0,
    "optimizer.warmup_updates": _AT_LEAST_0,
    "optimizer.decay_updates": _AT_LEAST_0,
    "optimizer.total_updates": _AT_LEAST_0,
    "optimizer.min_lr_ratio": Range(0, 1),
    "optimizer.beta1": Range(0, 1, is_high_open=True),
    "optimizer.beta2": Range(0, 1, is_high_open=True),
    "optimizer.eps": _ABOVE_0,
    "optimizer.weight_decay": _AT_LEAST_0,
    "optimizer.clip_grad_norm": _AT_LEAST_0,
    "optimizer.muon.momentum": Range(0, 1, is_high_open=True),
    "optimizer.muon.steps": _AT_LEAST_1,
    "critic.value_clip": _ABOVE_0,
    "critic.huber_delta": _ABOVE_0,
    "critic.warmup_steps": _AT_LEAST_0,
    **dict.fromkeys((f"critic.parallel.{name}" for name in SIZES), _AT_LEAST_0),
    "rollout.num_engines": _AT_LEAST_0,
    "rollout.engine_tensor": _AT_LEAST_1,
    "rollout.engine_pipeline": _AT_LEAST_1,
    "rollout.engine_data": _AT_LEAST_1,
    "rollout.max_concurrent_requests": _AT_LEAST_0,
    "rollout.request_timeout_s": _ABOVE_0,
    "rollout.request_attempts": _AT_LEAST_1,
    "rollout.health_interval_s": _ABOVE_0,
    "rollout.max_engine_restarts": _AT_LEAST_0,
    "rollout.oversampling": _AT_LEAST_0,
    "rollout.temperature": _ABOVE_0,
    "rollout.top_p": Range(0, 1, is_low_open=True),
    "rollout.top_k": _AT_LEAST_0,
    "rollout.max_new_tokens": _AT_LEAST_1,
    "rollout.max_model_len": Range(2),
    "rollout.max_num_seqs": _AT_LEAST_1,
    "rollout.kv_cache_gib": _AT_LEAST_1,
    "rollout.gpu_memory_utilization": _OPEN_UNIT,
    "rollout.weight_bucket_mib": _AT_LEAST_1,
    "rollout.probe_tolerance": _AT_LEAST_0,
    "rollout.start_timeout_s": _ABOVE_0,
    "env.max_turns": _AT_LEAST_1,
    "env.timeout_s": _ABOVE_0,
    "env.retries": _AT_LEAST_0,
    "reward.env_weight": _AT_LEAST_0,
    "data.limit": _AT_LEAST_0,
    "evaluation.interval_steps": _AT_LEAST_0,
    "evaluation.num_prompts": _AT_LEAST_0,
    "evaluation.samples_per_prompt": _AT_LEAST_1,
    "evaluation.temperature": _AT_LEAST_0,
    "evaluation.top_p": Range(0, 1, is_low_open=True),
    "evaluation.top_k": _AT_LEAST_0,
    "evaluation.pass_score": Range(-1e6, 1e6),
    "checkpoint.interval_steps": _AT_LEAST_0,
    "checkpoint.keep_last": _AT_LEAST_1,
    "checkpoint.keep_best": _AT_LEAST_0,
    "checkpoint.timeout_s": _ABOVE_0,
    "trainer.prompts_per_step": _AT_LEAST_1,
    "trainer.samples_per_prompt": _AT_LEAST_1,
    "trainer.updates_per_step": _AT_LEAST_1,
    "trainer.tokens_per_micro_batch": _AT_LEAST_1,
    "trainer.max_steps": _AT_LEAST_1,
    "trainer.max_nonfinite_updates": _AT_LEAST_0,
    "trainer.max_staleness": _AT_LEAST_0,
    "trainer.seed": Range(0, 2**32, is_high_open=True),
    "trainer.threads": _AT_LEAST_1,
}
RANGES |= {f"critic.{key}": allowed for key, allowed in RANGES.items() if key.startswith("optimizer.")}


def value_at(config: Any, key: str) -> Any:
    """The value of the dotted `key`."""
    value: Any = config
    for name in key.split("."):
        value = value.__dict__[name]
    return value


def range_problems(config: Config) -> Iterator[str]:
    """One message per number outside its range."""
    defaults = {setting.key: setting.default for setting in all_settings()}
    for key, allowed in RANGES.items():
        value = value_at(config, key)
        if value not in allowed:
            note = " Greedy decoding is for evaluation, which uses it by itself." if key == "rollout.temperature" else ""
            yield f"`{key}` must be {allowed}; got {value}. The default is {defaults[key]}.{note}"


def section_problems(section: str, values: Any) -> Iterator[str]:
    """What is outside its range in `values`, which are set as those of the section `section` are."""
    for key, allowed in RANGES.items():
        prefix, _, name = key.rpartition(".")
        if prefix == section and getattr(values, name) not in allowed:
            yield f"{name} must be {allowed}; got {getattr(values, name)}"
