"""Further destinations of metrics: TensorBoard, Weights & Biases, MLflow. `metrics.jsonl` is written whatever happens here.

A missing package is an error at construction, before training. Once training runs, a tracker that fails is a warning: no
run is worth losing to a dashboard. The run's id at a tracker is kept in the run directory, so that a resumed run continues
the same curve.
"""

from __future__ import annotations

import netrc
import os
import secrets
import time
import urllib.parse
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from skyrl_mega.errors import ConfigError, MissingDependencyError
from skyrl_mega.protocols import Tracker


def make_trackers(
    names: Iterable[str], run_dir: str | Path, project: str, config_dict: Mapping[str, Any], *, start_step: int = 0
) -> list[Tracker]:
    """One tracker per name (tensorboard, wandb, mlflow), each safe to call: their `log` and `close` never raise.

    `start_step` is the last finished step of the run being resumed (0: a new run). Rank 0 only.
    Raises ConfigError for an unknown name, MissingDependencyError for a package that is not installed.
    """
    trackers: list[Tracker] = []
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(f"telemetry.trackers ({name!r}) must be among {', '.join(sorted(TRACKERS))}.")
        trackers.append(SafeTracker(name, TRACKERS[name](Path(run_dir), project, config_dict, start_step)))
    return trackers


class SafeTracker:
    """Another tracker whose failures are reported once, as a warning, and otherwise passed over."""

    def __init__(self, name: str, tracker: Tracker):
        self.name, self._tracker, self._warned = name, tracker, False

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._guarded(lambda: self._tracker.log(metrics, step), f"at step {step}")

    def close(self) -> None:
        self._guarded(self._tracker.close, "while closing")

    def _guarded(self, call: Callable[[], None], when: str) -> None:
        try:
            call()
        # The promise of `Tracker` is that nothing gets out, and three foreign clients may raise anything.
        except Exception as error:  # noqa: BLE001
            if not self._warned:
                self._warned = True
                message = f"tracker {self.name} failed {when}: {type(error).__name__}: {error}. metrics.jsonl is not affected."
                warnings.warn(f"{message} Further failures of it are not reported.", RuntimeWarning, stacklevel=4)


class TensorBoardTracker:
    """Event files under `run_dir/tensorboard`. On resume, events after `start_step` are hidden from the curves."""

    def __init__(self, run_dir: Path, project: str, config_dict: Mapping[str, Any], start_step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboard", "tensorboard") from error
        self._writer = SummaryWriter(
            str(run_dir / "tensorboard"), purge_step=start_step + 1 if start_step else None, flush_secs=10
        )
        if not start_step:
            self._writer.add_text("config", _as_markdown(config_dict), 0)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, float(value), step)

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """A Weights & Biases run; offline (under `run_dir/wandb`, for `wandb sync`) unless a key is configured.

    WANDB_MODE decides when it is set. A server that can't be reached is a warning, and the run goes on offline.
    """

    def __init__(self, run_dir: Path, project: str, config_dict: Mapping[str, Any], start_step: int):
        try:
            import wandb
        except ImportError as error:
            raise _missing("wandb", "wandb") from error
        settings = dict(project=project, dir=str(run_dir), name=run_dir.name, config=dict(config_dict), resume="allow")
        settings["settings"] = wandb.Settings(init_timeout=30)
        settings["id"] = _stored_id(run_dir / "wandb_run_id", lambda: secrets.token_hex(4))
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline")
        try:
            self._run = wandb.init(mode=mode, **settings)
        except wandb.Error as error:
            if mode == "offline":
                raise
            warnings.warn(
                f"wandb could not start online ({error}); logging offline under {run_dir}/wandb.", RuntimeWarning, stacklevel=2
            )
            wandb.teardown()  # else the failed attempt still owns the run's id
            self._run = wandb.init(mode="offline", **settings)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflowTracker:
    """An MLflow run in the file store `run_dir/mlruns`, or wherever MLFLOW_TRACKING_URI points."""

    def __init__(self, run_dir: Path, project: str, config_dict: Mapping[str, Any], start_step: int):
        try:
            from mlflow.entities import Metric, Param
            from mlflow.tracking import MlflowClient
        except ImportError as error:
            raise _missing("mlflow", "mlflow-skinny") from error
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            uri = (run_dir / "mlruns").resolve().as_uri()
            # MLflow 3.17 wants a database instead and refuses a plain directory; mlflow-skinny has no database driver.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self._client, self._metric = MlflowClient(tracking_uri=uri), Metric
        self._run_id = _stored_id(run_dir / "mlflow_run_id", lambda: self._create_run(project, run_dir.name))
        if start_step:
            self._client.update_run(self._run_id, status="RUNNING")
        else:
            params = [Param(name, str(value)[:500]) for name, value in _flatten(config_dict).items()]
            for start in range(0, len(params), 100):
                self._client.log_batch(self._run_id, params=params[start : start + 100])

    def _create_run(self, project: str, run_name: str) -> str:
        experiment = self._client.get_experiment_by_name(project)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(project)
        return self._client.create_run(experiment_id, run_name=run_name).info.run_id

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        now_ms = int(time.time() * 1000)
        points = [self._metric(name, float(value), now_ms, step) for name, value in metrics.items()]
        self._client.log_batch(self._run_id, metrics=points)

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


TRACKERS: dict[str, Callable[[Path, str, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": TensorBoardTracker,
    "wandb": WandbTracker,
    "mlflow": MLflowTracker,
}


def _stored_id(path: Path, create: Callable[[], str]) -> str:
    """The id in `path`, made by `create` and written there the first time."""
    if path.exists():
        return path.read_text().strip()
    path.parent.mkdir(parents=True, exist_ok=True)
    run_id = create()
    path.write_text(run_id + "\n")
    return run_id


def _has_wandb_key() -> bool:
    """Whether a key is in WANDB_API_KEY or, where `wandb login` leaves it, in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urllib.parse.urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    files = [Path(os.environ["NETRC"])] if "NETRC" in os.environ else [Path.home() / ".netrc", Path.home() / "_netrc"]
    for file in files:
        try:
            if file.exists() and netrc.netrc(str(file)).authenticators(host):
                return True
        except (netrc.NetrcParseError, OSError) as error:
            warnings.warn(f"wandb's key can't be read from {file}: {error}", RuntimeWarning, stacklevel=2)
    return False


def _missing(name: str, package: str) -> MissingDependencyError:
    return MissingDependencyError(
        f"telemetry.trackers names {name}, which needs the package {package}. Install it with: pip install {package}"
    )


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat.update(_flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value})
    return flat


def _as_markdown(config_dict: Mapping[str, Any]) -> str:
    return "\n".join(f"    {name}: {value}" for name, value in _flatten(config_dict).items())
