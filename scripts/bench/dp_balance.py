"""How evenly does the trainer's packer load its data-parallel ranks on long-tailed rollouts?

Response lengths of reasoning rollouts are lognormal to a good approximation: here median 600 tokens, sigma 1, at most 8192;
prompts have a median of 150 tokens. Updates of 256, 512 and 1024 samples in groups of 8 and 16 go to 2 to 64 ranks, with and
without shared prompts, at 16384 tokens per micro-batch; all ranks' batches are packed by `balance_and_pack` itself and judged
by what came out.

Goals, written down before measuring:

1. The most loaded rank's cost is at most 1.02 times the mean. No packer can beat the longest sample: where that alone costs
   more than 1.02 mean loads, the goal is 1.02 times its cost ("bound" in the table: the least that any packer can reach).
2. At most 3% of any rank's tokens carry no sample.
3. Packing takes one rank at most 0.5 s of CPU time.

Beside them: `lockstep`, the sum over micro-batch indices of the slowest rank over the mean (what ranks lose that wait for
each other in every micro-batch, as expert parallelism does), and `repeated`, the cost of computing a prompt more than once
because its group was split (0 without sharing).

    python scripts/bench/dp_balance.py --json docs/benchmarks/dp_balance.json
    python scripts/bench/dp_balance.py --goals docs/benchmarks/dp_balance.json
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skyrl_mega.types import MicroBatch, TrainSample

MEDIAN_RESPONSE, RESPONSE_SIGMA, LONGEST_RESPONSE = 600, 1.0, 8192
MEDIAN_PROMPT, PROMPT_SIGMA, LONGEST_PROMPT = 150, 0.6, 1024
TOKENS_PER_MICRO_BATCH = 16384
MOST_IMBALANCE, MOST_PADDING, MOST_SECONDS = 1.02, 0.03, 0.5


@dataclass(frozen=True)
class Case:
    samples: int
    group_size: int
    ranks: int
    shared: bool


@dataclass(frozen=True)
class Result:
    """Costs are relative to their mean over ranks; see the module's docstring. `cpu_s`: one rank's call."""

    case: Case
    max_over_mean: float
    bound: float
    lockstep: float
    padding: float
    repeated: float
    micro_batches: int
    cpu_s: float


CASES = [Case(*sizes) for sizes in itertools.product((256, 512, 1024), (8, 16), (2, 4, 8, 16, 32, 64), (False, True))]


def make_trace(samples: int, group_size: int, seed: int = 0) -> list[TrainSample]:
    """One update's samples, with lengths as the module's docstring says."""
    import torch

    from skyrl_mega.types import TrainSample

    generator = torch.Generator().manual_seed(seed)

    def length(median: float, sigma: float, longest: int) -> int:
        return max(2, min(longest, round(median * float(torch.randn((), generator=generator).mul(sigma).exp()))))

    trace: list[TrainSample] = []
    for group in range(samples // group_size):
        prompt = torch.randint(5, 40000, (length(MEDIAN_PROMPT, PROMPT_SIGMA, LONGEST_PROMPT),), generator=generator)
        for _ in range(group_size):
            response = torch.zeros(length(MEDIAN_RESPONSE, RESPONSE_SIGMA, LONGEST_RESPONSE), dtype=torch.int64)
            ids = torch.cat([prompt, response])
            mask = torch.arange(len(ids)) >= len(prompt)
            trace.append(TrainSample(len(trace), group, f"g{group}", ids, mask, -1.0 * mask, 0.0, 1.0 * mask))
    return trace


def measure(case: Case, trace: Sequence[TrainSample]) -> Result:
    from skyrl_mega.data.balance import sequence_cost
    from skyrl_mega.data.packing import balance_and_pack

    options = {"tokens_per_micro_batch": TOKENS_PER_MICRO_BATCH, "skip_zero_advantage": True, "share_prompts": case.shared}
    seconds, batches = [], []
    for rank in range(case.ranks):
        start = time.process_time()
        batches.append(balance_and_pack(trace, dp_rank=rank, dp_size=case.ranks, **options))
        seconds.append(time.process_time() - start)
    costs = [[micro_batch_cost(m) for m in batch.micro_batches] for batch in batches]
    mean = sum(map(sum, costs)) / case.ranks
    # Whoever computes the longest sample computes it whole.
    longest = max(sequence_cost(sample.num_tokens) for sample in trace)
    once = micro_batches_cost(trace, case)
    return Result(
        case=case,
        max_over_mean=max(map(sum, costs)) / mean,
        bound=max(1.0, longest / mean),
        lockstep=sum(max(column) for column in zip(*costs, strict=True)) / mean,
        padding=max(batch.padding_fraction for batch in batches),
        repeated=mean * case.ranks / once - 1.0,
        micro_batches=len(costs[0]),
        cpu_s=statistics.median(seconds),
    )


def micro_batches_cost(trace: Sequence[TrainSample], case: Case) -> float:
    """The cost of the update with nothing computed twice: one rank with room for every group."""
    from skyrl_mega.data.packing import balance_and_pack

    everything = balance_and_pack(
        trace,
        tokens_per_micro_batch=sum(sample.num_tokens for sample in trace),
        dp_rank=0,
        dp_size=1,
        skip_zero_advantage=True,
        share_prompts=case.shared,
    )
    return sum(micro_batch_cost(m) for m in everything.micro_batches)


def micro_batch_cost(micro_batch: MicroBatch) -> float:
    """Estimated compute of a packed micro-batch, read off its sequences."""
    from skyrl_mega.data.balance import sequence_cost

    lengths = micro_batch.cu_seqlens.diff().tolist()
    prefixes = [-1] * len(lengths) if micro_batch.prefix_segments is None else micro_batch.prefix_segments.tolist()
    trunks = [lengths[prefix] if prefix >= 0 else 0 for prefix in prefixes]
    return sum(sequence_cost(t + n) - sequence_cost(t) for t, n in zip(trunks, lengths, strict=True))


# -- what the results say -----------------------------------------------------------------------------------------------


def goals(record: dict[str, Any]) -> dict[str, bool]:
    return {
        "1 balance": record["max_over_mean"] <= MOST_IMBALANCE * record["bound"] + 1e-9,
        "2 padding": record["padding"] <= MOST_PADDING,
        "3 time": record["cpu_s"] <= MOST_SECONDS,
    }


def print_goals(records: Sequence[dict[str, Any]]) -> None:
    print("samples group ranks shared | max/mean  bound lockstep padding repeated  n  cpu s | goals missed")
    for record in records:
        c = Case(**record["case"])
        missed = ", ".join(goal for goal, held in goals(record).items() if not held) or "-"
        print(
            f"{c.samples:7} {c.group_size:5} {c.ranks:5} {c.shared!s:6} | {record['max_over_mean']:8.4f} {record['bound']:6.3f} "
            f"{record['lockstep']:8.4f} {100 * record['padding']:6.2f}% {100 * record['repeated']:7.2f}% "
            f"{record['micro_batches']:2} {record['cpu_s']:6.3f} | {missed}"
        )
    for goal in goals(records[0]):
        print(f"{goal}: {sum(goals(record)[goal] for record in records)} of {len(records)} cases hold")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records there")
    parser.add_argument("--goals", type=Path, metavar="FILE", help="measure nothing: judge the goals from these records")
    args = parser.parse_args()
    if args.goals is not None:
        print_goals(json.loads(args.goals.read_text())["records"])
        return

    import torch

    from skyrl_mega.telemetry.resources import load_average
    from skyrl_mega.telemetry.versions import collect_versions, git_commit, hardware

    torch.set_num_threads(1)
    traces = {sizes: make_trace(*sizes) for sizes in {(c.samples, c.group_size) for c in CASES}}
    load = load_average()
    records = [dataclasses.asdict(measure(case, traces[case.samples, case.group_size])) for case in CASES]
    print_goals(records)
    if args.json is not None:
        about = {"bench": "dp_balance", "date": time.strftime("%Y-%m-%d", time.gmtime()), "load": load, "hardware": hardware()}
        about |= {"versions": collect_versions(), "commit": git_commit(), "records": records}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
