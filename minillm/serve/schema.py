"""Requests of the OpenAI API: what is read, what is refused, and why.

A field is honoured or refused, never ignored; the few that are accepted without effect cannot
change an answer (`NO_EFFECT`). `null` means absent. Every refusal names its field.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from minillm.serve.problems import ApiError, short, unsupported
from minillm.serve.tool_calls import check_calls, link_results

NO_EFFECT = frozenset(
    ("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
)
"""Labels for the operator of a service; they cannot change an answer."""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "best_of": (1,),
    "suffix": ("",),
}
"""Known fields that this server cannot honour, with the values that ask for nothing."""


MAX_RUNS = 128
"""Answers that one request may ask for, over all prompts."""

MAX_TURNS = 10_000
"""A conversation of more turns fits no context and costs time to check."""

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
_DROPPED = frozenset(("reasoning_content", "reasoning"))  # an earlier answer, sent back as it came


def refuse(message: str) -> PydanticCustomError:
    """Return what a validator raises."""
    return PydanticCustomError("invalid_value", "{message}", {"message": message})


def _stop(value: Any) -> Any:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise refuse("must be a string or a list of strings")
    if len(texts) > 4:
        raise refuse(f"may hold at most 4 strings, got {len(texts)}")
    if "" in texts:
        raise refuse("must not hold an empty string")
    return tuple(texts)


def _stop_ids(value: Any) -> Any:
    if not isinstance(value, list) or not _are_ids(value):
        raise refuse("must be a list of token ids")
    return tuple(value)


def _response_format(value: Any) -> Any:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text" and len(value) == 1:
        return None
    if kind == "json_object" and value.keys() <= {"type", "schema"}:
        found = value.get("schema", {"type": "object"})  # llama.cpp's way to give one
        if isinstance(found, dict):
            return found
    given = value.get("json_schema") if kind == "json_schema" else None
    if not isinstance(given, dict) or not isinstance(given.get("schema"), dict):
        raise refuse("must be text, json_object, or json_schema with a `json_schema.schema`")
    return given["schema"]


def _logit_bias(value: Any) -> Any:
    if not isinstance(value, dict):
        raise refuse("must map token ids to numbers")
    for key, bias in value.items():
        if not re.fullmatch(r"[0-9]{1,9}", key):
            raise refuse(f"`{short(key)}` is not a token id")
        if isinstance(bias, bool) or not isinstance(bias, (int, float)) or not abs(bias) <= 100:
            raise refuse(f"the bias of token {key} must lie between -100 and 100")
    return {int(key): float(bias) for key, bias in value.items()}


def _prompt(value: Any) -> Any:
    """Return a list of prompts, each a string or a list of ids."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise refuse("must be a string, a list of strings, token ids, or a list of those")
    if _are_ids(value):
        return [value]
    if all(isinstance(item, str) for item in value):
        return value
    if all(isinstance(item, list) and _are_ids(item) for item in value):
        return value
    raise refuse("must be all strings, all token ids, or all lists of token ids")


def _are_ids(items: list[Any]) -> bool:
    return all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in items)


def _content(value: Any) -> Any:
    """Return the text of a message's content: a string, or text parts put together."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise refuse("must be a string or a list of text parts")
    for index, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else part
            raise refuse(f"part {index} is `{short(kind)}`; this model reads only text parts")
        if not isinstance(part.get("text"), str):
            raise refuse(f"part {index} has no text")
    return "".join(part["text"] for part in value)


def _role(value: Any) -> Any:
    if not isinstance(value, str) or value not in ROLES:
        raise refuse(f"must be one of {', '.join(ROLES)}, got `{short(value)}`")
    return ROLES[value]


class Strict(BaseModel):
    """No field but those named, no conversion between types."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Message(Strict):
    """One turn."""

    role: Annotated[str, BeforeValidator(_role)]
    content: Annotated[str, BeforeValidator(_content)]
    tool_calls: tuple[dict[str, Any], ...] = ()
    tool_call_id: str | None = None
    name: str | None = None


