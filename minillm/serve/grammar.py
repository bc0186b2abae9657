"""Answers that follow a JSON schema, by llguidance (the extra `grammar`)."""

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minillm.models.sampling import Constraint
from minillm.serve.backend import Backend
from minillm.serve.problems import ApiError
from minillm.serve.think import CLOSE
from minillm.serve.tool_calls import CLOSE as CALL_CLOSE
from minillm.serve.tool_calls import OPEN as CALL_OPEN

TIGHT = {"whitespace_flexible": False}
"""Free white space is where a small model gets lost."""


class Grammars:
    """Makes constraints for one tokenizer; the first one takes a second."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._tokenizer: Any = None

    def json(
        self, schema: Any, *, inside: bool, param: str = "response_format"
    ) -> Callable[[], Constraint]:
        """Return a maker of constraints to `schema`, for whole answers.

        Args:
            schema: A JSON schema.
            inside: The answer begins in a think part, which stays free.
            param: The field that asks for it.

        Raises:
            ApiError: 400 if llguidance is not installed or cannot follow the schema.
        """
        return self._make(
            lambda lib: lib.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=TIGHT),
            inside=inside,
            param=param,
        )

    def calls(self, schema: Any, *, inside: bool, param: str) -> Callable[[], Constraint]:
        """Return a maker of constraints to free text in which every call follows `schema`.

        Raises:
            ApiError: As `json`.
        """
        call = json.dumps({**schema, "x-guidance": TIGHT})
        lark = (
            "%llguidance {}\nstart: call* TEXT\nTEXT: /(.|\\n)*/\n"
            f'begin[lazy]: TEXT "{CALL_OPEN}"\n'
            f'call: begin "\\n"? body "\\n"? "{CALL_CLOSE}"\nbody: %json {call}\n'
        )
        return self._make(
            lambda lib: lib.LLMatcher.grammar_from_lark(lark), inside=inside, param=param
        )

    def _make(
        self, grammar_of: Callable[[Any], str], *, inside: bool, param: str
    ) -> Callable[[], Constraint]:
        try:
            import llguidance
        except ImportError:
            raise ApiError(
                f"`{param}` needs llguidance, which is not installed on this server; "
                "its operator can add it: `pip install 'minillm-lab[grammar]'`",
                code="unsupported_parameter",
                param=param,
            ) from None
        if self._tokenizer is None:
            self._tokenizer = llguidance.LLTokenizer(
                self._backend.tokenizer.backend_tokenizer.to_str(),
                n_vocab=self._backend.vocab_size,
                eos_token=list(self._backend.eos_ids),
            )
        matcher = llguidance.LLMatcher
        try:
            grammar = grammar_of(llguidance)
            problem = matcher.validate_grammar(grammar, self._tokenizer)
        except ValueError as error:
            problem = str(error)
        if problem:
            why = str(problem).splitlines()[0]
            raise ApiError(f"this schema cannot be followed: {why}", param=param)
        made = self._tokenizer, grammar
        return lambda: JsonConstraint(matcher(*made), self._backend, inside=inside)


class JsonConstraint:
    """The state of one answer."""

    def __init__(self, matcher: Any, backend: Backend, *, inside: bool) -> None:
        self._matcher, self._backend = matcher, backend
        self._is_free, self._tail = inside, b""

    def mask_V(self) -> Tensor:  # noqa: N802 - shape suffix
        """Return which tokens may come next."""
        size = self._backend.vocab_size
        if self._is_free:
            allowed = torch.ones(size, dtype=torch.bool)
            allowed[list(self._backend.eos_ids)] = False
            return allowed
        bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        shifts = torch.arange(8, dtype=torch.uint8)
        return ((bits[:, None] >> shifts) & 1).bool().flatten()[:size]

    def accept(self, token: int) -> None:
        """Note the token that came."""
        if not self._is_free:
            if not self._matcher.is_stopped():
                self._matcher.consume_token(token)
            return
        self._tail = (self._tail + self._backend.token_bytes(token))[-64:]
        self._is_free = CLOSE.encode() not in self._tail
