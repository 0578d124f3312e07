"""What does one read of the logits save over log_softmax and entropy from torch, and how far is it from memory bandwidth?

Forward and backward with entropy, one thread. The rate counts the bytes that must move: the logits read twice (forward, and
backward), the gradient written once, per CPU second. The limit is `copy`, a plain copy that reads and writes as many bytes.

    cpu             logits_logprobs, C++
    cpu_inplace     the same, the gradient over the logits
    cpu_top_20      the same as `cpu` with top_k=20
    reference       logits_logprobs in torch, chunked
    eager           log_softmax in float32, gather, -sum p log p
    compiled        the same under torch.compile

    python scripts/bench/logits_logprobs.py --json docs/benchmarks/logits_logprobs.json
"""

from __future__ import annotations

from collections.abc import Callable

from skyrl_mega.telemetry.bench import Variant, bench_main

TOKENS, VOCAB = 2048, 49152


def make_inputs(tokens: int, dtype: str):
    import torch

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(tokens, VOCAB, generator=generator).mul_(3).to(getattr(torch, dtype))
    return logits, torch.randint(0, VOCAB, (tokens,), generator=generator), torch.randn(2, tokens, generator=generator)


def step_of(head: Callable, tokens: int, dtype: str) -> Callable[[], None]:
    import torch

    logits, labels, grads = make_inputs(tokens, dtype)

    class Produced(torch.autograd.Function):
        """Stands for the matmul that made the logits: they are no leaf, and nobody keeps their gradient.

        What `cpu_inplace` leaves in them is what its next repetition reads, at the same speed.
        """

        @staticmethod
        def forward(ctx, anchor):
            return logits.detach()

        @staticmethod
        def backward(ctx, grad):
            return None

    anchor = torch.zeros((), requires_grad=True)

    def step() -> None:
        logprobs, entropy = head(Produced.apply(anchor), labels)[:2]
        (logprobs @ grads[0] + entropy @ grads[1]).backward()

    return step


def formula(logits, labels):
    table = logits.float().log_softmax(-1)
    return table.gather(1, labels[:, None])[:, 0], -(table.exp() * table).sum(-1)


def ours(tokens: int, dtype: str, backend: str, **settings) -> Callable[[], None]:
    from skyrl_mega_kernels.logits_logprobs import logits_logprobs

    return step_of(lambda *inputs: logits_logprobs(*inputs, return_entropy=True, backend=backend, **settings), tokens, dtype)


def cpu(tokens: int, dtype: str) -> Callable[[], None]:
    return ours(tokens, dtype, "cpu")


def cpu_inplace(tokens: int, dtype: str) -> Callable[[], None]:
    return ours(tokens, dtype, "cpu", inplace_backward=True)


def cpu_top_20(tokens: int, dtype: str) -> Callable[[], None]:
    return ours(tokens, dtype, "cpu", top_k=20)


def reference(tokens: int, dtype: str) -> Callable[[], None]:
    return ours(tokens, dtype, "reference")


def eager(tokens: int, dtype: str) -> Callable[[], None]:
    return step_of(formula, tokens, dtype)


def compiled(tokens: int, dtype: str) -> Callable[[], None]:
    import torch

    return step_of(torch.compile(formula), tokens, dtype)


def copy(tokens: int, dtype: str) -> Callable[[], None]:
    import torch

    logits, _, _ = make_inputs(tokens, dtype)
    # Three passes over the logits' bytes: a copy of one and a half times as many, read and written.
    source = torch.cat([logits, logits[: tokens // 2]])
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def variants() -> list[Variant]:
    listed = []
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        settings = {"params": {"tokens": TOKENS, "dtype": dtype}, "work": 3 * TOKENS * VOCAB * size / 1e9}
        listed.append(Variant("copy", f"{__file__}:copy", **settings))
        listed += [
            Variant(name, f"{__file__}:{name}", **settings, limit_from="copy")
            for name in ("cpu", "cpu_inplace", "cpu_top_20", "reference", "eager", "compiled")
        ]
    return listed


if __name__ == "__main__":
    bench_main("logits_logprobs", variants(), rate_unit="GB/s", description=__doc__ or "")
