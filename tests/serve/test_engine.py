"""The engine against the generator and transformers, with real models of random weights."""

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from minillm.errors import ConfigError
from minillm.models import registry
from minillm.models.generator import Delta, Generator
from minillm.models.sampling import SamplingParams
from minillm.serve.engine import Engine
from minillm.serve.memory import EngineSettings
from minillm.serve.problems import ApiError
from minillm.serve.speculate import LONGEST, SHORTEST, Drafter, look_up

NAMES = ["mini_llama3", "mini_deepseekv3", "mini_qwen3_next"]
COMMON = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "max_position_embeddings": 160,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
SHAPES: dict[str, dict[str, Any]] = {
    "mini_llama3": {
        "intermediate_size": 48, "num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 16,
    },
    "mini_deepseekv3": {
        "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
        "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8, "v_head_dim": 8,
    },
    "mini_qwen3_next": {
        "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"],
        "num_key_value_heads": 2, "head_dim": 16, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    },
}  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["hello world, the quick brown fox 你好"] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|endoftext|>", eos_token="<|im_end|>"
    )


def make_model(name: str) -> Any:
    """A model whose likeliest token is far ahead of the next: no rounding can change it."""
    torch.manual_seed(0)
    model = registry.build_model(registry.build_config(name, **COMMON | SHAPES[name]))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif parameter.ndim > 1:
                parameter.normal_(0, 0.25)
    return model.eval()


@pytest.fixture(scope="module", params=NAMES)
def generator(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast) -> Generator:
    return Generator(make_model(request.param), tokenizer)


Answers = dict[tuple[int, ...], tuple[int, ...]]


@pytest.fixture(scope="module")
def right(generator: Generator) -> Callable[[Sequence[int], int], tuple[int, ...]]:
    """The generator's greedy answer; for a few prompts also that of transformers."""
    known: Answers = {}

    def get(prompt: Sequence[int], num: int) -> tuple[int, ...]:
        key = tuple(prompt)
        if key not in known:
            params = SamplingParams(temperature=0, max_tokens=40)
            known[key] = generator.generate(prompt, params).token_ids
            if len(known) <= 4:
                ids = torch.tensor([prompt])
                theirs = generator.model.generate(  # type: ignore[operator]
                    ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40
                )
                assert tuple(theirs[0, len(prompt) :].tolist()) == known[key]
        return known[key][:num]

    return get


class Collected:
    """What an answer's client got."""

    def __init__(self) -> None:
        self.deltas: list[Delta] = []
        self.error: BaseException | None = None

    def __call__(self, item: Delta | BaseException) -> None:
        if isinstance(item, BaseException):
            assert self.error is None
            self.error = item
            return
        assert not self.is_over
        self.deltas.append(item)

    @property
    def is_over(self) -> bool:
        return self.error is not None or bool(self.deltas and self.deltas[-1].finish_reason)

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(token for delta in self.deltas for token in delta.token_ids)

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)


def engine_of(generator: Generator, **changes: Any) -> Engine:
    made = EngineSettings(**{"block_size": 4, "prefill_chunk": 16} | changes)
    return Engine(generator.model, generator.tokenizer, made, is_threaded=False)


def greedy(num: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num)


def drain(engine: Engine) -> None:
    for _ in range(2000):
        if not engine.scheduler.has_work and not engine._inbox:
            return
        engine.step()
    raise AssertionError("it does not end")


PROMPTS = st.tuples(st.sampled_from([(5, 9, 13, 40, 41, 7) * 4, (50, 51) * 6, ()]),
                    st.lists(st.integers(3, 299), min_size=1, max_size=12))  # fmt: skip
EVENTS = st.lists(
    st.tuples(PROMPTS, st.integers(1, 40), st.integers(0, 6), st.booleans()), max_size=7
)
SETTINGS = st.fixed_dictionaries(
    {
        "max_running": st.integers(1, 5),
        "cache_tokens": st.sampled_from([96, 120, 160, 600]),
        "prefill_chunk": st.sampled_from([3, 8, 64]),
        "block_size": st.sampled_from([2, 4, 8]),
        "keeps_prefixes": st.booleans(),
        "speculate": st.sampled_from(["off", "ngram", "mtp"]),
        "speculate_up_to": st.integers(1, 4),
    }
)


