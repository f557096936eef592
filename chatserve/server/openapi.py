"""`GET /openapi.json`: the HTTP surface as OpenAPI 3.1, assembled from the routes and the models that read requests.

A route's first sentence is its endpoint's; none can be missing. What a command's body holds is the command less what
the path says.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import models_json_schema
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from chatserve.protocol.commands import ResponseCreate, SessionCreate, SessionFork, SessionUpdate
from chatserve.server.documents import ExportQuery
from chatserve.server.http import ListQuery, ResumeBody, tenant_of
from chatserve.server.openai.chat_body import ChatBody
from chatserve.server.openai.completion_body import CompletionBody
from chatserve.server.openai.response_body import ResponseBody
from chatserve.server.openai.responses import ItemsQuery
from chatserve.server.turns import EventsQuery
from chatserve.sessions.portable import Document
from chatserve.version import __version__

REFS = "#/components/schemas/{model}"
OPEN_PATHS = frozenset({"/", "/healthz", "/readyz"})
BODIES: Mapping[tuple[str, str], type] = {
    ("POST", "/v1/sessions"): SessionCreate,
    ("PATCH", "/v1/sessions/{session_id}"): SessionUpdate,
    ("POST", "/v1/sessions/import"): Document,
    ("POST", "/v1/sessions/{session_id}/fork"): SessionFork,
    ("POST", "/v1/sessions/{session_id}/resume"): ResumeBody,
    ("POST", "/v1/sessions/{session_id}/responses"): ResponseCreate,
    ("POST", "/v1/completions"): CompletionBody,
    ("POST", "/v1/chat/completions"): ChatBody,
    ("POST", "/v1/responses"): ResponseBody,
}
QUERIES: Mapping[tuple[str, str], type[BaseModel]] = {
    ("GET", "/v1/sessions"): ListQuery,
    ("GET", "/v1/sessions/{session_id}/export"): ExportQuery,
    ("GET", "/v1/sessions/{session_id}/events"): EventsQuery,
    ("GET", "/v1/responses/{response_id}/input_items"): ItemsQuery,
}
KEYED = frozenset({SessionCreate, SessionFork, ResponseCreate, Document, ResponseBody})
COMMANDS = frozenset({SessionCreate, SessionFork, SessionUpdate, ResponseCreate})
STREAM_FLAG = {"type": "boolean", "default": False, "description": "Answer with the turn's events as they come."}
_IN_PATH = re.compile(r"\{(\w+)(?::\w+)?\}")
_OF_THE_PATH = ("type", "id", "session_id")


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path."""

    method: str
    path: str
    text: str

    @property
    def key(self) -> tuple[str, str]:
        """As the tables above name it."""
        return self.method, self.path


def openapi_document(routes: Iterable[BaseRoute]) -> dict[str, Any]:
    """The document for these routes; those of the browser's page are left out."""
    schemas = _Schemas()
    paths: dict[str, dict[str, Any]] = {}
    for operation in _operations(routes):
        described = _described(operation, schemas)
        paths.setdefault(_IN_PATH.sub(r"{\1}", operation.path), {})[operation.method.lower()] = described
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "chatserve",
            "version": __version__,
            "description": "A multi-turn chat session server. docs/protocol.md describes its WebSocket at /v1/ws.",
        },
        "security": [{"key": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": {"Error": _error_schema(), **schemas.definitions},
        },
    }


class _Schemas:
    """Schemas of request bodies by name, collected as they are asked for."""

    def __init__(self) -> None:
        self.definitions: dict[str, Any] = {}

    def ref(self, body: type) -> dict[str, str]:
        """A reference to the schema of a body."""
        if body in COMMANDS:
            schema = _without_path(TypeAdapter(body).json_schema(ref_template=REFS))
            if body is ResponseCreate:
                schema["properties"]["stream"] = STREAM_FLAG
            self.definitions |= schema.pop("$defs", {})
            self.definitions[body.__name__] = schema
        else:
            _, schema = models_json_schema([(body, "validation")], ref_template=REFS)
            self.definitions |= schema["$defs"]
        return {"$ref": REFS.format(model=body.__name__)}


def _without_path(schema: dict[str, Any]) -> dict[str, Any]:
    """A command's schema without what HTTP says elsewhere; the key may stand in a header."""
    schema["properties"] = {name: part for name, part in schema["properties"].items() if name not in _OF_THE_PATH}
    required = [name for name in schema.pop("required", []) if name in schema["properties"] and name != "key"]
    return schema | ({"required": required} if required else {})


def _operations(routes: Iterable[BaseRoute]) -> Iterator[Operation]:
    for route in routes:
        text = getattr(getattr(route, "endpoint", None), "__doc__", None)
        if isinstance(route, Route) and text and route.include_in_schema:
            for method in sorted((route.methods or set()) - {"HEAD"}):
                yield Operation(method, route.path, " ".join(text.split()))


def _described(operation: Operation, schemas: _Schemas) -> dict[str, Any]:
    summary = operation.text.partition("`: ")[2] or operation.text
    described: dict[str, Any] = {
        "operationId": _operation_id(operation),
        "summary": summary[:1].upper() + summary[1:],
        "parameters": [*_path_parameters(operation), *_query_parameters(operation), *_header_parameters(operation)],
        "responses": {
            "2XX": {"description": "Done."},
            "default": {
                "description": "Refused; the code says why.",
                "content": {"application/json": {"schema": {"$ref": REFS.format(model="Error")}}},
            },
        },
    }
    body = BODIES.get(operation.key)
    if body is not None:
        described["requestBody"] = {"content": {"application/json": {"schema": schemas.ref(body)}}}
    if operation.path in OPEN_PATHS:
        described["security"] = []
    return described


def _operation_id(operation: Operation) -> str:
    words = re.findall(r"\w+", operation.path.removeprefix("/v1"))
    return "_".join([operation.method.lower(), *words])


def _path_parameters(operation: Operation) -> Iterator[dict[str, Any]]:
    for name in _IN_PATH.findall(operation.path):
        yield {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def _query_parameters(operation: Operation) -> Iterator[dict[str, Any]]:
    query = QUERIES.get(operation.key)
    for name, schema in query.model_json_schema()["properties"].items() if query else ():
        yield {"name": name, "in": "query", "required": False, "schema": schema}


def _header_parameters(operation: Operation) -> Iterator[dict[str, Any]]:
    if BODIES.get(operation.key) in KEYED:
        text = "Makes sending this twice harmless; kept for 24 hours at least."
        yield _header("Idempotency-Key", text)
    if operation.path.endswith("/events"):
        yield _header("Last-Event-ID", "The id of the last event seen: what followed it comes first.")


def _header(name: str, text: str) -> dict[str, Any]:
    schema = {"type": "string", "maxLength": 64}
    return {"name": name, "in": "header", "required": False, "description": text, "schema": schema}


def _error_schema() -> dict[str, Any]:
    texts = {name: {"type": "string"} for name in ("type", "code", "message", "param")}
    numbers = {"retryable": {"type": "boolean"}, "retry_after_ms": {"type": "integer"}}
    error = {"type": "object", "properties": texts | numbers, "required": ["type", "code", "message", "retryable"]}
    return {"type": "object", "properties": {"error": error}, "required": ["error"]}


def openapi_route(routes: Iterable[BaseRoute]) -> Route:
    """The route that serves the document of these routes and itself."""

    async def openapi(request: Request) -> Response:
        """`GET /openapi.json`: this document."""
        tenant_of(request)
        return Response(content, media_type="application/json")

    route = Route("/openapi.json", openapi, methods=["GET"])
    content = to_json(openapi_document([*routes, route]))
    return route
