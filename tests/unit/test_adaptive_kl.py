"""The coefficient of the distance to the reference, steered towards a target by the loop and kept over a resume."""

from __future__ import annotations

from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrl_mega.algorithms.kl import next_kl_coef
from skyrl_mega.checkpoint import store
from skyrl_mega.config.schema import AlgorithmConfig, Config, EnvConfig, KLConfig, ModelConfig
from skyrl_mega.orchestration.loop import adapt_kl_coef, advance, current_kl_coef
from skyrl_mega.types import TrainState


@pytest.mark.parametrize(
    ("kl", "expected"),
    [(0.1, 0.5), (0.11, 0.5 * 1.01), (0.2, 0.5 * 1.02), (9.0, 0.5 * 1.02), (0.05, 0.5 * 0.98), (-1.0, 0.5 * 0.98)],
)
def test_the_coefficient_follows_the_relative_error_up_to_a_fifth(kl, expected):
    assert next_kl_coef(0.5, kl, target=0.1, horizon=100, num_samples=10) == pytest.approx(expected)


@given(st.floats(1e-6, 10), st.floats(-10, 1e3), st.floats(1e-6, 10), st.integers(1, 64))
def test_it_stays_positive_and_moves_towards_the_target(coef, kl, target, num_samples):
    after = next_kl_coef(coef, kl, target=target, horizon=64, num_samples=num_samples)
    assert 0.8 * coef - 1e-12 <= after <= 1.2 * coef + 1e-12
    assert (after - coef) * (kl - target) >= 0


def test_a_policy_that_answers_to_the_coefficient_settles_at_the_target():
    coef = 0.01
    for _ in range(2000):
        kl = 0.02 / coef  # the stronger the pull, the smaller the distance
        coef = next_kl_coef(coef, kl, target=0.25, horizon=1000, num_samples=100)
    assert 0.02 / coef == pytest.approx(0.25, rel=1e-2)


def parts_of(state=None, **kl):
    config = Config(model=ModelConfig(path="x"), env=EnvConfig("x"), algorithm=AlgorithmConfig(kl=KLConfig(**kl)))
    return SimpleNamespace(
        config=config,
        state=state or TrainState(0, 0, {}, num_trained_groups=0, num_optimizer_steps=0),
        policy=SimpleNamespace(num_updates=1, kl_coef=None),
        recorder=SimpleNamespace(step_seconds=lambda: 1.0),
        skipped=SimpleNamespace(take_total=lambda: 0),
        rollout=None,
        critic=None,
    )


@pytest.mark.parametrize(("place", "name"), [("loss", "policy/kl_ref"), ("reward", "reward/kl")])
def test_the_loop_reports_this_steps_coefficient_and_steers_the_next_steps(place, name):
    parts = parts_of(coef=0.5, target=0.1, horizon=100, place=place)
    for step, coef in ((1, 0.5), (2, 0.5 * 1.02), (3, 0.5 * 1.02**2)):
        assert current_kl_coef(parts) == pytest.approx(coef)
        metrics = adapt_kl_coef(parts, {name: 0.5, "other": 7.0}, num_samples=10)
        assert metrics == {"policy/kl_coef": pytest.approx(coef)}
        parts.state = advance(parts, step, [])
    assert parts.state.step == 3


def test_a_fixed_coefficient_stays_and_no_coefficient_is_not_reported():
    parts = parts_of(coef=0.5)
    assert adapt_kl_coef(parts, {"policy/kl_ref": 9.0}, 10) == {"policy/kl_coef": 0.5}
    assert parts.state.kl_coef is None
    assert adapt_kl_coef(parts_of(), {}, 10) == {}


def test_a_step_that_did_not_train_the_policy_changes_nothing():
    for place, metrics in (("loss", {"update/skipped": 1.0}), ("reward", {"reward/kl": 9.0, "update/skipped": 1.0})):
        parts = parts_of(coef=0.5, target=0.1, place=place)
        assert adapt_kl_coef(parts, metrics, 10) == {"policy/kl_coef": 0.5}
        assert parts.state.kl_coef is None


def test_a_resumed_run_goes_on_where_the_coefficient_stood_unless_it_is_fixed_now(tmp_path):
    parts = parts_of(coef=0.5, target=0.1, horizon=100)
    adapt_kl_coef(parts, {"policy/kl_ref": 0.5}, 10)
    (tmp_path / store.STATE_FILE).write_text(
        store.json.dumps({"format": 2, "state": asdict(parts.state), "layout": {}}), encoding="utf-8"
    )
    state, _ = store.read_state(tmp_path)
    assert current_kl_coef(parts_of(state, coef=0.5, target=0.1)) == pytest.approx(0.51)
    assert current_kl_coef(parts_of(state, coef=0.25)) == 0.25
    assert current_kl_coef(parts_of(replace(state, kl_coef=None), coef=0.25, target=0.1)) == 0.25
