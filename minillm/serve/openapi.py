"""`/openapi.json`: the routes, what requests may hold, and how errors look.

Bodies come from the request models that check them; where a model reads several forms of a field
through a function of its own, the forms are written out here.
"""

import re
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from pydantic import BaseModel

from minillm.serve.responses_schema import LOGPROBS, ResponseRequest
from minillm.serve.schema import (
    ROLES,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)

_TEXT = {"type": "string"}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_TEXT_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": _TEXT},
    "required": ["type", "text"],
}
_FORMS: Mapping[str, Mapping[str, Any]] = {
    "stop": {
        "anyOf": [
            {"type": "string", "minLength": 1},
            {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": 4},
            {"type": "null"},
        ]
    },
    "stop_token_ids": _IDS,
    "tokens": _IDS,
    "logit_bias": {
        "type": "object",
        "propertyNames": {"pattern": "^[0-9]{1,9}$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    },
    "response_format": {
        "anyOf": [
            {
                "type": "object",
                "properties": {"type": {"enum": ["text", "json_object"]}},
                "required": ["type"],
                "additionalProperties": False,
            },
            {
                "type": "object",
                "properties": {
                    "type": {"const": "json_schema"},
                    "json_schema": {
                        "type": "object",
                        "properties": {"name": _TEXT, "schema": {"type": "object"}},
                        "required": ["schema"],
                    },
                },
                "required": ["type", "json_schema"],
            },
            {"type": "null"},
        ]
    },
    "prompt": {
        "anyOf": [
            {"type": "string", "minLength": 1},
            {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
            {**_IDS, "minItems": 1},
            {"type": "array", "items": {**_IDS, "minItems": 1}, "minItems": 1},
        ]
    },
    "input": {
        "anyOf": [
            _TEXT,
            {"type": "array", "items": {"type": "object"}, "minItems": 1},
        ]
    },
    "include": {"type": "array", "items": {"const": LOGPROBS}},
    "metadata": {
        "type": "object",
        "propertyNames": {"maxLength": 64},
        "additionalProperties": {"type": "string", "maxLength": 512},
        "maxProperties": 16,
    },
    "role": {"enum": list(ROLES)},
    "content": {"anyOf": [_TEXT, {"type": "array", "items": _TEXT_PART}]},
}
"""Fields by name, in the forms that a request may give them."""

_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": _TEXT,
                "type": _TEXT,
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}
_BODIES: Mapping[str, tuple[str, type[BaseModel]]] = {
    "/v1/chat/completions": ("Answer a conversation", ChatRequest),
    "/v1/completions": ("Continue plain text", CompletionRequest),
    "/v1/responses": ("Answer a conversation (Responses API)", ResponseRequest),
    "/tokenize": ("Ids of text", TokenizeRequest),
    "/detokenize": ("Text of ids", DetokenizeRequest),
}
_STREAMS = frozenset(("/v1/chat/completions", "/v1/completions", "/v1/responses"))
_READS = {
    "/": ("The chat page", "text/html"),
    "/health": ("Whether text can be generated", "application/json"),
    "/v1/models": ("The models", "application/json"),
    "/v1/models/{model_id}": ("One model", "application/json"),
    "/v1/responses/{response_id}": ("A stored response", "application/json"),
    "/v1/responses/{response_id}/input_items": ("Its input", "application/json"),
    "/metrics": ("Numbers for Prometheus", "text/plain"),
    "/openapi.json": ("This description", "application/json"),
}


def describe(*, needs_key: bool) -> dict[str, Any]:
    """Return the description of the whole interface, OpenAPI 3.1."""
    schemas: dict[str, Any] = {"Error": _ERROR}
    paths: dict[str, Any] = {}
    for path, (title, kind) in _READS.items():
        operation: dict[str, Any] = {"summary": title, "responses": _responses(kind)}
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": _TEXT}
            for name in re.findall(r"{(\w+)}", path)
        ]
        paths[path] = {"get": operation}
    for path, (title, model) in _BODIES.items():
        found = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= {name: _widen(part) for name, part in found.pop("$defs", {}).items()}
        schemas[model.__name__] = _widen(found)
        body = {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}
        paths[path] = {
            "post": {
                "summary": title,
                "requestBody": {"required": True, "content": {"application/json": body}},
                "responses": _responses("application/json", streams=path in _STREAMS),
            }
        }
    stored = paths["/v1/responses/{response_id}"]
    stored["delete"] = {**stored["get"], "summary": "Forget a stored response"}
    about = {"title": "minillm", "version": version("minillm-lab")}
    components: dict[str, Any] = {"schemas": schemas}
    whole: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": about,
        "paths": paths,
        "components": components,
    }
    if needs_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        whole["security"] = [{"key": []}]
    return whole


def _widen(schema: dict[str, Any]) -> dict[str, Any]:
    """Give the fields of `_FORMS` their forms."""
    fields = schema.get("properties", {})
    is_tokenize = schema.get("title") == "TokenizeRequest"  # there, prompt and content are texts
    given = {name: _FORMS[name] for name in fields.keys() & _FORMS.keys() if not is_tokenize}
    return {**schema, "properties": {**fields, **given}}


def _responses(kind: str, *, streams: bool = False) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    content: dict[str, Any] = {kind: {}}
    if streams:
        content["text/event-stream"] = {}
    return {
        "200": {"description": "Done", "content": content},
        "default": {"description": "An error", "content": error},
    }
