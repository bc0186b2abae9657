# ruff: noqa: E501
"""Points that clients of an OpenAI server rely on, one request or two for each.

    python benchmarks/api_points.py --url http://127.0.0.1:8000 [--key KEY]

Prints each point that fails and a Markdown row; exit code 1 if any does. Takes about ten seconds
with a small model. It knows nothing of minillm: it can be pointed at any server.
"""

import argparse
import json
import socket
import sys
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
from pydantic import BaseModel, Field

USER = [{"role": "user", "content": "hi"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}},
            "required": ["a"],
            "additionalProperties": False,
        },
    },
}
NAMED = {"type": "function", "function": {"name": "add"}}
FORM = {"name": "n", "schema": TOOL["function"]["parameters"]}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
CHAT, TEXT, RESP = "/v1/chat/completions", "/v1/completions", "/v1/responses"
URL = MODEL = ""
HTTP = httpx.Client(timeout=120)


class Form(BaseModel):
    """What an answer must be."""

    a: int = Field(ge=0, le=99)


def post(path: str, raw: bytes | None = None, **fields: Any) -> httpx.Response:
    """Ask; `raw` is sent as it is."""
    base: dict[str, Any] = {"model": MODEL}
    if path == CHAT:
        base |= {"messages": USER, "max_tokens": 6, "temperature": 0}
    if path == TEXT:
        base |= {"prompt": "hi", "max_tokens": 6, "temperature": 0}
    if path == RESP:
        base |= {"input": "hi", "max_output_tokens": 6, "temperature": 0}
    head = {"content-type": "application/json"}
    body = raw if raw is not None else json.dumps({**base, **fields}).encode()
    return HTTP.post(URL + path, content=body, headers=head)


def stream(path: str, **fields: Any) -> list[str]:
    """Return the lines of a stream."""
    return [line for line in post(path, stream=True, **fields).text.split("\n") if line]


def chunks(path: str = CHAT, **fields: Any) -> list[Any]:
    """Return the events of a stream."""
    lines = stream(path, **fields)
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


def said(**fields: Any) -> Any:
    """Return the message of a chat."""
    return post(CHAT, **fields).json()["choices"][0]["message"]


def text(**fields: Any) -> str:
    """Return the text of a completion."""
    return str(post(TEXT, **fields).json()["choices"][0]["text"])


def is_error(answer: httpx.Response, status: int, code: str = "", param: str | None = None) -> bool:
    """Tell whether an answer is the error that it should be."""
    error = answer.json()["error"]
    return (
        answer.status_code == status
        and error.keys() >= {"message", "type", "param", "code"}
        and code in (error["code"] or "")
        and (param is None or error["param"] == param)
    )


def is_refused(path: str, param: str, **fields: Any) -> bool:
    """Tell whether a request is a 400 that names `param`."""
    return is_error(post(path, **fields), 400, param=param)


def is_free(within_s: float = 1.5) -> bool:
    """Tell whether nothing runs any more, by `/metrics`."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        lines = HTTP.get(URL + "/metrics").text.splitlines()
        if any("running" in x and x[0] != "#" and float(x.split()[-1]) == 0 for x in lines if x):
            return True
        time.sleep(0.05)
    return False


def leave(streams: bool) -> bool:
    """Leave in the middle of a long answer."""
    body = {"model": MODEL, "prompt": "a", "max_tokens": 900, "min_tokens": 900, "stream": streams}
    data, place = json.dumps(body).encode(), urlsplit(URL)
    with socket.create_connection((place.hostname or "", place.port or 80)) as sock:
        key = HTTP.headers.get("authorization", "")
        head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nAuthorization: {key}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        sock.sendall(head.encode() + data)
        time.sleep(0.3)
    return is_free()


def loglikelihood() -> bool:
    """Tell whether a prompt is measured as lm-eval needs it, and as decoding measures it."""
    out = post(TEXT, logprobs=1, max_tokens=4).json()["choices"][0]
    made = out["logprobs"]["token_logprobs"]
    whole = "hi" + out["text"]
    told = post(TEXT, prompt=whole, echo=True, logprobs=1, max_tokens=0).json()["choices"][0]
    found = told["logprobs"]
    values, starts = found["token_logprobs"], found["text_offset"]
    pieces = [told["text"][a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)]
    close = all(abs(a - b) < 1e-3 for a, b in zip(values[-len(made) :], made, strict=False))
    aligned = pieces == found["tokens"] and told["text"] == whole
    return values[0] is None and all(v <= 0 for v in values[1:]) and aligned and close


def events() -> list[str]:
    """Return the names of a response's events."""
    return [event["type"].removeprefix("response.") for event in chunks(RESP)]


