"""The main job on a tiny model, with real vLLM, each run in a process of its own as a user starts it.

One undisturbed run is the measure for the others: killed and resumed, on two tensor ranks, on two data ranks.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from helpers import even_env
from helpers.rewards import write_reward_model
from helpers.spawn import free_port
from helpers.tiny import write_tiny_model
from skyrl_mega.data.ledger_audit import audit
from skyrl_mega.data.ledger_reader import LedgerReader
from skyrl_mega.telemetry.metrics import read_metrics
from skyrl_mega.telemetry.trace_merge import merge_traces

STEPS = 4
#: Everything that is computed, as opposed to timed.
COMPUTED = ("reward/", "loss/", "policy/", "critic/", "mismatch/", "eval/", "update/", "response/", "group/", "env/")
#: Two further terms of the reward, by weight: a function of the user's own and a reward model.
WEIGHTS = {"brevity": 0.05, "liking": 0.02}
REWARDS = """
def brevity(one, *, target_tokens):
    return -abs(one.num_response_tokens - target_tokens) / target_tokens
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with a model and an environment of the user's own."""
    path = tmp_path_factory.mktemp("training")
    write_tiny_model(path / "model", "llama", tied=True)
    write_reward_model(path / "reward_model")
    shutil.copy(even_env.__file__, path)
    (path / "my_rewards.py").write_text(REWARDS)
    return path


def reward_terms(home: Path) -> str:
    function = f"kind: function, path: '{home / 'my_rewards.py'}:brevity', options: {{target_tokens: 8}}"
    model = f"kind: model, path: '{home / 'reward_model'}', dtype: float32"
    brevity, liking = WEIGHTS.values()
    return f"[{{name: brevity, weight: {brevity}, {function}}}, {{name: liking, weight: {liking}, {model}}}]"


def command(home: Path, run_dir: Path, *overrides: str, ranks: int = 1) -> list[str]:
    python = [sys.executable]
    if ranks > 1:
        python += ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={free_port()}"]
    return [
        *python,
        "-m",
        "skyrl_mega.train",
        "recipe=tiny",
        f"model.path={home / 'model'}",
        "env.name=even_env:EvenEnv",
        f"trainer.run_dir={run_dir}",
        f"trainer.max_steps={STEPS}",
        "checkpoint.interval_steps=2",
        "evaluation.interval_steps=2",
        "rollout.probe_after_sync=true",
        f"reward.terms={reward_terms(home)}",
        *overrides,
    ]


def environment(home: Path) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "RANK", "WORLD_SIZE"))}
    return clean | {"PYTHONPATH": str(home), "OMP_NUM_THREADS": "1"}


