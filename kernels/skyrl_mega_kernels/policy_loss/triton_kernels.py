"""Policy losses, their gradients and their statistics, in Triton: the formulas of `csrc/cpu/policy_loss_kernels.h` again.

A block of tokens, or a sequence, per program; every program writes its sums beside the others', to be added up in their order.
`LOSS` chooses the formulas when a kernel is compiled, so that each is a kernel of its own.
"""

import triton
import triton.language as tl

from skyrl_mega_kernels.triton_jit import jit

#: Loss and at most five statistics.
NUM_SUMS = tl.constexpr(6)
_MAX_ABS_LOG_RATIO = tl.constexpr(20.0)


@triton.jit
def beyond_linear(x, ratio):
    """ratio - 1 - x, near 0 by the terms of exp's polynomial beyond the first two (there the difference has no digits left)."""
    q = 1.9875691500e-4 * x + 1.3981999507e-3
    q = q * x + 8.3334519073e-3
    q = q * x + 4.1665795894e-2
    q = q * x + 1.6666665459e-1
    q = q * x + 5.0000001201e-1
    return tl.where(tl.abs(x) < 0.34, q * x * x, ratio - 1.0 - x)


@triton.jit
def clipped_log_ratio(numerator, denominator, counts):
    """(log ratio within +-20, whether it has a gradient: it counts and is not clipped)."""
    difference = numerator - denominator
    is_inside = counts & (difference >= -_MAX_ABS_LOG_RATIO) & (difference <= _MAX_ABS_LOG_RATIO)
    log_ratio = tl.where(difference < -_MAX_ABS_LOG_RATIO, -_MAX_ABS_LOG_RATIO, difference)
    return tl.where(log_ratio > _MAX_ABS_LOG_RATIO, _MAX_ABS_LOG_RATIO, log_ratio), is_inside


@triton.jit
def _load_tokens(logprobs, denominators, advantages, loss_mask, at, is_there):
    """(logprob, denominator, advantage, log ratio, counts, has a gradient by its ratio); of a masked token 0."""
    counts = tl.load(loss_mask + at, mask=is_there, other=0) != 0
    logprob = tl.load(logprobs + at, mask=counts, other=0.0)
    denominator = tl.load(denominators + at, mask=counts, other=0.0)
    advantage = tl.load(advantages + at, mask=counts, other=0.0)
    log_ratio, is_inside = clipped_log_ratio(logprob, denominator, counts)
    return logprob, denominator, advantage, log_ratio, counts, is_inside


@triton.jit
def one_where(condition):
    return tl.where(condition, 1.0, 0.0)


@triton.jit
def _clipped(ratio, advantage, low, high):
    """(clipped surrogate, is_low, is_high)."""
    is_low = (advantage < 0) & (ratio < low)
    is_high = (advantage > 0) & (ratio > high)
    return -tl.where(is_low, low, tl.where(is_high, high, ratio)) * advantage, is_low, is_high


@triton.jit
def _probability(logprob):
    return tl.exp(tl.where(logprob > 0, 0.0, logprob))


