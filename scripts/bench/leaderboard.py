"""How far does each algorithm get on the quickstart's task, in the same number of steps, from the same model and seed?

    python scripts/bench/leaderboard.py                    # every family that the record lacks, one after the other
    python scripts/bench/leaderboard.py --families grpo rloo --steps 13

Each family is a run of the training command in RUNS/FAMILY, which goes on where it was if it is started again; a finished one is
added to the record at once, so that the script may be stopped at any time. The yardstick is held-out accuracy, greedy, over 128
problems: one run of one seed, whose standard error is about 0.04. It shows what learns and what does not, not which is best.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from skyrl_mega.telemetry.metrics import read_metrics
from skyrl_mega.telemetry.versions import collect_versions, git_commit, hardware

OUTPUT = Path("docs/benchmarks/leaderboard.json")
STEPS = 26

#: What differs from recipe=quickstart; `recipe=` replaces it.
FAMILIES: dict[str, list[str]] = {
    "grpo": ["recipe=quickstart"],
    "dr_grpo": ["recipe=quickstart", "algorithm=dr_grpo"],
    "dapo": ["recipe=dapo"],
    "rloo": ["recipe=rloo"],
    "ppo": ["recipe=ppo"],
    "gspo": ["recipe=gspo"],
    "cispo": ["recipe=cispo"],
    "reinforce_plus_plus": ["recipe=quickstart", "algorithm.advantage=reinforce_plus_plus"],
    # Their teacher is what grpo made.
    "distill": ["recipe=distill", "teacher.path={runs}/grpo/hf"],
    "distill_topk": [
        *("recipe=distill", "teacher.path={runs}/grpo/hf", "algorithm.advantage=grpo", "algorithm.policy_loss=distill_topk"),
        "teacher.topk=32",
    ],
}


def run_family(name: str, runs: Path, *, steps: int, overrides: list[str], timeout_s: float | None = None) -> dict:
    """The record of a finished run of the family. Raises CalledProcessError or TimeoutExpired; the run then goes on when called
    again.
    """
    run_dir = runs / name
    command = [
        *(sys.executable, "-m", "skyrl_mega.train", *(text.format(runs=runs) for text in FAMILIES[name])),
        *(f"trainer.run_dir={run_dir}", f"trainer.max_steps={steps}", "checkpoint.interval_steps=4", "telemetry.trackers=[]"),
        *(f"evaluation.interval_steps={max(1, steps // 2)}", "checkpoint.keep_last=1", *overrides),
    ]
    runs.mkdir(parents=True, exist_ok=True)
    if not (run_dir / "summary.json").is_file():
        with (runs / f"{name}.log").open("a") as log:
            subprocess.run(command, check=True, timeout=timeout_s, stdout=log, stderr=subprocess.STDOUT)
    return record(name, run_dir, steps)


def record(name: str, run_dir: Path, steps: int) -> dict:
    rows = read_metrics(run_dir)
    evaluations = {row["step"]: row["eval/accuracy"] for row in rows if "eval/accuracy" in row}
    trained = [row for row in rows if row["step"] > 0]
    return {
        "settings": FAMILIES[name],
        "steps": steps,
        "accuracy_before": evaluations[0],
        "accuracy_after": evaluations[steps],
        "accuracy_by_step": evaluations,
        "train_reward_last": trained[-1]["reward/mean"],
        "wall_s": sum(row["time/step_s"] for row in trained),
        "train_s": sum(row["time/train_s"] for row in trained),
        "git_commit": git_commit(),
    }


def add(output: Path, name: str, result: dict) -> None:
    """Adds the family to the record, which appears whole."""
    content = json.loads(output.read_text()) if output.is_file() else {"families": {}}
    content |= {"task": "two-digit addition, SmolLM2-135M-Instruct", "hardware": hardware(), "versions": collect_versions()}
    content["families"][name] = result
    temporary = output.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--runs", type=Path, default=Path("runs/leaderboard"))
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--again", action="store_true", help="also what the record has already")
    parser.add_argument("overrides", nargs="*", default=[], metavar="SETTING", help="further settings of every run, after --")
    args = parser.parse_args()
    known = json.loads(args.output.read_text())["families"] if args.output.is_file() else {}
    for name in args.families:
        if name in known and not args.again:
            continue
        result = run_family(name, args.runs, steps=args.steps, overrides=args.overrides)
        add(args.output, name, result)
        print(
            f"{name:<20} {result['accuracy_before']:.3f} -> {result['accuracy_after']:.3f}  {result['wall_s']:.0f} s", flush=True
        )


if __name__ == "__main__":
    main()
