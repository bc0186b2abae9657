"""The description of the interface fits what the server does."""

from typing import Any

import httpx
import pytest


@pytest.mark.parametrize("key", ["", "k"])
def test_every_described_route_is_there_and_references_end_somewhere(
    serve: Any, scripted: Any, key: str
) -> None:
    headers = {"authorization": f"Bearer {key or 'x'}"}
    with serve(scripted(), api_key=key) as server:
        found = httpx.get(f"{server.url}/openapi.json", headers=headers).json()
        for path, methods in found["paths"].items():
            for method in methods:
                asked = path.replace("{model_id}", "lab/scripted")
                answer = httpx.request(method, server.url + asked, headers=headers)
                if "{response_id}" in path:
                    assert "no response" in answer.json()["error"]["message"]
                else:
                    assert answer.status_code in (200, 400), path
    assert ("security" in found) == bool(key)
    schemas = found["components"]["schemas"]
    for name in {word.split("'")[0] for word in str(found).split("#/components/schemas/")[1:]}:
        assert name in schemas
    assert schemas["ChatRequest"]["required"] == ["model", "messages"]
    assert "developer" in schemas["Message"]["properties"]["role"]["enum"]
