"""The chat page in a real Chromium: `pytest -m browser` (extra `browser`).

Every server here is a real one; all but one run the scripted generator of `conftest.py`, so that
it is known what the page must show and what the model must be told.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoTokenizer

from minillm import paths
from minillm.models import registry

pytestmark = pytest.mark.browser

HOSTILE = (
    '# t <img src=x onerror="window.pwned=1"><script>window.pwned=1</script> **bold**\n\n'
    "[bad](javascript:window.pwned=1) [data](data:text/html,<b>) ![i](javascript:1) <a href=/>\n"
    "[ok](https://a.example/w_(b_(c)) 'title') https://b.example/C_(d)). `<i>`\n\n"
    "| <b>h</b> | r |\n|---|--:|\n| <img src=x onerror=window.pwned=1> | 2 |\n\n"
    '- one\n  - two <svg onload="window.pwned=1">\n\n'
    '```py"><img src=x onerror=window.pwned=1>\nprint("<b>")'
)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """The system's Chromium if there is one, else Playwright's."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        path = shutil.which("chromium") or shutil.which("google-chrome")
        browser = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


class Tab:
    """A browser tab with the chat page, and how to use it."""

    def __init__(self, page: Any, url: str) -> None:
        """Open the page; scripts that fail or break the policy are kept in `errors`."""
        self.page, self.errors = page, []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda line: line.type == "error" and self.errors.append(line.text))
        page.goto(url)

    def until(self, script: str, value: Any = True, within_s: float = 15) -> None:
        """Wait for a JavaScript value; the page's policy forbids Playwright's own way."""
        end = time.monotonic() + within_s
        while (seen := self.page.evaluate(script)) != value:
            assert time.monotonic() < end, f"{script} is {seen!r}, not {value!r}"
            time.sleep(0.02)

    def send(self, text: str) -> None:
        """Ask and go on at once."""
        self.page.fill("#box", text)
        self.page.press("#box", "Enter")

    def ask(self, text: str) -> None:
        """Ask and wait for the whole answer."""
        before = len(self.turns())
        self.send(text)
        self.until("document.querySelectorAll('.turn').length", before + 2)
        self.idle()

    def idle(self) -> None:
        """Wait until no answer is on its way."""
        self.until("document.querySelectorAll('.busy').length", 0)

    def turns(self) -> list[str]:
        """The shown texts, questions and answers in turn."""
        return self.page.locator(".turn > :is(.bubble, .text)").all_inner_texts()

    def titles(self) -> list[str]:
        """The conversations in the list."""
        return self.page.locator("#chats .name").all_inner_texts()


@pytest.fixture
def tab(chromium: Any) -> Iterator[Callable[..., Tab]]:
    """Open a page in a profile of its own; it must have run without an error."""
    contexts, tabs = [], []

    def opened(url: str, **options: Any) -> Tab:
        contexts.append(chromium.new_context(**{"locale": "en-US", **options}))
        tabs.append(Tab(contexts[-1].new_page(), url))
        return tabs[-1]

    yield opened
    for context in contexts:
        context.close()
    assert [error for one in tabs for error in one.errors] == []


@pytest.mark.parametrize("as_thought", [False, True])
def test_hostile_text_stays_text(scripted: Any, serve: Any, tab: Any, as_thought: bool) -> None:
    class Hostile(scripted):  # type: ignore[misc]
        def _pieces(self, word: str, params: Any, cancel: Any) -> Any:
            text = f"<think>\n{HOSTILE}\n</think>\n\n{HOSTILE}" if as_thought else HOSTILE
            self.script = {word: list(text)}
            yield from super()._pieces(word, params, cancel)

    with serve(Hostile(max_context=10_000)) as server:
        it = tab(server.url)
        it.ask(HOSTILE)
        it.page.set_input_files(
            "#file",
            {
                "name": "x.json",
                "mimeType": "application/json",
                "buffer": json.dumps(
                    {
                        "chats": [
                            {
                                "id": '"><img src=x onerror=window.pwned=1>',
                                "title": HOSTILE,
                                "turns": [
                                    {"role": "user", "content": HOSTILE},
                                    {"role": "assistant", "content": HOSTILE, "error": HOSTILE},
                                ],
                            }
                        ]
                    }
                ).encode(),
            },
        )
        it.until("document.querySelectorAll('#chats li').length", 2)
        for number in range(2):
            it.page.click(f"#chats li:nth-child({number + 1}) .name")
            found = it.page.evaluate(
                "[window.pwned ?? 0, document.querySelectorAll("
                "'#log :is(img, script, b, i, svg), #chats :is(img, b, script)').length,"
                "[...document.querySelectorAll('#log a')].map((a) => a.href)]"
            )
            links = ["https://a.example/w_(b_(c))", "https://b.example/C_(d)"]
            assert found == [0, 0, links]
            assert it.page.evaluate("document.querySelector('.bubble').textContent") == HOSTILE
            assert it.page.inner_text(".code pre") == 'print("<b>")'.rstrip()


