"""What `lm_head.py` measures: set-up functions, each called in a fresh process with a variant's params.

Every one builds the inputs of its `case` (hidden, vocab, tokens, dtype) and returns a function without arguments, one call of
which is one forward and backward pass.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # this file is loaded by its path: nothing beside it is importable otherwise

import lm_head_rivals as rivals

Case = dict[str, Any]


def make_inputs(hidden: int, vocab: int, tokens: int, dtype: str):
    import torch

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    kind = getattr(torch, dtype)
    hidden_TH = torch.randn(tokens, hidden, generator=generator).to(kind).requires_grad_()
    weight_VH = torch.randn(vocab, hidden, generator=generator).mul_(hidden**-0.5).to(kind).requires_grad_()
    labels_T = torch.randint(0, vocab, (tokens,), generator=generator)
    return hidden_TH, weight_VH, labels_T, torch.randn(2, tokens, generator=generator)


def repeated(step: Callable, case: Case, *, compile_first: bool = False, with_main_grad: bool = False) -> Callable[[], None]:
    """One call is `step(hidden, weight, labels, grads)` on the case's inputs: a forward and backward pass.

    `with_main_grad`: the weight carries a float32 `main_grad`, as in Megatron's buffers; it counts as an input.

    What the first call of all loads (libraries, and with `compile_first` what it compiles) is not what a step needs: a call on
    tiny inputs, or on the case's own where shapes are compiled, happens before the measurement begins.
    """
    inputs = make_inputs(**case)
    if with_main_grad:
        import torch

        inputs[1].main_grad = torch.full(inputs[1].shape, 0.0)  # zeros() would leave its pages to be counted later
    first = inputs if compile_first else make_inputs(case["hidden"], 64, 8, case["dtype"])
    step(*first)
    for tensor in first[:2]:
        tensor.grad = None

    def repetition() -> None:
        inputs[0].grad = inputs[1].grad = None
        step(*inputs)

    return repetition


def training_step(head: Callable, case: Case, *, compile_first: bool = False) -> Callable[[], None]:
    """A head with per-token gradients of all that it returns."""

    def step(hidden_TH, weight_VH, labels_T, grads_2T) -> None:
        logprobs_T, entropy_T = head(hidden_TH, weight_VH, labels_T)
        loss = logprobs_T.float() @ grads_2T[0]
        if entropy_T is not None:
            loss = loss + entropy_T.float() @ grads_2T[1]
        loss.backward()

    return repeated(step, case, compile_first=compile_first)


def rival(rival_name: str, case: Case) -> Callable[[], None]:
    chosen = rivals.RIVALS[rival_name]
    return training_step(chosen.load(), case, compile_first=chosen.compiles)


def ours(backend: str, case: Case) -> Callable[[], None]:
    from skyrl_mega_kernels.linear_logprobs import linear_logprobs

    def head(*inputs):
        output = linear_logprobs(*inputs, return_entropy=True, backend=backend)
        return output.logprobs, output.entropy

    return training_step(head, case)


def head_then_loss(backend: str, case: Case) -> Callable[[], None]:
    from skyrl_mega_kernels.linear_logprobs import linear_logprobs

    def step(hidden_TH, weight_VH, labels_T, grads_2T) -> None:
        output = linear_logprobs(hidden_TH, weight_VH, labels_T, return_entropy=True, backend=backend)
        loss, _ = ppo_clip_objective(grads_2T[0], slice(None), output.logprobs, output.entropy)
        loss.backward()

    return repeated(step, case, with_main_grad=True)


def fused_loss(backend: str, case: Case) -> Callable[[], None]:
    from skyrl_mega_kernels.linear_policy_loss import linear_policy_loss

    def step(hidden_TH, weight_VH, labels_T, grads_2T) -> None:
        loss_fn = functools.partial(ppo_clip_objective, grads_2T[0])
        linear_policy_loss(hidden_TH, weight_VH, labels_T, loss_fn, return_entropy=True, backend=backend).loss.backward()

    return repeated(step, case, with_main_grad=True)


def ppo_clip_objective(advantages_T, rows, logprobs_C, entropy_C):
    """(loss, statistics) of the trainer's own objective on some rows: ppo_clip, token mean, and an entropy bonus."""
    import torch

    from skyrl_mega.algorithms.loss import Objective
    from skyrl_mega.algorithms.policy_losses import LossInputs
    from skyrl_mega.config.schema import AlgorithmConfig, KLConfig

    config = AlgorithmConfig(entropy_coef=0.01, kl=KLConfig(coef=0.0))
    advantages_C = advantages_T[rows]
    # Old log-probabilities a little off the new ones: ratios on both sides of 1, some of them clipped.
    old_C = logprobs_C.detach() + 0.2 * advantages_C.sin()
    mask_C = torch.ones_like(logprobs_C, dtype=torch.bool)
    inputs = LossInputs(logprobs_C, old_C, old_C, advantages_C, mask_C, entropy=entropy_C)
    return Objective(config)(inputs, torch.full_like(advantages_C, 1 / len(advantages_T)))


def bare_gemms(count: int, case: Case) -> Callable[[], None]:
    """The head's GEMMs by torch.mm, with nothing between them: logits (twice for 4), gradient of hidden, gradient of weight."""
    hidden_TH, weight_VH, _, _ = (tensor.detach() for tensor in make_inputs(**case))

    def step() -> None:
        for _ in range(count - 2):
            logits_TV = hidden_TH @ weight_VH.t()
        logits_TV @ weight_VH
        logits_TV.t() @ hidden_TH

    return step


def brgemm(case: Case) -> Callable[[], None]:
    """oneDNN's small GEMM, float32 sums, on one [256 x H] x [H x 64] tile, as often as the case's three GEMMs need it.

    Called by the name its C++ symbol has in torch's library: torch offers it to C++ alone.
    """
    import ctypes

    import torch

    torch.set_num_threads(1)
    dtype = getattr(torch, case["dtype"])
    element = {torch.float32: "KfS3_", torch.bfloat16: "KN3c108BFloat16ES5_"}[dtype]
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    function = library[f"_ZN2at6native7cpublas6brgemmEllllllbP{element}Pfb"]
    function.argtypes = [ctypes.c_long] * 6 + [ctypes.c_bool] + [ctypes.c_void_p] * 3 + [ctypes.c_bool]
    function.restype = None
    m, n, k = 256, 64, case["hidden"]
    a, b, out = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype), torch.empty(m, n)
    calls = round(3 * case["tokens"] * case["vocab"] / (m * n))

    def step() -> None:
        # Packed by pairs (VNNI) is what bfloat16 wants; the numbers do not matter here.
        arguments = (m, n, k, k, n, n, False, a.data_ptr(), b.data_ptr(), out.data_ptr(), dtype == torch.bfloat16)
        for _ in range(calls):
            function(*arguments)

    return step
