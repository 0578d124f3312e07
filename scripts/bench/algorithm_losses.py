"""How near is each policy loss to what memory allows: forward, backward and statistics over a million tokens, on one CPU thread?

The limit, written down before measuring: each token's logprob, old logprob, advantage and weight (float32) and its mask (one
byte) must be read and a gradient (float32) written, 21 bytes; the dppo losses read the engine's logprob in the old one's place,
and a mark of clip_cov and kl_cov (one byte more) is left out of the account. `copy` moves 21 bytes a token as STREAM's copy does,
out of cache, in the same run. The goal is twice its time (50% of the limit). Statistics are sums: they move nothing.
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

A repetition is one forward and backward; of a hundred the quickest counts.

    python scripts/bench/algorithm_losses.py --json docs/benchmarks/algorithm_losses.json
"""

from __future__ import annotations

import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal

from skyrl_mega.algorithms.policy_losses import POLICY_LOSSES
from skyrl_mega.telemetry.bench import Variant, bench_main

if TYPE_CHECKING:
    import torch

    from skyrl_mega.algorithms.policy_losses import LossInputs

TOKENS, LENGTH = 2**20, 1024
#: Inputs that take turns, so that no cache holds them.
SETS = 4
BYTES = 21
LOSSES = [name for name in POLICY_LOSSES if not POLICY_LOSSES.find(name).traits["needs"]]
HOWS = ("fused", "eager", "compiled")
How = Literal["fused", "eager", "compiled"]
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


def variants() -> list[Variant]:
    work = TOKENS * BYTES / 1e9
    listed = [Variant("copy", f"{__file__}:copy", {}, work)]
    for name in LOSSES:
        hows = HOWS if name == "ppo_clip" else HOWS[:2]
        listed += [Variant(f"{name}_{how}", f"{__file__}:{name}_{how}", {}, work, limit_from="copy") for how in hows]
    listed.append(Variant("dppo_kl_far", f"{__file__}:dppo_kl_far", {}, work, limit_from="copy"))
    for name, (bytes_per_token, _) in OBJECTIVES.items():
        listed.append(Variant(name, f"{__file__}:{name}", {}, TOKENS * bytes_per_token / 1e9, limit_from="copy"))
    return listed


#: Whole objectives: bytes per token, and how each is set up.
OBJECTIVES = {
    f"objective{with_kl}_{how}": (size, functools.partial(objective, kernels, bool(with_kl)))
    for with_kl, size in (("", 25), ("_kl_entropy", 37))
    for how, kernels in (("fused", "cpu"), ("eager", "reference"))
}


#: The set-up functions, by name: gspo_eager() and so on.
globals().update({f"{name}_{how}": functools.partial(step, name, how) for name in LOSSES for how in HOWS})
globals().update({name: set_up for name, (_, set_up) in OBJECTIVES.items()})
dppo_kl_far = functools.partial(step, "dppo_kl", "fused", FAR)


if __name__ == "__main__":
    # Many: a repetition takes milliseconds.
    bench_main("algorithm_losses", variants(), rate_unit="GB/s", description=__doc__ or "", repeats=101, best=True)