def test_conversations_survive_reload_export_and_import(
    server: Any, tab: Any, tmp_path: Path
) -> None:
    it = tab(server.url)
    it.ask("hi")
    it.page.click("#fresh")
    it.ask("chinese")
    assert it.titles() == ["chinese", "hi"]
    it.page.click("#chats li.on .icon >> nth=0")
    it.page.keyboard.type("旅行 <b>")
    it.page.keyboard.press("Enter")
    shown = it.turns()
    assert shown[1].startswith("你好，世界 🙂‍↔️")
    it.page.reload()
    it.until("document.querySelectorAll('#chats li').length", 2)
    assert (it.titles(), it.turns()) == (["旅行 <b>", "hi"], shown)
    with it.page.expect_download() as download:
        it.page.click("#export")
    file = tmp_path / "chats.json"
    download.value.save_as(file)
    it.page.on("dialog", lambda dialog: dialog.accept())
    for _ in range(2):
        it.page.click("#chats li.on .icon >> nth=1")
    it.until("document.querySelectorAll('#chats li').length", 0)
    assert it.turns() == []

    other = tab(server.url)
    other.page.set_input_files("#file", file)
    other.until("document.querySelectorAll('#chats li').length", 2)
    other.page.set_input_files("#file", file)  # again: nothing is doubled
    other.page.click("#chats li:nth-child(1) .name")
    assert (other.titles(), other.turns()) == (["旅行 <b>", "hi"], shown)
    other.page.set_input_files("#file", __file__)
    other.until(
        "document.querySelector('#notice').textContent", "This file holds no conversations."
    )


def test_edit_and_regenerate_tell_the_model_only_what_is_shown(
    scripted: Any, serve: Any, tab: Any
) -> None:
    generator = scripted()
    with serve(generator) as server:
        it = tab(server.url)
        it.ask("hi")
        it.ask("second")
        it.page.click(".again >> nth=1")
        it.idle()
        assert generator.prompts[-2:] == ["[user]hi[assistant]Hello![user]second[assistant]"] * 2
        assert it.turns() == ["hi", "Hello!", "second", "ok"]
        it.page.hover(".user")
        it.page.click(".user .edit >> nth=0")
        assert it.page.evaluate("document.activeElement.value") == "hi"
        it.page.keyboard.type(" there")
        it.page.keyboard.press("Enter")
        it.until("document.querySelectorAll('.turn').length", 2)
        it.idle()
        assert generator.prompts[-1] == "[user]hi there[assistant]"
        assert it.turns() == ["hi there", "ok"]
        it.page.press("#box", "ArrowUp")  # edits the last message
        it.page.keyboard.press("Escape")
        assert it.turns() == ["hi there", "ok"]


def test_a_failed_answer_is_shown_and_left_out_of_the_next_question(
    scripted: Any, serve: Any, tab: Any
) -> None:
    class Failing(scripted):  # type: ignore[misc]
        def _pieces(self, word: str, params: Any, cancel: Any) -> Any:
            if word == "fail":
                raise ValueError("secret detail")
            yield from super()._pieces(word, params, cancel)

    generator = Failing()
    with serve(generator) as server:
        it = tab(server.url)
        it.ask("fail")
        assert it.page.inner_text(".error")
        assert "secret" not in it.page.inner_text(".error")
        it.ask("hi")
        assert generator.prompts[-1] == "[user]hi[assistant]"
    it.page.click(".again >> nth=1")
    it.until("document.querySelectorAll('.error')[1].textContent", "The server cannot be reached.")
    assert it.errors.pop().endswith("net::ERR_CONNECTION_REFUSED")


