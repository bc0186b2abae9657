"""Requests of the OpenAI API: what is read, what is refused, and why.

A field is honoured or refused, never ignored; the few that are accepted without effect cannot
change an answer (`NO_EFFECT`). `null` means absent. Every refusal names its field.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from minillm.models.sampling import SamplingParams
from minillm.serve.problems import ApiError, short, unsupported

NO_EFFECT = frozenset(
    ("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
)
"""Labels for the operator of a service; they cannot change an answer."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
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

_LAID_ASIDE = NO_EFFECT | NEUTRAL.keys()

MAX_RUNS = 128
"""Answers that one request may ask for, over all prompts."""

MAX_TURNS = 10_000
"""A conversation of more turns fits no context and costs time to check."""

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_DROPPED = frozenset(("reasoning_content", "reasoning"))  # an earlier answer, sent back as it came


def _refuse(message: str) -> PydanticCustomError:
    return PydanticCustomError("invalid_value", "{message}", {"message": message})


def _stop(value: Any) -> Any:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise _refuse("must be a string or a list of strings")
    if len(texts) > 4:
        raise _refuse(f"may hold at most 4 strings, got {len(texts)}")
    if "" in texts:
        raise _refuse("must not hold an empty string")
    return tuple(texts)


def _logit_bias(value: Any) -> Any:
    if not isinstance(value, dict):
        raise _refuse("must map token ids to numbers")
    for key, bias in value.items():
        if not re.fullmatch(r"[0-9]{1,9}", key):
            raise _refuse(f"`{short(key)}` is not a token id")
        if isinstance(bias, bool) or not isinstance(bias, (int, float)) or not abs(bias) <= 100:
            raise _refuse(f"the bias of token {key} must lie between -100 and 100")
    return {int(key): float(bias) for key, bias in value.items()}


def _prompt(value: Any) -> Any:
    """Return a list of prompts, each a string or a list of ids."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise _refuse("must be a string, a list of strings, token ids, or a list of those")
    if _are_ids(value):
        return [value]
    if all(isinstance(item, str) for item in value):
        return value
    if all(isinstance(item, list) and _are_ids(item) for item in value):
        return value
    raise _refuse("must be all strings, all token ids, or all lists of token ids")


def _are_ids(items: list[Any]) -> bool:
    return all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in items)


def _content(value: Any) -> Any:
    """Return the text of a message's content: a string, or text parts put together."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise _refuse("must be a string or a list of text parts")
    for index, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else part
            raise _refuse(f"part {index} is `{short(kind)}`; this model reads only text parts")
        if not isinstance(part.get("text"), str):
            raise _refuse(f"part {index} has no text")
    return "".join(part["text"] for part in value)


def _role(value: Any) -> Any:
    if not isinstance(value, str) or value not in ROLES:
        raise _refuse(f"must be one of {', '.join(ROLES)}, got `{short(value)}`")
    return ROLES[value]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Message(_Strict):
    """One turn."""

    role: Annotated[str, BeforeValidator(_role)]
    content: Annotated[str, BeforeValidator(_content)]


class StreamOptions(_Strict):
    """How to stream."""

    include_usage: bool = False


class TemplateOptions(_Strict):
    """Switches of the chat template."""

    enable_think: bool = False


class Request(_Strict):
    """What both endpoints take."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=MAX_RUNS)
    max_tokens: int | None = Field(None, ge=1)
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

    @property
    def limit(self) -> int | None:
        """Longest answer in tokens; `None` is all that fits. The newer name wins."""
        return self.max_completion_tokens or self.max_tokens

    def plain_messages(self) -> list[dict[str, str]]:
        """Return the turns for the chat template."""
        return [{"role": turn.role, "content": turn.content} for turn in self.messages]


class CompletionRequest(Request):
    """`POST /v1/completions`."""

    prompt: Annotated[list[Any], BeforeValidator(_prompt)]
    max_tokens: int | None = Field(16, ge=1)  # OpenAI's default
    echo: bool = False

    @property
    def limit(self) -> int | None:
        """Longest answer in tokens."""
        return self.max_tokens


R = TypeVar("R", bound=Request)


def parse(cls: type[R], body: Any) -> R:
    """Check a decoded JSON body.

    Raises:
        ApiError: 400 that names the first field at fault.
    """
    if not isinstance(body, dict):
        raise ApiError("the request body must be a JSON object", code="invalid_json")
    given = {key: value for key, value in body.items() if value is not None}
    for name in NEUTRAL.keys() & given.keys():
        value = given[name]
        if not any(
            value == ok and type(value) is type(ok) for ok in NEUTRAL[name]
        ):  # 0 is no False
            raise unsupported(name, f"this server cannot honour `{short(value)}`")
    known = {key: value for key, value in given.items() if key not in _LAID_ASIDE}
    if isinstance(known.get("messages"), list):
        if len(known["messages"]) > MAX_TURNS:
            raise ApiError(f"`messages` has more than {MAX_TURNS} turns", param="messages")
        known["messages"] = [_plain_turn(turn, i) for i, turn in enumerate(known["messages"])]
    if not known.get("stream") and "stream_options" in known:
        raise ApiError("`stream_options` needs `stream: true`", param="stream_options")
    try:
        return cls.model_validate(known)
    except ValidationError as error:
        raise _first_problem(error) from None


def _plain_turn(turn: Any, index: int) -> Any:
    """Drop what is absent (`null`, empty) from a turn; refuse what the template cannot show."""
    if not isinstance(turn, dict):
        return turn
    kept = {key: value for key, value in turn.items() if value is not None and key not in _DROPPED}
    for key in kept.keys() - {"role", "content"}:
        if kept[key] not in ([], {}):
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


@dataclasses.dataclass(frozen=True, slots=True)
class Defaults:
    """What a request gets that does not choose."""

    temperature: float = 0.7
    top_p: float = 0.9


def sampling_params(
    request: ChatRequest | CompletionRequest, defaults: Defaults, *, room: int, choice: int
) -> SamplingParams:
    """Return the sampling of one answer.

    Args:
        request: The request.
        defaults: Temperature and top-p where the request has none.
        room: Tokens left in the context; the answer is never longer.
        choice: Which of the `n` answers: a given seed is counted up, so that they differ.
    """
    seed = None if request.seed is None else (request.seed + choice) % 2**63
    pick = request.temperature, request.top_p
    return SamplingParams(
        temperature=defaults.temperature if pick[0] is None else pick[0],
        top_p=defaults.top_p if pick[1] is None else pick[1],
        top_k=request.top_k,
        min_p=request.min_p,
        repetition_penalty=request.repetition_penalty,
        frequency_penalty=request.frequency_penalty,
        presence_penalty=request.presence_penalty,
        logit_bias=request.logit_bias,
        max_tokens=min(request.limit or room, room),
        stop=request.stop,
        seed=seed,
    )


def check_ids(ids: Sequence[int] | Mapping[int, float], vocab_size: int, param: str) -> None:
    """Raise a 400 unless every id is below `vocab_size`."""
    bad = next((index for index in ids if index >= vocab_size), None)
    if bad is not None:
        raise ApiError(
            f"`{param}` names token {bad}; the vocabulary ends at {vocab_size - 1}", param=param
        )
