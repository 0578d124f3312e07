"""Training on fixed data on a tiny model: configurations, examples of every kind, and what updates make of them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from skyrl_mega.config.load import load_config
from skyrl_mega.config.offline import kind_of_rows, training_config
from skyrl_mega.config.offline_schema import ROOTS, OfflineConfig, RMConfig
from skyrl_mega.data.examples import Example, TokenSequence
from skyrl_mega.orchestration.layout_check import COMPARED_EPS
from skyrl_mega.orchestration.offline_tasks import make_task
from skyrl_mega.parallel.topology import init_topology
from skyrl_mega.telemetry.metrics import read_metrics

#: So that the first updates of AdamW don't take the sign of gradients that are nothing but noise.
LR = 1e-3
SETTINGS = (
    *("model.dtype=float32", "data.max_length=60", "trainer.tokens_per_micro_batch=128", "trainer.batch_size=6"),
    *(f"optimizer.lr={LR}", f"optimizer.eps={COMPARED_EPS}", "telemetry.trackers=[]", "data.chat_template=false"),
)


def offline_config(command: str, model: Path, *overrides: str) -> OfflineConfig:
    """A configuration of `command` on `model`, in float32."""
    return load_config([f"model.path={model}", *SETTINGS, *overrides], config_name=command, root=ROOTS[command])


def random_examples(config: OfflineConfig, count: int, *, seed: int) -> list[Example]:
    """Rows as the command reads them: random tokens, pairs that share a prompt and some of their answers' tokens."""
    rng = random.Random(seed)
    kind, scored = kind_of_rows(config), isinstance(config, RMConfig)

    def tokens(least: int, most: int) -> list[int]:
        return [rng.randrange(5, 261) for _ in range(rng.randint(least, most))]

    def sequence(prompt: list[int], answer: list[int]) -> TokenSequence:
        ids = prompt + answer
        if scored:
            return TokenSequence.of([*ids, ids[-1]], [0] * len(ids) + [1])
        return TokenSequence.of(ids, [0] * len(prompt) + [1] * len(answer))

    examples = []
    for number in range(count):
        prompt, shared = tokens(2, 12), tokens(0, 3)
        answers = [[*shared, *tokens(1, 9)] for _ in range(2 if kind == "pairs" else 1)]
        target = {"labelled": float(rng.random() < 0.5), "scored": rng.gauss(0, 1)}.get(kind, 0.0)
        examples.append(Example(f"rows:{seed}:{number}", tuple(sequence(prompt, answer) for answer in answers), target))
    return examples


def updates(config: OfflineConfig, batches: Sequence[list[Example]], held_out: list[Example]) -> dict[str, Any]:
    """Each update's metrics, the evaluation before and after them, and the weights that they leave (float32, by name)."""
    derived = training_config(config)
    topology = init_topology(derived.parallel, torch.device("cpu"), seed=0)
    try:
        task = make_task(config, derived, topology)
        task.prepare([*(example for batch in batches for example in batch), *held_out])
        before = task.evaluate(held_out)
        metrics = [task.update(batch) for batch in batches]
        after = task.evaluate(held_out)
        weights = {name: value.clone() for name, value in task.trained.iter_weights(torch.float32)}
        return {"before": before, "metrics": metrics, "after": after, "weights": weights}
    finally:
        topology.destroy()


def write_rows(path: Path, kind: str, count: int = 30) -> Path:
    """A file of sums for `sft`, or of pairs for the others."""

    def row(n):
        prompt = f"{n}+1="
        if kind == "sft":
            return {"prompt": prompt, "response": str(n + 1)}
        return {"prompt": prompt, "chosen": str(n + 1), "rejected": str(n + 3)}

    path.write_text("".join(json.dumps(row(n)) + "\n" for n in range(count)))
    return path


def run_config(tmp_path: Path, model: Path, command: str, name: str, *overrides: str) -> OfflineConfig:
    """Six updates on 24 of 30 rows, a checkpoint after every second one, in the run directory `name`."""
    rows = write_rows(tmp_path / f"{command}.jsonl", command)
    more = ("trainer.max_steps=6", "checkpoint.interval_steps=2", "evaluation.interval_steps=3", "data.eval_share=0.2")
    return offline_config(command, model, f"data.path={rows}", f"trainer.run_dir={tmp_path / name}", *more, *overrides)


def lines(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what no two runs have in common."""
    timed = ("time", "throughput/", "memory/", "cpu_time", "checkpoint/")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in read_metrics(run_dir)]