class Oracle(Drafter):
    """Guesses that are right up to a place, so that all kinds of acceptance occur."""

    def __init__(self, whole: Sequence[int], seed: int) -> None:
        super().__init__()
        self.whole, self.rng = list(whole), random.Random(seed)

    def guess(self, tokens: Sequence[int], most: int) -> list[int]:
        found = self.whole[len(tokens) : len(tokens) + self.rng.randint(0, min(most, 5))]
        if found and self.rng.random() < 0.6:
            found[self.rng.randrange(len(found))] ^= 1
        return found


Right = Callable[[Sequence[int], int], tuple[int, ...]]
Events = list[tuple[tuple[tuple[int, ...], list[int]], int, int, bool]]


@settings(
    max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(SETTINGS, EVENTS)
def test_greedy_tokens_are_those_of_the_generator_whatever_happens(
    generator: Generator, right: Right, changes: dict[str, Any], events: Events
) -> None:
    check_schedule(generator, right, changes, events)


@pytest.mark.slow
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(SETTINGS, EVENTS)
def test_many_schedules(
    generator: Generator, right: Right, changes: dict[str, Any], events: Events
) -> None:
    check_schedule(generator, right, changes, events)


def check_schedule(
    generator: Generator, right: Right, changes: dict[str, Any], events: Events
) -> None:
    """Let requests come and go; every answer must be the generator's, and all memory free."""
    if changes["speculate"] == "mtp" and generator.model.config.model_type != "mini_deepseekv3":
        changes = changes | {"speculate": "ngram"}
    engine = engine_of(generator, **changes)
    asked: list[tuple[list[int], int, Collected, bool]] = []
    for (start, tail), num, steps, aborts in events:
        prompt, client = [*start, *tail], Collected()
        request = engine.add(prompt, greedy(num), client)
        request.drafter = Oracle([*prompt, *right(prompt, 40)], seed=num)
        asked.append((prompt, num, client, aborts))
        for _ in range(steps):
            engine.step()
        if aborts:
            engine.abort(request)
            engine.step()
            assert client.is_over
            assert request.sequence.num_blocks == 0
    drain(engine)
    for prompt, num, client, aborts in asked:
        assert client.error is None
        answer = right(prompt, num)
        if aborts and client.deltas[-1].finish_reason == "cancelled":
            assert client.tokens == answer[: len(client.tokens)]
        else:
            assert client.tokens == answer
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.cache_tokens_running) == (0, 0, 0)


def test_a_full_cache_a_shared_beginning_and_right_guesses_all_happen(
    generator: Generator, right: Right
) -> None:
    """What the random schedules are about does occur, and is counted."""
    start = [5, 9, 13, 40, 41, 7] * 4
    engine = engine_of(generator, cache_tokens=120, max_running=4, speculate="ngram")
    clients = [Collected() for _ in range(5)]
    for number, client in enumerate(clients):
        engine.add([*start, 60 + number], greedy(40), client)
        for _ in range(3):
            engine.step()
    drain(engine)
    for number, client in enumerate(clients):
        assert client.tokens == right([*start, 60 + number], 40)
    stats = engine.stats()
    assert stats.preemptions > 0
    assert stats.prefix_hits > 0
    assert stats.prefix_tokens >= 4
    again, prompt = Collected(), [*start, 9]
    request = engine.add(prompt, greedy(40), again)
    request.drafter = Oracle([*prompt, *right(prompt, 40)], seed=0)
    drain(engine)
    before, stats = stats, engine.stats()
    assert again.tokens == right(prompt, 40)
    assert 0 < stats.drafts_accepted < stats.drafts_proposed
    assert stats.steps - before.steps < 40
    assert stats.tokens_out == sum(len(client.tokens) for client in [*clients, again])


