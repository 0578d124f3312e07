"""Which LM head is fastest and smallest, and how far is ours from its GEMMs alone?

Forward and backward on one thread, per-token gradients of logprobs and entropy: SmolLM2-135M's head (H=576, V=49152) and a
Qwen-sized vocabulary (H=512, V=151936), T=2048 and 8192 tokens, float32 and bfloat16. A rival that gives less says so in its
name. Yardsticks are CPU seconds and the peak of resident memory beyond the inputs; the gradients of hidden and weight are
part of that peak. The rate is that of the GEMMs a variant runs, 2 T H V FLOPs each: 3 where the logits are kept for the
backward pass, 4 where they are computed again. The limit is oneDNN's brgemm on one tile that stays in the cache, measured
just before: what the GEMMs would take if nothing else took time.

Goals, written down before measuring:

1. `linear_logprobs` (cpu) is the fastest of all heads that return logprob and entropy with gradients.
2. It is at least 2.2 times as fast as eager, in both dtypes.
3. In bfloat16 it takes at most 1.2 times the time of cut-cross-entropy, which computes no entropy.
4. Its extra peak memory is at most 1/10 of eager's at T=2048 and 1/25 at T=8192.
5. Its GEMMs run at 85% of brgemm's rate or more, everything else it does counted as lost time.
6. `linear_policy_loss` is at least 1.15 times as fast as `linear_logprobs` followed by the same loss, both adding the
   weight's gradient to a `main_grad` as in the trainer.

All measurements of one case are taken one after the other: a virtual machine's clock is not the same next morning, so only
numbers of one case may be compared. Cases already in the file stay there unless they are measured again.

    pip install --no-deps --target DIR cut-cross-entropy trl verl
    python scripts/bench/lm_head.py --rivals DIR --json docs/benchmarks/lm_head.json
    python scripts/bench/lm_head.py --goals docs/benchmarks/lm_head.json
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lm_head_rivals as rivals

from skyrl_mega.telemetry.bench import BenchRecord, Variant, bench_main, print_table

SET_UPS = Path(__file__).with_name("lm_head_variants.py")
SHAPES = {"smollm2": (576, 49152), "qwen": (512, 151936)}
TOKENS = (2048, 8192)
DTYPES = ("float32", "bfloat16")
BRGEMM = "brgemm, one tile"
EAGER = "eager"
CUT_CROSS_ENTROPY = "cut-cross-entropy (no entropy)"
OURS = "linear_logprobs cpu"
THEN_LOSS = "linear_logprobs cpu, then ppo_clip, into main_grad"
FUSED_LOSS = "linear_policy_loss cpu, ppo_clip, into main_grad"
#: Shares of the free memory that a variant may be expected to fill.
MEMORY_SHARE = 0.85

Record = dict[str, Any]


# -- the list of variants ---------------------------------------------------------------------------------------------------


def variants(case: Record) -> list[Variant]:
    """In measuring order; the limit comes first."""

    def variant(name: str, function: str, matmuls: int, **params: Any) -> Variant:
        return Variant(name, f"{SET_UPS}:{function}", {**params, "case": case}, work=matmuls * gemm_gflop(case))

    return [
        variant(BRGEMM, "brgemm", 3),
        variant("3 GEMMs by torch.mm", "bare_gemms", 3, count=3),
        variant("4 GEMMs by torch.mm", "bare_gemms", 4, count=4),
        variant(OURS, "ours", 4, backend="cpu"),
        variant("linear_logprobs reference", "ours", 4, backend="reference"),
        variant(THEN_LOSS, "head_then_loss", 4, backend="cpu"),
        variant(FUSED_LOSS, "fused_loss", 3, backend="cpu"),
        *(variant(name, "rival", entry.matmuls, rival_name=name) for name, entry in rivals.RIVALS.items()),
    ]


def gemm_gflop(case: Record) -> float:
    return 2 * case["tokens"] * case["hidden"] * case["vocab"] / 1e9


def why_skipped(variant: Variant, records: list[Record]) -> str | None:
    """Why a variant can't be measured here, with the remedy; None where it can."""
    if variant.name in rivals.RIVALS and (absent := rivals.why_absent(rivals.RIVALS[variant.name])):
        return absent
    if variant.params.get("backend") == "cpu":
        from skyrl_mega_kernels.extension import why_absent

        if absent := why_absent("_C"):
            return absent
    return why_too_large(variant, records)


