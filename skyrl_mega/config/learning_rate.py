"""The learning rate of every optimizer update, and how many updates a run plans. Pure numbers: no torch, no state.

A schedule is a function of the update's number u (from 0), so a resumed run needs only its count of updates. With the peak rate
lr, W warm-up updates, T updates in all, D decay updates and the floor m = `min_lr_ratio`:

    u < W:                 lr (u + 1) / W
    constant               lr
    cosine, linear         lr (m + (1 - m) f(p)),  p = (u - W) / D,        D = T - W unless it is given
    wsd                    lr before u = T - D, then lr (m + (1 - m) f(p)),  p = (u - (T - D)) / D,   D = T / 10 unless given

    f: linear 1 - p;  cosine (1 + cos(pi p)) / 2;  sqrt 1 - sqrt(p);  exponential: lr m^p as a whole

p is held to 1 afterwards. The last update of the run is at p = (D - 1) / D, not at 1: with a floor of 0 it would be a wasted one.
Sources: cosine arXiv:1608.03983 (eq. 5), WSD arXiv:2404.06395 (section 4), its shapes arXiv:2405.18392 (section 4).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from skyrl_mega.config.schema import Config, OptimizerConfig

#: wsd's share of the run that decays, where `decay_updates` leaves it open.
WSD_DECAY_SHARE = 10


def learning_rate(config: OptimizerConfig, update: int, *, planned_updates: int = 0) -> float:
    """The learning rate of optimizer update number `update` (from 0).

    `planned_updates`: how many the run makes in all; `config.total_updates` goes before it. A constant schedule needs neither.
    """
    if update < config.warmup_updates:
        return config.lr * (update + 1) / config.warmup_updates
    if config.schedule == "constant":
        return config.lr
    start, length = decay_span(config, planned_updates=planned_updates)
    progress = min(1.0, max(0.0, (update - start) / length))
    shape = config.wsd_decay if config.schedule == "wsd" else config.schedule
    if shape == "exponential":
        return config.lr * config.min_lr_ratio**progress
    left = {"linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)), "sqrt": 1.0 - math.sqrt(progress)}
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * left[shape])


def decay_span(config: OptimizerConfig, *, planned_updates: int) -> tuple[int, int]:
    """(the first update of the decay, how many it takes, at least 1) of a schedule that is not constant."""
    total = config.total_updates or planned_updates
    if config.schedule == "wsd":
        length = max(1, config.decay_updates or total // WSD_DECAY_SHARE)
        return max(config.warmup_updates, total - length), length
    return config.warmup_updates, max(1, config.decay_updates or total - config.warmup_updates)


def policy_updates(config: Config, *, has_critic: bool) -> int:
    """The updates of the policy that a run plans: a warm-up's supervised ones, then those of every step that trains it.

    A step may make fewer: an update without a learning signal, or one that was not finite, is not made and not counted.
    """
    trainer = config.trainer
    steps = trainer.max_steps - (config.critic.warmup_steps if has_critic else 0)
    return config.warmup.steps + steps * trainer.updates_per_step


def critic_updates(config: Config) -> int:
    """The updates of the critic that a run plans: those of every step."""
    return config.trainer.max_steps * config.trainer.updates_per_step