def test_the_same_seed_gives_the_same_text_alone_and_among_eight(generator: Generator) -> None:
    params = SamplingParams(
        temperature=0.8, top_p=0.95, top_k=50, seed=7, max_tokens=30, frequency_penalty=0.3
    )
    alone = generator.generate([5, 9, 13], params)
    for speculate in ("off", "ngram"):
        engine = engine_of(generator, max_running=8, speculate=speculate, speculate_up_to=8)
        others = [Collected() for _ in range(7)]
        for number, client in enumerate(others[:4]):
            engine.add([7] * (number + 1), SamplingParams(seed=number, max_tokens=40), client)
        engine.step()
        ours = Collected()
        engine.add([5, 9, 13], params, ours)
        for number, client in enumerate(others[4:]):
            engine.add([8, number], greedy(20), client)
        drain(engine)
        assert (ours.text, ours.tokens) == (alone.text, alone.token_ids)


def test_everything_a_delta_carries_is_that_of_the_generator(generator: Generator) -> None:
    wishes = [
        SamplingParams(temperature=0, max_tokens=20, logprobs=3),
        SamplingParams(temperature=0, max_tokens=9, prompt_logprobs=2, logprobs=0),
        SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=1),
        SamplingParams(temperature=0, max_tokens=30, stop_ids=tuple(range(100, 200))),
        SamplingParams(temperature=0, max_tokens=30, repetition_penalty=1.3, min_tokens=30),
        SamplingParams(temperature=0, max_tokens=30, logit_bias={77: 100.0}),
        SamplingParams(
            temperature=0, max_tokens=30, min_tokens=20, stop_ids=tuple(range(0, 400, 2))
        ),
    ]
    engine = engine_of(generator, speculate="ngram", prefill_chunk=5)
    prompt = [5, 9, 13, 40, 41, 7, 9, 13, 40, 41, 6]
    for params in wishes:
        ours, theirs = engine.generate(prompt, params), generator.generate(prompt, params)
        assert ours.token_ids == theirs.token_ids
        assert (ours.text, ours.finish_reason) == (theirs.text, theirs.finish_reason)
        for mine, other in (
            (ours.logprobs or (), theirs.logprobs or ()),
            ((ours.prompt_logprobs or ())[1:], (theirs.prompt_logprobs or ())[1:]),
        ):
            assert [one.token_id for one in mine] == [one.token_id for one in other]  # type: ignore[union-attr]
            assert [one.logprob for one in mine] == pytest.approx(  # type: ignore[union-attr]
                [one.logprob for one in other],  # type: ignore[union-attr]
                abs=1e-3,
            )


@pytest.mark.parametrize("max_tokens", [0, 4])
def test_a_prompt_of_one_token_is_measured_too(generator: Generator, max_tokens: int) -> None:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, prompt_logprobs=1, logprobs=1)
    ours, theirs = engine_of(generator).generate([5], params), generator.generate([5], params)
    assert ours.prompt_logprobs == theirs.prompt_logprobs == (None,)
    assert ours.token_ids == theirs.token_ids