def test_the_settings_reach_the_model_and_thoughts_are_folded(
    scripted: Any, serve: Any, tab: Any
) -> None:
    generator = scripted()
    with serve(generator) as server:
        it = tab(server.url)
        it.ask("hi")
        assert generator.seen[-1].temperature == 0.7  # nothing set: the server's default
        it.page.click("#tune")
        values = {"temperature": "0.3", "top_p": "0.5", "max_tokens": "4", "seed": "7"}
        for name, value in {**values, "system": "be brief"}.items():
            it.page.fill(f"#{name}", value)
        it.page.check("#think")
        it.page.reload()
        it.ask("think")
    told = generator.seen[-1]
    assert (told.temperature, told.top_p, told.max_tokens, told.seed) == (0.3, 0.5, 4, 7)
    assert generator.prompts[-1].startswith("[system]be brief[user]hi")
    assert generator.prompts[-1].endswith("[assistant]<think>\n")
    assert it.turns()[-1] == "42"
    assert re.fullmatch(r"Thought for [\d.]+ s", it.page.inner_text(".turn:last-child summary"))
    assert not it.page.is_visible(".turn:last-child details > div")
    it.page.click(".turn:last-child summary")
    assert "let me see" in it.page.inner_text(".turn:last-child details > div")
    assert "length limit reached" in it.page.inner_text(".turn:last-child .meta")


def test_answers_go_on_in_their_own_conversation(scripted: Any, serve: Any, tab: Any) -> None:
    with serve(scripted(max_context=10**6)) as server:
        it = tab(server.url)
        it.ask("hi")
        it.page.click("#fresh")
        it.send("slow")
        it.until("document.querySelector('.assistant .text')?.textContent.startsWith('x')")
        it.page.click("#chats li:nth-child(2) .name")
        assert it.turns() == ["hi", "Hello!"]
        it.until("document.querySelectorAll('#chats .dot').length", 1)
        it.page.click("#chats li:nth-child(1) .name")
        length = len(it.turns()[1])
        it.until(f"document.querySelector('.assistant .text').textContent.length > {length} + 5")
        assert "tok/s" in it.page.inner_text(".busy .meta")
        it.page.click("#send")
        it.idle()
        server.wait_idle(1)
        assert "stopped" in it.page.inner_text(".assistant .meta")
        it.send("slow")
        it.until("document.querySelectorAll('.busy').length", 1)
        it.page.reload()  # the half answer is kept, the server freed
        server.wait_idle(1)
        assert len(it.turns()) == 4


@pytest.mark.parametrize("secure", [True, False])
def test_code_is_copied_with_and_without_https(
    scripted: Any, serve: Any, tab: Any, secure: bool
) -> None:
    generator = scripted()
    generator.script = {"hi": ("```py\n", "if x:\n", "    y = '<b>'\n", "```\nEnd")}
    with serve(generator) as server:
        it = tab(server.url, permissions=["clipboard-read", "clipboard-write"] if secure else [])
        if not secure:
            it.page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
        it.ask("hi")
        it.page.click(".code button")
        it.until("document.querySelector('.code button').textContent", "Copied")
        it.page.focus("#box")
        it.page.keyboard.press("Control+V")
        assert it.page.input_value("#box") == "if x:\n    y = '<b>'"


def test_a_full_storage_does_not_stop_the_chat(server: Any, tab: Any) -> None:
    it = tab(server.url)
    it.page.evaluate(
        "for (let n = 2 ** 22, i = 0; n; i++)"
        " try { localStorage.setItem('x' + i, 'x'.repeat(n)); } catch { n >>= 1; }"
    )
    it.ask("hi")
    assert it.turns() == ["hi", "Hello!"]
    assert it.page.inner_text("#notice") == "The browser's storage is full."
    it.page.evaluate("localStorage.clear()")
    it.ask("second")
    it.page.reload()
    assert it.turns() == ["hi", "Hello!", "second", "ok"]


def test_two_tabs_do_not_overwrite_each_other(server: Any, tab: Any) -> None:
    one = tab(server.url)
    two = Tab(one.page.context.new_page(), server.url)
    one.ask("hi")
    two.until("document.querySelectorAll('#chats li').length", 1)
    two.ask("chinese")
    one.until("document.querySelectorAll('#chats li').length", 2)
    two.page.click("#chats li:nth-child(2) .name")
    assert two.turns() == ["hi", "Hello!"]
    one.ask("second")
    two.until("document.querySelectorAll('.turn').length", 4)
    assert two.errors == []


def test_language_and_theme(server: Any, tab: Any) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    it = tab(server.url, locale="zh-CN", color_scheme="dark")
    assert it.page.inner_text("#fresh") == "新对话"
    assert it.page.evaluate("document.documentElement.lang") == "zh-CN"
    dark = it.page.evaluate(background)
    it.page.click("#theme")  # light
    light = it.page.evaluate(background)
    assert (dark, light) == ("rgb(21, 24, 27)", "rgb(251, 251, 250)")
    it.page.click("#lang")
    it.page.reload()
    assert it.page.inner_text("#fresh") == "New chat"
    assert it.page.evaluate(background) == light
    it.page.click("#theme")  # dark
    it.page.emulate_media(color_scheme="light")
    assert it.page.evaluate(background) == dark
    it.page.click("#theme")  # the system's
    assert it.page.evaluate(background) == light


