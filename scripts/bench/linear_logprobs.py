"""How far is `linear_logprobs` from its matmuls alone, and how much memory does it save over the plain formula?

Forward and backward with entropy, hidden size 576 and vocabulary 49152 (SmolLM2-135M), one thread. The rate counts the
useful work of an LM head, 6 T H V floating-point operations (logits, gradient of hidden, gradient of weight), per CPU second.
The limit is the same three matmuls with nothing between them, measured first. `reference` recomputes the logits in its
backward pass, a fourth matmul: it can reach 75% of the limit at best.

    python scripts/bench/linear_logprobs.py --json benchmarks/linear_logprobs.json
"""

from __future__ import annotations

from collections.abc import Callable

from skyrl_mega.telemetry.bench import Variant, bench_main

HIDDEN, VOCAB = 576, 49152


def make_inputs(tokens: int, dtype: str):
    import torch

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    kind = getattr(torch, dtype)
    hidden = torch.randn(tokens, HIDDEN, generator=generator).to(kind).requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN, generator=generator).mul_(HIDDEN**-0.5).to(kind).requires_grad_()
    labels = torch.randint(0, VOCAB, (tokens,), generator=generator)
    return hidden, weight, labels, torch.randn(2, tokens, generator=generator)


def training_step(head: Callable, tokens: int, dtype: str) -> Callable[[], None]:
    hidden, weight, labels, grads = make_inputs(tokens, dtype)

    def step() -> None:
        hidden.grad = weight.grad = None
        logprobs, entropy = head(hidden, weight, labels)
        (logprobs @ grads[0] + entropy @ grads[1]).backward()

    return step


def reference(tokens: int, dtype: str) -> Callable[[], None]:
    from skyrl_mega_kernels.linear_logprobs import linear_logprobs

    return training_step(lambda *inputs: linear_logprobs(*inputs, return_entropy=True), tokens, dtype)


def eager(tokens: int, dtype: str) -> Callable[[], None]:
    def head(hidden, weight, labels):
        table = (hidden @ weight.t()).float().log_softmax(-1)
        return table.gather(1, labels[:, None])[:, 0], -(table.exp() * table).sum(-1)

    return training_step(head, tokens, dtype)


def bare_matmuls(tokens: int, dtype: str) -> Callable[[], None]:
    hidden, weight, _, _ = (tensor.detach() for tensor in make_inputs(tokens, dtype))

    def step() -> None:
        logits = hidden @ weight.t()
        logits @ weight
        logits.t() @ hidden

    return step


def variants() -> list[Variant]:
    listed = []
    for dtype in ("float32", "bfloat16"):
        for tokens in (512, 2048):
            settings = {"params": {"tokens": tokens, "dtype": dtype}, "work": 6 * tokens * HIDDEN * VOCAB / 1e9}
            listed += [
                Variant("bare_matmuls", f"{__file__}:bare_matmuls", **settings),
                Variant("reference", f"{__file__}:reference", **settings, limit_from="bare_matmuls"),
                Variant("eager", f"{__file__}:eager", **settings, limit_from="bare_matmuls"),
            ]
    return listed


if __name__ == "__main__":
    bench_main("linear_logprobs", variants(), rate_unit="GFLOP/s", description=__doc__ or "")
