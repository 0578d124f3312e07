"""From a configuration's terms to the rewards of a step: the real composition, with an engine that has no model.

The judge is asked over a socket, by the very client that a run uses.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from helpers.fake_engine import FakeEngine
from helpers.rewards import TOKENIZER, chat_answer, write_reward_model
from skyrl_mega.config.build import config_from_dict
from skyrl_mega.data.ledger_reader import LedgerReader
from skyrl_mega.orchestration import rollout_assembly
from skyrl_mega.orchestration.rollout_assembly import RolloutPlan, make_coordinator
from skyrl_mega.rewards.check import check_rewards
from skyrl_mega.rewards.model import LoadedClassifier

STEP, SAMPLES = 2, 3
TEMPLATE = "Rate {response} to {prompt}."
FUNCTION = "def tens(one, *, step):\n    return step * (sum(one.token_ids) % 10)\n"


class LettersEngine(FakeEngine):
    """Samples of a group differ: the request's seed chooses where in the alphabet a turn begins."""

    async def generate(self, request):
        completion = await super().generate(request)
        shift = (request.sampling.seed or 0) % 7
        tokens = [5 + (token + shift) % 26 for token in completion.token_ids]
        text = TOKENIZER.decode(tokens)
        return type(completion)(**{**vars(completion), "token_ids": tokens, "text": text})


@contextlib.contextmanager
def judge_server():
    """An endpoint whose score is the number of bytes of the question modulo 12: 11 is out of range. Yields (url, keys sent)."""
    keys: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            keys.append(self.headers["authorization"])
            question = body["messages"][0]["content"]
            answer = json.dumps(chat_answer(f"Score: {sum(question.encode()) % 12}")[1]).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *arguments):
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", keys
    finally:
        server.shutdown()
        server.server_close()


def mixture(*, env, tens, liking, judge):
    return 0.5 * env + 0.5 * tens + 2.0 * liking - 0.25 * judge


@pytest.mark.parametrize("placement", ["in_process", "child_process"])
def test_the_terms_of_a_configuration_score_what_a_step_takes(tmp_path, monkeypatch, placement):
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    TOKENIZER.save_pretrained(tmp_path / "model")
    write_reward_model(tmp_path / "reward_model")
    (tmp_path / "my_rewards.py").write_text(FUNCTION)
    monkeypatch.setattr(rollout_assembly, "engine_factories", lambda plan: {"0": make_engine})

    async def make_engine(name):
        return LettersEngine(name)

    with judge_server() as (url, keys):
        judge = {
            "kind": "judge",
            "url": url,
            "model": "m",
            "template": "Rate {response} to {prompt}.",
            "api_key_env": "JUDGE_KEY",
        }
        function = {"kind": "function", "path": f"{tmp_path / 'my_rewards.py'}:tens", "options": {"step": 0.1}}
        terms = [
            {"name": "tens", "weight": 0.5, **function},
            {"name": "liking", "weight": 2.0, "kind": "model", "path": str(tmp_path / "reward_model"), "dtype": "float32"},
            {"name": "judge", "weight": -0.25, "on_error": "default", "default": 0.5, **judge},
        ]
        config = config_from_dict(
            {
                "model": {"path": str(tmp_path / "model")},
                "env": {"name": "arithmetic", "chat_template": False},
                "rollout": {"max_new_tokens": 5, "max_model_len": 200, "health_interval_s": 60.0},
                "trainer": {"prompts_per_step": STEP, "samples_per_prompt": SAMPLES, "run_dir": str(tmp_path / "run")},
                "reward": {"env_weight": 0.5, "terms": terms},
            }
        )
        check_rewards(config)
        path = tmp_path / "ledger.sqlite"
        plan = RolloutPlan(config, placement, "cpu", 0, str(path), str(tmp_path), (), ())

        async def scenario():
            coordinator = await make_coordinator(plan)
            try:
                await coordinator.resume(0, {})
                taken = await coordinator.take(1, patience_s=60.0)
                return taken, await coordinator.evaluate(4)
            finally:
                await coordinator.close()

        taken, evaluated = asyncio.run(scenario())
    assert set(keys) == {"Bearer s3cret"}
    trajectories = [t for group in taken.groups for t in group.trajectories]
    assert len(trajectories) == STEP * SAMPLES
    classifier = LoadedClassifier(config.reward.terms[1])
    for t in trajectories:
        scores = t.reward_components
        assert list(scores) == ["env", "tens", "liking", "judge"]
        assert scores["tens"] == 0.1 * (sum(t.token_ids) % 10)
        [[liking]] = asyncio.run(classifier.outputs([list(t.token_ids)]))
        assert scores["liking"] == pytest.approx(liking, abs=2e-6)
        start = t.turns[0].start
        question = TEMPLATE.format(prompt=TOKENIZER.decode(t.token_ids[:start]), response=TOKENIZER.decode(t.token_ids[start:]))
        verdict = sum(question.encode()) % 12
        assert scores["judge"] == (0.5 if verdict == 11 else verdict / 10)
        assert t.reward == pytest.approx(mixture(**scores))
    assert len({t.reward for t in trajectories}) > 1
    means = {name: evaluated[f"eval/reward_{name}"] for name in scores}
    assert evaluated["eval/reward"] == pytest.approx(mixture(**means))
    with LedgerReader.open_read_only(path) as ledger:
        assert ledger.load([group.group_id for group in taken.groups]) == taken.groups
