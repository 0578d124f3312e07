"""A group, and beside it one greedy answer to the same prompt: the baseline of ReMax (arXiv:2310.10505)."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from skyrl_mega.protocols import GroupRunner
from skyrl_mega.types import PromptGroup, TrajectoryGroup


async def run_with_baseline(
    runner: GroupRunner, group: PromptGroup, *, on_sample: Callable[[], None] | None = None
) -> TrajectoryGroup:
    """What `runner` makes of the group, with the reward of one greedy episode from the same start as `baseline_reward`.

    None where that episode's environment or a term of its reward failed and is masked. `on_sample` is called for it too. Raises
    what the runner raises; the other of the two is cancelled then, and both are when this is.
    """
    both = (
        asyncio.ensure_future(runner(group, on_sample=on_sample)),
        asyncio.ensure_future(runner(replace(group, num_samples=1), greedy=True, on_sample=on_sample)),
    )
    try:
        sampled, greedy = await asyncio.gather(*both)
    finally:
        for task in both:
            task.cancel()
        await asyncio.gather(*both, return_exceptions=True)
    return replace(
        sampled,
        baseline_reward=greedy.trajectories[0].reward if greedy.trajectories else None,
        num_retries=sampled.num_retries + greedy.num_retries,
        reward_errors=dict(Counter(sampled.reward_errors) + Counter(greedy.reward_errors)),
    )