def run(home: Path, run_dir: Path, *overrides: str, ranks: int = 1, timeout: float = 400) -> str:
    result = subprocess.run(
        command(home, run_dir, *overrides, ranks=ranks),
        env=environment(home),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert result.returncode == 0, f"{result.stdout[-3000:]}\n{result.stderr[-6000:]}"
    return result.stdout


def computed(run_dir: Path) -> dict[int, dict[str, float]]:
    rows = read_metrics(run_dir)
    assert len({row["step"] for row in rows}) == len(rows), "a step has two lines"
    return {row["step"]: {k: v for k, v in row.items() if k.startswith(COMPUTED)} for row in rows}


@pytest.fixture(scope="module")
def undisturbed(home):
    run_dir = home / "undisturbed"
    return run_dir, run(home, run_dir)


def test_a_run_learns_from_its_rollouts_and_reports_every_step(undisturbed):
    run_dir, output = undisturbed
    rows = computed(run_dir)
    assert sorted(rows) == list(range(STEPS + 1))
    updates = [rows[step] for step in range(1, STEPS + 1)]
    assert all(0.0 < row["reward/env_mean"] < 1.0 for row in updates)
    assert any(row["update/skipped"] == 0.0 and row["update/grad_norm"] > 0.0 for row in updates)
    # The engine samples from the very policy that is trained, before and after every weight sync.
    assert all(row.get("mismatch/abs_logprob_diff_max", 0.0) < 1e-3 for row in updates)
    assert all(row["probe/logprob_diff_max"] < 1e-3 for row in read_metrics(run_dir)[1:])
    assert "eval/accuracy" in rows[0]
    assert "eval/accuracy" in rows[STEPS]
    assert "finished" in output


def test_every_reward_is_the_sum_of_its_terms(undisturbed):
    run_dir, _ = undisturbed
    rows = computed(run_dir)
    for prefix, suffix, steps in (("reward/", "_mean", range(1, STEPS + 1)), ("eval/reward_", "", (0, 2, 4))):
        for row in (rows[step] for step in steps):
            terms = sum(weight * row[f"{prefix}{name}{suffix}"] for name, weight in WEIGHTS.items())
            total = row["reward/mean" if prefix == "reward/" else "eval/reward"]
            assert total == pytest.approx(row[f"{prefix}env{suffix}"] + terms, abs=1e-9)
            assert row[f"{prefix}liking{suffix}"] != 0.0


def test_a_run_leaves_summary_config_curve_tensorboard_and_checkpoints(undisturbed):
    run_dir, _ = undisturbed
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["steps"] == STEPS
    assert summary["accuracy_before"] is not None
    assert summary["accuracy_after"] is not None
    assert summary["peak_rss_bytes"] > 10**8
    assert {"torch", "megatron-core", "python"} <= summary["versions"].keys()
    assert (run_dir / "reward_curve.png").read_bytes().startswith(b"\x89PNG")
    assert list((run_dir / "tensorboard").iterdir())
    assert "max_steps: 4" in (run_dir / "config.yaml").read_text()
    assert (run_dir / "checkpoints" / "latest").read_text() == f"step_{STEPS:06d}\n"


def test_transformers_loads_the_exported_policy_and_it_has_moved(undisturbed, home):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run_dir, _ = undisturbed
    before = AutoModelForCausalLM.from_pretrained(home / "model")
    after = AutoModelForCausalLM.from_pretrained(run_dir / "hf")
    ids = torch.tensor([AutoTokenizer.from_pretrained(run_dir / "hf").encode("train 0", add_special_tokens=False)])
    assert after.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > ids.shape[1]
    moved = [not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert all(moved)


def test_export_of_the_last_checkpoint_equals_the_export_of_the_run(undisturbed, home):
    from safetensors.torch import load_file

    run_dir, _ = undisturbed
    output = home / "exported"
    arguments = ["export", "--run", str(run_dir), "--output", str(output)]
    subprocess.run([sys.executable, "-m", "skyrl_mega", *arguments], env=environment(home), check=True, capture_output=True)
    exported, direct = (load_file(directory / "model.safetensors") for directory in (output, run_dir / "hf"))
    assert exported.keys() == direct.keys()
    assert all(torch.equal(tensor, direct[name]) for name, tensor in exported.items())


def test_a_run_killed_at_any_moment_resumes_to_the_same_numbers(undisturbed, home):
    reference_dir, _ = undisturbed
    run_dir = home / "killed"
    process = subprocess.Popen(
        command(home, run_dir),
        env=environment(home),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    # Killed as soon as step 3 is recorded: after the checkpoint of step 2, before that of step 4.
    deadline = time.monotonic() + 300
    metrics = run_dir / "metrics.jsonl"
    while not (metrics.exists() and any(row["step"] == 3 for row in read_metrics(metrics))):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "no third step after 300 s"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (run_dir / "summary.json").exists()
    output = run(home, run_dir)
    assert "resuming from" in output
    assert computed(run_dir) == computed(reference_dir)
    summary, reference = (json.loads((d / "summary.json").read_text()) for d in (run_dir, reference_dir))
    for name in ("steps", "optimizer_steps", "trained_groups"):
        assert summary[name] == reference[name], name


def test_a_run_killed_after_its_last_checkpoint_still_gets_its_summary_and_model(undisturbed, home):
    reference_dir, _ = undisturbed
    run_dir = home / "killed_late"
    shutil.copytree(reference_dir, run_dir)
    (run_dir / "summary.json").unlink()
    shutil.rmtree(run_dir / "hf")
    run(home, run_dir)
    assert computed(run_dir) == computed(reference_dir)
    assert (run_dir / "hf" / "model.safetensors").read_bytes() == (reference_dir / "hf" / "model.safetensors").read_bytes()
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == STEPS
    assert "has finished its 4 steps" in run(home, run_dir)


@pytest.mark.parametrize("layout", ["tp2", "dp2"])
def test_two_ranks_end_with_the_losses_of_one_process(undisturbed, home, layout):
    reference_dir, _ = undisturbed
    run_dir = home / layout
    run(home, run_dir, f"parallel={layout}", "checkpoint.interval_steps=0", ranks=2)
    numbers, reference = computed(run_dir), computed(reference_dir)
    assert numbers.keys() == reference.keys()
    for step in range(1, STEPS + 1):
        for name in ("loss/total", "update/grad_norm", "reward/mean"):
            assert numbers[step].get(name) == pytest.approx(reference[step].get(name), abs=1e-4), f"{name} of step {step}"


def test_a_pipeline_whose_last_stage_is_killed_restarts_by_itself_and_ends_with_the_same_losses(undisturbed, home):
    reference_dir, _ = undisturbed
    run_dir = home / "pp2"
    arguments = command(home, run_dir, "parallel=pp2")
    script = Path(__file__).parents[2] / "scripts/launch/torchrun.sh"
    process = subprocess.Popen(
        ["bash", str(script), *arguments[arguments.index("recipe=tiny") :]],
        env=environment(home) | {"NPROC_PER_NODE": "2", "SKYRL_MEGA_VENV": sys.prefix},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        victim = wait_for_rank_1_after(run_dir / "metrics.jsonl", step=3, launcher=process)
        os.kill(victim, signal.SIGKILL)
        output, _ = process.communicate(timeout=400)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output[-6000:]
    assert "resuming from" in output
    numbers, reference = computed(run_dir), computed(reference_dir)
    assert numbers.keys() == reference.keys()
    for step in range(1, STEPS + 1):
        for name in ("loss/total", "update/grad_norm", "reward/mean"):
            assert numbers[step].get(name) == pytest.approx(reference[step].get(name), abs=1e-4), f"{name} of step {step}"


def wait_for_rank_1_after(metrics: Path, *, step: int, launcher: subprocess.Popen) -> int:
    """The process of rank 1, once `step` is recorded."""
    deadline = time.monotonic() + 300
    while not (metrics.exists() and any(row["step"] == step for row in read_metrics(metrics))):
        assert launcher.poll() is None, launcher.communicate()[0][-6000:]
        assert time.monotonic() < deadline, f"no step {step} after 300 s"
        time.sleep(0.02)
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            variables = (entry / "environ").read_bytes().split(b"\0")
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:  # ended meanwhile, or another user's
            continue
        if b"RANK=1" in variables and b"skyrl_mega.train" in words and f"trainer.run_dir={metrics.parent}".encode() in words:
            return int(entry.name)
    raise AssertionError("rank 1 is not running")


@pytest.mark.parametrize(
    "overrides", [["rollout=async"], ["rollout=fleet", "rollout.weight_transport=gloo"]], ids=["child", "ray"]
)
def test_an_asynchronous_run_trains_every_group_once_and_within_its_bound(home, overrides, request):
    run_dir = home / f"asynchronous_{request.node.callspec.id}"
    steps, bound = 8, 2
    run(home, run_dir, *overrides, f"trainer.max_staleness={bound}", f"trainer.max_steps={steps}", "telemetry.trace=true")
    rows = {row["step"]: row for row in read_metrics(run_dir)}
    assert sorted(rows) == list(range(steps + 1))
    for step in range(1, steps + 1):
        assert rows[step]["staleness/max"] <= bound
        assert rows[step]["sync/policy_version"] == step
        assert rows[step]["probe/logprob_diff_mean"] < 1e-3
    assert max(row["staleness/max"] for row in rows.values() if row["step"]) > 0, "nothing was generated ahead"
    with LedgerReader.open_read_only(run_dir / "ledger.sqlite") as ledger:
        found = audit(ledger.file, metrics_steps=[step for step in rows if step > 0])
        assert found.passed, found.findings
        assert ledger.counts().trained == steps * 4
    names = [process.name for process in merge_traces(run_dir).processes]
    engines = ["engine 0", "engine 1"] if "rollout=fleet" in overrides else ["engine 0"]
    assert names == ["rank 0", "coordinator", *engines, "transfers"]


PPO = [
    *("algorithm.advantage=gae", "algorithm.normalize_advantages=true", "trainer.updates_per_step=2"),
    *("critic.warmup_steps=1", "critic.optimizer.lr=1e-3", "evaluation.num_prompts=0", "rollout.probe_after_sync=false"),
]


@pytest.fixture(scope="module")
def ppo(home):
    run_dir = home / "ppo"
    run(home, run_dir, *PPO)
    return run_dir


def cut_short(run_dir: Path, copy: Path) -> Path:
    """A copy of the run as if killed between the last step and its checkpoint."""
    shutil.copytree(run_dir, copy)
    for made in ("checkpoints/step_000004", "hf", "hf_critic"):
        shutil.rmtree(copy / made)
    (copy / "summary.json").unlink()
    return copy


def test_ppo_trains_a_critic_beside_the_policy_and_resumes_to_the_same_numbers(home, ppo):
    from transformers import AutoModelForSequenceClassification

    run_dir = ppo
    rows = computed(run_dir)
    assert rows[1]["update/skipped"] == 1.0, "the first step is the critic's alone"
    assert "update/grad_norm" not in rows[1]
    for step in range(1, STEPS + 1):
        assert rows[step]["critic/grad_norm"] > 0.0
        assert step == 1 or rows[step]["update/grad_norm"] > 0.0
    assert rows[1]["critic/value_mean"] != rows[STEPS]["critic/value_mean"]
    critic = AutoModelForSequenceClassification.from_pretrained(run_dir / "hf_critic")
    assert critic.config.num_labels == 1
    assert critic.score.weight.abs().max() > 0

    resumed = cut_short(run_dir, home / "ppo_resumed")
    assert "step_000002" in run(home, resumed, *PPO)
    assert computed(resumed) == rows
    for made in ("hf", "hf_critic"):
        weights = [(directory / made / "model.safetensors").read_bytes() for directory in (run_dir, resumed)]
        assert weights[0] == weights[1], made


def test_a_critic_in_a_layout_of_its_own_goes_on_with_ppo_on_two_ranks(home, ppo):
    """The policy is split over both ranks, and each has a whole critic. What the ledger replays is the same."""
    rows, resumed = computed(ppo), cut_short(ppo, home / "ppo_two_layouts")
    assert "step_000002" in run(home, resumed, *PPO, "parallel=tp2", "critic.parallel.tensor=1", ranks=2)
    after = computed(resumed)
    for name, value in rows[3].items():
        assert after[3][name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
    assert after[STEPS]["critic/grad_norm"] > 0.0
    assert (resumed / "hf_critic" / "model.safetensors").is_file()


@pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=pytest.mark.nightly)])
def test_memory_does_not_creep(home, precision):
    """200 steps with rollout, sync, evaluation, probe and checkpoints, engine in the same process."""
    run_dir = home / f"long-{precision}"
    settings = [f"precision={precision}", "trainer.max_steps=200", "evaluation.interval_steps=10", "checkpoint.interval_steps=10"]
    if precision == "bfloat16":
        # Wide enough for oneDNN, which keeps a kernel for every new number of tokens.
        wide = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 1024}
        settings.append(f"model.path={write_tiny_model(home / 'wide', 'llama', tied=True, dtype='bfloat16', **wide)}")
    run(home, run_dir, *settings, timeout=580)
    peaks = {row["step"]: row["memory/peak_rss_bytes"] for row in read_metrics(run_dir)}
    assert max(peaks) == 200
    assert peaks[200] <= 1.02 * peaks[20], f"{peaks[20]:,.0f} bytes after 20 steps, {peaks[200]:,.0f} after 200"
