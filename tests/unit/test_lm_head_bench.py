"""What scripts/bench/lm_head.py concludes from its records, and how it says that something could not be measured."""

import sys
from pathlib import Path

import pytest

BENCH_FOLDER = Path(__file__).parents[2] / "scripts" / "bench"


@pytest.fixture
def lm_head(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH_FOLDER))
    import lm_head

    yield lm_head
    for name in ("lm_head", "lm_head_rivals"):
        sys.modules.pop(name, None)


@pytest.fixture
def case(lm_head):
    return lm_head.cases(["smollm2"], [2048], ["bfloat16"])[0]


def record(lm_head, case, variant, cpu_s, megabytes=100, gemms=4):
    rate = gemms * lm_head.gemm_gflop(case) / cpu_s
    return {"variant": variant, "params": case, "cpu_s": cpu_s, "peak_extra_bytes": megabytes * 10**6, "rate": rate}


def verdicts(lm_head, case, **seconds):
    names = {"ours": lm_head.OURS, "eager": lm_head.EAGER, "cut": lm_head.CUT_CROSS_ENTROPY, "brgemm": lm_head.BRGEMM}
    gemms = {"ours": 4}
    records = [
        record(lm_head, case, names[name], s, 1100 if name == "eager" else 100, gemms.get(name, 3)) for name, s in seconds.items()
    ]
    return {goal.split()[0]: held for goal, held, _ in lm_head.goals(records, case)}


def test_goals_are_judged_against_the_rivals_of_the_same_case(lm_head, case):
    # Four GEMMs in 2 s against a limit of three in 1.35 s: 90% of the rate.
    held = verdicts(lm_head, case, ours=2.0, eager=5.0, cut=1.7, brgemm=1.35)
    assert held == {"1": True, "2": True, "3": True, "4": True, "5": True, "6": None}
    held = verdicts(lm_head, case, ours=2.5, eager=5.0, cut=1.7, brgemm=1.35)
    assert held == {"1": True, "2": False, "3": False, "4": True, "5": False, "6": None}


def test_a_rival_without_entropy_may_be_faster_than_the_fastest_with_it(lm_head, case):
    assert verdicts(lm_head, case, ours=2.0, eager=5.0, cut=1.0)["1"] is True


def test_what_was_not_measured_is_neither_held_nor_missed(lm_head, case):
    assert verdicts(lm_head, case, ours=2.0) == dict.fromkeys("123456", None)
    skipped = [{"variant": lm_head.OURS, "params": case, "skipped": "no compiler"}]
    assert lm_head.goals(skipped, case) == [("all", None, f"{lm_head.OURS} was not measured")]


def test_a_rival_that_is_not_there_is_listed_with_the_remedy(lm_head, case, tmp_path, monkeypatch):
    variant = next(v for v in lm_head.variants(case) if v.name == lm_head.CUT_CROSS_ENTROPY)
    monkeypatch.delenv(lm_head.rivals.RIVALS_ENV, raising=False)
    assert "pip install --no-deps --target DIR cut-cross-entropy" in lm_head.why_skipped(variant, [])
    monkeypatch.setenv(lm_head.rivals.RIVALS_ENV, str(tmp_path))
    assert "cut_cross_entropy/__init__.py is not in the directory" in lm_head.measure(variant, 1, [], None)["skipped"]


def test_what_would_not_fit_into_memory_is_not_started(lm_head, case):
    large = {**case, "tokens": 8192}
    variant = next(v for v in lm_head.variants(large) if v.name == lm_head.EAGER)
    assert lm_head.why_too_large(variant, []) is None
    assert lm_head.why_too_large(variant, [record(lm_head, case, lm_head.EAGER, 1.0, megabytes=1)]) is None
    reason = lm_head.why_too_large(variant, [record(lm_head, case, lm_head.EAGER, 1.0, megabytes=10**9)])
    assert "4 times its T=2048" in reason


def test_a_record_replaces_an_earlier_one_of_the_same_case_only(lm_head, case):
    records = [record(lm_head, case, "eager", 1.0), record(lm_head, {**case, "tokens": 8192}, "eager", 4.0)]
    lm_head.put(records, record(lm_head, case, "eager", 2.0))
    assert [r["cpu_s"] for r in records] == [2.0, 4.0]
