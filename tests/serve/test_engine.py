"""The engine against the generator and transformers, with real models of random weights."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from minillm.models import registry
from minillm.models.generator import Delta, Generator
from minillm.models.sampling import SamplingParams
from minillm.serve.engine import Engine
from minillm.serve.memory import EngineSettings

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


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(SETTINGS, EVENTS)
def test_greedy_tokens_are_those_of_the_generator_whatever_happens(
    generator: Generator,
    right: Callable[[Sequence[int], int], tuple[int, ...]],
    changes: dict[str, Any],
    events: list[tuple[tuple[tuple[int, ...], list[int]], int, int, bool]],
) -> None:
    if changes["speculate"] == "mtp" and generator.model.config.model_type != "mini_deepseekv3":
        changes = changes | {"speculate": "ngram"}
    engine = engine_of(generator, **changes)
    asked: list[tuple[list[int], int, Collected, bool]] = []
    for (start, tail), num, steps, aborts in events:
        prompt, client = [*start, *tail], Collected()
        request = engine.add(prompt, greedy(num), client)
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
