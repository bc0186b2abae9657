"""Keys, other sites' pages, time limits, and requests that come while the server stops."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from minillm.errors import ConfigError, InputError
from minillm.serve.access import read_keys
from minillm.settings import ServeConfig

CHAT = "/v1/chat/completions"


def body(word: str, **fields: Any) -> dict[str, Any]:
    return {"model": "lab/scripted", "messages": [{"role": "user", "content": word}], **fields}


def test_keys_come_from_flags_and_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# team\nanna: s:1\n\n b:k2 \n", encoding="utf-8")
    assert read_keys(["x", "y"], file) == {"key-1": "x", "key-2": "y", "anna": "s:1", "b": "k2"}
    assert read_keys([], None) == {}


@pytest.mark.parametrize("text", ["secret\n", "a:\n", ":secret\n", "a:x\na:secret\n", "# a\n"])
def test_a_wrong_file_of_keys_is_refused_and_no_message_holds_a_key(
    tmp_path: Path, text: str
) -> None:
    file = tmp_path / "keys"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        read_keys([], file)
    assert "secret" not in f"{caught.value} {caught.value.hint}"


def test_a_missing_file_and_an_empty_key_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        read_keys([], tmp_path / "none")
    with pytest.raises(ConfigError):
        read_keys([" "], None)


def test_each_key_opens_and_is_counted_by_its_name(serve: Any, scripted: Any) -> None:
    with serve(scripted(), keys={"anna": "k1", "ben": "k2"}) as server:
        for key in ("k1", "k2", "k2"):
            with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key) as client:
                client.models.list()
        wrong = httpx.get(f"{server.url}/metrics", headers={"authorization": "Bearer k1k2"})
        text = httpx.get(f"{server.url}/metrics", headers={"authorization": "Bearer k1"}).text
    assert wrong.status_code == 401
    assert 'minillm_key_uses_total{key="anna"} 2.0' in text
    assert 'minillm_key_uses_total{key="ben"} 2.0' in text
    assert "k1" not in text


def test_only_named_sites_may_read_answers(serve: Any, scripted: Any) -> None:
    asked = {"access-control-request-method": "POST"}
    asked["access-control-request-headers"] = "authorization,content-type"
    with serve(scripted(), api_key="k", cors_origins=["https://a.example"]) as server:
        friend, other = {"origin": "https://a.example"}, {"origin": "https://b.example"}
        first = httpx.options(server.url + CHAT, headers={**friend, **asked})
        assert first.status_code == 200
        assert first.headers["access-control-allow-origin"] == "https://a.example"
        refused = httpx.post(server.url + CHAT, headers=friend, json={})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://a.example"
        assert httpx.options(server.url + CHAT, headers={**other, **asked}).status_code == 400
        answer = httpx.get(server.url + "/health", headers=other)
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    ("origin", "is_ours"),
    [
        ("http://localhost", True),
        ("http://localhost:5173", True),
        ("https://127.0.0.1:3000", True),
        ("http://[::1]:3000", True),
        ("http://localhost.evil.example", False),
        ("http://notlocalhost", False),
        ("http://localhost:80@evil.example", False),
    ],
)
def test_localhost_means_all_pages_of_this_machine(
    serve: Any, scripted: Any, origin: str, is_ours: bool
) -> None:
    with serve(scripted(), cors_origins=["localhost"]) as server:
        answer = httpx.get(server.url + "/health", headers={"origin": origin})
    assert answer.headers.get("access-control-allow-origin") == (origin if is_ours else None)


@pytest.mark.parametrize("origin", ["a.example", "https://a.example/", "https://", "null"])
def test_an_origin_with_a_path_or_without_a_scheme_is_refused(origin: str) -> None:
    with pytest.raises(ConfigError):
        ServeConfig(cors_origin=(origin,))


def test_an_answer_over_the_time_limit_is_a_504_that_no_client_repeats(
    serve: Any, scripted: Any
) -> None:
    with serve(scripted(), timeout_s=0.3) as server:
        with (
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="-") as client,
            pytest.raises(openai.InternalServerError) as caught,
        ):
            client.chat.completions.create(**body("slow"))
        assert len(server.generator.prompts) == 1
        assert (caught.value.status_code, caught.value.code) == (504, "timeout")
        events = httpx.post(server.url + CHAT, json=body("slow", stream=True)).text.split("\n\n")
        assert json.loads(events[-3].removeprefix("data: "))["error"]["code"] == "timeout"
        assert events[-2:] == ["data: [DONE]", ""]
        server.wait_idle(within_s=1)
        assert httpx.post(server.url + CHAT, json=body("hi")).status_code == 200


def test_new_requests_get_a_503_while_running_answers_end(serve: Any, scripted: Any) -> None:
    with (
        serve(scripted(), drain_s=10) as server,
        httpx.stream(
            "POST", server.url + CHAT, json=body("slow", stream=True, max_tokens=60)
        ) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        server.server.handle_exit(signal.SIGTERM, None)
        time.sleep(0.2)
        late = httpx.post(server.url + CHAT, json=body("hi"))
        assert late.status_code == 503
        assert late.json()["error"]["code"] == "unavailable"
        assert int(late.headers["retry-after"]) > 0
        assert httpx.get(server.url + "/health").status_code == 503
        assert '"finish_reason":"length"' in [line for line in lines if line][-2]
