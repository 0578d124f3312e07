"""Which checkpoint directories count, and what survives a writer that dies."""

import json
import os
import shutil

import pytest

from skyrl_mega.checkpoint import manifest, store
from skyrl_mega.errors import CheckpointError
from skyrl_mega.types import TrainState

LAYOUT = {"tensor": 1, "pipeline": 1, "data": 1}


def state(step: int) -> TrainState:
    return TrainState(step, step, {"position": step * 4}, num_trained_groups=step * 4, num_optimizer_steps=step)


def write(run_dir, step: int, keep_last: int = 10, **retention):
    """A checkpoint whose one file of tensors is ten bytes; `metric` is its evaluation."""
    metrics = {"eval/accuracy": retention.pop("metric")} if "metric" in retention else {}
    temporary = store.begin(run_dir, step)
    (temporary / "tensors.bin").write_bytes(b"x" * 10)
    (temporary / "index").write_bytes(bytes([step % 256]))
    known = [manifest.FileRecord("tensors.bin", 10, manifest.checksum_of(temporary / "tensors.bin"))]
    keep = store.Retention(keep_last, **retention)
    return store.commit(temporary, state(step), LAYOUT, keep, files=known, metrics=metrics)


def names(run_dir) -> list[str]:
    return [path.name for path in store.list_checkpoints(run_dir)]


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


# ---- damage ---------------------------------------------------------------------------------------------------------------


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("break_it", "file", "what", "needs_checksums"),
    [
        (flip_a_bit, "tensors.bin", "tensors.bin has other content than was written", True),
        (cut_short, "tensors.bin", "tensors.bin has 9 bytes instead of 10", False),
        (os.remove, "index", "index is missing", False),
        (os.remove, "train_state.json", "train_state.json is missing or can't be read", False),
        (cut_short, "train_state.json", "train_state.json has", False),
        (os.remove, "manifest.json", "manifest.json can't be read", False),
        (lambda path: path.write_text(path.read_text()[:40]), "manifest.json", "manifest.json can't be read", False),
    ],
    ids=["flipped-bit", "truncated", "missing", "no-state", "state-cut", "no-manifest", "half-manifest"],
)
def test_damage_is_found_and_named(tmp_path, break_it, file, what, needs_checksums):
    path = write(tmp_path, 5)
    assert store.damage(path, "checksums") == []
    break_it(path / file)
    assert [line.startswith(what) for line in store.damage(path, "checksums")] == [True]
    assert bool(store.damage(path, "sizes")) != needs_checksums
    with pytest.raises(CheckpointError, match="is damaged"):
        store.require_whole(path, "checksums")


def test_ranks_that_share_the_checking_read_each_file_once_and_find_the_same(tmp_path):
    path = write(tmp_path, 5)
    flip_a_bit(path / "tensors.bin")
    found = [store.damage(path, "checksums", share=(rank, 3)) for rank in range(3)]
    assert sorted(map(len, found)) == [0, 0, 1]


def test_a_checkpoint_from_before_manifests_counts_if_its_index_is_there(tmp_path):
    path = write(tmp_path, 5)
    content = json.loads((path / store.STATE_FILE).read_text())
    (path / store.STATE_FILE).write_text(json.dumps({key: content[key] for key in ("state", "layout")}))
    (path / manifest.MANIFEST_FILE).unlink()
    assert store.damage(path, "checksums") == [f"{name} is missing" for name in (".metadata", "metadata.json", "common.pt")]
    for name in (".metadata", "metadata.json", "common.pt"):
        (path / name).touch()
    assert store.damage(path, "checksums") == []


# ---- what is kept ---------------------------------------------------------------------------------------------------------


def test_the_best_are_kept_beside_the_newest_and_found_by_name(tmp_path):
    for step, accuracy in enumerate([0.1, 0.7, 0.3, 0.6, 0.2], start=1):
        write(tmp_path, step, keep_last=1, keep_best=2, metric=accuracy)
    assert names(tmp_path) == ["step_000002", "step_000004", "step_000005"]
    assert store.find_checkpoint(tmp_path, "best").name == "step_000002"
    assert (tmp_path / "checkpoints" / "best").read_text() == "step_000002\n"


def test_lower_can_be_better_ties_go_to_the_newer_and_what_has_no_number_is_never_best(tmp_path):
    for step, loss in enumerate([0.3, 0.1, 0.1, float("nan")], start=1):
        write(tmp_path, step, keep_last=1, keep_best=1, better="lower", metric=loss)
    write(tmp_path, 5, keep_last=1, keep_best=1, better="lower")
    assert names(tmp_path) == ["step_000003", "step_000005"]
    assert store.find_checkpoint(tmp_path, "best").name == "step_000003"


def test_why_a_checkpoint_is_kept(tmp_path):
    paths = [write(tmp_path, step, metric=value) for step, value in ((1, 0.9), (2, 0.1), (3, 0.8))]
    kept = store.Retention(keep_last=2, keep_best=2).kept(paths)
    assert {path.name: why for path, why in kept.items()} == {
        "step_000001": "best",
        "step_000002": "last 2",
        "step_000003": "latest, best 2",
    }


def test_what_was_just_written_is_never_removed(tmp_path):
    write(tmp_path, 9)
    assert write(tmp_path, 3, keep_last=1).is_dir()
    assert names(tmp_path) == ["step_000003", "step_000009"]


def test_no_best_checkpoint_is_an_error_that_says_how_to_get_one(tmp_path):
    write(tmp_path, 5, metric=1.0)
    with pytest.raises(CheckpointError, match=r"checkpoint\.keep_best=1"):
        store.find_checkpoint(tmp_path, "best")


# ---- writers that die -----------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_was_being_replaced_gets_its_name_back(tmp_path):
    path = write(tmp_path, 5)
    path.rename(path.with_suffix(store.REPLACED))  # as a writer killed between its two renames leaves it
    half = store.checkpoint_path(tmp_path, 5).with_suffix(store.TEMPORARY)
    half.mkdir()
    assert store.remove_leftovers(tmp_path) == [half.name]
    assert names(tmp_path) == ["step_000005"]
    assert store.damage(path, "checksums") == []


def test_a_damaged_checkpoint_is_set_aside_not_removed(tmp_path):
    path = write(tmp_path, 5)
    aside = store.set_aside(path)
    assert names(tmp_path) == []
    assert (aside / "tensors.bin").exists()
    shutil.copytree(aside, path)
    assert store.set_aside(path) == aside
