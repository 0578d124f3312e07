"""The reward picture: drawn from what the file holds, without touching pyplot."""

import subprocess
import sys

import pytest

from skyrl_mega.errors import DataError
from skyrl_mega.telemetry.metrics import MetricsLog
from skyrl_mega.telemetry.plots import Curve, plot_curves, plot_rewards, smooth


def write_run(run_dir, steps=20, evaluations=(0, 10, 20)):
    log = MetricsLog(run_dir)
    for step in range(steps + 1):
        metrics = {"reward/mean": step / 40 if step != 7 else float("nan")} if step else {"other": 1.0}
        log.log(metrics | ({"eval/accuracy": 0.2 + step / 50} if step in evaluations else {}), step)
    log.close()


def size(path):
    from matplotlib.image import imread

    image = imread(path)
    assert image[..., :3].std() > 0.05, "the picture is blank"
    return image.shape[:2]


def test_a_run_with_evaluations_gets_two_panels_and_one_without_gets_one(tmp_path):
    write_run(tmp_path / "full")
    write_run(tmp_path / "bare", evaluations=())
    both = size(plot_rewards(tmp_path / "full", tmp_path / "out" / "full.png"))
    one = size(plot_rewards(tmp_path / "bare" / "metrics.jsonl", tmp_path / "bare.png", title="x"))
    assert both[0] > 1.5 * one[0]


@pytest.mark.parametrize("steps", [1, 2])
def test_the_shortest_runs_can_be_drawn(tmp_path, steps):
    write_run(tmp_path, steps=steps, evaluations=(0,))
    size(plot_rewards(tmp_path, tmp_path / "curve.png"))


def test_a_file_without_rewards_is_an_error_that_says_so(tmp_path):
    MetricsLog(tmp_path).log({"loss": 1.0}, 1)
    with pytest.raises(DataError, match="it has 1 steps with neither"):
        plot_rewards(tmp_path, tmp_path / "curve.png")


def test_curves_get_a_panel_each_where_the_metrics_hold_them(tmp_path):
    log = MetricsLog(tmp_path)
    for step in range(9):
        log.log({"loss/total": 1.0 / (step + 1)} | ({"eval/loss": 0.5} if step % 4 == 0 else {}), step)
    log.close()
    one = [Curve("loss", "loss/total", "eval/loss")]
    alone = size(plot_curves(tmp_path, tmp_path / "one.png", curves=one))
    assert size(plot_curves(tmp_path, tmp_path / "two.png", curves=[*one, Curve("again", "", "eval/loss")])) != alone
    assert size(plot_curves(tmp_path, tmp_path / "one.png", curves=[*one, Curve("absent", "x/y", "eval/y")])) == alone
    with pytest.raises(DataError, match="must hold x/y"):
        plot_curves(tmp_path, tmp_path / "none.png", curves=[Curve("absent", "x/y", "eval/y")])


def test_smoothing_keeps_constants_and_straight_lines_and_does_not_lag():
    assert smooth([0.3] * 5) == pytest.approx([0.3] * 5)
    line = [i / 100 for i in range(100)]
    assert smooth(line)[15:85] == pytest.approx(line[15:85])
    impulse = smooth([0.0] * 50 + [1.0] + [0.0] * 50)
    assert impulse.index(max(impulse)) == 50
    assert impulse == pytest.approx(impulse[::-1])


def test_importing_telemetry_loads_neither_matplotlib_nor_torch():
    program = (
        "import sys; import skyrl_mega.telemetry.plots, skyrl_mega.telemetry.metrics, skyrl_mega.telemetry.trackers, "
        "skyrl_mega.telemetry.phases, skyrl_mega.telemetry.progress, skyrl_mega.telemetry.bench, skyrl_mega.telemetry.versions; "
        "print([m for m in ('matplotlib', 'torch', 'numpy', 'tensorboard') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60).stdout
    assert output.strip() == "[]"