def test_enter_in_a_composition_does_not_send(server: Any, tab: Any) -> None:
    it = tab(server.url)
    it.page.focus("#box")
    devtools = it.page.context.new_cdp_session(it.page)
    composing = {"text": "ni", "selectionStart": 2, "selectionEnd": 2}
    devtools.send("Input.imeSetComposition", composing)
    it.page.keyboard.press("Enter")
    assert it.turns() == []
    devtools.send("Input.insertText", {"text": "你"})
    it.page.keyboard.press("Shift+Enter")
    it.page.keyboard.type("x")
    assert it.turns() == []
    assert it.page.input_value("#box").replace("ni", "").strip("\n") == "你\nx"
    it.page.keyboard.press("Enter")
    it.until("document.querySelectorAll('.turn').length", 2)
    it.idle()
    it.until("document.querySelector('#say').textContent", "Answer complete. ok")


def test_on_a_phone_the_list_is_a_drawer(server: Any, tab: Any) -> None:
    it = tab(server.url, viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    it.ask("hi")
    assert not it.page.is_visible("#side")
    it.page.tap("#menu")
    it.page.wait_for_selector("#chats .name")
    assert it.page.evaluate("document.activeElement.id") == "fresh"
    it.page.evaluate("document.getElementById('box').focus()")  # nothing below can be reached
    assert it.page.evaluate("document.activeElement.id") == "fresh"
    it.page.keyboard.press("Escape")
    it.page.wait_for_selector("#side", state="hidden")
    assert it.page.evaluate("document.activeElement.id") == "menu"
    it.page.tap("#tune")
    assert it.page.evaluate("document.documentElement.scrollWidth") == 360
    for node in it.page.query_selector_all("button:visible, input:visible, textarea:visible"):
        name = node.evaluate("(n) => n.innerText || n.ariaLabel || n.labels?.[0]?.innerText")
        assert name.strip(), node


def test_a_server_with_a_key_asks_for_it(scripted: Any, serve: Any, tab: Any) -> None:
    with serve(scripted(), api_key="sesame") as server:
        it = tab(server.url)
        it.until("document.activeElement.id", "key")
        it.page.keyboard.type("sesame")
        it.page.keyboard.press("Tab")
        it.until("document.querySelector('#model').textContent", "lab/scripted")
        it.page.reload()
        it.ask("hi")
        assert it.turns() == ["hi", "Hello!"]
        assert "sesame" not in it.page.evaluate("JSON.stringify(localStorage)")
    assert len(it.errors) == 1  # the 401, as Chromium logs it
    assert "401" in it.errors.pop()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of `minillm serve` with random weights."""
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
        max_position_embeddings=16384,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("model") / "tiny"
    registry.build_model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    command = [sys.executable, "-m", "minillm", "serve", "--model", str(folder), "--port", "0"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "NO_COLOR": "1"}
    ) as process:
        assert process.stderr
        text = ""
        for line in process.stderr:
            text += line
            if "Ctrl-C" in line:
                break
        found = re.search(r"http://127\.0\.0\.1:\d+", text)
        assert found, text
        yield found[0]
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def test_stop_frees_a_real_model_and_keeps_the_half_answer(served: str, tab: Any) -> None:
    def running() -> float:
        text = httpx.get(f"{served}/metrics").text
        return float(re.search(r"^\w*running\w* ([\d.]+)", text, re.MULTILINE)[1])  # type: ignore[index]

    it = tab(served)
    it.send("从前")
    it.until(
        "(document.querySelector('.assistant .text')?.textContent.length ?? 0) > 40", within_s=60
    )
    assert running() == 1
    it.page.keyboard.press("Escape")
    start = time.monotonic()
    while running():
        assert time.monotonic() - start < 1
        time.sleep(0.02)
    it.idle()
    assert re.search(r"\d+ tokens · \d+ tok/s · stopped", it.page.inner_text(".assistant .meta"))
    shown = it.turns()
    it.page.reload()
    assert it.turns() == shown
    it.page.click("#tune")
    it.page.fill("#max_tokens", "5")
    it.page.click(".again")
    it.idle()
    line = it.page.inner_text(".assistant .meta span")
    assert re.fullmatch(r"5 tokens( · \d+ tok/s)? · length limit reached", line)
