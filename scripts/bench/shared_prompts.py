"""What does computing a prompt once per group save in a training update, and what does it cost where it can't help?

One update (forward, backward, optimizer) of SmolLM2-135M in bfloat16 on one thread, 8 samples of each prompt. `whole` packs
every sample with its prompt, `shared` packs the prompt once. The rate counts trained samples per CPU second. The LM head and
the optimizer cost the same either way, so the gain stays below the ratio of the packed tokens, which each variant's name
says. `long_responses` is the losing case: little prompt to share.

Needs the model of scripts/prepare_smollm2.py:

    python scripts/bench/shared_prompts.py --json docs/benchmarks/shared_prompts.json
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from skyrl_mega.telemetry.bench import Variant, bench_main

MODEL = Path(__file__).parents[2] / ".cache" / "models" / "SmolLM2-135M-Instruct"
GROUP_SIZE = 8
#: prompts, prompt tokens, response tokens
SHAPES = {"quickstart": (16, 17, 5), "long_prompt": (2, 200, 20), "long_responses": (2, 16, 128)}


def packed_tokens(prompts: int, prompt: int, response: int, *, shared: bool) -> int:
    return prompts * (prompt - 1 + GROUP_SIZE * response if shared else GROUP_SIZE * (prompt + response))


def update(shape: str, shared: bool) -> Callable[[], None]:
    import torch

    from skyrl_mega.config.load import load_config
    from skyrl_mega.data.packing import balance_and_pack
    from skyrl_mega.parallel.device import set_threads
    from skyrl_mega.parallel.topology import init_topology
    from skyrl_mega.training.policy import Policy

    set_threads(1)
    config = load_config(["recipe=quickstart", f"model.path={MODEL}"])
    policy = Policy.from_hf(config, init_topology(config.parallel, torch.device("cpu"), seed=0))
    batch = balance_and_pack(
        make_samples(*SHAPES[shape]),
        tokens_per_micro_batch=2048,
        dp_rank=0,
        dp_size=1,
        skip_zero_advantage=False,
        share_prompts=shared,
    )
    return lambda: policy.train_step(batch)


def make_samples(prompts: int, prompt: int, response: int) -> list:
    import torch

    from skyrl_mega.types import TrainSample

    generator = torch.Generator().manual_seed(0)
    samples = []
    for group in range(prompts):
        prompt_ids = torch.randint(5, 40000, (prompt,), generator=generator)
        for _ in range(GROUP_SIZE):
            ids = torch.cat([prompt_ids, torch.randint(5, 40000, (response,), generator=generator)])
            mask = torch.arange(prompt + response) >= prompt
            advantages = mask * torch.randn((), generator=generator)
            samples.append(TrainSample(len(samples), group, f"g{group}", ids, mask, -1.0 * mask, 0.0, advantages))
    return samples


def variants() -> list[Variant]:
    listed = []
    for shape, sizes in SHAPES.items():
        for shared in (False, True):
            tokens = packed_tokens(*sizes, shared=shared)
            params = {"shape": shape, "shared": shared}
            name = f"{shape}/{'shared' if shared else 'whole'} ({tokens} tokens)"
            listed.append(Variant(name, f"{__file__}:update", params, work=sizes[0] * GROUP_SIZE))
    return listed


if __name__ == "__main__":
    bench_main("shared_prompts", variants(), rate_unit="samples/s", description=__doc__ or "")