def client() -> openai.OpenAI:
    """Return the official client."""
    key = HTTP.headers.get("authorization", "Bearer x").removeprefix("Bearer ")
    return openai.OpenAI(base_url=URL + "/v1", api_key=key, max_retries=0)


def stored() -> bool:
    """Tell whether a response can be fetched, continued and deleted."""
    uid = post(RESP).json()["id"]
    fetched = HTTP.get(f"{URL}{RESP}/{uid}").json()["id"] == uid
    more = post(RESP, previous_response_id=uid).status_code == 200
    items = HTTP.get(f"{URL}{RESP}/{uid}/input_items").json()["object"] == "list"
    gone = HTTP.delete(f"{URL}{RESP}/{uid}").json()["deleted"]
    return fetched and more and items and gone and HTTP.get(f"{URL}{RESP}/{uid}").status_code == 404


def forced(**fields: Any) -> bool:
    """Tell whether an answer is a call of the tool that fits its schema."""
    choice = post(CHAT, tools=[TOOL], max_tokens=200, **fields).json()["choices"][0]
    made = choice["message"]["tool_calls"][0]
    is_right = made["function"]["name"] == "add" and made["type"] == "function" and made["id"]
    fits = 0 <= json.loads(made["function"]["arguments"])["a"] <= 99
    return bool(is_right and fits and choice["finish_reason"] == "tool_calls")


def ask(method: str, path: str, **headers: str) -> httpx.Response:
    """Ask without a body."""
    return HTTP.request(method, URL + path, headers=headers)


def usage() -> Any:
    """Return the last chunk of a stream that asks for usage."""
    return chunks(stream_options={"include_usage": True})[-1]


def tops(n: int) -> Any:
    """Return the measured tokens of a chat."""
    made = post(CHAT, logprobs=True, top_logprobs=n).json()
    return made["choices"][0]["logprobs"]["content"]


