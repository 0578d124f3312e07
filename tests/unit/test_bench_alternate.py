"""Sides measured by turns: each in its own process, the numbers of each kept apart, a failure reported."""

import textwrap

import pytest

from skyrl_mega.telemetry.bench_alternate import Side, SideResult, median_ratio, run_alternating

SIDES = """
    import os, time

    def burn(seconds, extra_mb=0, log=None):
        calls = []
        kept = bytearray(b"x") * (64 * 2**20)

        def repetition():
            calls.append(1)
            if log:
                with open(log, "a") as file:
                    file.write(f"{seconds} ")
            print("a library talks")
            more = bytearray(b"x") * (extra_mb * 2**20 + len(kept) // 2**30)
            start = time.process_time()
            while time.process_time() - start < seconds:
                pass
            return {"calls": len(calls), "pid": os.getpid()}

        return repetition

    def broken():
        return lambda: 1 / 0

    def slow():
        return lambda: time.sleep(60)
"""


@pytest.fixture
def sides(tmp_path):
    path = tmp_path / "sides.py"
    path.write_text(textwrap.dedent(SIDES))
    return str(path)


def test_sides_take_turns_and_keep_their_own_time_and_memory(sides, tmp_path):
    log = tmp_path / "order.txt"
    small = Side("small", f"{sides}:burn", {"seconds": 0.05, "log": str(log)})
    large = Side("large", f"{sides}:burn", {"seconds": 0.2, "extra_mb": 200, "log": str(log)})
    results = run_alternating([small, large], rounds=2)
    # One warm-up round, then two; every other round backwards.
    assert log.read_text().split() == ["0.05", "0.2", "0.2", "0.05", "0.05", "0.2"]
    assert 2.0 < median_ratio(results["large"], results["small"]) < 20
    assert [len(r.cpu_s) for r in results.values()] == [2, 2]
    assert results["large"].peak_bytes - results["small"].peak_bytes > 150 * 2**20
    assert results["small"].peak_bytes - results["small"].imported_bytes > 60 * 2**20
    for result in results.values():
        assert (result.first["calls"], result.last["calls"]) == (1, 3)
    assert results["small"].first["pid"] != results["large"].first["pid"]


def test_the_ratio_is_the_median_of_the_ratios_within_a_round():
    def result(*seconds: float) -> SideResult:
        return SideResult(seconds, seconds, 0, 0, {}, {})

    # The machine slowed down threefold in the second round: within each round the ratio is 2.
    assert median_ratio(result(2.0, 6.0, 2.0), result(1.0, 3.0, 1.0)) == 2.0
    assert median_ratio(result(2.0, 9.0, 8.0), result(1.0, 3.0, 4.0)) == 2.0


def test_a_side_that_fails_or_hangs_is_named(sides, capfd):
    with pytest.raises(RuntimeError, match=r"bench side 'bad' .* ended with 1"):
        run_alternating([Side("bad", f"{sides}:broken", {})], rounds=1)
    assert "ZeroDivisionError" in capfd.readouterr().err
    with pytest.raises(TimeoutError, match="bench side 'late' gave no answer within 8 s"):
        run_alternating([Side("late", f"{sides}:slow", {})], rounds=1, timeout_s=8)
