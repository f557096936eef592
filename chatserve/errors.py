"""The errors a client can meet: one class per party who must act, each carrying a protocol code.

`ServiceError` is turned into the wire's error object by the WebSocket and HTTP surfaces alike; this knows neither.
"""

from __future__ import annotations

from typing import Any, ClassVar


class ServiceError(Exception):
    """A refusal with a protocol `code`, a sentence for people, and whether trying again can help.

    `kind` is the OpenAI-style error type and `http_status` the status the HTTP surface answers with.
    """

    kind: ClassVar[str] = "server_error"
    http_status: ClassVar[int] = 500
    default_code: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False

    def __init__(
        self, message: str, *, code: str | None = None, param: str | None = None, retry_after_ms: int | None = None
    ) -> None:
        super().__init__(message)
        self.code = code or self.default_code
        self.message = message
        self.param = param
        self.retry_after_ms = retry_after_ms

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"

    def as_object(self) -> dict[str, Any]:
        """The `error` object of the WebSocket protocol and of HTTP bodies, without empty fields."""
        fields = {
            "type": self.kind,
            "code": self.code,
            "message": self.message,
            "param": self.param,
            "retryable": self.retryable,
            "retry_after_ms": self.retry_after_ms,
        }
        return {name: value for name, value in fields.items() if value is not None}


class BadRequest(ServiceError):
    """The client sent something that cannot be carried out as it stands; the client must change it.

    `command_id` is the `id` of the offending command where it could be read.
    """

    kind = "invalid_request_error"
    http_status = 400
    default_code = "invalid_value"

    def __init__(
        self, message: str, *, code: str | None = None, param: str | None = None, command_id: str | None = None
    ) -> None:
        super().__init__(message, code=code, param=param)
        self.command_id = command_id


class NotFound(ServiceError):
    """No such session, message, response or model for this tenant."""

    kind = "invalid_request_error"
    http_status = 404
    default_code = "session_not_found"


class Conflict(ServiceError):
    """The command contradicts the present state: a response is running, or a key was used for another body."""

    kind = "invalid_request_error"
    http_status = 409
    default_code = "response_in_progress"


class TooSlow(ServiceError):
    """A request that did not arrive in time; its connection is not kept for it."""

    kind = "invalid_request_error"
    http_status = 408
    default_code = "bad_message"
    retryable = True


class MessageTooLarge(ServiceError):
    """A message or body beyond the limit announced in `welcome`."""

    kind = "invalid_request_error"
    http_status = 413
    default_code = "message_too_large"


class Unauthorized(ServiceError):
    """No key, or a wrong one."""

    kind = "authentication_error"
    http_status = 401
    default_code = "unauthorized"


class Forbidden(ServiceError):
    """The origin or host is not allowed here."""

    kind = "permission_error"
    http_status = 403
    default_code = "forbidden"


class Overloaded(ServiceError):
    """A bounded queue is full or a rate is exceeded; try again after `retry_after_ms`."""

    kind = "rate_limit_error"
    http_status = 429
    default_code = "queue_full"
    retryable = True


class QuotaReached(Overloaded):
    """The tenant has as many of something as it may have; waiting does not help, deleting one does."""

    default_code = "rate_limited"
    retryable = False


class Unavailable(ServiceError):
    """The server cannot serve now (draining, storage away, engine restarted); trying again later helps."""

    http_status = 503
    default_code = "storage_unavailable"
    retryable = True


class StartupError(Exception):
    """The server cannot start; the text names the value at fault and the remedy, for the operator."""
