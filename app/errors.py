"""Every way a request can fail. Status and code are class attributes; `app.main` turns them into responses."""

from __future__ import annotations

from typing import ClassVar


class ServiceError(Exception):
    """Base of all errors that a client sees. `param` names the offending field, `retry_after` is in seconds."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.message, self.param, self.retry_after = message, param, retry_after

    def body(self) -> dict[str, dict[str, str | None]]:
        """The one error shape: {"error": {type, code, message, param}}."""
        return {"error": {"type": self.type, "code": self.code, "message": self.message, "param": self.param}}

    @property
    def type(self) -> str:
        return "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"


class InvalidRequest(ServiceError):
    status, code = 422, "invalid_request"


class InvalidClassLabel(ServiceError):
    status, code = 422, "invalid_class_label"


class NotFound(ServiceError):
    status, code = 404, "not_found"


class MethodNotAllowed(ServiceError):
    status, code = 405, "method_not_allowed"


class NotAcceptable(ServiceError):
    status, code = 406, "not_acceptable"


class BodyTooLarge(ServiceError):
    status, code = 413, "body_too_large"


class Overloaded(ServiceError):
    status, code = 429, "overloaded"


class NotReady(ServiceError):
    status, code = 503, "not_ready"


class DeadlineExceeded(ServiceError):
    status, code = 504, "deadline_exceeded"


class StepFailed(ServiceError):
    status, code = 500, "step_failed"


class Cancelled(ServiceError):
    """The client went away. Nobody reads this answer; it ends the request, and 499 marks it in log and metrics."""

    status, code = 499, "cancelled"
