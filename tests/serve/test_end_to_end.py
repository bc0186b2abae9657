"""Real weights, the real tokenizer, real processes: the parts together."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pexpect
import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

from minillm import paths
from minillm.cli.app import app
from minillm.models import registry
from minillm.models.fast_decode import LlamaStep, make_decode_step
from minillm.models.generator import Generator
from minillm.models.load import load_model
from minillm.models.sampling import SamplingParams
from minillm.serve.native import TransformersSource
from minillm.serve.source import load

MODEL = "lab/tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with random weights."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(paths.BUNDLED_TOKENIZER)
    config = registry.build_config(
        "mini_llama3:tiny",
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    made = tmp_path_factory.mktemp("model") / "tiny"
    registry.build_model(config).save_pretrained(made)
    tokenizer.save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def generator(folder: Path) -> Generator:
    return Generator(*load_model(folder))


@pytest.fixture(scope="module")
def client(generator: Generator, serve: Any) -> Iterator[openai.OpenAI]:
    with (
        serve(generator, model=MODEL) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made,
    ):
        yield made


def test_weights_are_packed_from_fp32_where_the_processor_has_bf16(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minillm.device.has_bf16", lambda _: True)
    packed, _ = load(str(folder), device="cpu", precision="auto", quantize="none")
    assert isinstance(make_decode_step(packed), LlamaStep)
    plain, _ = load(str(folder), device="cpu", precision="auto")
    assert plain.dtype == torch.bfloat16


def test_a_stream_and_a_whole_answer_are_the_same_text(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "你好 🙂"}],
        "temperature": 1.5,
        "seed": 3,
        "max_tokens": 30,
    }
    whole = client.chat.completions.create(**asked)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert len(text) > 10
    assert chunks[-1].usage == whole.usage


def test_greedy_answers_are_the_generators_own(client: openai.OpenAI, generator: Generator) -> None:
    messages = [{"role": "user", "content": "hello"}]
    params = SamplingParams(temperature=0, max_tokens=20)
    expected = generator.generate(generator.encode_chat(messages), params)
    done = client.chat.completions.create(
        model=MODEL, messages=messages, temperature=0, max_tokens=20
    )
    assert done.choices[0].message.content == expected.text
    assert done.usage.prompt_tokens == expected.prompt_tokens
    assert done.usage.completion_tokens == expected.completion_tokens


def test_text_and_its_token_ids_are_the_same_prompt(
    client: openai.OpenAI, generator: Generator
) -> None:
    ids = generator.tokenizer.encode("从前有座山")
    done = [
        client.completions.create(model=MODEL, prompt=prompt, temperature=0, echo=True)
        for prompt in ("从前有座山", ids)
    ]
    assert done[0].choices[0].text == done[1].choices[0].text
    assert done[0].choices[0].text.startswith("从前有座山")


@pytest.mark.parametrize("text", ["hello", "你好，世界"])
def test_transformers_generate_gives_the_same_greedy_tokens(
    generator: Generator, text: str
) -> None:
    native = TransformersSource(generator.model, generator.tokenizer)
    prompt = generator.encode_chat([{"role": "user", "content": text}])
    params = SamplingParams(temperature=0, max_tokens=40)
    ours, theirs = generator.generate(prompt, params), list(native.stream(prompt, params))
    assert tuple(i for delta in theirs for i in delta.token_ids) == ours.token_ids
    assert "".join(delta.text for delta in theirs) == ours.text
    assert theirs[-1].finish_reason == ours.finish_reason


def test_transformers_generate_stops_when_told(generator: Generator) -> None:
    native, cancel = TransformersSource(generator.model, generator.tokenizer), threading.Event()
    before = threading.active_count()
    reasons = []
    for delta in native.stream([5, 6], SamplingParams(max_tokens=1000, seed=1), cancel=cancel):
        reasons.append(delta.finish_reason)
        cancel.set()
    assert reasons[-1] == "cancelled"
    assert len(reasons) < 100
    stream = native.stream([5, 6], SamplingParams(max_tokens=1000, seed=1))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


# --------------------------------------------------- a model that says what the test wants


class SayingModel:
    """Its logits spell a text in the bundled tokenizer, token by token, then end."""

    def __init__(self, tokenizer: Any, text: str) -> None:
        self.ids = [*tokenizer.encode(text), tokenizer.eos_token_id]
        self.config = SimpleNamespace(max_position_embeddings=512, vocab_size=len(tokenizer))
        self.generation_config = None
        self.device = torch.device("cpu")

    def make_cache(self, num_slots: int, max_len: int) -> None:
        self._at = 0

    def __call__(self, **_: Any) -> SimpleNamespace:
        logits = torch.full((1, 1, self.config.vocab_size), -100.0)
        logits[0, 0, self.ids[self._at]] = 100.0
        self._at += 1
        return SimpleNamespace(logits=logits)


def say(generator: Generator, serve: Any, text: str, **fields: Any) -> tuple[Any, list[str]]:
    """Return the whole answer's choice and the streamed pieces."""
    saying: Any = SayingModel(generator.tokenizer, text)
    messages = [{"role": "user", "content": "speak"}]
    with (
        serve(Generator(saying, generator.tokenizer), model=MODEL) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        whole = client.chat.completions.create(model=MODEL, messages=messages, **fields)  # type: ignore[call-overload]
        stream = client.chat.completions.create(  # type: ignore[call-overload]
            model=MODEL, messages=messages, stream=True, **fields
        )
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    return whole, pieces


def test_characters_that_are_spread_over_tokens_arrive_whole(
    generator: Generator, serve: Any
) -> None:
    text = "好🙂‍↔️龘 𝔘𝔫 ok"
    assert len(generator.tokenizer.encode(text)) > len(text), "nothing is spread over tokens"
    whole, pieces = say(generator, serve, text)
    assert whole.choices[0].message.content == "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert whole.usage.completion_tokens == len(generator.tokenizer.encode(text)) + 1


def test_no_part_of_a_stop_string_leaks(generator: Generator, serve: Any) -> None:
    whole, pieces = say(generator, serve, "one two END three", stop=["zzz", "END"])
    assert whole.choices[0].message.content == "".join(pieces) == "one two "
    assert whole.choices[0].finish_reason == "stop"


def test_think_tokens_of_the_real_tokenizer_are_split_off(generator: Generator, serve: Any) -> None:
    whole, pieces = say(generator, serve, "<think>\n想一想\n</think>\n\n答案")
    assert whole.choices[0].message.reasoning_content == "想一想"
    assert whole.choices[0].message.content == "".join(pieces) == "答案"


# ---------------------------------------------------------------------------- the commands


def test_a_piped_message_makes_one_answer_on_stdout(folder: Path) -> None:
    flags = ["--model", str(folder), "--max-tokens", "8", "--temperature", "0"]
    outputs = set()
    for given, more in (("你好", []), ("", ["--prompt", "你好"])):
        for backend in ("generator", "transformers"):
            arguments = ["chat", *flags, *more, "--backend", backend]
            result = CliRunner().invoke(app, arguments, input=given)
            assert result.exit_code == 0, result.output
            outputs.add(result.stdout)
    assert len(outputs) == 1, "both backends, both ways"
    assert outputs.pop().strip()


@pytest.mark.parametrize("command", [["chat", "--prompt", "x"], ["serve", "--port", "0"]])
def test_without_a_run_the_hint_is_the_demo(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 3
    assert "minillm demo" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_server_starts_answers_and_ends_by_sigterm_in_mid_answer(folder: Path) -> None:
    command = [sys.executable, "-m", "minillm", "serve", "--model", str(folder), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--drain-s", "1", "--served-model-name", MODEL],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "NO_COLOR": "1"},
    )
    try:
        assert process.stderr
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "Ctrl-C" in line:
                break
        text = "".join(lines)
        url = re.search(r"http://127\.0\.0\.1:\d+", text)
        assert url, text
        assert "curl" in text
        assert "chat page" in text
        assert MODEL in text
        body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "stream": True}
        with httpx.stream("POST", f"{url[0]}/v1/chat/completions", json=body) as response:
            chunks = response.iter_lines()
            for _ in range(6):
                next(chunks)
            start = time.monotonic()
            process.send_signal(signal.SIGTERM)
            rest = [line for line in chunks if line]
        assert "the server stopped" in rest[-2]
        assert rest[-1] == "data: [DONE]"
        assert process.wait(10) == 0
        assert time.monotonic() - start < 5
        assert process.stdout
        assert process.stdout.read() == ""
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.communicate()


def test_a_terminal_chat_goes_on_after_ctrl_c(folder: Path, tmp_path: Path) -> None:
    arguments = ["-m", "minillm", "chat", "--model", str(folder), "--max-tokens", "2000"]
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "TERM": "xterm"}
    environment["PROMPT_TOOLKIT_NO_CPR"] = "1"  # nobody here answers where the cursor is
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pexpect forks; Python 3.12 warns
        child = pexpect.spawn(
            sys.executable,
            arguments,
            env=environment,
            dimensions=(40, 80),
            encoding="utf-8",
            timeout=30,
        )
    child.expect("/help lists the commands")
    child.expect("›")
    child.send("你好\r")
    child.expect_exact("\x1b[?2004l")  # the prompt is left: Ctrl-C is no key of it any more
    time.sleep(0.5)
    child.sendintr()
    child.expect("stopped · [0-9]+ tokens")
    child.send("/stats\r")
    child.expect("1 questions, context [0-9]+/2048")
    child.expect("›")
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