class StreamOptions(Strict):
    """How to stream."""

    include_usage: bool = False


class TemplateOptions(Strict):
    """Switches of the chat template."""

    enable_think: bool = False
    enable_thinking: bool = False  # the name that Qwen's templates made common


class Request(Strict):
    """What both endpoints take."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=MAX_RUNS)
    max_tokens: int | None = Field(None, ge=1)
    min_tokens: int = Field(0, ge=0)
    stop_token_ids: Annotated[tuple[int, ...], BeforeValidator(_stop_ids)] = ()
    stop: Annotated[tuple[str, ...], BeforeValidator(_stop)] = ()
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: Annotated[dict[int, float], BeforeValidator(_logit_bias)] = Field(
        default_factory=dict
    )

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(Request):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    chat_template_kwargs: TemplateOptions = TemplateOptions()
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: Annotated[Any, BeforeValidator(_response_format)] = None
    tools: list[dict[str, Any]] = Field(default_factory=list)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True

    @property
    def limit(self) -> int | None:
        """Longest answer in tokens; `None` is all that fits. The newer name wins."""
        return self.max_completion_tokens or self.max_tokens

    def plain_messages(self) -> list[dict[str, Any]]:
        """Return the turns for the chat template; only what is there."""
        turns = []
        for index, turn in enumerate(self.messages):
            plain: dict[str, Any] = {"role": turn.role, "content": turn.content}
            if turn.tool_calls:
                plain["tool_calls"] = check_calls(turn.tool_calls, f"messages[{index}]")
            if turn.role == "tool":
                plain |= {"tool_call_id": turn.tool_call_id, "name": turn.name}
            turns.append({key: value for key, value in plain.items() if value is not None})
        return link_results(turns)


class CompletionRequest(Request):
    """`POST /v1/completions`."""

    prompt: Annotated[list[Any], BeforeValidator(_prompt)]
    max_tokens: int | None = Field(16, ge=0)  # OpenAI's default
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def limit(self) -> int | None:
        """Longest answer in tokens."""
        return self.max_tokens


class TokenizeRequest(Strict):
    """`POST /tokenize`, with the field names of vLLM and of llama.cpp."""

    model: str | None = None
    prompt: str | None = None
    content: str | None = None
    add_special_tokens: bool | None = None
    add_special: bool | None = None

    @property
    def text(self) -> str:
        """The text."""
        return self.prompt if self.prompt is not None else self.content or ""

    @property
    def specials(self) -> bool:
        """Whether the tokenizer may add its own tokens."""
        given = self.add_special_tokens if self.add_special is None else self.add_special
        return given if given is not None else self.prompt is not None


class DetokenizeRequest(Strict):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: Annotated[tuple[int, ...], BeforeValidator(_stop_ids)]


R = TypeVar("R", bound=Request)
P = TypeVar("P", bound=Strict)


def parse_plain(cls: type[P], body: Any) -> P:
    """Check a decoded JSON body that makes no answer.

    Raises:
        ApiError: 400 that names the first field at fault.
    """
    if not isinstance(body, dict):
        raise ApiError("the request body must be a JSON object", code="invalid_json")
    try:
        request = cls.model_validate({k: v for k, v in body.items() if v is not None})
    except ValidationError as error:
        raise _first_problem(error) from None
    if isinstance(request, TokenizeRequest) and request.prompt is request.content is None:
        raise ApiError("`prompt` is required", code="missing_parameter", param="prompt")
    return request


def given_fields(body: Any, neutral: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Return the fields of a decoded JSON body that are not null, and not `neutral`.

    Args:
        body: The body.
        neutral: Fields that change nothing at these values, and cannot be honoured at others.

    Raises:
        ApiError: The body is no object, or a field has another value than these.
    """
    if not isinstance(body, dict):
        raise ApiError("the request body must be a JSON object", code="invalid_json")
    given = {key: value for key, value in body.items() if value is not None}
    for name in neutral.keys() & given.keys():
        value = given.pop(name)
        if not any(
            value == ok and type(value) is type(ok) for ok in neutral[name]
        ):  # 0 is no False
            raise unsupported(name, f"this server cannot honour `{short(value)}`")
    return given


