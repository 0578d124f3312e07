"""How far is the Triton LM head from its matmuls alone, on this GPU, and what do memory and time of the plain formula look like?

Forward and backward with entropy, bfloat16. The rate counts the useful work of an LM head, 6 N H V floating-point operations
(logits, gradient of hidden, gradient of weight), per second of wall time. The limit is the same three matmuls with nothing
between them, measured first. `triton` recomputes the logits in its backward pass, a fourth matmul: it can reach 75% of the
limit at best; `triton_chunks`, what `linear_policy_loss` runs, does three.

    python scripts/bench/lm_head_gpu.py --json docs/benchmarks/lm_head_gpu.json
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from skyrl_mega.telemetry.bench import Variant, bench_main

SHAPES = ((8192, 576, 49152), (8192, 4096, 151936), (16384, 4096, 151936))
#: The logits of more rows than this are not materialised: the plain formula keeps several copies of them.
EAGER_LOGITS = 8192 * 49152
CHUNK_TOKENS = 2048


def make_inputs(tokens: int, hidden: int, vocab: int):
    import torch

    generator = torch.Generator(device="cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    hidden_NH, weight_VH = normal(tokens, hidden), normal(vocab, hidden).mul_(hidden**-0.5)
    labels_N = torch.randint(0, vocab, (tokens,), generator=generator, device="cuda")
    return hidden_NH, weight_VH, labels_N, torch.randn(3, tokens, generator=generator, device="cuda")


def triton(tokens: int, hidden: int, vocab: int) -> Callable[[], None]:
    import torch

    from skyrl_mega_kernels.linear_logprobs import triton as backend

    hidden_NH, weight_VH, labels_N, coefficients_3N = make_inputs(tokens, hidden, vocab)
    grad_hidden = torch.empty_like(hidden_NH, dtype=torch.float32)
    grad_weight = torch.zeros_like(weight_VH, dtype=torch.float32)
    settings = dict(temperature=1.0, chunk_tokens=CHUNK_TOKENS)

    def step() -> None:
        inputs = (hidden_NH, weight_VH, None, labels_N, None)
        packed = backend.statistics(*inputs, with_entropy=True, top_k=0, **settings)[0]
        grads = dict(grad_hidden_NH=grad_hidden, grad_weight_UH=grad_weight, grad_bias_U=None)
        backend.gradients(*inputs, packed[0] + packed[1].log(), coefficients_3N, accumulate=True, **grads, **settings)

    return step


def triton_chunks(tokens: int, hidden: int, vocab: int) -> Callable[[], None]:
    import torch

    from skyrl_mega_kernels.linear_logprobs import triton as backend

    hidden_NH, weight_VH, labels_N, coefficients_3N = make_inputs(tokens, hidden, vocab)
    grad_hidden = torch.empty_like(hidden_NH, dtype=torch.float32)
    grad_weight = torch.zeros_like(weight_VH, dtype=torch.float32)
    size = backend.workspace_size(CHUNK_TOKENS, vocab, torch.bfloat16)

    def step() -> None:
        workspace = torch.empty(size, device="cuda")
        for start in range(0, tokens, CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            inputs, labels = (hidden_NH[rows], weight_VH), labels_N[rows]
            packed = backend.chunk_statistics(*inputs, None, labels, None, workspace, temperature=1.0, with_entropy=True)
            per_row = (packed[0] + packed[1].log(), coefficients_3N[:, rows].contiguous())
            grads = dict(grad_hidden_CH=grad_hidden[rows], grad_weight_UH=grad_weight, grad_bias_U=None)
            backend.chunk_gradients(*inputs, labels, None, *per_row, workspace, temperature=1.0, **grads)

    return step


def eager(tokens: int, hidden: int, vocab: int) -> Callable[[], None]:
    hidden_NH, weight_VH, labels_N, coefficients_3N = make_inputs(tokens, hidden, vocab)
    hidden_NH.requires_grad_()
    weight_VH.requires_grad_()

    def step() -> None:
        hidden_NH.grad = weight_VH.grad = None
        table = (hidden_NH @ weight_VH.t()).float().log_softmax(-1)
        logprobs, entropy = table.gather(1, labels_N[:, None])[:, 0], -(table.exp() * table).sum(-1)
        (logprobs @ coefficients_3N[0] + entropy @ coefficients_3N[1]).backward()

    return step


def bare_matmuls(tokens: int, hidden: int, vocab: int) -> Callable[[], None]:
    hidden_NH, weight_VH, _, _ = make_inputs(tokens, hidden, vocab)
    logits = hidden_NH @ weight_VH.t()

    def step() -> None:
        import torch

        torch.mm(hidden_NH, weight_VH.t(), out=logits)
        logits @ weight_VH
        logits.t() @ hidden_NH

    return step


def variants() -> list[Variant]:
    listed = []
    for tokens, hidden, vocab in SHAPES:
        settings = {"params": dict(tokens=tokens, hidden=hidden, vocab=vocab), "work": 6 * tokens * hidden * vocab / 1e12}
        listed.append(Variant("bare_matmuls", f"{__file__}:bare_matmuls", **settings))
        names = ["triton", "triton_chunks"] + (["eager"] if tokens * vocab <= EAGER_LOGITS else [])
        listed += [Variant(name, f"{__file__}:{name}", **settings, limit_from="bare_matmuls") for name in names]
    return listed


def main() -> None:
    """The command line; refuses where there is nothing to measure."""
    import torch

    from skyrl_mega_kernels.linear_logprobs import triton as backend

    wants_help = bool({"-h", "--help"} & set(sys.argv))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = "torch sees no GPU" if device.type == "cpu" else backend.unavailable(device, torch.bfloat16)
    if reason is not None and not wants_help:
        sys.exit(f"lm_head_gpu.py measures the Triton backend on a GPU, which can't run here: {reason}.")
    bench_main("lm_head_gpu", variants(), rate_unit="TFLOP/s", clock="wall", description=__doc__ or "")


if __name__ == "__main__":
    main()
