"""`skyrl-mega verify-layout`: does a cluster's layout compute what one process computes? Asked on CPU, with a small model.

The layout's split axes are cut to two (`layout_plan`), the model to a small random one of the same architecture
(`models.scaled_down`). Both then make the same updates, once in one process and once in the ranks of each small layout, started
by torchrun as a training run is; losses, logprobs of every token, gradient norms and updated weights are compared.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from skyrl_mega.config.layout_rules import data_parallel_size
from skyrl_mega.config.load import load_saved, save_resolved
from skyrl_mega.config.schema import Config, ParallelConfig
from skyrl_mega.config.validate import validate
from skyrl_mega.errors import SkyRLMegaError
from skyrl_mega.launch.layout_plan import SmallLayout, small_layouts

if TYPE_CHECKING:
    from rich.console import Console

    from skyrl_mega.orchestration.comparison import Comparison
    from skyrl_mega.orchestration.layout_check import LayoutResult

LR = 1e-3
#: Prompt and response of a sample together; several samples make a micro-batch, several micro-batches an update.
MAX_TOKENS, MICRO_BATCH_TOKENS = 32, 96
CONFIG_FILE, RESULT_FILE, LOG_FILE = "config.yaml", "result.pt", "log.txt"


@dataclass(frozen=True)
class LayoutReport:
    """What a small layout computed, against one process; `error` instead where it ended without a result."""

    layout: SmallLayout
    comparisons: list[Comparison]
    seconds: float
    error: str = ""

    @property
    def agrees(self) -> bool:
        return not self.error and all(line.agrees for line in self.comparisons)


def run_verify_layout(config: Config, *, world_size: int, max_ranks: int, timeout_s: float, details: bool) -> int:
    """Prints a table and returns the exit code: 0 where every layout agrees. One process calls; it starts the ranks."""
    from rich.console import Console

    validate(config, world_size=world_size, check_surroundings=False)
    data = data_parallel_size(config, world_size)
    layouts = small_layouts(config.parallel, data, max_ranks)
    console = Console()
    whole = SmallLayout(config.parallel, data)
    console.print(f"{whole} on {world_size} processes, checked on CPU as: {'; '.join(map(str, layouts)) or 'nothing is split'}")
    if not layouts:
        return 0
    reports = []
    with tempfile.TemporaryDirectory(prefix="skyrl-mega-layout-") as folder, console.status("") as status:
        for number, layout in enumerate(layouts):
            status.update(f"{layout}: {layout.ranks} ranks ({number + 1} of {len(layouts)})")
            reports.append(_check(config, layout, Path(folder) / str(number), timeout_s))
    _print(reports, console, details=details)
    return 0 if all(report.agrees for report in reports) else 1


def _check(config: Config, layout: SmallLayout, folder: Path, timeout_s: float) -> LayoutReport:
    from skyrl_mega.models.scaled_down import write_scaled_down
    from skyrl_mega.orchestration.layout_check import compare_results

    began = time.monotonic()
    small = layout.parallel
    num_layers = max(2, layout.num_chunks)
    write_scaled_down(config.model.path, folder / "model", num_layers=num_layers, tensor=small.tensor, expert=small.expert)
    one = _run(config, SmallLayout(ParallelConfig(), 1), folder / "one", timeout_s)
    if isinstance(one, str):
        raise SkyRLMegaError(f"The small model does not train in one process, so there is nothing to compare with:\n{one}")
    several = _run(config, layout, folder / "several", timeout_s)
    seconds = time.monotonic() - began
    if isinstance(several, str):
        return LayoutReport(layout, [], seconds, several)
    return LayoutReport(layout, list(compare_results(one, several, LR)), seconds)


def _run(config: Config, layout: SmallLayout, folder: Path, timeout_s: float) -> LayoutResult | str:
    """What the ranks of `layout` computed, or the end of their log."""
    import torch

    folder.mkdir(parents=True)
    save_resolved(small_config(config, layout.parallel, folder.parent / "model", folder), folder / CONFIG_FILE)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(layout.ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (folder / LOG_FILE).open("w") as log:
        try:
            ended = subprocess.run(
                [sys.executable, *launcher, "-m", "skyrl_mega.launch.verify_layout", str(folder)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                timeout=timeout_s,
            ).returncode
        except subprocess.TimeoutExpired:
            ended = -1
    if ended == 0:
        return torch.load(folder / RESULT_FILE, weights_only=False)
    why = f"no result after {timeout_s:g} s" if ended == -1 else f"torchrun ended with {ended}"
    return f"{why}; the end of its log:\n" + "\n".join((folder / LOG_FILE).read_text().splitlines()[-30:])


def small_config(config: Config, parallel: ParallelConfig, model: Path, folder: Path) -> Config:
    """The user's settings, in float32 on CPU on the small model: what could change a layout's result stays as it is."""
    from skyrl_mega.orchestration.layout_check import COMPARED_EPS

    return replace(
        config,
        model=replace(config.model, path=str(model), dtype="float32", attention="auto", kernels="auto"),
        parallel=parallel,
        optimizer=replace(config.optimizer, lr=LR, warmup_updates=0, eps=COMPARED_EPS),
        rollout=replace(config.rollout, dtype="float32", max_model_len=MAX_TOKENS, max_new_tokens=MAX_TOKENS // 2),
        trainer=replace(
            config.trainer, device="cpu", threads=1, tokens_per_micro_batch=MICRO_BATCH_TOKENS, run_dir=str(folder / "run")
        ),
    )


def run_rank(folder: Path) -> None:
    """What each rank of torchrun does: the updates; rank 0 leaves the result."""
    import torch

    from skyrl_mega.data.synthetic import random_samples
    from skyrl_mega.models.families import read_architecture
    from skyrl_mega.orchestration.layout_check import run_updates
    from skyrl_mega.parallel.topology import init_topology

    config = load_saved(folder / CONFIG_FILE)
    torch.set_num_threads(1)
    topology = init_topology(config.parallel, torch.device("cpu"), seed=config.trainer.seed)
    vocab = read_architecture(config.model.path).vocab_size
    updates = [random_samples(6, 4, vocab=vocab, seed=seed, max_len=MAX_TOKENS) for seed in (1, 2)]
    result = run_updates(config, topology, updates)
    if topology.is_main:
        torch.save(result, folder / RESULT_FILE)
    topology.barrier("result written")
    topology.destroy()


def _print(reports: Sequence[LayoutReport], console: Console, *, details: bool) -> None:
    from rich.table import Table

    for report in reports:
        if details or not report.agrees:
            table = Table("quantity", "one process", "in ranks", "difference", "allowed", "", title=str(report.layout))
            for line in report.comparisons:
                numbers = (f"{line.recorded:.6g}", f"{line.replayed:.6g}", f"{line.difference:.1e}", f"{line.tolerance:.0e}")
                table.add_row(line.name, *numbers, "ok" if line.agrees else "[bold red]differs")
            console.print(report.error or table, markup=not report.error)
    summary = Table("layout", "ranks", "worst difference / allowed", "seconds", "verdict")
    for report in reports:
        worst = max((line.difference / line.tolerance for line in report.comparisons), default=float("nan"))
        verdict = "[green]equal" if report.agrees else "[bold red]no result" if report.error else "[bold red]differs"
        summary.add_row(str(report.layout), str(report.layout.ranks), f"{worst:.3f}", f"{report.seconds:.0f}", verdict)
    console.print(summary)


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