@jit
def token_policy_loss(
    logprobs,
    denominators,
    advantages,
    loss_mask,
    weights,
    loss_weights,
    marked,
    gradient,
    sums,
    num_tokens,
    option_0,
    option_1,
    option_2,
    LOSS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of tokens: gradient[t], and sums[program, :] of the loss and its statistics."""
    program = tl.program_id(0).to(tl.int64)
    at = program * BLOCK + tl.arange(0, BLOCK)
    is_there = at < num_tokens
    logprob, denominator, advantage, x, counts, is_inside = _load_tokens(
        logprobs, denominators, advantages, loss_mask, at, is_there
    )
    weight = tl.load(weights + at, mask=counts, other=0.0)
    loss_weight = tl.load(loss_weights + at, mask=counts, other=0.0)
    ratio = tl.exp(x)
    zero = tl.zeros([BLOCK], tl.float32)
    first, second, third, fourth, fifth = ratio, beyond_linear(x, ratio), zero, zero, zero

    if LOSS == "ppo_clip" or LOSS == "dual_clip" or LOSS == "clip_cov":
        loss, is_low, is_high = _clipped(ratio, advantage, 1.0 - option_0, 1.0 + option_1)
        slope = tl.where(is_inside & (is_low == 0) & (is_high == 0), loss, 0.0)
        third, fourth = one_where(is_low), one_where(is_high)
        if LOSS == "dual_clip":
            bound = -option_2 * advantage
            is_capped = (advantage < 0) & (loss > bound)
            loss, slope, fifth = tl.where(is_capped, bound, loss), tl.where(is_capped, 0.0, slope), one_where(is_capped)
        if LOSS == "clip_cov":
            is_marked = counts & (tl.load(marked + at, mask=is_there, other=0) != 0)
            loss, slope, fifth = tl.where(is_marked, 0.0, loss), tl.where(is_marked, 0.0, slope), one_where(is_marked)
    elif LOSS == "cispo":
        low, high = 1.0 - option_0, 1.0 + option_1
        is_low, is_high = ratio < low, ratio > high
        slope = -tl.where(is_low, low, tl.where(is_high, high, ratio)) * advantage
        loss, third, fourth = slope * logprob, one_where(is_low), one_where(is_high)
    elif LOSS == "sapo":
        tau = tl.where(advantage > 0, option_0, option_1)
        negated = tau * (1.0 - ratio)
        decay = tl.exp(tl.where(negated > 87.0, 87.0, negated))
        is_open = 1.0 / (1.0 + decay)
        third = 4.0 * is_open * (decay * is_open)  # 1 - open, without cancellation
        loss = -advantage * is_open * (4.0 / tau)
        slope = tl.where(is_inside, -advantage * ratio * third, 0.0)
    elif LOSS == "dppo_tv" or LOSS == "dppo_kl":
        p, q = _probability(logprob), _probability(denominator)
        if LOSS == "dppo_tv":
            is_low, is_high = p - q < -option_0, p - q > option_1
        else:
            divergence = (1.0 - q) * tl.log((1.0 - q + 1e-8) / (1.0 - p + 1e-8)) - q * x
            is_low, is_high = (divergence > option_0) & (p < q), (divergence > option_1) & (p > q)
        is_low, is_high = is_low & (advantage < 0), is_high & (advantage > 0)
        is_over = ratio > option_2
        slope = tl.where(is_low | is_high, 0.0, -tl.where(is_over, option_2, ratio) * advantage)
        loss = slope * (1.0 + (logprob - logprob))  # x - x is 0, or NaN
        third, fourth, fifth = one_where(is_low), one_where(is_high), one_where(is_over)
    elif LOSS == "kl_cov":
        is_marked = counts & (tl.load(marked + at, mask=is_there, other=0) != 0)
        third, fourth = one_where(is_marked), tl.where(is_marked, tl.abs(x), 0.0)
        sign = one_where(x > 0) - one_where(x < 0)
        loss = option_0 * fourth - ratio * advantage
        slope = tl.where(is_inside, tl.where(is_marked, option_0 * sign, 0.0) - ratio * advantage, 0.0)
    elif LOSS == "reinforce":
        loss, slope = -advantage * logprob, -advantage
    elif LOSS == "importance_sampling":
        loss = -ratio * advantage
        slope = tl.where(is_inside, loss, 0.0)
    else:
        tl.static_assert(LOSS == "cross_entropy", "no such loss")
        loss, slope = -logprob, -one_where(counts)

    tl.store(gradient + at, slope * loss_weight, mask=is_there)
    own = sums + program * NUM_SUMS
    tl.store(own, tl.sum(loss * loss_weight, 0))
    tl.store(own + 1, tl.sum(first * weight, 0))
    tl.store(own + 2, tl.sum(second * weight, 0))
    tl.store(own + 3, tl.sum(third * weight, 0))
    tl.store(own + 4, tl.sum(fourth * weight, 0))
    tl.store(own + 5, tl.sum(fifth * weight, 0))


@triton.jit
def _part(x, advantage, is_inside, option_0, option_1, LOSS: tl.constexpr):
    """(a token's part of its sequence's mean, whether that follows its logprob, is_low, is_high)."""
    if LOSS == "gmpo":
        is_low, is_high = (advantage < 0) & (x < -option_0), (advantage > 0) & (x > option_1)
        takes_part = (advantage > 0) | (advantage < 0)
        part = tl.where(takes_part, tl.where(is_low, -option_0, tl.where(is_high, option_1, x)), 0.0)
        follows = is_inside & takes_part & (is_low == 0) & (is_high == 0)
    else:
        is_low, is_high, part, follows = x != x, x != x, x, is_inside
    return part, follows, is_low, is_high


@jit
def sequence_policy_loss(
    logprobs,
    denominators,
    advantages,
    loss_mask,
    weights,
    loss_weights,
    cu_seqlens,
    gradient,
    sums,
    option_0,
    option_1,
    LOSS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One sequence in three walks: its number, the losses with that number, and back through the mean to the tokens."""
    program = tl.program_id(0).to(tl.int64)
    start = tl.load(cu_seqlens + program)
    end = tl.load(cu_seqlens + program + 1)
    lanes = tl.arange(0, BLOCK)
    zero = tl.zeros([BLOCK], tl.float32)

    total, count, ratios, kls, lows, highs = zero, zero, zero, zero, zero, zero
    for first in range(start, end, BLOCK):
        at = first + lanes
        _, _, advantage, x, counts, is_inside = _load_tokens(logprobs, denominators, advantages, loss_mask, at, at < end)
        weight = tl.load(weights + at, mask=counts, other=0.0)
        ratio = tl.exp(x)
        part, _, is_low, is_high = _part(x, advantage, is_inside, option_0, option_1, LOSS)
        total += part
        count += one_where(counts)
        kls += beyond_linear(x, ratio) * weight
        if LOSS == "gmpo":
            ratios += ratio * weight
            lows += one_where(is_low) * weight
            highs += one_where(is_high) * weight
    num_counting = tl.maximum(tl.sum(count, 0), 1.0)
    scale = tl.exp(tl.sum(total, 0) / num_counting) + zero

    losses, slopes, scales = zero, zero, zero
    for first in range(start, end, BLOCK):
        at = first + lanes
        is_there = at < end
        _, _, advantage, x, counts, is_inside = _load_tokens(logprobs, denominators, advantages, loss_mask, at, is_there)
        weight = tl.load(weights + at, mask=counts, other=0.0)
        loss_weight = tl.load(loss_weights + at, mask=counts, other=0.0)
        if LOSS == "gmpo":
            loss = -scale * advantage
            slope = loss
        else:
            loss, is_low, is_high = _clipped(scale, advantage, 1.0 - option_0, 1.0 + option_1)
            slope = tl.where(is_low | is_high, 0.0, loss)
            lows += one_where(is_low) * weight
            highs += one_where(is_high) * weight
        losses += loss * loss_weight
        slopes += slope * loss_weight
        scales += scale * weight
        if LOSS == "gspo_token":
            tl.store(gradient + at, tl.where(is_inside, slope * loss_weight, 0.0), mask=is_there)

    if LOSS != "gspo_token":
        to_each = tl.sum(slopes, 0) / num_counting
        for first in range(start, end, BLOCK):
            at = first + lanes
            is_there = at < end
            _, _, advantage, x, counts, is_inside = _load_tokens(logprobs, denominators, advantages, loss_mask, at, is_there)
            _, follows, _, _ = _part(x, advantage, is_inside, option_0, option_1, LOSS)
            tl.store(gradient + at, tl.where(follows, to_each, 0.0), mask=is_there)

    own = sums + program * NUM_SUMS
    tl.store(own, tl.sum(losses, 0))
    if LOSS == "gmpo":
        tl.store(own + 1, tl.sum(ratios, 0))
        tl.store(own + 2, tl.sum(kls, 0))
    else:
        tl.store(own + 1, tl.sum(kls, 0))
        tl.store(own + 2, tl.sum(scales, 0))
    tl.store(own + 3, tl.sum(lows, 0))
    tl.store(own + 4, tl.sum(highs, 0))
    tl.store(own + 5, tl.sum(scales, 0))
