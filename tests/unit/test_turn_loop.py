"""The turn loop with a scripted engine: who wrote which token, when episodes end, and that nothing is tokenised twice."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from helpers.tiny import make_tokenizer
from skyrl_mega.agents.chat import ObservationEncoder
from skyrl_mega.agents.env_calls import EnvCalls
from skyrl_mega.agents.stats import rollout_metrics
from skyrl_mega.agents.turn_loop import AgentRunner
from skyrl_mega.config.schema import EnvConfig, RolloutConfig
from skyrl_mega.data.samples import to_samples
from skyrl_mega.envs.base import Reply, TextEnvBase
from skyrl_mega.envs.registry import make_env
from skyrl_mega.errors import DataError, EnvError, RolloutError
from skyrl_mega.types import Completion, GenerationRequest, Prompt, PromptGroup, StopReason, Trajectory, TrajectoryGroup, Turn

TOKENIZER = make_tokenizer()
EOS, IM_START, IM_END = 2, 3, 4


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


@dataclass
class ScriptedEngine:
    """A fleet of one that answers turn t of every request with `script[t]`: token ids, and how the turn stopped."""

    script: Sequence[tuple[list[int], StopReason]]
    policy_version: int = 5
    requests: list[GenerationRequest] = field(default_factory=list)

    async def generate(self, request: GenerationRequest, *, session: str | None = None) -> Completion:
        assert request.request_id.startswith(f"{session}/"), "the turns of an episode are one session"
        self.requests.append(request)
        await asyncio.sleep(0)
        tokens, stop = self.script[int(request.request_id.rsplit("/", 1)[1])]
        if len(tokens) > request.sampling.max_new_tokens:
            tokens, stop = tokens[: request.sampling.max_new_tokens], StopReason.LENGTH
        text = TOKENIZER.decode(tokens, skip_special_tokens=True)
        logprobs = [-0.1 * (t + 1) for t in range(len(tokens))]
        return Completion(request.request_id, list(tokens), logprobs, text, stop, [self.policy_version] * len(tokens))


@dataclass
class Runner:
    """An AgentRunner whose groups run together, and are waited for."""

    runner: AgentRunner

    def __call__(self, groups: Sequence[PromptGroup], *, greedy: bool = False) -> list[TrajectoryGroup]:
        async def run() -> list[TrajectoryGroup]:
            return await asyncio.gather(*(self.runner(group, greedy=greedy) for group in groups))

        return asyncio.run(run())


class CountdownEnv(TextEnvBase):
    """Asks `turns` times, then ends; each turn gives 0.25 and reports what was said."""

    def __init__(self, *, turns: int = 2, chat: bool = False) -> None:
        super().__init__(chat=chat)
        self.turns = turns
        self.heard: list[str] = []

    def pose(self, payload):
        self.heard, self.left = [], self.turns
        return [{"role": "user", "content": payload["text"]}] if self._chat else payload["text"]

    def respond(self, action):
        self.heard.append(action)
        self.left -= 1
        again = f" again {self.left}:"
        observation = [{"role": "user", "content": again}] if self._chat else again
        return Reply(0.25, self.left == 0, observation=observation, metrics={"accuracy": float(self.left == 0)})


def runner(
    engine, make=CountdownEnv, *, max_turns=4, chat=False, seed=0, sequential=True, env=None, rewards=None, **rollout
) -> Runner:
    settings = RolloutConfig(**{"max_new_tokens": 8, "max_model_len": 128, **rollout})
    env = EnvConfig("x", max_turns=max_turns, chat_template=chat, **{"retries": 0, **(env or {})})
    how = dict(rollout=settings, env=env, seed=seed, sequential_envs=sequential, rewards=rewards)
    return Runner(AgentRunner(engine, TOKENIZER, make, **how))


def groups(*texts: str, samples: int = 1) -> list[PromptGroup]:
    return [PromptGroup(f"g{i}", Prompt(f"p{i}", {"text": text}), samples) for i, text in enumerate(texts)]


def say(*texts: str, stop=StopReason.STOP):
    return [(ids(text), stop) for text in texts]


def test_a_tokens_routing_is_that_of_the_request_that_first_computed_it():
    """Every request computes the tokens before it again, perhaps otherwise: the first answer stays."""

    class Routing(ScriptedEngine):
        async def generate(self, request, *, session=None):
            completion = await super().generate(request, session=session)
            count = len(request.prompt_token_ids) + len(completion.token_ids) - 1
            return replace(completion, routed_experts=np.full((count, 3, 2), len(self.requests), dtype=np.int16))

    [group] = runner(Routing(say("yes", "no!")))(groups("Q:"))
    [t] = group.trajectories
    told = [1] * len(ids("Q:") + ids("ye")) + [2] * len(ids("s") + ids(" again 1:") + ids("no")) + [-1]
    assert t.routed_experts.shape == (len(t.token_ids), 3, 2)
    assert t.routed_experts.dtype == np.int16
    assert (t.routed_experts == np.array(told)[:, None, None]).all()
    [sample] = to_samples([group])
    assert sample.routed_experts.tolist() == t.routed_experts.tolist()


def test_two_turns_of_raw_text_are_joined_token_by_token():
    engine = ScriptedEngine(say("yes", "no!"))
    [group] = runner(engine)(groups("Q:"))
    [t] = group.trajectories
    again = ids(" again 1:")
    assert t.token_ids == ids("Q:") + ids("yes") + again + ids("no!")
    assert t.loss_mask == [0] * 2 + [1] * 3 + [0] * len(again) + [1] * 3
    assert t.policy_versions == [5 if mask else -1 for mask in t.loss_mask]
    expected = [0.0] * 2 + [-0.1, -0.2, -0.3] + [0.0] * len(again) + [-0.1, -0.2, -0.3]
    assert t.rollout_logprobs == pytest.approx(expected)
    assert t.turns == (Turn(2, 5, StopReason.STOP, 0.25), Turn(5 + len(again), 8 + len(again), StopReason.STOP, 0.25))
    assert (t.reward, t.terminated, t.truncated) == (0.5, True, False)
    assert t.metrics == {"accuracy": 1.0}
    assert (group.group_id, group.prompt_id, group.min_policy_version) == ("g0", "p0", 5)
    assert len(to_samples([group])) == 1


def test_sampled_tokens_are_never_tokenised_again():
    odd = [
        [*ids("a"), 1, 0, IM_START, *ids("\u00e9")[:1]],
        ids("b"),
    ]  # specials and half a character: no text re-encodes to these
    engine = ScriptedEngine([(tokens, StopReason.STOP) for tokens in odd])
    [group] = runner(engine)(groups("Q:"))
    t = group.trajectories[0]
    assert t.token_ids[2:7] == odd[0]
    assert engine.requests[1].prompt_token_ids[: 2 + len(odd[0])] == ids("Q:") + odd[0]


def test_raw_text_gets_no_special_token():
    engine = ScriptedEngine(say("35"))
    env = {"level": "two_digit_addition", "operands": [47, 35]}
    run = runner(engine, lambda: make_env("arithmetic", {}), max_turns=1)
    run([PromptGroup("g", Prompt("p", env), 1)])
    assert engine.requests[0].prompt_token_ids == ids("31 + 4 = 35\n47 + 35 =")


def test_requests_are_made_in_an_order_that_repeats_with_stable_ids():
    class Uneven(CountdownEnv):
        def pose(self, payload):
            self.turns = len(payload["text"])
            return super().pose(payload)

    engine = ScriptedEngine(say("a", "b", "c"))
    results = runner(engine, Uneven)(groups("x", "xyz", samples=2))
    turns = [["g0/0/0", "g0/1/0", "g1/0/0", "g1/1/0"], ["g1/0/1", "g1/1/1"], ["g1/0/2", "g1/1/2"]]
    assert [request.request_id for request in engine.requests] == [name for turn in turns for name in turn]
    assert [[len(t.turns) for t in g.trajectories] for g in results] == [[1, 1], [3, 3]]


def test_requests_have_their_own_seeds_whatever_else_is_in_flight():
    def seeds(seed, *texts, samples=3):
        engine = ScriptedEngine(say("a", "b"))
        runner(engine, seed=seed)(groups(*texts, samples=samples))
        return {request.request_id: request.sampling.seed for request in engine.requests}

    alone, together = seeds(0, "x"), seeds(0, "x", "y", samples=4)
    assert len(set(together.values())) == len(together) == 16
    assert alone.items() <= together.items()
    assert seeds(1, "x").keys() == alone.keys()
    assert not set(seeds(1, "x").values()) & set(alone.values())
    assert all(0 <= seed < 2**32 for seed in together.values())


def test_sampling_parameters_come_from_the_config_and_greedy_overrides_them():
    settings = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "stop": ("\n",), "max_new_tokens": 6}
    engine = ScriptedEngine(say("a", "b"))
    run = runner(engine, **settings)
    run(groups("x"))
    run(groups("x"), greedy=True)
    sampled, greedy = engine.requests[0].sampling, engine.requests[2].sampling
    assert (sampled.temperature, sampled.top_p, sampled.top_k, sampled.stop, sampled.max_new_tokens) == (0.7, 0.9, 20, ("\n",), 6)
    assert (greedy.temperature, greedy.top_p, greedy.top_k, greedy.stop, greedy.max_new_tokens) == (0.0, 1.0, 0, ("\n",), 6)
    assert greedy.seed is None


def test_an_episode_longer_than_max_turns_is_truncated():
    [group] = runner(ScriptedEngine(say("a", "b")), lambda: CountdownEnv(turns=9), max_turns=2)(groups("x"))
    t = group.trajectories[0]
    assert (len(t.turns), t.terminated, t.truncated, t.reward) == (2, False, True, 0.5)
    assert t.loss_mask[-1] == 1, "no observation follows the last turn"


@pytest.mark.parametrize(
    ("limit", "asked", "turns"), [(10, [8], 1), (14, [8], 1), (15, [8, 1], 2), (18, [8, 4], 2), (30, [8, 8], 2)]
)
def test_turns_are_limited_to_the_context_that_is_left(limit, asked, turns):
    # prompt 2, turn 3, observation 9: 14 tokens before the second turn
    engine = ScriptedEngine(say("aaa", "bbbbbb"))
    [group] = runner(engine, max_model_len=limit)(groups("Q:"))
    t = group.trajectories[0]
    assert [request.sampling.max_new_tokens for request in engine.requests] == asked
    assert len(t.turns) == turns
    assert len(t.token_ids) <= limit
    assert t.truncated == (turns == 1)
    if asked[-1] == 1:
        assert t.turns[-1].stop_reason is StopReason.LENGTH


def test_a_prompt_without_room_for_an_answer_is_an_error():
    run = runner(ScriptedEngine(say("a", "b")), max_model_len=8)
    run(groups("1234567"))
    with pytest.raises(DataError, match=r"group 'g0' has 8 tokens, but rollout.max_model_len \(8\)"):
        run(groups("12345678"))


def test_an_aborted_turn_is_kept_and_not_graded():
    engine = ScriptedEngine(say("par", stop=StopReason.ABORT))
    [group] = runner(engine)(groups("x"))
    t = group.trajectories[0]
    assert (t.truncated, t.terminated, t.reward) == (True, False, 0.0)
    assert t.turns == (Turn(1, 4, StopReason.ABORT, 0.0),)
    assert sum(t.loss_mask) == 3


# -- chat ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends_itself", [True, False])
def test_chat_turns_join_into_what_the_template_would_render(ends_itself):
    tail = [IM_END] if ends_itself else []
    engine = ScriptedEngine([(ids("yes") + tail, StopReason.STOP), (ids("no") + tail, StopReason.STOP)])
    [group] = runner(engine, lambda: CountdownEnv(chat=True), chat=True, max_model_len=400)(groups("Q:"))
    t = group.trajectories[0]
    conversation = [
        {"role": "user", "content": "Q:"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": " again 1:"},
    ]
    rendered = TOKENIZER.apply_chat_template(conversation, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert engine.requests[1].prompt_token_ids == rendered
    assert t.token_ids == rendered + ids("no") + tail
    sampled = [token for token, mask in zip(t.token_ids, t.loss_mask, strict=True) if mask]
    assert sampled == ids("yes") + tail + ids("no") + tail
    first = TOKENIZER.apply_chat_template(conversation[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert engine.requests[0].prompt_token_ids == first


def test_chat_history_is_not_rendered_again_even_where_the_template_rewrites_it():
    rewriting = make_tokenizer()  # as templates do that drop earlier reasoning: only the last message keeps its content
    rewriting.chat_template = (
        "<s>{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    encoder = ObservationEncoder(rewriting, chat_template=True)
    new = encoder.later([{"role": "tool", "content": "42"}], [*ids("thought"), IM_END])
    assert rewriting.decode(new) == "\n<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n"
    unfinished = encoder.later([{"role": "tool", "content": "42"}], ids("thought"))
    assert unfinished == [IM_END, *new]


def test_plain_text_counts_as_a_user_message_where_the_chat_template_is_on():
    encoder = ObservationEncoder(TOKENIZER, chat_template=True)
    assert encoder.first("hi") == encoder.first([{"role": "user", "content": "hi"}])


def test_chat_settings_that_can_not_work_say_so():
    class NoTemplate:
        chat_template = None

    with pytest.raises(EnvError, match=r"has no chat template.*env\.chat_template=false"):
        ObservationEncoder(NoTemplate(), chat_template=True)
    raw = ObservationEncoder(TOKENIZER, chat_template=False)
    with pytest.raises(EnvError, match=r"chat messages, but env\.chat_template is false"):
        raw.first([{"role": "user", "content": "hi"}])
    with pytest.raises(EnvError, match="must not be empty"):
        raw.first("")
    with pytest.raises(EnvError, match="must be a text or a list of messages"):
        raw.first([{"role": "user"}])
    amnesiac = make_tokenizer()
    amnesiac.chat_template = "{% for m in messages %}{% if m['role'] != 'assistant' %}{{ m['content'] }}{% endif %}{% endfor %}"
    with pytest.raises(EnvError, match="does not repeat an assistant's turn exactly once"):
        ObservationEncoder(amnesiac, chat_template=True).later("x", [1])
    picky = make_tokenizer()
    picky.chat_template = "{{ raise_exception('only users here') }}"
    with pytest.raises(EnvError, match=r"refuses messages with the roles \['system'\]: only users here"):
        ObservationEncoder(picky, chat_template=True).first([{"role": "system", "content": "x"}])


# -- errors --------------------------------------------------------------------------------------------------------------


def test_whatever_an_environment_raises_names_the_group():
    class Broken(CountdownEnv):
        def respond(self, action):
            raise KeyError("gold")

    with pytest.raises(EnvError, match=r"failed in step of group 'g0', sample 0, turn 0: KeyError: 'gold'") as caught:
        runner(ScriptedEngine(say("a")), Broken)(groups("x"))
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(EnvError, match=r"failed in reset of group 'g0'.*KeyError: 'text'"):
        runner(ScriptedEngine(say("a")))([PromptGroup("g0", Prompt("p", {}), 1)])


def test_a_reward_that_is_not_finite_is_an_error():
    class Infinite(CountdownEnv):
        def respond(self, action):
            return Reply(float("inf"), metrics={"accuracy": float("nan")})

    with pytest.raises(EnvError, match=r"must be finite.*'reward': inf, 'accuracy': nan"):
        runner(ScriptedEngine(say("a")), Infinite)(groups("x"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: replace(c, request_id="other"), "answered 'other' where 'g0/0/0' was asked"),
        (lambda c: replace(c, logprobs=[]), "3 tokens, 0 logprobs"),
        (lambda c: replace(c, token_ids=[], logprobs=[]), "0 tokens, 0 logprobs"),
        (lambda c: replace(c, token_ids=[7] * 9, logprobs=[0.0] * 9), "equally many, from 1 to 8"),
        (lambda c: replace(c, policy_versions=[-1] * len(c.token_ids)), "policy_version -1"),
    ],
)
def test_an_engine_that_breaks_its_protocol_is_found_out(spoil, message):
    class Spoiled(ScriptedEngine):
        async def generate(self, request, *, session=None):
            return spoil(await super().generate(request, session=session))

    with pytest.raises(RolloutError, match=message):
        runner(Spoiled(say("abc")))(groups("x"))


def test_groups_must_have_samples():
    with pytest.raises(DataError, match="asks for 0 samples"):
        runner(ScriptedEngine(say("a")))(groups("x", samples=0))


class BrokenEnv(CountdownEnv):
    def respond(self, action):
        raise OSError("the sandbox is gone")


def sometimes_broken(*broken: int):
    """Makes environments, of which those with the numbers `broken` fail."""
    numbers = itertools.count()
    return lambda: BrokenEnv() if next(numbers) in broken else CountdownEnv()


def test_an_episode_that_failed_is_begun_again_with_another_environment():
    undisturbed = runner(ScriptedEngine(say("a", "b")))(groups("x", samples=3))
    [group] = runner(ScriptedEngine(say("a", "b")), sometimes_broken(1), env={"retries": 1})(groups("x", samples=3))
    assert group.trajectories == undisturbed[0].trajectories
    assert (group.num_retries, group.num_masked) == (1, 0)


def test_a_sample_that_keeps_failing_is_masked_or_ends_the_run():
    masking = {"retries": 1, "on_error": "mask"}
    [group] = runner(ScriptedEngine(say("a", "b")), sometimes_broken(0, 3), env=masking)(groups("x", samples=3))
    assert (len(group.trajectories), group.num_masked, group.num_retries) == (2, 1, 1)
    with pytest.raises(EnvError, match=r"failed in step of group 'g0', sample 0, turn 0: OSError: the sandbox is gone"):
        runner(ScriptedEngine(say("a", "b")), sometimes_broken(0, 3), env={"retries": 1})(groups("x", samples=3))


@pytest.mark.parametrize("sequential", [True, False])
def test_an_environment_that_hangs_runs_out_of_time(sequential):
    released = threading.Event()

    class Hangs(CountdownEnv):
        def respond(self, action):
            if self.left == 1:
                released.wait(30)
            return super().respond(action)

    settings = {"timeout_s": 0.1, "on_error": "mask"}
    try:
        [group] = runner(ScriptedEngine(say("a", "b")), Hangs, sequential=sequential, env=settings)(groups("x", samples=3))
        assert (group.trajectories, group.num_masked) == ((), 3)
        with pytest.raises(EnvError, match=r"TimeoutError: no answer within env.timeout_s \(0.1 s\)"):
            runner(ScriptedEngine(say("a", "b")), Hangs, sequential=sequential, env={"timeout_s": 0.1})(groups("x"))
    finally:
        released.set()


def test_environments_run_side_by_side_unless_they_shall_repeat():
    together = threading.Barrier(4)

    class Meets(CountdownEnv):
        def pose(self, payload):
            together.wait(20)
            return super().pose(payload)

    [group] = runner(ScriptedEngine(say("a", "b")), Meets, sequential=False)(groups("x", samples=4))
    assert len(group.trajectories) == 4


def test_no_call_of_thousands_is_taken_for_late():
    async def run():
        calls = EnvCalls(20.0)
        await asyncio.gather(*(calls(int, "7") for _ in range(5000)))
        calls.close()

    asyncio.run(run())


def test_a_cancelled_group_cancels_its_requests():
    class Slow(ScriptedEngine):
        async def generate(self, request, *, session=None):
            try:
                await asyncio.sleep(60)
            finally:
                cancelled.append(request.request_id)

    async def run():
        task = asyncio.ensure_future(runner(Slow(say("a"))).runner(groups("x", samples=2)[0]))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    cancelled: list[str] = []
    asyncio.run(run())
    assert sorted(cancelled) == ["g0/0/0", "g0/1/0"]


def test_environments_are_kept_between_calls():
    made = []

    def make():
        made.append(CountdownEnv())
        return made[-1]

    run = runner(ScriptedEngine(say("a", "b")), make)
    first = run(groups("x", "y", samples=3))
    assert run(groups("x", "y", samples=3)) == first
    assert len(made) == 6


def test_samples_of_a_group_start_alike_and_groups_differ():
    class Dice(CountdownEnv):
        def pose(self, payload):
            super().pose(payload)
            return str(self.np_random.integers(10**6))

    results = runner(ScriptedEngine(say("a", "b")), Dice)(groups("x", "y", samples=3))
    starts = [{tuple(t.token_ids[: t.turns[0].start]) for t in group.trajectories} for group in results]
    assert [len(s) for s in starts] == [1, 1]
    assert starts[0] != starts[1]


# -- scores --------------------------------------------------------------------------------------------------------------


class Scorer:
    """A reward pipeline that keeps what it is told, and waits for `gate`."""

    def __init__(self, gate=None):
        self.told, self.gate, self.cancelled, self.closed = [], gate, [], False

    async def __call__(self, group, inputs):
        self.told.append((group, inputs))
        try:
            await (asyncio.sleep(0) if self.gate is None else self.gate.wait())
        except asyncio.CancelledError:
            self.cancelled.append(group.group_id)
            raise
        return replace(group, num_masked=group.num_masked + 10)

    async def close(self):
        self.closed = True


@pytest.mark.parametrize(("chat", "greedy"), [(False, False), (True, True)])
def test_a_finished_group_is_scored_with_all_that_was_said(chat, greedy):
    rewards = Scorer()
    engine = ScriptedEngine(say("yes", "no!", stop=StopReason.LENGTH))
    run = runner(engine, lambda: CountdownEnv(chat=chat), chat=chat, rewards=rewards, max_model_len=400)
    [group] = run(groups("Q:", samples=2), greedy=greedy)
    assert group.num_masked == 10
    [(told_group, inputs)] = rewards.told
    assert told_group.trajectories == group.trajectories
    assert [one.sample for one in inputs] == [0, 1]
    one = inputs[1]
    said = [("user", "Q:"), ("assistant", "yes"), ("user", " again 1:"), ("assistant", "no!")]
    assert [(message["role"], message["content"]) for message in one.messages] == said
    assert (one.prompt, one.response) == ("user: Q:\n\nassistant: yes\n\nuser:  again 1:", "no!")
    assert (one.group_id, one.prompt_id, one.payload) == ("g0", "p0", {"text": "Q:"})
    assert one.token_ids == group.trajectories[1].token_ids
    assert (one.num_response_tokens, one.num_prompt_tokens) == (6, len(one.token_ids) - 6)
    assert (one.stop_reason, one.truncated, one.env_reward, one.metrics) == (StopReason.LENGTH, False, 0.5, {"accuracy": 1.0})
    asyncio.run(run.runner.close())
    assert rewards.closed


def test_samples_that_their_environment_failed_are_not_scored():
    rewards = Scorer()
    masking = {"retries": 0, "on_error": "mask"}
    [group] = runner(ScriptedEngine(say("a", "b")), sometimes_broken(1), env=masking, rewards=rewards)(groups("x", samples=3))
    [(_, inputs)] = rewards.told
    assert len(inputs) == len(group.trajectories) == 2
    assert group.num_masked == 11


def test_groups_are_scored_one_by_one_and_a_cancelled_group_cancels_its_scoring():
    async def run():
        rewards = Scorer(asyncio.Event())
        run_group = runner(ScriptedEngine(say("a", "b")), rewards=rewards).runner
        ended = []
        tasks = [asyncio.create_task(run_group(g, on_sample=lambda: ended.append(1))) for g in groups("x", "y", samples=2)]
        while len(rewards.told) < 2:
            await asyncio.sleep(0.001)
        assert len(ended) == 4, "engines are free while a group is scored"
        tasks[0].cancel()
        await asyncio.gather(tasks[0], return_exceptions=True)
        assert rewards.cancelled == ["g0"]
        rewards.gate.set()
        assert (await tasks[1]).num_masked == 10

    asyncio.run(asyncio.wait_for(run(), 30))


# -- metrics -------------------------------------------------------------------------------------------------------------


def episode(reward, tokens, stop=StopReason.STOP, truncated=False, **metrics) -> Trajectory:
    mask = [0] + [1] * tokens
    turns = (Turn(1, 1 + tokens, stop, reward),)
    versions = [-1] + [0] * tokens
    return Trajectory([1] * len(mask), mask, [0.0] * len(mask), versions, turns, reward, not truncated, truncated, metrics)


def test_rollout_metrics_are_what_their_names_say():
    metrics = rollout_metrics(
        [
            TrajectoryGroup("a", "p", (episode(1.0, 2, accuracy=1.0), episode(0.0, 4, StopReason.LENGTH, accuracy=0.0))),
            TrajectoryGroup("b", "q", (episode(1.0, 6, accuracy=1.0), episode(1.0, 8, StopReason.LENGTH, truncated=True))),
        ]
    )
    assert metrics["reward/mean"] == 0.75
    assert metrics["reward/std"] == pytest.approx(0.1875**0.5)
    assert metrics["reward/max"] == 1.0
    assert metrics["group/zero_variance_fraction"] == 0.5
    assert metrics["response/tokens_mean"] == 5.0
    assert metrics["response/tokens_p95"] == pytest.approx(7.7)
    assert metrics["response/tokens_max"] == 8.0
    assert metrics["response/turns_mean"] == 1.0
    assert metrics["response/length_stop_fraction"] == 0.5
    assert metrics["response/truncated_fraction"] == 0.25
    assert metrics["env/accuracy"] == 0.5, "an episode that reported nothing counts as 0"
    assert not any(name.startswith("reward/") and name not in ("reward/mean", "reward/std", "reward/max") for name in metrics)
    mixed = [replace(episode(0.0, 1), reward_components={"env": 1.0, "judge": score}) for score in (0.25, 0.5)]
    metrics = rollout_metrics([TrajectoryGroup("a", "p", tuple(mixed))])
    assert (metrics["reward/env_mean"], metrics["reward/judge_mean"]) == (1.0, 0.375)
    with pytest.raises(DataError, match="no trajectory"):
        rollout_metrics([])