def parse(cls: type[R], body: Any) -> R:
    """Check a decoded JSON body.

    Raises:
        ApiError: 400 that names the first field at fault.
    """
    given = given_fields(body, NEUTRAL)
    known = {key: value for key, value in given.items() if key not in NO_EFFECT}
    if isinstance(known.get("messages"), list):
        if len(known["messages"]) > MAX_TURNS:
            raise ApiError(f"`messages` has more than {MAX_TURNS} turns", param="messages")
        known["messages"] = [_plain_turn(turn, i) for i, turn in enumerate(known["messages"])]
    if not known.get("stream") and "stream_options" in known:
        raise ApiError("`stream_options` needs `stream: true`", param="stream_options")
    try:
        request = cls.model_validate(known)
    except ValidationError as error:
        raise _first_problem(error) from None
    _check_together(request)
    return request


def _check_together(request: Request) -> None:
    if isinstance(request, ChatRequest) and request.top_logprobs and not request.logprobs:
        raise ApiError("`top_logprobs` needs `logprobs: true`", param="top_logprobs")
    if isinstance(request, CompletionRequest) and request.max_tokens == 0 and not request.echo:
        raise ApiError("`max_tokens` 0 needs `echo: true`", param="max_tokens")
    if isinstance(request, ChatRequest) and request.response_format and request.min_tokens:
        raise ApiError("`min_tokens` excludes `response_format`", param="min_tokens")
    limit = request.limit if isinstance(request, ChatRequest | CompletionRequest) else None
    if limit is not None and request.min_tokens > limit:
        raise ApiError(f"`min_tokens` is above the limit of {limit} tokens", param="min_tokens")


def _plain_turn(turn: Any, index: int) -> Any:
    """Drop what is absent (`null`, empty) from a turn; refuse what the template cannot show."""
    if not isinstance(turn, dict):
        return turn
    kept = {key: value for key, value in turn.items() if value is not None and key not in _DROPPED}
    role = kept.get("role")
    places = {"assistant": {"tool_calls"}, "tool": {"tool_call_id", "name"}}
    known = {"role", "content"} | (places.get(role, set()) if isinstance(role, str) else set())
    if role == "assistant" and isinstance(calls := kept.get("tool_calls"), list):
        kept["tool_calls"] = tuple(calls)
        if calls:
            kept.setdefault("content", "")
    for key in kept.keys() - known:
        if kept[key] not in ([], {}, ()):
            raise unsupported(f"messages[{index}].{key}", "the chat template has no place for it")
        del kept[key]
    return kept


def _first_problem(error: ValidationError) -> ApiError:
    detail = error.errors(include_url=False)[0]
    param = ""
    for step in detail["loc"]:
        param += f"[{step}]" if isinstance(step, int) else f".{step}" if param else str(step)
    kind = detail["type"]
    if kind == "extra_forbidden":
        return ApiError(f"unknown field `{short(param)}`", code="unknown_parameter", param=param)
    if kind == "missing":
        return ApiError(f"`{param}` is required", code="missing_parameter", param=param)
    message = re.sub("^(Input|List) should", "must", detail["msg"])
    message = message.replace(" after validation", "")
    if kind == "model_type":
        message = "must be a JSON object"
    got = "" if kind == "invalid_value" else f", got `{short(detail['input'])}`"
    return ApiError(f"`{param}` {message}{got}", param=param)


def check_ids(ids: Sequence[int] | Mapping[int, float], vocab_size: int, param: str) -> None:
    """Raise a 400 unless every id is below `vocab_size`."""
    bad = next((index for index in ids if index >= vocab_size), None)
    if bad is not None:
        raise ApiError(
            f"`{param}` names token {bad}; the vocabulary ends at {vocab_size - 1}", param=param
        )