RESULT = {"role": "tool", "tool_call_id": "c1", "content": "2"}
TURN = {"role": "assistant", "content": None, "tool_calls": [CALL]}
OK = 200
POINTS: dict[str, Callable[[], Any]] = {
    "models: list": lambda: ask("GET", "/v1/models").json()["object"] == "list",
    "models: card": lambda: {"id", "object", "created", "owned_by"} <= client().models.list().data[0].model_dump().keys(),
    "models: retrieve": lambda: client().models.retrieve(MODEL).id == MODEL,
    "models: unknown is 404": lambda: is_error(ask("GET", "/v1/models/nope"), 404, "model_not_found"),
    "chat: object": lambda: post(CHAT).json()["object"] == "chat.completion",
    "chat: id, created, model": lambda: {"id", "created", "model", "choices", "usage"} <= post(CHAT).json().keys(),
    "chat: role": lambda: said()["role"] == "assistant",
    "chat: usage adds up": lambda: (u := post(CHAT).json()["usage"])["total_tokens"] == u["prompt_tokens"] + u["completion_tokens"] > 0,
    "chat: greedy repeats": lambda: said() == said(),
    "chat: seed repeats": lambda: said(temperature=1, seed=5) == said(temperature=1, seed=5),
    "chat: length": lambda: post(CHAT, max_tokens=1).json()["choices"][0]["finish_reason"] == "length",
    "chat: max_completion_tokens wins": lambda: post(CHAT, max_completion_tokens=1, max_tokens=5).json()["usage"]["completion_tokens"] == 1,
    "chat: n": lambda: [c["index"] for c in post(CHAT, n=3, temperature=1).json()["choices"]] == [0, 1, 2],
    "chat: n differ": lambda: len({c["message"]["content"] for c in post(CHAT, n=4, temperature=2, top_p=1, max_tokens=12).json()["choices"]}) > 1,
    "chat: null fields": lambda: post(CHAT, stop=None, tools=None, n=None, seed=None, user=None).status_code == OK,
    "chat: content parts": lambda: said(messages=[{"role": "user", "content": [{"type": "text", "text": "hi"}]}]) == said(),
    "chat: system = developer": lambda: said(messages=[{"role": "system", "content": "S"}, *USER]) == said(messages=[{"role": "developer", "content": "S"}, *USER]),
    "chat: image part is 400": lambda: is_error(post(CHAT, messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]), 400),
    "chat: answer sent back": lambda: post(CHAT, messages=[*USER, said(), *USER]).status_code == OK,
    "chat: labels": lambda: post(CHAT, user="u", metadata={"a": "b"}, store=False).status_code == OK,
    "chat: logit_bias forbids": lambda: (t := tops(0)[0]["token"]) and not str(said(logit_bias={str(i): -100 for i in post("/tokenize", content=t, add_special=False).json()["tokens"]})["content"]).startswith(t),
    "chat: penalties": lambda: post(CHAT, frequency_penalty=1.5, presence_penalty=-1.5).status_code == OK,
    "chat: top_k, min_p": lambda: said(temperature=1, top_k=1) == said() and post(CHAT, min_p=0.1).status_code == OK,
    "chat: stop list": lambda: (t := str(said(max_tokens=12)["content"]))[3:5] not in str(said(max_tokens=12, stop=["\0", t[3:5]])["content"]) or len(t) < 5,
    "chat: stop reason": lambda: post(CHAT, max_tokens=12, stop=[str(said(max_tokens=12)["content"])[:3]]).json()["choices"][0]["finish_reason"] == "stop",
    "chat: logprobs without top": lambda: all(x["top_logprobs"] == [] and x["logprob"] <= 0 for x in post(CHAT, logprobs=True).json()["choices"][0]["logprobs"]["content"]),
    "chat: top_logprobs 20": lambda: all(len(x["top_logprobs"]) == 20 for x in tops(20)),
    "chat: logprob bytes": lambda: b"".join(bytes(x["bytes"]) for x in tops(1)).decode(errors="replace").strip() == str(said()["content"]).strip(),
    "chat: logprobs in a stream": lambda: sum(len((c["choices"][0]["logprobs"] or {"content": []})["content"]) for c in chunks(logprobs=True)) == len(tops(0)),
    "chat: json_object": lambda: isinstance(json.loads(said(response_format={"type": "json_schema", "json_schema": FORM}, max_tokens=200)["content"]), dict),
    "chat: parse": lambda: isinstance(client().chat.completions.parse(model=MODEL, messages=USER, response_format=Form, max_tokens=200, temperature=0).choices[0].message.parsed, Form),
    "chat: bad schema is 400": lambda: is_refused(CHAT, "response_format", response_format={"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}),
    "tools: auto": lambda: post(CHAT, tools=[TOOL]).status_code == OK,
    "tools: none": lambda: "tool_calls" not in said(tools=[TOOL], tool_choice="none"),
    "tools: required": lambda: forced(tool_choice="required"),
    "tools: named": lambda: forced(tool_choice=NAMED),
    "tools: strict": lambda: post(CHAT, tools=[{**TOOL, "function": {**TOOL["function"], "strict": True}}]).status_code == OK,
    "tools: streamed": lambda: [c["choices"][0]["finish_reason"] for c in chunks(tools=[TOOL], tool_choice="required", max_tokens=200)][-1] == "tool_calls",
    "tools: result": lambda: post(CHAT, messages=[*USER, TURN, RESULT]).status_code == OK,
    "tools: result of no call": lambda: is_error(post(CHAT, messages=[*USER, RESULT]), 400, param="messages[1].tool_call_id"),
    "tools: unknown name is 400": lambda: is_refused(CHAT, "tool_choice", tools=[TOOL], tool_choice={"type": "function", "function": {"name": "no"}}),
    "stream: [DONE] last": lambda: stream(CHAT)[-1] == "data: [DONE]",
    "stream: content type": lambda: post(CHAT, stream=True).headers["content-type"].startswith("text/event-stream"),
    "stream: one id": lambda: len({(c["id"], c["created"], c["model"], c["object"]) for c in chunks()}) == 1,
    "stream: role first": lambda: [("role" in c["choices"][0]["delta"]) for c in chunks()].count(True) == 1 and "role" in chunks()[0]["choices"][0]["delta"],
    "stream: one finish_reason": lambda: [bool(c["choices"][0]["finish_reason"]) for c in chunks()].count(True) == 1,
    "stream: equals whole": lambda: "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks(max_tokens=20)) == said(max_tokens=20)["content"],
    "stream: no usage unasked": lambda: not any(c.get("usage") for c in chunks()),
    "stream: usage last": lambda: usage()["choices"] == [] and usage()["usage"]["completion_tokens"] > 0,
    "stream: n": lambda: sorted(c["choices"][0]["index"] for c in chunks(n=2) if c["choices"][0]["finish_reason"]) == [0, 1],
    "stream: stop not leaked": lambda: (t := str(said(max_tokens=16)["content"])) and t[2:5] not in "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks(max_tokens=16, stop=t[2:5])),
    "stream: bad request is a 400": lambda: is_error(post(CHAT, stream=True, n=0), 400),
    "text: string": lambda: post(TEXT).json()["object"] == "text_completion",
    "text: list": lambda: len(post(TEXT, prompt=["a", "b"]).json()["choices"]) == 2,
    "text: ids": lambda: text(prompt=post("/tokenize", prompt="hi").json()["tokens"]) == text(),
    "text: lists of ids": lambda: [c["index"] for c in post(TEXT, prompt=[[1], [2]]).json()["choices"]] == [0, 1],
    "text: list and n": lambda: len(post(TEXT, prompt=["a", "b"], n=2, temperature=1).json()["choices"]) == 4,
    "text: echo": lambda: text(echo=True) == "hi" + text(),
    "text: echo of ids": lambda: text(prompt=post("/tokenize", prompt="hi").json()["tokens"], echo=True).startswith("hi"),
    "text: echo streamed": lambda: "".join(c["choices"][0]["text"] for c in chunks(TEXT, echo=True)) == text(echo=True),
    "text: logprobs shape": lambda: {"tokens", "token_logprobs", "top_logprobs", "text_offset"} <= post(TEXT, logprobs=3).json()["choices"][0]["logprobs"].keys(),
    "text: loglikelihood": loglikelihood,
    "text: 16 by default": lambda: post(TEXT, max_tokens=None).json()["usage"]["completion_tokens"] <= 16,
    "text: empty prompt is 400": lambda: is_refused(TEXT, "prompt", prompt=""),
    "text: id above vocabulary": lambda: is_refused(TEXT, "prompt", prompt=[10**8]),
    "text: suffix is refused": lambda: is_refused(TEXT, "suffix", suffix="x"),
    "text: stream [DONE]": lambda: stream(TEXT)[-1] == "data: [DONE]",
    "responses: object": lambda: post(RESP).json()["object"] == "response",
    "responses: client": lambda: client().responses.create(model=MODEL, input="hi", max_output_tokens=4).status in ("incomplete", "completed"),
    "responses: items": lambda: post(RESP, input=[{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]).json()["output"][0]["content"][0]["text"] == post(RESP).json()["output"][0]["content"][0]["text"],
    "responses: instructions": lambda: post(RESP, instructions="S").json()["instructions"] == "S",
    "responses: events begin": lambda: events()[:4] == ["created", "in_progress", "output_item.added", "content_part.added"],
    "responses: events end": lambda: events()[-1] in ("completed", "incomplete") and events()[-2] == "output_item.done",
    "responses: numbered": lambda: [e["sequence_number"] for e in chunks(RESP)] == list(range(len(chunks(RESP)))),
    "responses: named events": lambda: stream(RESP)[0] == "event: response.created",
    "responses: function call": lambda: post(RESP, tools=[{"type": "function", **TOOL["function"]}], tool_choice="required", max_output_tokens=200).json()["output"][0]["type"] == "function_call",
    "responses: parse": lambda: isinstance(client().responses.parse(model=MODEL, input="x", text_format=Form, max_output_tokens=200, temperature=0).output_parsed, Form),
    "responses: store": stored,
    "responses: store false": lambda: HTTP.get(f"{URL}{RESP}/{post(RESP, store=False).json()['id']}").status_code == 404,
    "responses: built-in tool": lambda: is_refused(RESP, "tools[0]", tools=[{"type": "web_search"}]),
    "tokens: round trip": lambda: post("/detokenize", tokens=post("/tokenize", prompt="你好, a").json()["tokens"]).json()["prompt"].endswith("你好, a"),
    "tokens: count": lambda: (t := post("/tokenize", prompt="a b").json())["count"] == len(t["tokens"]),
    "tokens: model is checked": lambda: is_error(post("/tokenize", model="nope", prompt="a"), 404),
    "health": lambda: ask("GET", "/health").status_code == OK,
    "metrics": lambda: "# TYPE" in ask("GET", "/metrics").text,
    "openapi.json": lambda: ask("GET", "/openapi.json").json()["openapi"].startswith("3."),
    "page": lambda: "text/html" in ask("GET", "/").headers["content-type"],
    "page: policy": lambda: "content-security-policy" in ask("GET", "/").headers,
    "embeddings: 501, no retry": lambda: (a := post("/v1/embeddings", input="x")).status_code == 501 and a.headers["x-should-retry"] == "false",
    "error: bad JSON": lambda: is_error(post(CHAT, raw=b"{"), 400, "invalid_json"),
    "error: NaN": lambda: is_error(post(CHAT, raw=b'{"temperature": NaN}'), 400),
    "error: deep nesting": lambda: is_error(post(CHAT, raw=b"[" * 50_000), 400),
    "error: not an object": lambda: is_error(post(CHAT, raw=b"[1]"), 400),
    "error: half a character": lambda: is_error(post(CHAT, raw=b'{"model": "\\ud800"}'), 400),
    "error: unknown field": lambda: is_refused(CHAT, "nonsense", nonsense=1),
    "error: wrong type": lambda: is_refused(CHAT, "temperature", temperature="1"),
    "error: out of range": lambda: all(is_refused(CHAT, k, **{k: v}) for k, v in {"temperature": 3, "top_p": 0, "presence_penalty": 3, "n": 0, "max_tokens": 0}.items()),
    "error: empty messages": lambda: is_refused(CHAT, "messages", messages=[]),
    "error: unknown role": lambda: is_refused(CHAT, "messages[0].role", messages=[{"role": "x", "content": "y"}]),
    "error: five stops": lambda: is_refused(CHAT, "stop", stop=list("abcde")),
    "error: bias out of vocabulary": lambda: is_refused(CHAT, "logit_bias", logit_bias={"99999999": 1}),
    "error: top_logprobs alone": lambda: is_refused(CHAT, "top_logprobs", top_logprobs=2),
    "error: unknown model": lambda: is_error(post(CHAT, model="nope"), 404, "model_not_found", "model"),
    "error: unknown path": lambda: is_error(ask("GET", "/v1/nope"), 404),
    "error: wrong method": lambda: is_error(ask("GET", CHAT), 405),
    "error: too long": lambda: is_error(post(TEXT, prompt="word " * 60_000), 400, "context_length_exceeded", "prompt"),
    "error: too large is 413": lambda: is_error(post(CHAT, raw=b" " * (17 * 2**20)), 413),
    "disconnect: stream": lambda: leave(True),
    "disconnect: whole": lambda: leave(False),
    "cors: closed": lambda: "access-control-allow-origin" not in ask("GET", "/v1/models", origin="https://evil.example").headers,
}  # fmt: skip
"""Whether each point holds; an exception means no."""


def main() -> int:
    """Try all points."""
    global URL, MODEL
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--key", default="")
    given = parser.parse_args()
    URL = given.url.rstrip("/")
    if given.key:
        HTTP.headers["authorization"] = f"Bearer {given.key}"
    MODEL = HTTP.get(URL + "/v1/models").json()["data"][0]["id"]
    failed = []
    for name, holds in POINTS.items():
        try:
            why = "" if holds() else "does not hold"
        except Exception as error:
            why = f"{type(error).__name__}: {error}"[:120]
        if why:
            failed.append(name)
            print(f"FAIL {name}: {why}")
    print(
        f"| {MODEL} | {len(POINTS) - len(failed)} of {len(POINTS)} | {', '.join(failed) or '–'} |"
    )
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
