"""`/openapi.json`: valid, complete, and in agreement with what the server takes."""

from __future__ import annotations

import re

import pytest
from openapi_schema_validator import OAS31Validator
from openapi_spec_validator import validate
from starlette.routing import Route

from chatserve.server.app import create_app
from chatserve.server.openapi import BODIES, OPEN_PATHS, QUERIES


@pytest.fixture
async def document(served):
    """What the server says of itself."""
    async with served.http() as http:
        answer = await http.get("/openapi.json")
    assert answer.headers["content-type"] == "application/json"
    return answer.json()


def operations(document):
    return {(method.upper(), path) for path, item in document["paths"].items() for method in item}


async def test_document_is_valid(document):
    """It is OpenAPI 3.1 as the specification's own schema has it, with unique operation ids."""
    validate(document)


async def test_every_route_is_described(served, document):
    """Each route but the page's files has its operation with a sentence, and no operation is without a route."""
    routes = [route for route in create_app(served.services).routes if isinstance(route, Route)]
    described = {
        (method, re.sub(r":\w+", "", route.path))
        for route in routes
        if route.endpoint.__doc__
        for method in route.methods - {"HEAD"}
    }
    assert operations(document) == described
    assert set(BODIES) | set(QUERIES) <= operations(document)
    for path, item in document["paths"].items():
        for operation in item.values():
            assert len(operation["summary"]) > 10
            assert (operation.get("security") == []) == (path in OPEN_PATHS)


@pytest.mark.parametrize(
    ("method", "path", "body", "fits"),
    [
        ("post", "/v1/sessions", {}, True),
        ("post", "/v1/sessions", {"title": "One", "params": {"temperature": 0.5}}, True),
        ("post", "/v1/sessions", {"title": 5}, False),
        ("post", "/v1/sessions", {"titel": "One"}, False),
        ("post", "/v1/sessions/{session_id}/responses", {"input": "Hi" * 99, "stop": "x" * 20, "stream": True}, True),
        ("post", "/v1/sessions/{session_id}/responses", {"input": "Hello", "temperature": 3}, False),
        ("post", "/v1/sessions/{session_id}/fork", {"title": "x"}, False),
        ("post", "/v1/sessions/{session_id}/resume", {"after_seq": 3, "warm": True}, True),
        ("post", "/v1/sessions/import", {"format": "something"}, False),
        ("post", "/v1/completions", {"prompt": "x", "max_tokens": 3}, True),
    ],
)
async def test_schemas_say_what_is_taken(document, method, path, body, fits):
    """A body fits its schema where the server would take it, and does not where it would be refused."""
    schema = document["paths"][path][method]["requestBody"]["content"]["application/json"]["schema"]
    validator = OAS31Validator({**schema, "components": document["components"]})
    assert validator.is_valid(body) is fits
