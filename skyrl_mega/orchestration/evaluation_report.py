"""What `skyrl-mega eval` leaves: a table in the terminal, and in a directory

result.json      every statistic with its interval, and what was evaluated how
samples.jsonl    a line per sample: prompt, response, score, reward, answer, how it ended
pass_at_k.png    pass@k over k, where there are several samples of a prompt
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from skyrl_mega.config.schema import Config, as_dict
from skyrl_mega.orchestration.coordinator import EvaluationState
from skyrl_mega.orchestration.evaluation import SuiteResult, score_of
from skyrl_mega.telemetry.eval_plots import plot_pass_at_k
from skyrl_mega.telemetry.versions import collect_versions, git_commit
from skyrl_mega.types import Metrics

RESULT_FILE, SAMPLES_FILE, PLOT_FILE = "result.json", "samples.jsonl", "pass_at_k.png"
#: Where nothing is drawn, a line is printed after each such share of the samples.
LINE_EVERY = 0.25


def show_progress(wait: Callable[[], EvaluationState]) -> list[SuiteResult]:
    """Calls `wait` until it has the results, and shows how many samples are there: a bar on a terminal, lines elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(highlight=False)
    columns = (TextColumn("samples"), MofNCompleteColumn(), BarColumn(bar_width=None), TimeElapsedColumn(), TimeRemainingColumn())
    began, next_line = time.monotonic(), LINE_EVERY
    with Progress(*columns, console=console, disable=not sys.stdout.isatty(), transient=True) as progress:
        bar = progress.add_task("", total=None)
        while True:
            state = wait()
            progress.update(bar, completed=state.num_finished, total=state.num_total)
            share = state.num_finished / state.num_total
            if state.results is not None:
                break
            if progress.disable and share >= next_line:
                console.print(f"{state.num_finished} of {state.num_total} samples, {time.monotonic() - began:.0f} s")
                next_line = (share // LINE_EVERY + 1) * LINE_EVERY
    console.print(f"{state.num_total} samples in {time.monotonic() - began:.1f} s")
    return state.results


def show_results(config: Config, results: Sequence[SuiteResult]) -> None:
    """The table: a row per statistic and task, with its 95% interval."""
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "prompts", "samples", "statistic", "value", "95% interval", box=None, pad_edge=False)
    for result in results:
        head = (_title(config, result), str(len(result.groups)), str(result.samples_per_prompt))
        for name, number in result.estimates.items():
            table.add_row(*head, name, f"{number.value:.4f}", f"{number.low:.4f} to {number.high:.4f} ({number.method})")
            head = ("", "", "")
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    console.print(table)
    for result in results:
        for reason in result.omitted:
            console.print(f"{_title(config, result)}: no {reason}", soft_wrap=True)


def write_results(config: Config, results: Sequence[SuiteResult], directory: Path, *, model: str, tokenizer: Any) -> Metrics:
    """Writes the files of the module's text into `directory` (earlier ones of an evaluation are replaced); all metrics by name.

    `model`: which weights were evaluated, in words.
    """
    directory.mkdir(parents=True, exist_ok=True)
    metrics = {name: value for result in results for name, value in result.metrics.items()}
    with (directory / SAMPLES_FILE).open("w", encoding="utf-8", errors="backslashreplace") as file:
        for result in results:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in sample_rows(config, result, tokenizer))
    content = {
        "model": model,
        "tasks": [
            {
                "task": _title(config, result),
                "prompts": len(result.groups),
                "samples_per_prompt": result.samples_per_prompt,
                "masked_samples": sum(group.num_masked for group in result.groups),
                "statistics": {name: vars(number) for name, number in result.estimates.items()},
                "omitted": result.omitted,
            }
            for result in results
        ],
        "metrics": metrics,
        "evaluation": as_dict(config.evaluation),
        "seed": config.trainer.seed,
        "versions": collect_versions(),
        "commit": git_commit(),
    }
    (directory / RESULT_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    curves = {_title(config, result): result.estimates for result in results if result.samples_per_prompt > 1}
    (directory / PLOT_FILE).unlink(missing_ok=True)
    if curves:
        plot_pass_at_k(curves, directory / PLOT_FILE, title=Path(model).name)
    return metrics


def sample_rows(config: Config, result: SuiteResult, tokenizer: Any) -> Iterator[dict[str, Any]]:
    """A plain mapping for each sample. `prompt` is decoded from the tokens that the model read, special ones included."""
    for group in result.groups:
        for number, trajectory in enumerate(group.trajectories):
            prompt = list(trajectory.token_ids[: trajectory.turns[0].start])
            yield {
                "task": _title(config, result),
                "prompt_id": group.prompt_id,
                "sample": number,
                "prompt": tokenizer.decode(prompt, skip_special_tokens=False),
                "response": trajectory.text,
                "score": score_of(trajectory),
                "reward": trajectory.reward,
                "answer": trajectory.answer,
                "metrics": dict(trajectory.metrics),
                "response_tokens": sum(trajectory.loss_mask),
                "turns": len(trajectory.turns),
                "stop_reason": trajectory.turns[-1].stop_reason.value,
                "truncated": trajectory.truncated,
            }


def _title(config: Config, result: SuiteResult) -> str:
    return result.name or config.env.name
