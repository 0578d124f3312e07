"""Supervised warm-up: before the first step the policy imitates responses, and reinforcement learning begins from there.

The updates are the policy's own, by its optimizer: AdamW's moments and the learning-rate schedule go on where they end. They
leave

    run_dir/warmup/metrics.jsonl    a line for every update: warmup/loss, warmup/grad_norm ...
    run_dir/warmup/nonfinite_batches.jsonl    the rows of updates that were left out: loss or gradient was not finite
    run_dir/warmup/hf/              the warmed-up model, which is the reference of a KL term from then on
    run_dir/checkpoints/step_000000

A run killed before that checkpoint begins its warm-up again, with the same rows in the same order.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from skyrl_mega.agents.demonstrations import DemonstrationEncoder
from skyrl_mega.config.schema import AlgorithmConfig, Config
from skyrl_mega.data.packing import balance_and_pack
from skyrl_mega.data.rows import load_rows
from skyrl_mega.errors import DataError, NonFiniteUpdateError
from skyrl_mega.orchestration.nonfinite import record_batch
from skyrl_mega.telemetry.metrics import MetricsLog
from skyrl_mega.training.schedule import packing_multiples
from skyrl_mega.types import Metrics, TrainBatch, TrainSample

if TYPE_CHECKING:
    from skyrl_mega.orchestration.loop import Parts

#: What of an update's numbers is kept, and under which name.
KEPT = {
    "loss/policy": "warmup/loss",
    "policy/entropy": "warmup/entropy",
    "update/grad_norm": "warmup/grad_norm",
    "update/lr": "warmup/lr",
}


def warm_up(parts: Parts) -> Metrics:
    """Makes the supervised updates that are still to come, and saves what they made; their numbers, {} without any. *All ranks.*

    Afterwards the engines want the weights (`loop.train` pushes them).
    """
    settings, run_dir = parts.config.warmup, Path(parts.config.trainer.run_dir)
    hf_dir = run_dir / "warmup" / "hf"
    metrics: Metrics = {}
    is_open = parts.state.warmup_steps < settings.steps
    if is_open and parts.state.step > 0:
        parts.recorder.note(
            f"step {parts.state.step} is trained: the warm-up of {settings.steps} updates comes too late, and is left out"
        )
    elif is_open:
        if parts.rollout is not None:
            parts.rollout.call("rest", timeout_s=parts.config.parallel.timeout_s)
        with parts.recorder.phase("warmup"):
            metrics = _train(parts, run_dir / "warmup")
            parts.policy.save_hf(str(hf_dir))
        parts.state = replace(
            parts.state,
            warmup_steps=settings.steps,
            num_optimizer_steps=parts.policy.num_updates,
            num_nonfinite_skipped=parts.state.num_nonfinite_skipped + parts.skipped.take_total(),
        )
        if parts.config.checkpoint.interval_steps:
            parts.checkpointer.save(parts.policy, parts.state, metrics)
    if parts.state.warmup_steps > 0 and parts.reference is not None:
        parts.reference.load(str(hf_dir))
    return metrics


def supervised(config: Config) -> Config:
    """The settings of supervised updates: cross-entropy over all response tokens, at temperature 1 and nothing truncated."""
    return replace(
        config,
        algorithm=AlgorithmConfig(policy_loss="cross_entropy", reduction="token_mean"),
        optimizer=replace(config.optimizer, lr=config.warmup.lr or config.optimizer.lr),
        rollout=replace(config.rollout, temperature=1.0, top_p=1.0, top_k=0),
    )


def _train(parts: Parts, directory: Path) -> Metrics:
    """The updates; the numbers of the last that was made, with the first one's loss and the tokens that were trained.

    Those that are not finite are left out, as those of later steps are.
    """
    config, settings = parts.config, parts.config.warmup
    batches = _batches(parts.demonstrations, config, from_step=parts.state.warmup_steps)
    log = MetricsLog(directory) if parts.topology.is_main else None
    first_loss, tokens, metrics = None, 0, Metrics()
    try:
        if log is not None:
            log.rewind(parts.state.warmup_steps)
        with parts.policy.trained_by(supervised(config)):
            for step, samples in zip(range(parts.state.warmup_steps + 1, settings.steps + 1), batches, strict=False):
                update = parts.skipped.attempt("warmup", partial(_update, parts, directory, step, samples))
                row = {name: update[key] for key, name in KEPT.items() if key in update} | parts.skipped.take_metrics()
                if "warmup/loss" in row:
                    metrics, first_loss = row, row["warmup/loss"] if first_loss is None else first_loss
                    tokens += sum(sample.num_loss_tokens for sample in samples)
                if log is not None:
                    log.log(row, step)
    finally:
        if log is not None:
            log.close()
    if first_loss is None:
        parts.recorder.note(f"warm-up: none of its {settings.steps} updates was made")
        return {"warmup/steps": float(settings.steps)}
    parts.recorder.note(f"warm-up: {settings.steps} supervised updates, loss {first_loss:.3f} to {metrics['warmup/loss']:.3f}")
    return metrics | {"warmup/first_loss": first_loss, "warmup/steps": float(settings.steps), "warmup/tokens": float(tokens)}


def _update(parts: Parts, directory: Path, step: int, samples: Sequence[TrainSample]) -> Metrics:
    """One update; where it is not finite, its rows are written down before the error goes on."""
    try:
        return parts.policy.train_step(_pack(parts, samples))
    except NonFiniteUpdateError as error:
        if parts.topology.is_main:
            record_batch(directory, step, str(error), [sample.group_id for sample in samples])
        raise


def read_demonstrations(config: Config) -> list[TrainSample]:
    """The rows of `warmup.path` as samples; [] without a warm-up. Raises DataError for rows that can't be used."""
    from transformers import AutoTokenizer

    if config.warmup.steps == 0:
        return []
    rows, places = load_rows(config.warmup.path, "jsonl")
    encoder = DemonstrationEncoder(
        AutoTokenizer.from_pretrained(config.model.path),
        chat_template=config.env.chat_template,
        stop=config.rollout.stop,
        max_tokens=config.rollout.max_model_len,
    )
    return [encoder.sample(row, where, index) for index, (row, where) in enumerate(zip(rows, places, strict=True))]


def _batches(samples: Sequence[TrainSample], config: Config, *, from_step: int) -> Iterator[list[TrainSample]]:
    """The samples of each update after `from_step`, without end: each once an epoch, in an order that the seed gives."""
    size = config.warmup.batch_size
    order = itertools.islice(row_order(len(samples), seed=config.trainer.seed), from_step * size, None)
    while True:
        chosen = [next(order) for _ in range(size)]
        yield [replace(samples[row], sample_index=index, group_index=index) for index, row in enumerate(chosen)]


def row_order(num_rows: int, *, seed: int) -> Iterator[int]:
    """Rows without end: each epoch holds every row once, in an order of its own."""
    if num_rows < 1:
        raise DataError("a warm-up needs at least one row.")
    epoch = 0
    while True:
        order = list(range(num_rows))
        random.Random(f"warm-up {seed} {epoch}").shuffle(order)
        yield from order
        epoch += 1


def _pack(parts: Parts, samples: Sequence[TrainSample]) -> TrainBatch:
    topology = parts.topology
    return balance_and_pack(
        samples,
        tokens_per_micro_batch=parts.config.trainer.tokens_per_micro_batch,
        dp_rank=topology.dp_rank,
        dp_size=topology.dp_size,
        skip_zero_advantage=False,
        **packing_multiples(parts.config, topology),
    )