def why_too_large(variant: Variant, records: list[Record]) -> str | None:
    """Not run where it would not fit: the machine would kill somebody, not necessarily this process."""
    import psutil

    case, smallest = variant.params["case"], min(TOKENS)
    small = find(records, variant.name, {**case, "tokens": smallest})
    if case["tokens"] == smallest or small is None or "skipped" in small:
        return None
    expected = small["peak_extra_bytes"] * case["tokens"] / smallest
    free = psutil.virtual_memory().available
    if expected <= MEMORY_SHARE * free:
        return None
    times = case["tokens"] // smallest
    return f"it would need about {expected / 1e9:.0f} GB, {times} times its T={smallest}; {free / 1e9:.0f} are free"


def measure(variant: Variant, repeats: int, records: list[Record], limit: float | None) -> Record:
    """The record of one variant, or what was skipped and why."""
    case = variant.params["case"]
    reason = why_skipped(variant, records)
    if reason is None:
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # one table at the end is enough
                (record,) = bench_main(
                    "lm_head",
                    [dataclasses.replace(variant, limit=limit)],
                    rate_unit="GFLOP/s",
                    argv=["--repeats", str(repeats)],
                )
            return dataclasses.asdict(dataclasses.replace(record, params=case, versions={**record.versions, **rivals.versions()}))
        except RuntimeError as failure:  # the variant's process ended badly: a rival's bug, or no memory
            reason = f"its process failed: {str(failure).strip().splitlines()[-1]}"
        except subprocess.TimeoutExpired as failure:
            reason = f"it took more than {failure.timeout:.0f} s"
    print(f"  skipped: {reason}", file=sys.stderr, flush=True)
    return {"bench": "lm_head", "variant": variant.name, "params": case, "skipped": reason}


# -- what the records say about the goals -----------------------------------------------------------------------------------


def goals(records: list[Record], case: Record) -> list[tuple[str, bool | None, str]]:
    """(goal, whether it holds, the numbers) for one case; None where something was not measured.

    "at most" says what the goal's number would be if our four GEMMs ran at brgemm's full rate and nothing else took time.
    """
    measured = {record["variant"]: record for record in of_case(records, case) if "skipped" not in record}
    if OURS not in measured:
        return [("all", None, f"{OURS} was not measured")]
    seconds = {name: record["cpu_s"] for name, record in measured.items()}
    mine = seconds[OURS]
    floor = 4 * gemm_gflop(case) / measured[BRGEMM]["rate"] if BRGEMM in measured else None
    verdicts: list[tuple[str, bool | None, str]] = []

    def judge(goal: str, value: float | None, at_least: float, text: str) -> None:
        verdicts.append((goal, None if value is None else value >= at_least, "not measured" if value is None else text))

    complete = {name: s for name, s in seconds.items() if name in rivals.RIVALS and "no entropy" not in name}
    next_best = min(complete, key=complete.__getitem__, default=None)
    lead = ratio(complete.get(next_best), mine)
    judge("1 fastest with entropy", lead, 1, f"{lead or 0:.2f}x {next_best}; at most {(lead or 0) * mine / (floor or mine):.2f}x")
    speedup = ratio(seconds.get(EAGER), mine)
    judge("2 at least 2.2x eager", speedup, 2.2, f"{speedup or 0:.2f}x; at most {(speedup or 0) * mine / (floor or mine):.2f}x")
    if case["dtype"] == "bfloat16":
        share = ratio(seconds.get(CUT_CROSS_ENTROPY), mine)
        taken = 1 / share if share else 0
        judge("3 1.2x cut-cross-entropy's time", share, 1 / 1.2, f"{taken:.2f}x; at best {taken * (floor or mine) / mine:.2f}x")
    divisor = 10 if case["tokens"] == min(TOKENS) else 25
    eager_bytes = measured[EAGER]["peak_extra_bytes"] if EAGER in measured else None
    saved = ratio(eager_bytes, measured[OURS]["peak_extra_bytes"])
    megabytes = f"{measured[OURS]['peak_extra_bytes'] / 1e6:.0f} of {(eager_bytes or 0) / 1e6:.0f} MB"
    judge(f"4 1/{divisor} of eager's memory", saved, divisor, f"1/{saved or 0:.1f}, {megabytes}")
    utilisation = ratio(floor, mine)
    judge("5 at least 85% of brgemm's rate", utilisation, 0.85, f"{100 * (utilisation or 0):.0f}%")
    gain = ratio(seconds.get(THEN_LOSS), seconds.get(FUSED_LOSS))
    judge("6 linear_policy_loss at least 1.15x", gain, 1.15, f"{gain or 0:.2f}x")
    return verdicts