def test_a_stop_text_ends_an_answer_and_is_not_part_of_it(generator: Generator) -> None:
    whole = generator.generate([5, 9, 13], greedy(40))
    stop = whole.text[len(whole.text) // 2 :][:3]
    params = SamplingParams(temperature=0, max_tokens=40, stop=(stop,))
    engine = engine_of(generator)
    ours, theirs = engine.generate([5, 9, 13], params), generator.generate([5, 9, 13], params)
    assert (ours.text, ours.token_ids) == (theirs.text, theirs.token_ids)
    assert ours.finish_reason == "stop"
    assert stop not in ours.text
    engine.step()
    assert engine.stats().running == 0


class Poison:
    """A grammar that breaks after a few tokens."""

    def __init__(self) -> None:
        self.num_left = 3

    def mask_V(self) -> torch.Tensor:  # noqa: N802
        self.num_left -= 1
        if self.num_left < 0:
            raise RuntimeError("poisoned")
        return torch.ones(300, dtype=torch.bool)

    def accept(self, token: int) -> None:
        pass


def test_a_poisoned_request_fails_alone(generator: Generator, right: Right) -> None:
    engine = engine_of(generator, max_running=3)
    clients = [Collected() for _ in range(3)]
    engine.add([5, 9], greedy(20), clients[0])
    engine.add([6], SamplingParams(temperature=0, constraint=Poison), clients[1])
    engine.add([7, 9], greedy(20), clients[2])
    drain(engine)
    assert str(clients[1].error) == "poisoned"
    assert clients[0].tokens == right([5, 9], 20)
    assert clients[2].tokens == right([7, 9], 20)


def test_a_failed_forward_pass_fails_those_in_it_and_the_engine_lives(
    generator: Generator,
    right: Right,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = engine_of(generator)
    before, after = Collected(), Collected()
    engine.add([5, 9], greedy(20), before)
    engine.step()
    with monkeypatch.context() as patch:

        def fail(*_: Any) -> None:
            raise RuntimeError("out of memory")

        patch.setattr(engine.runner, "decode", fail)
        engine.step()
    assert str(before.error) == "out of memory"
    engine.add([7, 9], greedy(20), after)
    drain(engine)
    assert after.tokens == right([7, 9], 20)
    assert engine.stats().cache_tokens_running == 0
    assert engine.is_alive


def test_threads_many_clients_and_a_cancel(generator: Generator, right: Right) -> None:
    engine = Engine(generator.model, generator.tokenizer, EngineSettings(max_running=4))
    try:
        found: dict[int, tuple[int, ...]] = {}

        def ask(number: int) -> None:
            found[number] = engine.generate([5, 9, number], greedy(30)).token_ids

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(40, 48)]
        for thread in threads:
            thread.start()
        cancel = threading.Event()
        pieces = engine.stream([8], SamplingParams(max_tokens=150, min_tokens=150), cancel=cancel)
        next(pieces)
        cancel.set()
        assert list(pieces)[-1].finish_reason == "cancelled"
        for thread in threads:
            thread.join(60)
        assert found == {n: right([5, 9, n], 30) for n in range(40, 48)}
    finally:
        engine.close()
    assert not engine.is_alive


def test_a_dead_engine_says_so_and_fails_all_who_wait(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(generator.model, generator.tokenizer, EngineSettings())

    def die(*_: Any) -> None:
        raise SystemExit

    monkeypatch.setattr(engine.runner, "apply", die)
    with pytest.raises(ApiError, match="stopped generating"):
        engine.generate([5], greedy(5))
    with pytest.raises(ApiError, match="restart it"):
        engine.generate([5], greedy(5))
    assert not engine.is_alive


def test_guessing_with_a_block_that_is_not_there_is_refused(generator: Generator) -> None:
    if generator.model.config.model_type == "mini_deepseekv3":
        engine = engine_of(generator, speculate="mtp")
        engine.generate([5, 9, 13], greedy(30))
        assert engine.stats().drafts_proposed > 10
        return
    with pytest.raises(ConfigError, match="mtp"):
        engine_of(generator, speculate="mtp")


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(0, 5))
def test_a_guess_is_what_followed_the_longest_ending_seen_before(
    tokens: list[int], most: int
) -> None:
    best: tuple[int, int] | None = None
    for end in range(1, len(tokens)):
        length = 0
        while length < min(end, LONGEST) and tokens[end - 1 - length] == tokens[-1 - length]:
            length += 1
        if length >= SHORTEST and (best is None or (length, end) > best):
            best = (length, end)
    expected = tokens[best[1] : best[1] + most] if best and most else []
    assert look_up(tokens, most) == expected


def test_a_drafter_rests_after_wrong_guesses() -> None:
    drafter, tokens, num = Drafter(), [1, 2, 3] * 5, 0
    for _ in range(40):
        if found := drafter.guess(tokens, 4):
            num += 1
            drafter.learn(len(found), 0)
    assert num < 10
