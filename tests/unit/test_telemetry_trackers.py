"""Trackers: what they store, that a resumed run continues its curve, and that no failure of theirs ends a run."""

import importlib.util
import warnings

import pytest

from skyrl_mega.errors import ConfigError, MissingDependencyError
from skyrl_mega.telemetry.trackers import TRACKERS, SafeTracker, _has_wandb_key, make_trackers

CONFIG = {"model": {"path": "x"}, "trainer": {"seed": 1}}


class BrokenTracker:
    def __init__(self):
        self.calls = 0

    def log(self, metrics, step):
        self.calls += 1
        raise OSError("disk full")

    def close(self):
        raise KeyError("gone")


def test_a_failing_tracker_warns_once_and_never_raises():
    broken = BrokenTracker()
    tracker = SafeTracker("tensorboard", broken)
    with pytest.warns(RuntimeWarning, match=r"tracker tensorboard failed at step 1: OSError: disk full.*not affected"):
        tracker.log({"a": 1.0}, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tracker.log({"a": 1.0}, 2)
        tracker.close()
    assert broken.calls == 2, "it is still tried: the disk may have space again"


def test_unknown_trackers_are_refused():
    with pytest.raises(ConfigError, match=r"telemetry.trackers \('tensorbord'\) must be among mlflow, tensorboard, wandb"):
        make_trackers(["tensorbord"], "run", "p", CONFIG)


@pytest.mark.parametrize(("name", "package"), [("wandb", "wandb"), ("mlflow", "mlflow-skinny")])
def test_a_missing_package_is_an_error_at_construction(name, package, tmp_path):
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    with pytest.raises(MissingDependencyError, match=f"pip install {package}"):
        make_trackers([name], tmp_path, "p", CONFIG)


def test_tensorboard_events_can_be_read_back_and_a_resumed_run_hides_what_it_repeats(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tracker,) = make_trackers(["tensorboard"], tmp_path, "p", CONFIG)
    for step in (1, 2, 3):
        tracker.log({"reward/mean": step / 10, "loss": float("nan")}, step)
    tracker.close()
    (resumed,) = make_trackers(["tensorboard"], tmp_path, "p", CONFIG, start_step=1)
    resumed.log({"reward/mean": 0.9}, 2)
    resumed.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, round(e.value, 6)) for e in events.Scalars("reward/mean")] == [(1, 0.1), (2, 0.9)]


def test_mlflow_keeps_one_run_across_a_resume(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for start_step in (0, 1):
        (tracker,) = make_trackers(["mlflow"], tmp_path, "project", CONFIG, start_step=start_step)
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            tracker.log({"reward/mean": 0.5, "loss": float("nan")}, start_step + 1)
            tracker.close()
    client = MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("project").experiment_id])
    assert run.info.run_id == (tmp_path / "mlflow_run_id").read_text().strip()
    assert run.data.params["trainer.seed"] == "1"
    assert [m.step for m in client.get_metric_history(run.info.run_id, "reward/mean")] == [1, 2]


def test_a_wandb_key_is_found_where_wandb_login_leaves_it(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not _has_wandb_key()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert _has_wandb_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org:8080")
    assert not _has_wandb_key()
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert _has_wandb_key()


def test_wandb_without_a_key_is_offline_and_keeps_its_id_across_a_resume(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for start_step in (0, 1):
        (tracker,) = make_trackers(["wandb"], tmp_path, "project", CONFIG, start_step=start_step)
        tracker.log({"reward/mean": 0.5}, start_step + 1)
        tracker.close()
    run_id = (tmp_path / "wandb_run_id").read_text().strip()
    runs = [path.name for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert len(runs) == 2
    assert all(run_id in name for name in runs)


def test_every_tracker_named_in_the_configuration_exists():
    assert set(TRACKERS) == {"tensorboard", "wandb", "mlflow"}
