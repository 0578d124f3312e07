"""`skyrl-mega checkpoints`: the table of a run's checkpoints."""

import io
import json
import os

import pytest

from skyrl_mega.checkpoint import manifest, store
from skyrl_mega.launch import cli
from skyrl_mega.launch.checkpoints import run_checkpoints
from skyrl_mega.types import TrainState


@pytest.fixture
def run_dir(tmp_path):
    """Steps 10 (best), 20 and 30, whole; 25 set aside; 40 half written."""
    for step, accuracy in ((10, 0.75), (20, 0.5), (30, 0.25)):
        temporary = store.begin(tmp_path, step)
        (temporary / "tensors.bin").write_bytes(b"x" * 3 * 2**20)
        known = [manifest.FileRecord("tensors.bin", 3 * 2**20, manifest.checksum_of(temporary / "tensors.bin"))]
        state = TrainState(step, step, {}, num_trained_groups=0, num_optimizer_steps=0)
        keep = store.Retention(keep_last=2, keep_best=1)
        store.commit(temporary, state, {}, keep, files=known, metrics={"eval/accuracy": accuracy})
    store.checkpoint_path(tmp_path, 25).with_suffix(store.DAMAGED).mkdir()
    store.checkpoint_path(tmp_path, 40).with_suffix(store.TEMPORARY).mkdir()
    return tmp_path


def saved_settings(monkeypatch, run_dir):
    from skyrl_mega.config.schema import CheckpointConfig
    from skyrl_mega.launch import checkpoints

    monkeypatch.setattr(checkpoints, "_settings", lambda _: CheckpointConfig(keep_last=2, keep_best=1))


def test_every_checkpoint_is_listed_with_what_it_is_kept_for(monkeypatch, run_dir):
    saved_settings(monkeypatch, run_dir)
    output = io.StringIO()
    assert run_checkpoints(run_dir, as_json=True, output=output) == 1  # 25 is damaged
    rows = {row["step"]: (row["state"], row["kept"], row["metric"]) for row in json.loads(output.getvalue())}
    assert rows == {
        10: ("complete", "best", 0.75),
        20: ("complete", "last 2", 0.5),
        25: ("damaged", "set aside", None),
        30: ("complete", "latest", 0.25),
        40: ("being written, or left over", "", None),
    }


def test_the_table_names_damage_and_the_exit_code_tells_it(monkeypatch, run_dir, capsys):
    saved_settings(monkeypatch, run_dir)
    os.rmdir(store.checkpoint_path(run_dir, 25).with_suffix(store.DAMAGED))
    assert cli.main(["checkpoints", str(run_dir)]) == 0
    text = capsys.readouterr().out
    assert "eval/accuracy" in text
    assert "3.0 MiB" in text
    file = store.checkpoint_path(run_dir, 20) / "tensors.bin"
    file.write_bytes(b"y" + file.read_bytes()[1:])
    assert cli.main(["checkpoints", str(run_dir)]) == 0, "sizes alone can't see it"
    assert cli.main(["checkpoints", str(run_dir), "--verify", "checksums"]) == 1
    text = capsys.readouterr().out
    assert "step_000020: tensors.bin has other content than was written" in text


def test_a_directory_that_is_no_run_is_explained(tmp_path, capsys):
    assert cli.main(["checkpoints", str(tmp_path)]) == 2
    assert "has neither config.yaml nor checkpoints" in capsys.readouterr().err
