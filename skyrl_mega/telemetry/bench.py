"""Benchmark records: every variant measured in a fresh process, every number kept with what it was obtained on.

A bench is a script that lists `Variant`s and calls `bench_main`. A variant names a set-up function, "module:function" or
"file.py:function"; called with the variant's params it builds the inputs and returns a function without arguments, one call
of which is one repetition. A fresh process per variant keeps one variant's caches, arenas and threads out of another's
numbers, and lets the memory high-water mark mean something.

CPU seconds are the yardstick on a shared machine: they do not grow when others use it (caches apart), as wall seconds do.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from skyrl_mega.telemetry.resources import load_average, peak_rss_bytes, reset_peak_rss, rss_bytes
from skyrl_mega.telemetry.versions import collect_versions, git_commit, hardware


@dataclass(frozen=True)
class Measurement:
    """One variant, per repetition: CPU and wall seconds (medians, or the least), and the most bytes held beyond its inputs.

    The bytes are of the device when the variant used CUDA, else resident memory. `load` is the machine's load average just
    before.
    """

    cpu_s: float
    wall_s: float
    peak_extra_bytes: int
    load: float


@dataclass(frozen=True)
class Variant:
    """What to measure. `work` is what one repetition does, in the rate's unit (0: no rate).

    The limit is a rate written down beforehand, or with `limit_from` the rate of an earlier variant with the same params.
    """

    name: str
    fn_path: str
    params: Mapping[str, Any]
    work: float = 0.0
    limit: float | None = None
    limit_from: str | None = None


@dataclass(frozen=True)
class BenchRecord:
    """One line of a result file. `rate` is work per second of `clock`; `fraction_of_limit` is rate / limit."""

    bench: str
    variant: str
    params: Mapping[str, Any]
    cpu_s: float
    wall_s: float
    peak_extra_bytes: int
    rate: float | None
    rate_unit: str
    clock: str
    limit: float | None
    fraction_of_limit: float | None
    load: float
    date: str
    hardware: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    commit: str | None = None


def run_variant(
    fn_path: str,
    params: Mapping[str, Any],
    *,
    warmup: int = 1,
    repeats: int = 3,
    best: bool = False,
    timeout_s: float = 600.0,
) -> Measurement:
    """Measures `fn_path` called with `params` in a fresh Python process: warm-up calls, then timed ones.

    The process has one thread unless OMP_NUM_THREADS says otherwise. Raises RuntimeError with the process's last words if it
    fails, subprocess.TimeoutExpired past `timeout_s`.
    """
    load = load_average()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        result = Path(folder) / "result.json"
        job = {
            "fn_path": fn_path,
            "params": dict(params),
            "warmup": warmup,
            "repeats": repeats,
            "best": best,
            "result": str(result),
        }
        process = subprocess.run(
            [sys.executable, "-m", "skyrl_mega.telemetry.bench", json.dumps(job)],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env={"OMP_NUM_THREADS": "1", **os.environ},
        )
        if process.returncode != 0:
            raise RuntimeError(f"bench {fn_path} {dict(params)} ended with {process.returncode}:\n{process.stderr[-3000:]}")
        return Measurement(load=load, **json.loads(result.read_text()))


def bench_main(
    bench: str,
    variants: Sequence[Variant],
    *,
    rate_unit: str,
    clock: Literal["cpu", "wall"] = "cpu",
    description: str = "",
    repeats: int = 3,
    best: bool = False,
    argv: Sequence[str] | None = None,
) -> list[BenchRecord]:
    """The command line of a bench: measures the variants in order, prints a table, writes records with `--json FILE`.

    `repeats`: timed repetitions of each variant, unless `--repeats` says otherwise. The median counts, or with `best` the
    quickest: of repetitions so short that whoever else uses the machine is in many of them, and only ever slows them.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records there as a JSON list")
    parser.add_argument("--only", metavar="NAME", help="measure only the variants of this name (and their limits)")
    parser.add_argument("--repeats", type=int, default=repeats, help="timed repetitions of each variant")
    args = parser.parse_args(argv)

    wanted = {v.name for v in variants if args.only in (None, v.name)}
    wanted |= {v.limit_from for v in variants if v.name in wanted and v.limit_from}
    if not wanted:
        parser.error(f"--only {args.only!r} must be one of {', '.join(dict.fromkeys(v.name for v in variants))}")
    common = {
        "bench": bench,
        "rate_unit": rate_unit,
        "clock": clock,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "hardware": hardware(),
        "versions": collect_versions(),
        "commit": git_commit(),
    }
    records: list[BenchRecord] = []
    for variant in variants:
        if variant.name in wanted:
            print(f"{variant.name} {_params_text(variant.params)} ...", file=sys.stderr, flush=True)
            measured = run_variant(variant.fn_path, variant.params, repeats=args.repeats, best=best)
            records.append(_record(variant, measured, records, common))
    print_table(records)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps([dataclasses.asdict(record) for record in records], indent=1) + "\n")
    return records


