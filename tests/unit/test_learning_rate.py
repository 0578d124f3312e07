"""Learning-rate schedules against their formulas, update by update."""

import math
from dataclasses import replace

import pytest

from skyrl_mega.config.learning_rate import critic_updates, learning_rate, policy_updates
from skyrl_mega.config.schema import Config, CriticConfig, OptimizerConfig, TrainerConfig, WarmupConfig

LR, WARMUP, TOTAL, FLOOR = 2e-3, 4, 20, 0.1


def rates(planned=TOTAL, **settings):
    config = OptimizerConfig(lr=LR, warmup_updates=WARMUP, **settings)
    return [learning_rate(config, update, planned_updates=planned) for update in range(TOTAL + 3)]


def fallen(left):
    """The rates of a decay from LR to FLOOR x LR, where `left` is the share of the way that is left."""
    return [LR * (FLOOR + (1 - FLOOR) * share) for share in left]


UP = [LR * 0.25, LR * 0.5, LR * 0.75, LR]
AFTER = [LR * FLOOR] * 3


def test_a_constant_rate_warms_up_linearly_and_needs_no_end():
    assert rates(planned=0, schedule="constant") == pytest.approx([*UP, *[LR] * (TOTAL + 3 - WARMUP)])


def test_cosine_and_linear_fall_from_the_end_of_the_warm_up_to_the_end_of_the_run():
    length = TOTAL - WARMUP
    cosine = fallen((1 + math.cos(math.pi * u / length)) / 2 for u in range(length))
    assert rates(schedule="cosine", min_lr_ratio=FLOOR) == pytest.approx([*UP, *cosine, *AFTER])
    linear = fallen(1 - u / length for u in range(length))
    assert rates(schedule="linear", min_lr_ratio=FLOOR) == pytest.approx([*UP, *linear, *AFTER])


def test_decay_updates_end_the_fall_earlier_and_total_updates_go_before_the_plan():
    given = rates(schedule="linear", decay_updates=8)
    assert given == pytest.approx([*UP, *(LR * (1 - u / 8) for u in range(8)), *[0.0] * (TOTAL + 3 - 12)])
    longer = rates(planned=5, schedule="cosine", total_updates=TOTAL, min_lr_ratio=FLOOR)
    assert longer == rates(schedule="cosine", min_lr_ratio=FLOOR)


@pytest.mark.parametrize(
    ("shape", "rate"),
    [
        ("linear", lambda p: FLOOR + (1 - FLOOR) * (1 - p)),
        ("cosine", lambda p: FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * p)) / 2),
        ("sqrt", lambda p: FLOOR + (1 - FLOOR) * (1 - math.sqrt(p))),
        ("exponential", lambda p: FLOOR**p),
    ],
)
def test_wsd_is_stable_and_falls_in_its_last_updates(shape, rate):
    got = rates(schedule="wsd", wsd_decay=shape, decay_updates=5, min_lr_ratio=FLOOR)
    assert got == pytest.approx([*UP, *[LR] * (TOTAL - WARMUP - 5), *(LR * rate(u / 5) for u in range(5)), *AFTER])
    # A tenth of the run is the default.
    assert rates(schedule="wsd", wsd_decay=shape, min_lr_ratio=FLOOR) == rates(
        schedule="wsd", wsd_decay=shape, decay_updates=2, min_lr_ratio=FLOOR
    )


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "wsd"])
def test_no_planned_update_is_wasted_and_no_rate_rises_after_the_warm_up(schedule):
    got = rates(schedule=schedule)
    assert min(got[:TOTAL]) > 0
    assert got[WARMUP - 1] == max(got) == LR
    assert got[WARMUP - 1 :] == sorted(got[WARMUP - 1 :], reverse=True)


def test_a_run_plans_the_updates_that_its_settings_ask_for():
    trainer = TrainerConfig(max_steps=10, updates_per_step=3)
    config = Config(trainer=trainer, warmup=WarmupConfig(steps=7), critic=CriticConfig(warmup_steps=2))
    assert policy_updates(config, has_critic=False) == 7 + 30
    assert policy_updates(config, has_critic=True) == 7 + 24
    assert critic_updates(replace(config, warmup=WarmupConfig())) == 30
