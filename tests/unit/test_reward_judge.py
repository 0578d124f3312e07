"""The judge: what it is asked, how its answers become scores, and what happens where there is none."""

from __future__ import annotations

import asyncio
import re

import httpx
import pytest

from helpers.rewards import JsonServer, chat_answer, reward_input
from skyrl_mega.config.schema import JudgeTerm
from skyrl_mega.errors import RewardError
from skyrl_mega.rewards import attempts
from skyrl_mega.rewards.extract import find_score
from skyrl_mega.rewards.judge import Judge, fill
from skyrl_mega.rewards.shared_calls import SharedCalls
from skyrl_mega.types import StopReason

TEMPLATE = 'Q: {prompt}\nA: {response}\nGold: {reference}\nEnd with {"score": 0..10} as "Score: N".'


def judge_term(**changes) -> JudgeTerm:
    settings = dict(name="j", url="http://judge/v1", model="judge-7b", template=TEMPLATE, reference="answer")
    return JudgeTerm(**{**settings, **changes})


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(attempts, "_jitter", lambda state: 0.0)


def judged(server: JsonServer, *inputs, **changes):
    async def run():
        judge = Judge(judge_term(**changes), transport=httpx.ASGITransport(server))
        try:
            return await judge.score(inputs)
        finally:
            await judge.close()

    return asyncio.run(run())


def test_the_judge_is_asked_as_an_openai_endpoint_expects_it(monkeypatch):
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest, ChatCompletionResponse

    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    server = JsonServer(lambda path, body: chat_answer("Right. Score: 7.5"))
    ChatCompletionResponse.model_validate(chat_answer("x")[1])
    assert judged(server, reward_input(), api_key_env="JUDGE_KEY", max_tokens=99) == [0.75]
    path, body = server.calls[0]
    request = ChatCompletionRequest.model_validate(body)
    assert path == "/v1/chat/completions"
    assert (request.model, request.temperature, request.max_tokens, len(request.messages)) == ("judge-7b", 0.0, 99, 1)
    assert request.messages[0]["content"] == 'Q: 6 x 7 =\nA: 42\nGold: 42\nEnd with {"score": 0..10} as "Score: N".'
    assert server.headers[0]["authorization"] == "Bearer s3cret"
    assert judged(server, reward_input()) == [0.75]
    assert "authorization" not in server.headers[1]


def test_a_template_is_filled_once_whatever_the_policy_wrote():
    one = reward_input("{reference} {prompt}", payload={"answer": {"gold": "\u00e9"}})
    assert fill(judge_term(template="{response}|{prompt}|{reference}"), one) == '{reference} {prompt}|6 x 7 =|{"gold": "\u00e9"}'
    with pytest.raises(RewardError, match="the payload has no `answer` to refer to; it has question"):
        fill(judge_term(), reward_input(payload={"question": "?"}))


def test_the_prompt_of_several_messages_has_their_roles_and_the_response_is_the_last_turn():
    messages = [("system", "Be brief."), ("user", "6 x 7?"), ("assistant", "41"), ("user", "Again."), ("assistant", "42")]
    one = reward_input(messages=[{"role": role, "content": content} for role, content in messages], stop_reason=StopReason.LENGTH)
    assert one.response == "42"
    assert one.prompt == "system: Be brief.\n\nuser: 6 x 7?\n\nassistant: 41\n\nuser: Again."


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Score: 0", 0.0),
        ("score: 10", 1.0),
        ("First I thought Score: 2. No. Score: 8", 0.8),
        ("Score: 2.5\n", 0.25),
    ],
)
def test_the_last_match_of_the_pattern_is_the_score(answer, score):
    assert find_score(answer, judge_term()) == score


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ('{"score": 3}', 0.5),
        ('```json\n{"why": "a {brace}", "score": "4.0"}\n```', 0.75),
        ('{"score": 1} was my first thought {not json} but {"reason": {"score": 9}, "score": 5} it is {"other": 2}', 1.0),
    ],
)
def test_the_last_json_object_with_the_key_has_the_score(answer, score):
    assert find_score(answer, judge_term(extract="json", min_score=1.0, max_score=5.0)) == score


@pytest.mark.parametrize(
    ("answer", "settings", "message"),
    [
        ("I can't say.", {}, r"nothing that `.*` matches: \"I can't say.\""),
        ("Score: 11", {}, "must be a number from 0 to 10, but is '11'"),
        ("Score: -1", {}, "must be a number from 0 to 10, but is '-1'"),
        ("Score: high", {"pattern": r"Score: (\w+)"}, "but is 'high'"),
        ('{"score": true}', {"extract": "json"}, "but is True"),
        ('{"score": [3]}', {"extract": "json"}, r"but is \[3\]"),
        ('{"score": 3', {"extract": "json"}, "no JSON object with `score`"),
        ('{"grade": 3}', {"extract": "json"}, "no JSON object with `score`"),
        ("x" * 999, {}, re.escape("...xxxx")),
    ],
)
def test_an_answer_without_a_score_in_the_range_is_an_error(answer, settings, message):
    with pytest.raises(RewardError, match=message):
        find_score(answer, judge_term(**settings))