def print_tables(records: list[Record]) -> None:
    """The records and the goals as Markdown, for `docs/kernels.md`."""
    for case in cases(SHAPES, TOKENS, DTYPES):
        if not of_case(records, case):
            continue
        print(f"\n**{title(case)}**\n\n| | CPU s | extra MB | of brgemm's rate |\n|---|---:|---:|---:|")
        for record in of_case(records, case):
            if "skipped" in record:
                print(f"| {record['variant']} | skipped: {record['skipped']} | | |")
                continue
            share = ratio(record["rate"], (find(records, BRGEMM, case) or {}).get("rate"))
            percent = "" if share is None else f"{100 * share:.0f}%"
            print(f"| {record['variant']} | {record['cpu_s']:.2f} | {record['peak_extra_bytes'] / 1e6:,.0f} | {percent} |")
    print("\n| Case | Goal | Held | Numbers |\n|---|---|---|---|")
    for case in cases(SHAPES, TOKENS, DTYPES):
        for goal, held, text in goals(records, case) if of_case(records, case) else []:
            print(f"| {title(case)} | {goal} | {'?' if held is None else 'yes' if held else '**no**'} | {text} |")


def title(case: Record) -> str:
    return f"H={case['hidden']} V={case['vocab']} T={case['tokens']} {case['dtype']}"


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    return None if numerator is None or not denominator else numerator / denominator


def print_goals(records: list[Record]) -> None:
    for case in cases(SHAPES, TOKENS, DTYPES):
        if of_case(records, case):
            print(f"\n{title(case)}")
            for goal, held, text in goals(records, case):
                print(f"  {'missed' if held is False else 'holds ' if held else '?     '}  {goal}: {text}")


# -- records and command line -----------------------------------------------------------------------------------------------


def cases(shapes, tokens, dtypes) -> list[Record]:
    """Small before large: what a large case needs is foretold from the small one."""
    return [
        {"hidden": SHAPES[shape][0], "vocab": SHAPES[shape][1], "tokens": count, "dtype": dtype}
        for count, shape, dtype in itertools.product(sorted(tokens), shapes, dtypes)
    ]


def of_case(records: list[Record], case: Record) -> list[Record]:
    return [record for record in records if record["params"] == case]


def find(records: list[Record], name: str, case: Record) -> Record | None:
    return next((record for record in of_case(records, case) if record["variant"] == name), None)


def put(records: list[Record], new: Record) -> None:
    """Adds a record in place of an earlier one of the same variant and case."""
    old = find(records, new["variant"], new["params"])
    if old is None:
        records.append(new)
    else:
        records[records.index(old)] = new


def print_records(records: list[Record]) -> None:
    measured = [BenchRecord(**record) for record in records if "skipped" not in record]
    if measured:
        print_table(measured)
    for record in records:
        if "skipped" in record:
            print(f"skipped: {record['variant']} {record['params']}: {record['skipped']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the records to this file, replacing older ones")
    parser.add_argument("--goals", type=Path, metavar="FILE", help="measure nothing: judge the goals from these records")
    parser.add_argument("--tables", type=Path, metavar="FILE", help="measure nothing: print these records as Markdown")
    parser.add_argument("--rivals", type=Path, metavar="DIR", help=f"packages of the rivals (or {rivals.RIVALS_ENV})")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these variants only")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, choices=TOKENS, default=list(TOKENS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=3, help="timed repetitions at the fewest tokens; 1 at more (default 3)")
    args = parser.parse_args()
    if args.goals is not None:
        print_goals(json.loads(args.goals.read_text()))
        return
    if args.tables is not None:
        print_tables(json.loads(args.tables.read_text()))
        return
    if args.rivals is not None:
        os.environ[rivals.RIVALS_ENV] = str(args.rivals.resolve())
    records = json.loads(args.json.read_text()) if args.json is not None and args.json.exists() else []
    for case in cases(args.shapes, args.tokens, args.dtypes):
        for variant in variants(case):
            if args.only is not None and variant.name not in args.only:
                continue
            limit = None if variant.name == BRGEMM else (find(records, BRGEMM, case) or {}).get("rate")
            put(records, measure(variant, args.repeats if case["tokens"] == min(TOKENS) else 1, records, limit))
            if args.json is not None:  # after each: an interrupted run keeps what it has
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps(records, indent=1) + "\n")
    print_records(records)
    print_goals(records)


if __name__ == "__main__":
    main()
