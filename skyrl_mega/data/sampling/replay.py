"""Replay: groups that were trained some steps ago are trained again, beside the step's own.

A group sampled by an older policy still teaches something, and costs no rollout. How much falls with its age, and the loss must
weigh it by how far the policy has moved since (docs/off_policy.md), so its age is bounded. Which groups a step replays depends on
the run's seed, the step and the candidates alone: a repeated step repeats its replays.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TypeVar

from skyrl_mega.config.schema import Config
from skyrl_mega.data.hashing import stable_hash

Group = TypeVar("Group")


def replays_per_step(config: Config) -> int:
    """Groups that a step replays once there are enough: `sampling.replay.share` of `trainer.prompts_per_step`, to the nearest."""
    return round(config.sampling.replay.share * config.trainer.prompts_per_step)


def choose_replayed(candidates: Sequence[str], count: int, *, updates: int, seed: int, step: int) -> list[str]:
    """At most `count` of the groups in `candidates`, none twice, in their order: a whole number for each of `updates` updates.

    Uniform, and fixed by (seed, step, candidates).
    """
    count = min(count, len(candidates)) // updates * updates
    chosen = Random(stable_hash("replay", seed, step)).sample(range(len(candidates)), count)
    return [candidates[place] for place in sorted(chosen)]


def interleave(own: Sequence[Group], replayed: Sequence[Group], updates: int) -> list[Group]:
    """The step's own groups and the replayed ones, so that each of `updates` equal parts has its share of both."""
    parts = range(updates)
    return [
        group
        for u in parts
        for groups in (own, replayed)
        for group in groups[u * len(groups) // updates : (u + 1) * len(groups) // updates]
    ]
