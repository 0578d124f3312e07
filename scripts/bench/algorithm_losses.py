"""How near is each policy loss to what memory allows: forward, backward and statistics over a million tokens, on one CPU thread?

The limit, written down before measuring: each token's logprob, old logprob, advantage and weight (float32) and its mask (one
byte) must be read and a gradient (float32) written, 21 bytes; the dppo losses read the engine's logprob in the old one's place,
and a mark of clip_cov and kl_cov (one byte more) is left out of the account. `copy` moves 21 bytes a token as STREAM's copy does,
out of cache. The goal is twice its time. Statistics are sums: they move nothing.
The whole objective (`objective_*`) reads the engine's logprob besides, 25 bytes; with KL and an entropy bonus it reads the
reference's logprob and the entropy, and writes the entropy's gradient, 37 bytes. Its goal is the same, of a copy of as many.

- `*_fused`: the kernel, as a run calls it (`skyrl_mega_kernels.policy_loss`, backend cpu): one pass, no compiling.
- `*_eager`: the definition by torch's operators; every one writes its result to memory and the next reads it.
- `ppo_clip_compiled`: torch.compile of the definition, its weighted sum and those of its statistics: one loop forward, one back.
  What that takes before the first result is `compile_s`, on standard error.
- `objective_*`: what a training step calls: ppo_clip, and the statistics of the mismatch between engine and trainer;
  `objective_kl_entropy_*` with the KL to a reference (k3) in the loss, and an entropy bonus.
- `dppo_kl_far`: its kernel where the policy has drifted far, by which it alone takes longer: it leaves a logarithm out where 16
  tokens in a row have moved little.

A repetition is one forward and backward. Variant and copy run by turns, each in a process of its own, since a copy's speed drifts
with whoever else uses the memory (0.65 to 1.2 ms within a day); what counts is the median ratio of a round.

    python scripts/bench/algorithm_losses.py --json docs/benchmarks/algorithm_losses.json
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from skyrl_mega.algorithms.policy_losses import POLICY_LOSSES
from skyrl_mega.telemetry.bench_alternate import Side, median_ratio, run_alternating
from skyrl_mega.telemetry.resources import load_average
from skyrl_mega.telemetry.versions import collect_versions, git_commit, hardware

if TYPE_CHECKING:
    import torch

    from skyrl_mega.algorithms.policy_losses import LossInputs

TOKENS, LENGTH = 2**20, 1024
#: Inputs that take turns, so that no cache holds them.
SETS = 4
BYTES = 21
#: Repetitions in a turn: one takes a millisecond or two, and the first after a wait pays for cold caches. Eager: 20 to 70 ms.
CALLS, EAGER_CALLS = 20, 2
#: At most so many times a copy of as many bytes.
GOAL = 2.0
LOSSES = [name for name in POLICY_LOSSES if not POLICY_LOSSES.find(name).traits["needs"]]
How = Literal["fused", "eager", "compiled"]
Record = dict[str, Any]
#: Deviation of the policy's logprobs from the old ones, as after some updates (PPO clips few tokens then); and from far away.
DRIFT, FAR = 0.05, 0.2


def step(name: str, how: How, drift: float = DRIFT) -> Callable[[], None]:
    import torch

    from skyrl_mega.algorithms.policy_losses.sums import PolicyLossSums
    from skyrl_mega_kernels.policy_loss.reference import weighted_sums

    entry, turns = POLICY_LOSSES.find(name), inputs_by_turns(drift)
    sums = PolicyLossSums(entry, {}, "cpu" if how == "fused" else "reference")

    def loss(inputs: LossInputs, weights: torch.Tensor) -> torch.Tensor:
        return sums(inputs, weights, weights)[0]

    if how == "compiled":
        start = time.perf_counter()
        compiled = torch.compile(lambda inputs, weights: weighted_sums(*entry.function(inputs), weights, weights))

        def loss(inputs: LossInputs, weights: torch.Tensor) -> torch.Tensor:
            return compiled(inputs, weights)[0]

        loss(*next(turns)).backward()
        print(f"{name}: compile_s {time.perf_counter() - start:.1f}", file=sys.stderr)
    return forward_and_backward(loss, turns)


def objective(kernels: str, has_kl: bool) -> Callable[[], None]:
    from skyrl_mega.algorithms.loss import Objective
    from skyrl_mega.config.schema import AlgorithmConfig, KLConfig

    kl = KLConfig(coef=0.01, estimator="k3") if has_kl else KLConfig(coef=0.0)
    whole = Objective(AlgorithmConfig(kl=kl, entropy_coef=0.01 if has_kl else 0.0), kernels)
    return forward_and_backward(lambda *turn: whole(*turn)[0], inputs_by_turns(DRIFT, has_kl))


def inputs_by_turns(drift: float, has_kl: bool = False) -> Iterator[tuple[LossInputs, torch.Tensor]]:
    """(inputs, weights) without end; with `has_kl` also a reference and an entropy."""
    import torch

    from skyrl_mega.algorithms.policy_losses import LossInputs
    from skyrl_mega.algorithms.sequences import Sequences

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)

    def noise(scale: float) -> torch.Tensor:
        return torch.randn(TOKENS, generator=generator).mul_(scale)

    def make_inputs() -> LossInputs:
        old = -noise(1.0).abs_() - 0.05
        return LossInputs(
            logprobs=(old + noise(drift)).clamp_(max=-0.01).requires_grad_(),
            old_logprobs=old,
            rollout_logprobs=(old + noise(0.02)).clamp_(max=-0.01),
            advantages=noise(1.0),
            loss_mask=torch.rand(TOKENS, generator=generator) < 0.7,
            marked=torch.rand(TOKENS, generator=generator) < 0.002,
            sequences=Sequences.packed(torch.arange(0, TOKENS + 1, LENGTH)),
            ref_logprobs=(old + noise(0.1)).clamp_(max=-0.01) if has_kl else None,
            entropy=noise(1.0).abs_().requires_grad_() if has_kl else None,
        )

    sets = [make_inputs() for _ in range(SETS)]
    return itertools.cycle([(inputs, inputs.loss_mask.float() / TOKENS) for inputs in sets])


def forward_and_backward(
    loss: Callable[[LossInputs, torch.Tensor], torch.Tensor], turns: Iterator[tuple[LossInputs, torch.Tensor]]
) -> Callable[[], None]:
    def whole() -> None:
        inputs, weights = next(turns)
        loss(inputs, weights).backward()
        inputs.logprobs.grad = None
        if inputs.entropy is not None:
            inputs.entropy.grad = None

    for _ in range(2 * SETS):
        whole()  # until the allocator keeps what is freed: the first repetitions would pay for fresh pages
    return whole


def copy() -> Callable[[], None]:
    import torch

    torch.set_num_threads(1)
    # Half is read and half is written.
    half = TOKENS * BYTES // 2
    pairs = [(torch.ones(half, dtype=torch.uint8), torch.ones(half, dtype=torch.uint8)) for _ in range(SETS)]
    turns = itertools.cycle(pairs)

    def one_copy() -> None:
        source, target = next(turns)
        target.copy_(source)

    return one_copy


SetUp = Callable[[], Callable[[], None]]
#: Name -> (bytes that a token must move, set-up function).
VARIANTS: dict[str, tuple[int, SetUp]] = {
    **{f"{name}_{how}": (BYTES, functools.partial(step, name, how)) for name in LOSSES for how in ("fused", "eager")},
    "ppo_clip_compiled": (BYTES, functools.partial(step, "ppo_clip", "compiled")),
    "dppo_kl_far": (BYTES, functools.partial(step, "dppo_kl", "fused", FAR)),
    "objective_fused": (25, functools.partial(objective, "cpu", has_kl=False)),
    "objective_eager": (25, functools.partial(objective, "reference", has_kl=False)),
    "objective_kl_entropy_fused": (37, functools.partial(objective, "cpu", has_kl=True)),
    "objective_kl_entropy_eager": (37, functools.partial(objective, "reference", has_kl=True)),
}


def turn(name: str) -> Callable[[], None]:
    """The repetitions of a turn: of a variant, or of the copy."""
    once = copy() if name == "copy" else VARIANTS[name][1]()

    def calls() -> None:
        for _ in range(calls_of(name)):
            once()

    return calls


def calls_of(name: str) -> int:
    return EAGER_CALLS if name.endswith("eager") else CALLS


def measure(name: str, rounds: int) -> Record:
    """A variant and the copy by turns; `copies` is the ratio to a copy of as many bytes."""
    load = load_average()
    sides = [Side(one, f"{__file__}:turn", {"name": one}) for one in (name, "copy")]
    results = run_alternating(sides, rounds=rounds)
    bytes_per_token = VARIANTS[name][0]
    ratio = median_ratio(results[name], results["copy"]) * CALLS / calls_of(name)
    return {
        "bench": "algorithm_losses",
        "variant": name,
        "tokens": TOKENS,
        "bytes_per_token": bytes_per_token,
        "cpu_s": results[name].median_cpu_s / calls_of(name),
        "copy_cpu_s": results["copy"].median_cpu_s / CALLS,
        "copies": ratio * BYTES / bytes_per_token,
        "clock": "cpu",
        "load": load,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "hardware": hardware(),
        "versions": collect_versions(),
        "commit": git_commit(),
    }


def print_table(records: list[Record]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"A million tokens; goal: at most {GOAL:g} copies")
    for title in ("variant", "ms", "ms of 21 bytes' copy", "copies", "goal"):
        table.add_column(title, justify="left" if title == "variant" else "right")
    for r in records:
        verdict = "" if r["variant"].endswith(("eager", "compiled")) else "holds" if r["copies"] <= GOAL else "missed"
        table.add_row(r["variant"], f"{1e3 * r['cpu_s']:.2f}", f"{1e3 * r['copy_cpu_s']:.2f}", f"{r['copies']:.2f}", verdict)
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records there as a JSON list")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME", help="these variants")
    parser.add_argument("--rounds", type=int, default=11, help="timed turns of each variant (default 11)")
    args = parser.parse_args()
    records = []
    for number, name in enumerate(args.only, start=1):
        print(f"{number} of {len(args.only)}: {name} ...", file=sys.stderr, flush=True)
        records.append(measure(name, args.rounds))
    print_table(records)
    if args.json is not None:
        args.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