def test_an_unreadable_answer_is_an_error_of_its_sample_alone():
    server = JsonServer(lambda path, body: chat_answer("Score: 3" if "A: a" in body["messages"][0]["content"] else None))
    good, bad = judged(server, reward_input("a"), reward_input("b", sample=1))
    assert good == 0.3
    assert str(bad).startswith("reward `j` failed for group 'g', sample 1: the answer has nothing that")
    assert len(server.calls) == 2, "at temperature 0 the same question would get the same answer"


@pytest.mark.parametrize("status", [429, 500, 503])
def test_overload_and_server_errors_are_tried_again(status):
    def answer(path, body):
        return (status, {"error": "busy"}) if len(server.calls) < 3 else chat_answer("Score: 5")

    server = JsonServer(answer)
    assert judged(server, reward_input(), retries=2) == [0.5]
    assert len(server.calls) == 3
    server.calls.clear()
    [error] = judged(server, reward_input(), retries=1)
    assert f"http://judge/v1/chat/completions answered {status}" in str(error)


def test_a_request_that_is_refused_is_not_tried_again():
    server = JsonServer(lambda path, body: (401, {"error": "wrong key"}))
    [error] = judged(server, reward_input())
    assert 'answered 401: {"error": "wrong key"}' in str(error)
    assert len(server.calls) == 1


def test_answers_of_another_kind_are_errors():
    for content, message in (("<html>", "answered no JSON: <html>"), ({"choices": []}, "holds no message"), ([], "no message")):
        [error] = judged(JsonServer(lambda path, body, content=content: (200, content)), reward_input())
        assert message in str(error)


def test_a_pause_is_as_long_as_the_server_asks_for(monkeypatch):
    pauses = []
    real_sleep = asyncio.sleep

    async def sleep(seconds):
        pauses.extend([seconds] if seconds else [])
        await real_sleep(0)

    def answer(path, body):
        header = [(b"retry-after", b"7")] if len(server.calls) == 1 else [(b"retry-after", b"9999")]
        return (429, {}, header) if len(server.calls) < 3 else chat_answer("Score: 5")

    server = JsonServer(answer)
    monkeypatch.setattr(asyncio, "sleep", sleep)
    assert judged(server, reward_input()) == [0.5]
    assert pauses == [7.0, attempts.LONGEST_PAUSE_S]


def test_a_judge_that_does_not_answer_runs_out_of_time_and_one_that_is_not_there_is_named():
    slow = JsonServer(lambda path, body: chat_answer("Score: 5"), delay_s=20)
    [error] = judged(slow, reward_input(), timeout_s=0.05, retries=0)
    assert "has not answered within 0.05 s" in str(error)

    class Gone(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request):
            raise httpx.ConnectError("connection refused")

    async def run():
        return await Judge(judge_term(retries=1), transport=Gone()).score([reward_input()])

    [error] = asyncio.run(run())
    assert "http://judge/v1/chat/completions can't be reached (ConnectError: connection refused)" in str(error)


def test_at_most_concurrency_requests_are_in_flight():
    server = JsonServer(lambda path, body: chat_answer("Score: 5"), delay_s=0.01)
    assert judged(server, *[reward_input(str(n), sample=n) for n in range(9)], concurrency=3) == [0.5] * 9
    assert server.most_running == 3


def test_equal_questions_are_asked_once_while_the_cache_holds_them():
    server = JsonServer(lambda path, body: chat_answer("Score: 5"))

    async def run(**changes):
        judge = Judge(judge_term(**changes), transport=httpx.ASGITransport(server))
        for _ in range(2):
            assert await judge.score([reward_input("a"), reward_input("a", sample=1), reward_input("b")]) == [0.5] * 3
        return len(server.calls)

    assert asyncio.run(run()) == 2
    assert asyncio.run(run(cache_size=0)) == 2 + 4, "those in flight are shared all the same"


def test_the_least_recently_used_answers_are_dropped():
    asked = []

    async def run():
        calls = SharedCalls(2)
        for question in "ababcacb":

            async def ask(question=question):
                asked.append(question)
                return question

            assert await calls.get(question, ask) == question

    asyncio.run(run())
    assert "".join(asked) == "abcab"


def test_a_shared_question_outlives_the_first_that_asked_it_and_is_cancelled_with_the_last():
    async def run():
        calls, release, cancelled = SharedCalls(4), asyncio.Event(), []

        async def ask():
            try:
                await release.wait()
            except asyncio.CancelledError:
                cancelled.append(True)
                raise
            return "answer"

        first, second = (asyncio.create_task(calls.get("q", ask)) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.sleep(0)
        release.set()
        assert await second == "answer"
        assert first.cancelled()
        assert not cancelled
        release.clear()
        last = asyncio.create_task(calls.get("another", ask))
        await asyncio.sleep(0)
        last.cancel()
        await asyncio.gather(last, return_exceptions=True)
        await asyncio.sleep(0)
        assert cancelled == [True]

        async def fail():
            raise RewardError("down")

        for _ in range(2):
            with pytest.raises(RewardError, match="down"):
                await calls.get("third", fail)

    asyncio.run(run())
