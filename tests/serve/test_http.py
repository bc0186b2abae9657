"""What the openai client does not show: raw bodies, limits, headers, disconnects, ports."""

import json
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from minillm.errors import ConfigError, SetupError
from minillm.serve import wire
from minillm.serve.server import listen

MODEL = "lab/scripted"
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def http(server: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=10) as client:
        yield client


def body(word: str, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": word}], **fields}


def check_error(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    return dict(error)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"\xff",
        b'{"a": NaN}',
        b"[" * 20_000 + b"]" * 20_000,
        b'{"model": "m", "messages": [{"role": "user", "content": "\\ud83d"}]}',
        b'{"model": "m", "messages": [{"role": "user", "content": "\xed\xa0\x80"}]}',
    ],
    ids=["empty", "cut", "not-utf8", "nan", "deep", "half-character", "half-character-raw"],
)
def test_a_body_that_is_not_json_is_a_400(http: httpx.Client, raw: bytes) -> None:
    check_error(http.post(CHAT, content=raw), 400, "invalid_json")


@pytest.mark.parametrize("value", [[], "x", 3, None])
def test_a_body_that_is_no_object_is_a_400(http: httpx.Client, value: Any) -> None:
    check_error(http.post(CHAT, json=value), 400, "invalid_json")


def test_a_deeply_nested_field_is_a_400(http: httpx.Client) -> None:
    deep = b"[" * 500 + b"]" * 500
    raw = b'{"model": "m", "messages": [{"role": "user", "content": ' + deep + b"}]}"
    check_error(http.post(CHAT, content=raw), 400, "invalid_value")


def test_a_body_over_the_limit_is_a_413(http: httpx.Client) -> None:
    raw = b'{"x": "' + b"a" * (16 * 2**20) + b'"}'
    check_error(http.post(CHAT, content=raw), 413, "request_too_large")