def print_table(records: Sequence[BenchRecord]) -> None:
    """The records as a table on standard output."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{records[0].bench}, {records[0].date}, {records[0].hardware['cpu']}" if records else None)
    table.add_column("variant")
    table.add_column("params", no_wrap=True)
    units = ("CPU s", "wall s", "peak MB", records[0].rate_unit if records else "rate", "% of limit")
    for title in units:
        table.add_column(title, justify="right")
    for r in records:
        rate = "-" if r.rate is None else f"{r.rate:.4g}"
        share = "-" if r.fraction_of_limit is None else f"{100 * r.fraction_of_limit:.0f}"
        numbers = (f"{r.cpu_s:.3f}", f"{r.wall_s:.3f}", f"{r.peak_extra_bytes / 1e6:,.0f}", rate, share)
        table.add_row(r.variant, _params_text(r.params), *numbers)
    # Without a terminal rich assumes 80 columns, which would cut the parameters short.
    Console(width=None if sys.stdout.isatty() else 130).print(table)


def _record(variant: Variant, measured: Measurement, earlier: Sequence[BenchRecord], common: Mapping[str, Any]) -> BenchRecord:
    seconds = measured.cpu_s if common["clock"] == "cpu" else measured.wall_s
    rate = variant.work / seconds if variant.work and seconds > 0 else None
    limit = variant.limit
    if variant.limit_from is not None:
        same = [r.rate for r in earlier if r.variant == variant.limit_from and dict(r.params) == dict(variant.params)]
        if not same:
            raise ValueError(
                f"limit_from ({variant.limit_from!r}) of {variant.name} must be an earlier variant with the same params."
            )
        limit = same[-1]
    return BenchRecord(
        variant=variant.name,
        params=dict(variant.params),
        rate=rate,
        limit=limit,
        fraction_of_limit=rate / limit if rate is not None and limit else None,
        **dataclasses.asdict(measured),
        **common,
    )


def _params_text(params: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in params.items())


# -- in the fresh process -----------------------------------------------------------------------------------------------


def _measure(job: Mapping[str, Any]) -> None:
    repetition = load_set_up(job["fn_path"])(**job["params"])
    memory = _DeviceMemory() if _uses_cuda() else _HostMemory()
    for _ in range(job["warmup"]):
        repetition()
    memory.restart_peak()
    cpu, wall = [], []
    for _ in range(job["repeats"]):
        memory.synchronize()
        cpu_start, wall_start = time.process_time(), time.perf_counter()
        repetition()
        memory.synchronize()
        cpu.append(time.process_time() - cpu_start)
        wall.append(time.perf_counter() - wall_start)
    measured = {
        "cpu_s": min(cpu) if job["best"] else statistics.median(cpu),
        "wall_s": min(wall) if job["best"] else statistics.median(wall),
        "peak_extra_bytes": memory.peak_extra_bytes(),
    }
    Path(job["result"]).write_text(json.dumps(measured))


class _HostMemory:
    """Resident memory: the high-water mark of the timed repetitions over what the inputs held before the warm-up."""

    def __init__(self) -> None:
        self._before = rss_bytes()

    def restart_peak(self) -> None:
        reset_peak_rss()  # where that is impossible the mark is that of the whole process, warm-up included

    def peak_extra_bytes(self) -> int:
        return max(peak_rss_bytes() - self._before, 0)

    def synchronize(self) -> None:
        pass


class _DeviceMemory:
    """The CUDA allocator's high-water mark of the timed repetitions over what the inputs held before."""

    def __init__(self) -> None:
        import torch

        self._cuda = torch.cuda
        self._before = self._cuda.memory_allocated()

    def restart_peak(self) -> None:
        self._cuda.reset_peak_memory_stats()

    def peak_extra_bytes(self) -> int:
        return max(self._cuda.max_memory_allocated() - self._before, 0)

    def synchronize(self) -> None:
        self._cuda.synchronize()


def _uses_cuda() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_initialized()


def load_set_up(fn_path: str) -> Callable[..., Callable[[], Any]]:
    """The set-up function that "module:function" or "file.py:function" names."""
    where, _, name = fn_path.rpartition(":")
    if where.endswith(".py"):
        spec = importlib.util.spec_from_file_location("bench_variants", where)
        if spec is None or spec.loader is None:
            raise ValueError(f"fn_path ({fn_path!r}) must name a Python file or module, a colon and a function.")
        module = importlib.util.module_from_spec(spec)
        sys.modules["bench_variants"] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(where)
    return getattr(module, name)


if __name__ == "__main__":
    _measure(json.loads(sys.argv[1]))
