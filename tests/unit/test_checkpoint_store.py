"""Which checkpoint directories count, and what survives a writer that dies."""

import pytest

from skyrl_mega.checkpoint import store
from skyrl_mega.errors import CheckpointError
from skyrl_mega.types import TrainState

LAYOUT = {"tensor": 1, "pipeline": 1, "data": 1}


def state(step: int) -> TrainState:
    return TrainState(step, step, {"position": step * 4}, num_trained_groups=step * 4, num_optimizer_steps=step)


def write(run_dir, step: int, keep_last: int = 10):
    temporary = store.begin(run_dir, step)
    (temporary / "tensors.bin").write_bytes(b"x" * 10)
    return store.commit(temporary, state(step), LAYOUT, keep_last)


def test_a_committed_checkpoint_is_found_with_its_state_and_layout(tmp_path):
    path = write(tmp_path, 12)
    assert store.find_checkpoint(tmp_path) == path
    assert store.read_state(path) == (state(12), LAYOUT)
    assert (path.parent / "latest").read_text() == "step_000012\n"


def test_a_half_written_checkpoint_does_not_count_and_is_cleaned_up_by_the_next_writer(tmp_path):
    write(tmp_path, 1)
    leftover = store.begin(tmp_path, 2)
    (leftover / "tensors.bin").write_bytes(b"half")
    assert store.find_checkpoint(tmp_path).name == "step_000001"
    write(tmp_path, 3)
    assert not leftover.exists()


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    for step in (9, 10, 100):
        write(tmp_path, step, keep_last=2)
    assert [path.name for path in store.list_checkpoints(tmp_path)] == ["step_000010", "step_000100"]


def test_the_same_step_can_be_saved_again_after_a_resume(tmp_path):
    write(tmp_path, 5)
    assert store.find_checkpoint(tmp_path, "5") == write(tmp_path, 5)


@pytest.mark.parametrize("which", ["7", "step_000007", "latest-but-one"])
def test_an_absent_checkpoint_is_an_error_that_lists_what_there_is(tmp_path, which):
    write(tmp_path, 5)
    with pytest.raises(CheckpointError, match=r"complete checkpoints there: step_000005"):
        store.find_checkpoint(tmp_path, which)


def test_a_run_without_checkpoints_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="complete checkpoints there: none"):
        store.find_checkpoint(tmp_path)


def test_a_damaged_state_file_names_the_file_and_the_way_out(tmp_path):
    path = write(tmp_path, 5)
    (path / store.STATE_FILE).write_text('{"state": {"step"')
    with pytest.raises(CheckpointError, match=r"train_state\.json can't be read .* remove"):
        store.read_state(path)
