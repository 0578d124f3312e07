"""Benchmark records: measured in a fresh process, in CPU time and in bytes beyond the inputs."""

import json
import textwrap

import pytest

from skyrl_mega.telemetry.bench import Variant, bench_main, run_variant

WORKLOADS = """
    import os, time

    def burn(seconds):
        calls = []

        def repetition():
            calls.append(1)
            start = time.process_time()
            # The warm-up call is much slower than the timed ones, as first calls are.
            while time.process_time() - start < seconds * (20 if len(calls) == 1 else 1):
                pass

        return repetition

    def sleep(seconds):
        return lambda: time.sleep(seconds)

    def allocate(input_mb, extra_mb):
        kept = bytearray(b"x") * (input_mb * 2**20)
        return lambda: len(bytearray(b"x") * (extra_mb * 2**20)) + len(kept)

    def pid():
        print(os.getpid())
        return lambda: None

    def broken(value):
        raise RuntimeError(f"no {value}")
"""


@pytest.fixture
def workloads(tmp_path):
    path = tmp_path / "workloads.py"
    path.write_text(textwrap.dedent(WORKLOADS))
    return str(path)


def test_cpu_and_wall_seconds_are_of_one_repetition_after_the_warm_up(workloads):
    burned = run_variant(f"{workloads}:burn", {"seconds": 0.05})
    assert 0.05 <= burned.cpu_s < 0.2
    assert burned.wall_s >= burned.cpu_s * 0.9
    slept = run_variant(f"{workloads}:sleep", {"seconds": 0.2}, repeats=2)
    assert slept.cpu_s < 0.1 < 0.2 <= slept.wall_s


def test_peak_bytes_are_those_beyond_the_inputs(workloads):
    measured = run_variant(f"{workloads}:allocate", {"input_mb": 200, "extra_mb": 64})
    assert 60 * 2**20 < measured.peak_extra_bytes < 90 * 2**20


def test_a_variant_that_fails_reports_its_last_words(workloads):
    with pytest.raises(RuntimeError, match=r"broken.*'value': 3(.|\n)*no 3"):
        run_variant(f"{workloads}:broken", {"value": 3})


def test_records_carry_rate_limit_and_circumstances(workloads, tmp_path, capsys):
    params = {"seconds": 0.05}
    variants = [
        Variant("matmul", f"{workloads}:burn", params, work=10.0),
        Variant("ours", f"{workloads}:burn", params, work=10.0, limit_from="matmul"),
        Variant("fixed", f"{workloads}:burn", params, work=10.0, limit=1000.0),
        Variant("other", f"{workloads}:broken", {"value": 1}),
    ]
    out = tmp_path / "results" / "bench.json"
    for name in ("ours", "fixed"):
        bench_main("demo", variants, rate_unit="ops/s", argv=["--json", str(out), "--only", name, "--repeats", "1"])
        records = json.loads(out.read_text())
        last = records[-1]
        assert [r["variant"] for r in records] == (["matmul", "ours"] if name == "ours" else ["fixed"])
        assert last["rate"] == pytest.approx(10.0 / last["cpu_s"])
        limit = records[0]["rate"] if name == "ours" else 1000.0
        assert last["limit"] == limit
        assert last["fraction_of_limit"] == pytest.approx(last["rate"] / limit)
        assert {"bench", "params", "wall_s", "peak_extra_bytes", "load", "hardware", "versions", "commit", "date"} <= set(last)
        assert last["params"] == params
    printed = capsys.readouterr().out
    assert "seconds=0.05" in printed
    assert "ops/s" in printed


def test_an_unknown_variant_and_a_limit_that_was_not_measured_are_refused(workloads):
    variant = Variant("ours", f"{workloads}:sleep", {"seconds": 0.0}, work=1.0, limit_from="nothing")
    with pytest.raises(SystemExit):
        bench_main("demo", [variant], rate_unit="x", argv=["--only", "theirs"])
    with pytest.raises(ValueError, match=r"limit_from \('nothing'\) of ours must be an earlier variant"):
        bench_main("demo", [variant], rate_unit="x", argv=["--repeats", "1"])
