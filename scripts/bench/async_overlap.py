"""How much of the time does asynchronous training hide, and what does a long tail of lengths cost it?

Everything that runs is real: vLLM in a process of its own, the coordinator, the ledger, the Megatron policy, a weight push after
every step. Two things take a time of their own, longer than what this machine needs for a tiny model, so that generation and
training can be made equally long: a model of an engine with SLOTS places, of which each response holds one for RESPONSE_S
seconds (with a long tail: 1% of the responses, drawn by a hash of their names, for ten times as long), and a model of a trainer
that needs TRAIN_S seconds a step. The real work happens inside these times.

    generation of a step = 32 responses x 0.75 s / 8 places = 3 s = training of a step

The limit of a step's time is max(generation, training) in asynchronous modes, and their sum in synchronous training.

    python scripts/bench/async_overlap.py --json docs/benchmarks/async.json       (about 12 minutes)
    python scripts/bench/async_overlap.py --only async --json docs/benchmarks/async.json     (one case again, the others kept)
    python scripts/bench/async_overlap.py --goals docs/benchmarks/async.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from skyrl_mega.envs.base import Reply, TextEnvBase

ROOT = Path(__file__).resolve().parents[2]

SLOTS, RESPONSE_S, TRAIN_S = 8, 0.75, 3.0
PROMPTS, SAMPLES, STEPS, WARM_UP = 8, 4, 24, 5
LONG_SHARE, LONG_FACTOR = 0.01, 10

#: name -> (max_staleness, whether lengths have a long tail)
CASES = {
    "sync": (0, False),
    "one_step_off": (1, False),
    "async": (4, False),
    "sync_long_tail": (0, True),
    "async_long_tail": (4, True),
}


class EvenEnv(TextEnvBase):
    """Reward 1 where the first character of the answer has an even code: a random model learns from it."""

    def pose(self, payload: Any) -> str:
        return payload["text"]

    def respond(self, action: str) -> Reply:
        even = float(bool(action) and ord(action[0]) % 2 == 0)
        return Reply(reward=even, metrics={"accuracy": even})

    @classmethod
    def generate_payload(cls, index: int, seed: int, split: str, **options: Any) -> dict[str, Any]:
        return {"text": f"{split} {seed} number {index}: "}


def is_long(request_id: str) -> bool:
    from skyrl_mega.data.hashing import stable_hash

    return stable_hash("length", request_id) < LONG_SHARE * 2**64


def pace(long_tail: bool) -> None:
    """Puts the two models of time around the real engine and the real policy of this process."""
    from skyrl_mega.orchestration import rollout_assembly
    from skyrl_mega.rollout.local_engines import LocalEngine
    from skyrl_mega.training.policy import Policy

    class PacedEngine(LocalEngine):
        async def generate(self, request: Any) -> Any:
            factor = LONG_FACTOR if long_tail and is_long(request.request_id) else 1
            done, _ = await asyncio.gather(super().generate(request), asyncio.sleep(factor * RESPONSE_S))
            return done

    def paced_factories(plan: Any) -> dict[str, Any]:
        def paced(factory: Any) -> Any:
            async def start(name: str) -> LocalEngine:
                return PacedEngine((await factory(name))._engine, is_inline=False)

            return start

        return {name: paced(factory) for name, factory in factories(plan).items()}

    def paced_train_step(self: Any, batch: Any) -> Any:
        began = time.monotonic()
        metrics = train_step(self, batch)
        time.sleep(max(0.0, began + TRAIN_S - time.monotonic()))
        return metrics

    factories, rollout_assembly.engine_factories = rollout_assembly.engine_factories, paced_factories
    train_step, Policy.train_step = Policy.train_step, paced_train_step


def run_case(name: str, home: Path) -> dict[str, Any]:
    """One training run; the means over its steady steps."""
    from skyrl_mega.config.load import load_config
    from skyrl_mega.orchestration.assemble import run_training
    from skyrl_mega.telemetry.metrics import read_metrics

    staleness, long_tail = CASES[name]
    pace(long_tail)
    config = load_config(
        [
            "recipe=tiny",
            f"model.path={home / 'model'}",
            "env.name=async_overlap:EvenEnv",
            "env.options={}",
            f"trainer.run_dir={home / name}",
            f"trainer.prompts_per_step={PROMPTS}",
            f"trainer.samples_per_prompt={SAMPLES}",
            f"trainer.max_steps={STEPS}",
            f"trainer.max_staleness={staleness}",
            f"rollout.max_num_seqs={SLOTS}",
            "rollout.placement=child_process",
            "algorithm.off_policy.stages=[{name: truncated_is}]",
            "evaluation.num_prompts=0",
            "checkpoint.interval_steps=0",
            "checkpoint.export_hf=false",
        ]
    )
    run_training(config)
    rows = [row for row in read_metrics(config.trainer.run_dir) if row["step"] > WARM_UP]
    columns = {
        "step_s": "time/step_s",
        "wait_s": "flight/wait_s",
        "busy_s": "flight/busy_s",
        "train_s": "time/train_s",
        "sync_s": "time/sync_s",
        "staleness_mean": "staleness/mean",
        "staleness_max": "staleness/max",
        "useful_tokens_per_s": "throughput/rollout_tokens_per_s",
    }
    means = {short: sum(row[column] for row in rows) / len(rows) for short, column in columns.items()}
    means["staleness_max"] = max(row["staleness/max"] for row in rows)
    tokens = sum(row["data/sampled_tokens"] for row in rows)
    means["useful_tokens_per_s"] = tokens / sum(row["time/step_s"] for row in rows)
    response_s = RESPONSE_S * (1 + LONG_SHARE * (LONG_FACTOR - 1) * long_tail)
    generation_s = PROMPTS * SAMPLES * response_s / SLOTS
    limit_s = max(generation_s, TRAIN_S) if staleness else generation_s + TRAIN_S
    return {"steps": len(rows), "generation_s": generation_s, "training_s": TRAIN_S, "limit_s": limit_s, **means}


def goals(cases: dict[str, dict[str, Any]]) -> list[tuple[str, float, float, bool]]:
    """(what, seen, bound, whether it holds) for every goal."""

    def speedup(a: str, b: str) -> float:
        return cases[b]["useful_tokens_per_s"] / cases[a]["useful_tokens_per_s"]

    step = {name: case["step_s"] for name, case in cases.items()}
    limit = {name: case["limit_s"] for name, case in cases.items()}
    rows = [
        ("async: step time / max(generation, training)", step["async"] / limit["async"], 1.10, True),
        (
            "one step off: step time / max(generation, training)",
            step["one_step_off"] / cases["one_step_off"]["limit_s"],
            1.10,
            True,
        ),
        ("async: useful tokens a second / synchronous", speedup("sync", "async"), 1.6, False),
        ("long tail: async step time / without", step["async_long_tail"] / step["async"], 1.10, True),
        ("long tail: synchronous step time / without", step["sync_long_tail"] / step["sync"], float("inf"), True),
        ("long tail: async / synchronous useful tokens", speedup("sync_long_tail", "async_long_tail"), 1.6, False),
    ]
    return [(what, seen, bound, seen <= bound if at_most else seen >= bound) for what, seen, bound, at_most in rows]


def show(cases: dict[str, dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("case", "limit s", "step s", "of limit", "trainer waits", "engines busy", "sync s", "staleness", "tokens/s")
    for name, case in cases.items():
        table.add_row(
            name,
            f"{case['limit_s']:.2f}",
            f"{case['step_s']:.2f}",
            f"{case['step_s'] / case['limit_s']:.2f}",
            f"{case['wait_s']:.2f} s",
            f"{case['busy_s'] / case['step_s']:.0%}",
            f"{case['sync_s']:.2f}",
            f"{case['staleness_mean']:.2f} (max {case['staleness_max']:.0f})",
            f"{case['useful_tokens_per_s']:.0f}",
        )
    console = Console(width=130)
    console.print(table)
    for what, seen, bound, holds in goals(cases):
        console.print(f"{'holds ' if holds else 'MISSED'} {what}: {seen:.2f} ({bound:.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the record there")
    parser.add_argument("--goals", type=Path, metavar="JSON", help="print a record and its verdicts, measure nothing")
    parser.add_argument("--only", nargs="*", choices=CASES, help="measure these cases; --json keeps its others")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--home", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.goals:
        show(json.loads(arguments.goals.read_text())["cases"])
        return
    if arguments.case:
        result = run_case(arguments.case, arguments.home)
        (arguments.home / f"{arguments.case}.json").write_text(json.dumps(result))
        return
    from skyrl_mega.telemetry.resources import load_average
    from skyrl_mega.telemetry.versions import collect_versions, git_commit, hardware

    sys.path.insert(0, str(ROOT / "tests"))
    from helpers.tiny import write_tiny_model

    kept = json.loads(arguments.json.read_text())["cases"] if arguments.json and arguments.json.is_file() else {}
    cases: dict[str, Any] = {name: kept[name] for name in CASES if name in kept and arguments.only and name not in arguments.only}
    with tempfile.TemporaryDirectory(prefix="async-bench-") as directory:
        home = Path(directory)
        write_tiny_model(home / "model", "llama", tied=True)
        paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        for name in arguments.only or CASES:
            command = [sys.executable, __file__, "--case", name, "--home", str(home)]
            subprocess.run(command, check=True, env=environment, timeout=900)
            about = {"load_average": load_average(), "commit": git_commit()}
            cases[name] = json.loads((home / f"{name}.json").read_text()) | about
            record = {
                "bench": "async_overlap",
                "settings": {
                    **{"slots": SLOTS, "response_s": RESPONSE_S, "train_s": TRAIN_S, "prompts": PROMPTS, "samples": SAMPLES},
                    **{"steps": STEPS, "warm_up": WARM_UP, "long_share": LONG_SHARE, "long_factor": LONG_FACTOR},
                },
                "cases": {case: cases[case] for case in CASES if case in cases},
                "hardware": hardware(),
                "versions": collect_versions(),
            }
            if arguments.json:
                arguments.json.write_text(json.dumps(record, indent=2) + "\n")
    if set(cases) == set(CASES):
        show(record["cases"])
    else:
        print(json.dumps(cases, indent=2))


if __name__ == "__main__":
    main()
