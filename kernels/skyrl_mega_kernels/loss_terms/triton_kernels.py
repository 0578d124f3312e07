"""The loss terms in Triton: the formulas of `csrc/cpu/loss_terms_kernels.h` again.

A block of tokens per program, which writes its sums beside the others', to be added up in their order. `KL` and `HAS_ENTROPY`
choose when a kernel is compiled, so that each is a kernel of its own.
"""

import triton.language as tl

from skyrl_mega_kernels.policy_loss.triton_kernels import beyond_linear, clipped_log_ratio, one_where
from skyrl_mega_kernels.triton_jit import jit

#: The sums of table.py, the largest distance, and one place that stays empty.
NUM_SUMS = tl.constexpr(8)


@jit
def loss_terms(
    trainer_logprobs,
    rollout_logprobs,
    loss_mask,
    weights,
    logprobs,
    ref_logprobs,
    entropy,
    logprobs_gradient,
    entropy_gradient,
    sums,
    num_tokens,
    kl_coef,
    entropy_coef,
    KL: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of tokens: the gradients, and sums[program, :]."""
    program = tl.program_id(0).to(tl.int64)
    at = program * BLOCK + tl.arange(0, BLOCK)
    is_there = at < num_tokens
    counts = tl.load(loss_mask + at, mask=is_there, other=0) != 0
    every_weight = tl.load(weights + at, mask=is_there, other=0.0)
    weight = tl.where(counts, every_weight, 0.0)
    trainer = tl.load(trainer_logprobs + at, mask=counts, other=0.0)
    engine = tl.load(rollout_logprobs + at, mask=counts, other=0.0)
    distance = tl.abs(trainer - engine)
    mismatch, _ = clipped_log_ratio(trainer, engine, counts)

    own = sums + program * NUM_SUMS
    if KL != "":
        logprob = tl.load(logprobs + at, mask=counts, other=0.0)
        reference = tl.load(ref_logprobs + at, mask=counts, other=0.0)
        x, is_inside = clipped_log_ratio(reference, logprob, counts)
        excess = beyond_linear(x, tl.exp(x))
        if KL == "k1" or KL == "k1+":
            value, slope = -x, tl.full([BLOCK], 1.0, tl.float32)
        elif KL == "k2":
            value, slope = 0.5 * x * x, -x
        elif KL == "k3" or KL == "k3+":
            value, slope = excess, -(excess + x)
        else:
            tl.static_assert(KL == "abs", "no such estimator")
            value, slope = tl.abs(x), one_where(x < 0) - one_where(x > 0)
        if KL == "k1+" or KL == "k3+":
            slope = -x
        tl.store(logprobs_gradient + at, tl.where(is_inside, slope, 0.0) * (weight * kl_coef), mask=is_there)
        tl.store(own, tl.sum(value * weight, 0))
    else:
        tl.store(own, 0.0)
    if HAS_ENTROPY:
        tl.store(own + 1, tl.sum(tl.load(entropy + at, mask=counts, other=0.0) * weight, 0))
        tl.store(entropy_gradient + at, -entropy_coef * weight, mask=is_there)
    else:
        tl.store(own + 1, 0.0)
    tl.store(own + 2, tl.sum(distance * weight, 0))
    tl.store(own + 3, tl.sum(beyond_linear(mismatch, tl.exp(mismatch)) * weight, 0))
    tl.store(own + 4, -tl.sum(mismatch * weight, 0))
    tl.store(own + 5, tl.sum(every_weight, 0))
    # A maximum may pass over a NaN; a sum can't.
    is_number = distance == distance
    largest = tl.max(tl.where(is_number, distance, 0.0), 0)
    tl.store(own + 6, largest + tl.sum(tl.where(is_number, 0.0, distance), 0))
