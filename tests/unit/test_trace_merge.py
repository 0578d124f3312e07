"""Several processes' traces on one time line: nothing lost, no two processes mixed up, torn ends tolerated."""

import json

import pytest

from skyrl_mega.errors import DataError
from skyrl_mega.launch import cli
from skyrl_mega.telemetry.phases import PhaseTimer
from skyrl_mega.telemetry.trace_merge import merge_traces


def event(name, ts, *, pid=0, dur=10.0, **more):
    return {"name": name, "cat": "phase", "ph": "X", "ts": ts, "dur": dur, "pid": pid, "tid": 1, "args": {}, **more}


def write(path, events, *, end="\n]\n"):
    path.write_text("[\n" + ",\n".join(json.dumps(e) for e in events) + end)


def named(name, pid=0):
    return {"name": "process_name", "ph": "M", "pid": pid, "tid": 0, "args": {"name": name}}


def by_process(path):
    events = json.loads(path.read_text())
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    order = {e["pid"]: e["args"]["sort_index"] for e in events if e["name"] == "process_sort_index"}
    found = {names[pid]: [] for pid in sorted(names, key=order.__getitem__)}
    for e in events:
        if e["ph"] != "M":
            found[names[e["pid"]]].append(e["name"])
    return found


def test_processes_keep_their_events_and_stand_in_order(tmp_path):
    for rank in (0, 10, 2):
        timer = PhaseTimer(tmp_path / ("trace.json" if rank == 0 else f"trace_rank{rank}.json"), rank=rank)
        with timer.phase(f"train{rank}"):
            pass
        timer.close()
    write(tmp_path / "trace_engine-1.json", [event("decode", 5.0)])  # nameless: the file's name says it
    write(
        tmp_path / "trace_rollout.json",
        [named("coordinator"), event("admit", 1.0), named("engine-0", 1), event("decode", 2.0, pid=1)],
    )
    write(tmp_path / "trace_misc.json", [named("weight transfer"), event("bucket", 3.0)])
    (tmp_path / "trace_vllm.json").write_text(json.dumps({"traceEvents": [named("profiler"), event("kernel", 4.0)]}))
    merged = merge_traces(tmp_path)
    expected = {
        "rank 0": ["train0"],
        "rank 2": ["train2"],
        "rank 10": ["train10"],
        "coordinator": ["admit"],
        "engine-0": ["decode"],
        "engine-1": ["decode"],
        "weight transfer": ["bucket"],
        "profiler": ["kernel"],
    }
    assert by_process(tmp_path / "trace_all.json") == expected
    assert list(by_process(merged.path)) == [process.name for process in merged.processes] == list(expected)
    assert [process.num_events for process in merged.processes] == [1] * 8
    assert merged.torn == {}
    assert by_process(merge_traces(tmp_path).path) == expected, "the merged file is no input of the next merge"


def test_times_and_other_fields_stay_as_they_are(tmp_path):
    flow = {"name": "request", "ph": "s", "id": 7, "ts": 12.5, "pid": 3, "tid": 9}
    thread = {"name": "thread_name", "ph": "M", "pid": 3, "tid": 9, "args": {"name": "loop"}}
    write(tmp_path / "trace.json", [named("rank 0", 3), thread, event("train", 10.25, pid=3, dur=2.5), flow])
    merged = merge_traces(tmp_path, tmp_path / "out.json")
    events = json.loads((tmp_path / "out.json").read_text())
    assert events[2:] == [{**thread, "pid": 0}, {**event("train", 10.25, dur=2.5)}, {**flow, "pid": 0}]
    [process] = merged.processes
    assert (process.first_us, process.last_us) == (10.25, 12.75)


@pytest.mark.parametrize("end", ["", ",", ',\n{"name": "torn", "ph"', ",\n{"])
def test_the_end_of_a_killed_processs_trace_may_be_missing(tmp_path, end, capsys):
    write(tmp_path / "trace.json", [named("rank 0"), event("a", 1.0), event("b", 2.0)], end=end)
    (tmp_path / "trace_rank1.json").write_text("[\n")
    assert by_process(merge_traces(tmp_path).path) == {"rank 0": ["a", "b"]}
    assert cli.main(["trace", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "rank 0   trace.json       2   0.000  0.000" in text
    assert f"wrote {tmp_path / 'trace_all.json'}" in text
    assert ("trace.json: 1 unfinished line left out" in text) == ("{" in end)


def test_what_is_no_trace_is_named(tmp_path, capsys):
    assert cli.main(["trace", str(tmp_path)]) == 2
    assert "has no trace; run with `telemetry.trace=true`" in capsys.readouterr().err
    assert cli.main(["trace", str(tmp_path / "absent")]) == 2
    assert "RUN must be the directory of a run" in capsys.readouterr().err
    (tmp_path / "trace.json").write_text("hello\n")
    with pytest.raises(DataError, match=r"trace.json must be a Chrome trace, one event a line; it begins with 'hello"):
        merge_traces(tmp_path)
    (tmp_path / "trace.json").write_text('{"other": 1}')
    with pytest.raises(DataError, match="an object with `traceEvents`"):
        merge_traces(tmp_path)
    assert not (tmp_path / "trace_all.json").exists()