def _half_a_request(server: Any) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    link = socket.create_connection((host, int(port)), timeout=10)
    link.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Length: 99\r\n\r\n{{".encode())
    return link


def test_a_body_that_never_comes_whole_is_a_408(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "BODY_TIMEOUT_S", 0.05)
    with _half_a_request(server) as link:
        answer = b"".join(iter(lambda: link.recv(9999), b"")).decode()  # until the server closes
    assert answer.startswith("HTTP/1.1 408 ")
    assert '"code":"request_timeout"' in answer


def test_a_client_that_leaves_midway_in_its_body_leaves_no_traceback(
    http: httpx.Client, server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    _half_a_request(server).close()
    http.get("/health")  # the loop has gone round
    assert caplog.text == ""


def test_silent_connections_outlive_those_that_clients_keep(server: Any) -> None:
    # else one is closed at the moment a client sends its next request on it: a lost connection
    kept_by_clients = openai.DEFAULT_CONNECTION_LIMITS.keepalive_expiry
    assert server.server.config.timeout_keep_alive > 2 * kept_by_clients


def test_megabytes_of_prompt_are_refused_before_they_are_tokenized(
    http: httpx.Client, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.generator, "encode_chat", lambda *_, **__: pytest.fail("tokenized"))
    error = check_error(http.post(CHAT, json=body("x" * 10**6)), 400, "context_length_exceeded")
    assert error["param"] == "messages"


@pytest.mark.parametrize("path", ["/nope", "/v1", "/v1/audio/speech", "/v1/models/"])
def test_an_unknown_path_is_a_404_in_json(http: httpx.Client, path: str) -> None:
    code = "model_not_found" if "models" in path else "not_found"
    check_error(http.get(path), 404, code)


def test_a_wrong_method_is_a_405_in_json_with_allow(http: httpx.Client) -> None:
    response = http.get(CHAT)
    check_error(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


def test_what_a_client_sends_never_comes_back_as_html(http: httpx.Client) -> None:
    evil = "<script>alert(1)</script>"
    for response in (
        http.get(f"/v1/models/{evil}"),
        http.get(f"/{evil}"),
        http.post(CHAT, json=body(evil, n=evil)),
    ):
        assert response.headers["content-type"] == "application/json"
        assert response.status_code in (400, 404)


def test_a_failed_stream_is_an_error_event_and_then_done(http: httpx.Client) -> None:
    lines = http.post(CHAT, json=body("boom", stream=True)).text.split("\n\n")
    assert "error" in json.loads(lines[-3].removeprefix("data: "))
    assert lines[-2:] == ["data: [DONE]", ""]


def test_a_stream_escapes_what_some_clients_take_for_a_line_end(http: httpx.Client) -> None:
    response = http.post(CHAT, json=body("chinese", stream=True))
    assert response.headers["content-type"].startswith("text/event-stream")
    assert "\u2028" not in response.text
    assert "你" in response.text  # readable in curl


def test_a_stream_that_is_left_frees_its_place(http: httpx.Client, server: Any) -> None:
    with http.stream("POST", CHAT, json=body("slow", stream=True)) as response:
        lines = response.iter_lines()
        for _ in range(4):
            next(lines)
        assert server.worker.num_open == 1
    assert server.wait_idle(within_s=1) < 1
    assert server.generator.num_running == 0


def test_a_request_without_stream_that_is_left_frees_its_place(
    http: httpx.Client, server: Any
) -> None:
    with pytest.raises(httpx.ReadTimeout):
        http.post(CHAT, json=body("slow"), timeout=0.3)
    assert server.wait_idle(within_s=1) < 1
    assert server.generator.num_running == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_waiting_request_that_is_left_frees_its_place(
    http: httpx.Client, server: Any, stream: bool
) -> None:
    with http.stream("POST", CHAT, json=body("slow", stream=True)) as working:
        lines = working.iter_lines()
        next(lines)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}{CHAT}", json=body("hi", stream=stream), timeout=0.3)
        start = time.monotonic()
        while server.worker.num_open > 1:
            assert time.monotonic() - start < 1
            time.sleep(0.005)
    server.wait_idle(within_s=1)


def test_many_dropped_requests_leave_the_server_quick(http: httpx.Client, server: Any) -> None:
    for _ in range(20):
        with pytest.raises(httpx.ReadTimeout):
            http.post(CHAT, json=body("slow"), timeout=0.02)
    start = time.monotonic()
    assert http.post(CHAT, json=body("hi")).json()["choices"][0]["message"]["content"] == "Hello!"
    assert time.monotonic() - start < 1


def test_health_answers_at_once_while_the_model_works(http: httpx.Client, server: Any) -> None:
    with http.stream("POST", CHAT, json=body("slow", stream=True)) as response:
        lines = response.iter_lines()
        next(lines)
        start = time.monotonic()
        assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
        assert time.monotonic() - start < 0.5
    server.wait_idle(within_s=1)


def test_a_dead_thread_makes_health_and_requests_503(serve: Any, scripted: Any) -> None:
    with serve(scripted()) as server, httpx.Client(base_url=server.url) as http:
        check_error(http.post(CHAT, json=body("die")), 503, "unavailable")
        assert http.get("/health").status_code == 503
        check_error(http.post(CHAT, json=body("hi")), 503, "unavailable")


def test_all_but_health_and_the_page_need_the_key(serve: Any, scripted: Any) -> None:
    with serve(scripted(), api_key="k") as server, httpx.Client(base_url=server.url) as http:
        for path in ("/v1/models", "/v1/models/x", CHAT, "/v1/completions", "/nope", "/health/"):
            for method in ("GET", "POST"):
                check_error(http.request(method, path), 401, "invalid_api_key")
        assert http.get("/health").status_code == http.get("/").status_code == 200
        for wrong in ("k", "Basic k", "Bearer xk", "Bearer kk", "Bearer", "Bearer  k"):
            response = http.get("/v1/models", headers={"authorization": wrong.encode()})
            check_error(response, 401, "invalid_api_key")
        for scheme in ("Bearer", "bearer"):
            headers = {"authorization": f"{scheme} k"}
            assert http.get("/v1/models", headers=headers).status_code == 200


def test_the_page_is_one_small_file_that_only_its_own_script_may_run(http: httpx.Client) -> None:
    response = http.get("/")
    policy = response.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    assert len(response.content) <= 60_000
    assert not re.search(r"https?://(?!www\.w3\.org)", response.text)  # works offline
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write", response.text)
    assert not re.search(r"""\sstyle=|\son\w+=["']""", response.text)  # the policy would block it


def test_no_site_but_its_own_may_read_answers(http: httpx.Client) -> None:
    response = http.get("/v1/models", headers={"origin": "https://evil.example"})
    assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.parametrize("num_signals", [1, 2])
def test_a_signal_drains_and_a_second_one_cuts_short(
    serve: Any, scripted: Any, num_signals: int
) -> None:
    long = {"drain_s": 60} if num_signals == 2 else {"drain_s": 1}
    with (
        serve(scripted(), **long) as server,
        httpx.stream("POST", server.url + CHAT, json=body("slow", stream=True)) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        start = time.monotonic()
        for _ in range(num_signals):
            server.server.handle_exit(signal.SIGINT, None)
        rest = [line for line in lines if line]
        assert "the server stopped this generation" in rest[-2]
        assert rest[-1] == "data: [DONE]"
        assert time.monotonic() - start < 3


def test_an_answer_that_ends_within_the_drain_is_whole(serve: Any, scripted: Any) -> None:
    generator = scripted()
    with (
        serve(generator, drain_s=10) as server,
        httpx.stream(
            "POST", server.url + CHAT, json=body("slow", stream=True, max_tokens=40)
        ) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        server.server.handle_exit(signal.SIGTERM, None)
        assert '"finish_reason":"length"' in [line for line in lines if line][-2]


def test_a_taken_port_is_a_setup_error_with_a_free_port_in_the_hint() -> None:
    # below the range that systems hand out, from which other programs take the one after it
    port = 20_000 + os.getpid() % 10_000
    with listen("127.0.0.1", port), pytest.raises(SetupError, match=str(port)) as caught:
        listen("127.0.0.1", port)
    hinted = re.search(r"--port (\d+)", str(caught.value.hint))
    assert hinted
    with listen("127.0.0.1", int(hinted[1])):
        pass


def test_a_host_that_is_no_address_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"no\.such\.host"):
        listen("no.such.host.invalid", 8000)


def test_an_address_of_another_machine_is_a_setup_error() -> None:
    with pytest.raises(SetupError):
        listen("192.0.2.1", 8000)


def test_tokenize_and_detokenize_know_the_model_by_its_name(server: Any) -> None:
    for path, body in (("tokenize", {"prompt": "a"}), ("detokenize", {"tokens": [97]})):
        for model, status in (("lab/scripted", 200), ("other", 404)):
            answer = httpx.post(f"{server.url}/{path}", json={"model": model, **body})
            assert answer.status_code == status
