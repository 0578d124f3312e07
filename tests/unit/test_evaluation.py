"""An evaluation of several tasks and samples, with scripted agents: its numbers, its files, its order."""

import asyncio
import json
from types import SimpleNamespace

import pytest

from helpers.tiny import make_tokenizer
from skyrl_mega.config.load import load_config
from skyrl_mega.config.schema import EvalConfig
from skyrl_mega.envs.registry import make_env
from skyrl_mega.errors import DataError, EnvError
from skyrl_mega.orchestration.coordinator import EvaluationState
from skyrl_mega.orchestration.evaluation import EvalSuite, Evaluation
from skyrl_mega.orchestration.evaluation_report import show_progress, show_results, write_results
from skyrl_mega.orchestration.rollout_assembly import make_task_sources
from skyrl_mega.types import Prompt, StopReason, Trajectory, TrajectoryGroup, Turn

SETTINGS = EvalConfig(samples_per_prompt=4, temperature=0.7)
#: Per prompt, what each sample answered; the right answer is "r", and "" is none.
ANSWERS = (("r", "r", "x", "r"), ("x", "x", "r", "y"), ("x", "y", "", "z"))


class Source:
    def eval_prompts(self, count):
        return [Prompt(f"p{number}", {"n": number}) for number in range(count)]


def trajectory(answer, *, says=True):
    right = float(answer == "r")
    turns = (Turn(2, 4, StopReason.STOP, right),)
    columns = ([104, 105, 106, 2], [0, 0, 1, 1], [0.0, 0.0, -1.0, -1.0], [-1, -1, 3, 3])
    return Trajectory(*columns, turns, right, True, False, text=f"<{answer}>", answer=(answer or None) if says else None)


class Runner:
    """Plays the script; later prompts end first. `says`: whether the environment reports answers."""

    def __init__(self, answers=ANSWERS, *, says=True, error=None):
        self.answers, self.says, self.error = answers, says, error
        self.greedy, self.cancelled = set(), 0

    async def __call__(self, group, *, greedy=False, on_sample=None):
        self.greedy.add(greedy)
        number = group.prompt.payload["n"]
        try:
            await asyncio.sleep(0.01 * (len(self.answers) - number))
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None and number == 2:
            raise self.error
        samples = [trajectory(answer, says=self.says) for answer in self.answers[number][: group.num_samples]]
        for _ in samples:
            on_sample()
        return TrajectoryGroup(group.group_id, group.prompt.prompt_id, tuple(samples), group.num_samples - len(samples))


def evaluate(*suites, settings=SETTINGS):
    async def run():
        return await Evaluation(suites, settings).wait()

    return asyncio.run(run())


def suite(runner=None, *, name="", prompts=3, samples=4):
    return EvalSuite(name, Source(), runner or Runner(), prompts, samples)


def test_pass_at_k_mean_and_majority_are_those_of_the_answers():
    [result] = evaluate(suite())
    numbers = {name: number.value for name, number in result.estimates.items()}
    # 3, 1 and 0 of 4 are right: pass@2 is 1 - C(n - c, 2) / 6 of each.
    expected = {"accuracy": 4 / 12, "pass@1": 4 / 12, "pass@2": (1 + (1 - 3 / 6) + 0) / 3, "pass@4": 2 / 3, "maj@4": 1 / 3}
    assert numbers == pytest.approx(expected)
    assert {name: result.metrics[f"eval/{name}"] for name in expected} == pytest.approx(expected)
    assert result.metrics["eval/accuracy_low"] < 4 / 12 < result.metrics["eval/accuracy_high"]
    assert (result.metrics["eval/prompts"], result.metrics["eval/response_tokens"]) == (3, 2)
    assert [group.group_id for group in result.groups] == ["eval/0/p0", "eval/1/p1", "eval/2/p2"]
    assert result.omitted == []


def test_tasks_have_numbers_and_seeds_of_their_own_and_all_are_sampled():
    own, other = Runner(), Runner((("r", "r"), ("r", "x")), says=False)
    first, second = evaluate(suite(own), suite(other, name="hard", prompts=2, samples=2))
    assert own.greedy == other.greedy == {False}
    assert second.metrics["eval/hard/accuracy"] == 0.75
    assert second.metrics["eval/hard/pass@2"] == 1.0
    assert not first.metrics.keys() & second.metrics.keys()
    assert second.groups[0].group_id == "eval:hard/0/p0", "sampling seeds follow from it"
    assert "maj@2" not in second.estimates
    assert "does not report what was answered" in second.omitted[0]


def test_one_greedy_sample_has_the_numbers_of_a_plain_evaluation():
    runner = Runner()
    [result] = evaluate(suite(runner, samples=1), settings=EvalConfig())
    assert runner.greedy == {True}
    assert result.estimates.keys() == {"accuracy"}
    assert result.estimates["accuracy"].method == "wilson"
    names = ("accuracy", "accuracy_low", "accuracy_high", "reward", "response_tokens", "prompts")
    assert result.metrics.keys() == {f"eval/{name}" for name in names}


