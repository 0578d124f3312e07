"""How far is generalised advantage estimation over packed sequences from the machine's memory bandwidth?

One thread. A token is 16 bytes: reward and value in, advantage and return out; the rate is those bytes per CPU second. The limit
is `copy`, a plain copy of as many bytes into new memory (the operator's outputs are new too), measured first, in the same shape
and thus the same caches. 64 x 2048 is 2 MB and stays in them: its limit lies above the memory's own, which the last shape shows.

    cpu_kernel      the C++ operator alone, without the checks and torch's dispatch in front of it (about 50 microseconds)
    cpu             segmented_gae, C++
    cpu_masked      the same with a loss_mask: runs of 128 tokens that count and 64 that do not
    reference       segmented_gae, log-doubling in torch
    padded_torch    one torch step per position over a [sequences, length] batch, as TRL and verl do
    python_loop     a loop over tokens in Python floats

    python scripts/bench/gae.py --json docs/benchmarks/gae.json
"""

from __future__ import annotations

from collections.abc import Callable

from skyrl_mega.telemetry.bench import Variant, bench_main

BYTES_PER_TOKEN = 16
GAMMA, LAM = 0.99, 0.95


def make_inputs(sequences: int, length: int):
    import torch

    torch.set_num_threads(1)
    rewards, values = torch.randn(2, sequences * length, generator=torch.Generator().manual_seed(0))
    return rewards, values, torch.arange(0, sequences * length + 1, length)


def repeated(function: Callable[[], object], times: int) -> Callable[[], None]:
    """Calls of a fraction of a millisecond, often enough for the clock."""

    def repetition() -> None:
        for _ in range(times):
            function()

    return repetition


def copy(sequences: int, length: int, calls: int) -> Callable[[], None]:
    rewards, values, _ = make_inputs(sequences, length)
    return repeated(lambda: (rewards.clone(), values.clone()), calls)


def cpu_kernel(sequences: int, length: int, calls: int) -> Callable[[], None]:
    from skyrl_mega_kernels.segmented_gae.cpu import gae

    rewards, values, cu_seqlens = make_inputs(sequences, length)
    return repeated(lambda: gae(rewards, values, cu_seqlens, None, None, GAMMA, LAM), calls)


def segmented(backend: str, sequences: int, length: int, calls: int, masked: bool = False) -> Callable[[], None]:
    import torch

    from skyrl_mega_kernels.segmented_gae import segmented_gae

    rewards, values, cu_seqlens = make_inputs(sequences, length)
    mask = torch.arange(rewards.shape[0]) % 192 < 128 if masked else None
    if mask is not None:
        mask[cu_seqlens[:-1]] = True
    settings = dict(gamma=GAMMA, lam=LAM, loss_mask=mask, backend=backend)
    return repeated(lambda: segmented_gae(rewards, values, cu_seqlens, **settings), calls)


def cpu(**shape: int) -> Callable[[], None]:
    return segmented("cpu", **shape)


def cpu_masked(**shape: int) -> Callable[[], None]:
    return segmented("cpu", **shape, masked=True)


def reference(**shape: int) -> Callable[[], None]:
    return segmented("reference", **shape)


def padded_torch(sequences: int, length: int, calls: int) -> Callable[[], None]:
    import torch

    rewards, values, _ = make_inputs(sequences, length)
    rewards, values = rewards.view(sequences, length), values.view(sequences, length)

    def once() -> None:
        advantage, next_value, reversed_columns = torch.zeros(sequences), torch.zeros(sequences), []
        for t in reversed(range(length)):
            advantage = rewards[:, t] + GAMMA * next_value - values[:, t] + GAMMA * LAM * advantage
            next_value = values[:, t]
            reversed_columns.append(advantage)
        advantages = torch.stack(reversed_columns[::-1], dim=1)
        assert (advantages + values).shape == advantages.shape

    return repeated(once, calls)


def python_loop(sequences: int, length: int, calls: int) -> Callable[[], None]:
    import torch

    rewards, values, cu_seqlens = make_inputs(sequences, length)

    def once() -> None:
        reward, value, advantages = rewards.tolist(), values.tolist(), [0.0] * rewards.shape[0]
        for start in cu_seqlens[:-1].tolist():
            advantage = next_value = 0.0
            for t in range(start + length - 1, start - 1, -1):
                advantage = reward[t] + GAMMA * next_value - value[t] + GAMMA * LAM * advantage
                next_value = value[t]
                advantages[t] = advantage
        packed = torch.tensor(advantages)
        assert (packed + values).shape == packed.shape

    return repeated(once, calls)


def variants() -> list[Variant]:
    listed = []
    # Many short sequences, the reference shape, one long sequence, and a batch that no cache holds; `calls` per repetition.
    for sequences, length, calls in ((1024, 128, 100), (64, 2048, 100), (1, 131072, 100), (256, 16384, 10)):
        shape = {"sequences": sequences, "length": length, "calls": calls}
        work = sequences * length * calls * BYTES_PER_TOKEN / 1e9
        names = ["copy", "cpu_kernel", "cpu", "cpu_masked"]
        if (sequences, length) == (64, 2048):
            names += ["reference", "padded_torch", "python_loop"]
        listed += [
            Variant(name, f"{__file__}:{name}", shape, work, limit_from=None if name == "copy" else "copy") for name in names
        ]
    return listed


if __name__ == "__main__":
    bench_main("gae", variants(), rate_unit="GB/s", description=__doc__ or "")
