"""Would kernels of our own for elementwise policy losses, or for packing, be worth having beside torch and torch.compile?

`loss_*`: the clipped policy loss over N float32 tokens, forward and backward. `pack_*`: the tokens that count, cut out of a
padded [sequences, length] batch, and put back. One thread; the rate is bytes per CPU second that must move (loss: logprobs, old
logprobs, advantages and mask read, one gradient written; packing: every counting token read and written, both ways). The limit
is `copy`. A repetition is 200 calls. What decides is the share of a step: the LM head alone takes seconds over as many tokens
(docs/benchmarks/lm_head.json), so a loss of some tenths of a millisecond is no place for a kernel.

    python scripts/bench/elementwise_losses.py --json docs/benchmarks/elementwise_losses.json
"""

from __future__ import annotations

from collections.abc import Callable

from skyrl_mega.telemetry.bench import Variant, bench_main

TOKENS, CALLS = 16384, 200
SEQUENCES, LENGTH = 64, 512
CLIP = 0.2


def repeated(function: Callable[[], object]) -> Callable[[], None]:
    """Calls of a fraction of a millisecond, often enough for the clock."""

    def repetition() -> None:
        for _ in range(CALLS):
            function()

    return repetition


def clipped_loss(logprobs, old_logprobs, advantages, mask):
    ratio = (logprobs - old_logprobs).exp()
    loss = -(ratio * advantages).minimum(ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
    return (loss * mask).sum() / mask.sum()


def loss_step(function: Callable) -> Callable[[], None]:
    import torch

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    old_logprobs, noise, advantages = torch.randn(3, TOKENS, generator=generator)
    logprobs = (old_logprobs + 0.2 * noise).requires_grad_()
    mask = (torch.rand(TOKENS, generator=generator) < 0.7).float()

    def step() -> None:
        logprobs.grad = None
        function(logprobs, old_logprobs, advantages, mask).backward()

    return repeated(step)


def loss_eager() -> Callable[[], None]:
    return loss_step(clipped_loss)


def loss_compiled() -> Callable[[], None]:
    import torch

    return loss_step(torch.compile(clipped_loss))


def pack_index_select() -> Callable[[], None]:
    import torch

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    padded = torch.randn(SEQUENCES * LENGTH, generator=generator)
    lengths = torch.randint(LENGTH // 4, LENGTH + 1, (SEQUENCES,), generator=generator)
    index = (torch.arange(LENGTH) < lengths[:, None]).flatten().nonzero().squeeze(1)

    def there_and_back() -> None:
        packed = padded.index_select(0, index)
        padded.new_zeros(padded.shape).index_copy_(0, index, packed)

    return repeated(there_and_back)


def copy() -> Callable[[], None]:
    import torch

    torch.set_num_threads(1)
    source = torch.randn(5 * TOKENS // 2)
    return repeated(source.clone)


def variants() -> list[Variant]:
    loss_work = CALLS * 5 * TOKENS * 4 / 1e9
    pack_work = CALLS * 4 * SEQUENCES * LENGTH * 4 * 0.625 / 1e9  # sequences are 5/8 full on average
    return [
        Variant("copy", f"{__file__}:copy", {}, loss_work),
        Variant("loss_eager", f"{__file__}:loss_eager", {}, loss_work, limit_from="copy"),
        Variant("loss_compiled", f"{__file__}:loss_compiled", {}, loss_work, limit_from="copy"),
        Variant("pack_index_select", f"{__file__}:pack_index_select", {}, pack_work, limit_from="copy"),
    ]


if __name__ == "__main__":
    bench_main("elementwise_losses", variants(), rate_unit="GB/s", description=__doc__ or "")