def test_samples_that_an_environment_failed_on_are_left_out_of_what_needs_them():
    [result] = evaluate(suite(Runner((("r", "x", "x", "x"), ("r", "r"), ()))))
    assert result.estimates["accuracy"].value == pytest.approx((0.25 + 1.0) / 2)
    assert result.estimates["pass@2"].value == pytest.approx((0.5 + 1.0) / 2)
    assert result.estimates["pass@4"].value == 1.0, "of the one prompt with four samples"
    assert result.metrics["eval/prompts"] == 3


def test_an_error_ends_what_is_in_flight():
    runner = Runner(error=EnvError("broken"))
    with pytest.raises(EnvError, match="broken"):
        evaluate(suite(runner))
    assert runner.cancelled == 2
    with pytest.raises(DataError, match="no prompt"):
        evaluate(suite(prompts=0))


def test_waiting_tells_how_far_it_is():
    async def run():
        evaluation = Evaluation([suite()], SETTINGS)
        assert evaluation.num_total == 12
        seen, results = [], None
        while results is None:
            results = await evaluation.wait(0.004)
            seen.append(evaluation.num_finished)
        assert seen == sorted(seen)
        assert (min(seen), max(seen)) == (0, 12)

    asyncio.run(run())


@pytest.fixture
def config(tmp_path):
    task = "{name: hard, env: {name: arithmetic, options: {level: multiplication}}, num_prompts: 2}"
    overrides = ["recipe=tiny", f"model.path={tmp_path}", f"trainer.run_dir={tmp_path}", "env.name=arithmetic", "env.options={}"]
    return load_config([*overrides, f"evaluation.tasks=[{task}]", "evaluation.num_prompts=3", "evaluation.temperature=0.7"])


def test_everything_is_written_and_shown(config, tmp_path, capsys):
    results = evaluate(suite(), suite(Runner(says=False), name="hard", prompts=2))
    states = iter([EvaluationState(0, 20), EvaluationState(12, 20), EvaluationState(20, 20, results)])
    assert show_progress(lambda: next(states)) is results
    show_results(config, results)
    shown = capsys.readouterr().out
    assert "12 of 20 samples" in shown
    assert all(text in shown for text in ("arithmetic", "pass@4", "0.6667", "maj@4", "(bootstrap)", "hard: no maj@4"))
    metrics = write_results(config, results, tmp_path / "out", model="models/tiny", tokenizer=make_tokenizer())
    content = json.loads((tmp_path / "out" / "result.json").read_text())
    assert content["metrics"] == metrics
    assert content["model"] == "models/tiny"
    own, hard = content["tasks"]
    assert (own["task"], own["prompts"], own["samples_per_prompt"], hard["task"]) == ("arithmetic", 3, 4, "hard")
    assert own["statistics"]["pass@4"]["value"] == pytest.approx(2 / 3)
    assert hard["omitted"]
    rows = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 4 * 3 + 4 * 2
    first = {"task": "arithmetic", "prompt_id": "p0", "sample": 0, "response": "<r>", "score": 1.0, "answer": "r", "reward": 1.0}
    assert first.items() <= rows[0].items()
    assert rows[0]["prompt"] == make_tokenizer().decode([104, 105])
    assert rows[0]["stop_reason"] == "stop"
    assert (tmp_path / "out" / "pass_at_k.png").read_bytes().startswith(b"\x89PNG")
    write_results(
        config, evaluate(suite(samples=1), settings=EvalConfig()), tmp_path / "out", model="m", tokenizer=make_tokenizer()
    )
    assert not (tmp_path / "out" / "pass_at_k.png").exists(), "one of an earlier evaluation"


def test_the_prompts_of_a_task_are_its_own_and_asked_for_at_once(config):
    [source] = make_task_sources(config)
    payloads = [prompt.payload for prompt in source.eval_prompts(2)]
    assert {payload["level"] for payload in payloads} == {"multiplication"}
    small = load_config(
        ["recipe=tiny", "model.path=x", "evaluation.tasks=[{name: few, env: {name: arithmetic}, num_prompts: 100000}]"]
    )
    with pytest.raises(EnvError, match=r"evaluation\.tasks, few: .*held-out problems"):
        make_task_sources(small)


@pytest.mark.parametrize(
    ("name", "options", "payload", "action", "answer"),
    [
        ("arithmetic", {}, {"level": "multiplication", "operands": [3, 4]}, " 12\n", "12"),
        ("arithmetic", {"style": "chat"}, {"level": "multiplication", "operands": [3, 4]}, "It is 4 * 3 = 12.", "12"),
        ("arithmetic", {"style": "chat"}, {"level": "multiplication", "operands": [3, 4]}, "No idea", None),
        ("gsm8k", {}, {"question": "q", "answer": "#### 1"}, "#### $1,200.50", "1200.5"),
        ("gsm8k", {}, {"question": "q", "answer": "#### 1"}, "so 7", None),
    ],
)
def test_environments_say_what_was_answered(name, options, payload, action, answer):
    env = make_env(name, options)
    env.reset(options={"payload": payload})
    info = env.step(action)[4]
    assert info.get("answer") == answer
    assert SimpleNamespace(**info).metrics
