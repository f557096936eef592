"""Sessions as files: `GET .../export` and `POST /v1/sessions/import`.

What is exported is sent as a download under the session's id, never as something that a browser would show.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from chatserve.server.http import idempotency_key, limited_body, services_of, session_id_of, tenant_of, validated
from chatserve.server.markdown import session_markdown
from chatserve.sessions.portable import import_command, read_document

_MEDIA_TYPES = {"json": "application/json", "markdown": "text/markdown; charset=utf-8"}
_SUFFIXES = {"json": "json", "markdown": "md"}


class ExportQuery(BaseModel):
    """`json` is everything and can be imported; `markdown` is the present branch for people."""

    model_config = ConfigDict(extra="forbid")

    format: Literal["json", "markdown"] = "json"


async def export_session(request: Request) -> Response:
    """`GET /v1/sessions/{id}/export?format=json|markdown`: the session as a file."""
    tenant, session_id = tenant_of(request), session_id_of(request)
    chosen = validated(ExportQuery, dict(request.query_params)).format
    document = await services_of(request).sessions.export_session(tenant, session_id)
    content = await asyncio.to_thread(_written, document, chosen)
    headers = {
        "Content-Disposition": f'attachment; filename="{session_id}.{_SUFFIXES[chosen]}"',
        "Content-Security-Policy": "default-src 'none'; sandbox",
        "Cache-Control": "no-store",
    }
    return Response(content, media_type=_MEDIA_TYPES[chosen], headers=headers)


def _written(document: Mapping[str, Any], chosen: str) -> bytes:
    return to_json(document) if chosen == "json" else session_markdown(document).encode()


async def import_session(request: Request) -> JSONResponse:
    """`POST /v1/sessions/import`: a session from an exported one. 201, or 200 where its key was used before."""
    tenant, services = tenant_of(request), services_of(request)
    key = idempotency_key(request) or secrets.token_hex(16)
    with services.imports.taken(tenant):
        raw = await limited_body(request, services.settings.max_import_bytes)
        document = await asyncio.to_thread(read_document, raw)
        view, duplicate = await services.sessions.import_session(tenant, import_command(raw, key), document)
    if not duplicate:
        services.hub.sessions_changed(tenant)
    return JSONResponse(view, status_code=200 if duplicate else 201)


ROUTES = [
    Route("/v1/sessions/import", import_session, methods=["POST"]),
    Route("/v1/sessions/{session_id}/export", export_session, methods=["GET"]),
]
