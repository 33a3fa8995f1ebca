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

    def headers(self) -> dict[str, str]:
        """What the answer's headers must say beside it."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}

    @property
    def type(self) -> str:
        """Whose fault it is, in OpenAI's words: the client's or the server's."""
        return "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"


class Unauthorized(ServiceError):
    """No key, or (`rejected`) one that is not good."""

    status, code = 401, "unauthorized"

    def __init__(self, message: str, *, rejected: bool = False) -> None:
        super().__init__(message)
        self._rejected = rejected

    def headers(self) -> dict[str, str]:
        """The challenge of RFC 6750, 3."""
        challenge = 'Bearer realm="ddpm-serve"'
        return {"WWW-Authenticate": challenge + ', error="invalid_token"' * self._rejected}


class BadRequest(ServiceError):
    """Not HTTP, or HTTP that two readers could understand in two ways."""

    status, code = 400, "bad_request"


class RequestTimeout(ServiceError):
    """The request's head or body did not arrive in time."""

    status, code = 408, "request_timeout"


class HeadersTooLarge(ServiceError):
    """Request line and headers are larger than the settings allow."""

    status, code = 431, "headers_too_large"


class InvalidRequest(ServiceError):
    """Something in the request is malformed or out of limits. `openai_code` is what OpenAI calls it."""

    status, code = 422, "invalid_request"

    def __init__(self, message: str, *, param: str | None = None, openai_code: str = "invalid_value") -> None:
        super().__init__(message, param=param)
        self.openai_code = openai_code


class InvalidClassLabel(ServiceError):
    """The checkpoint has no such class, or no classes at all."""

    status, code = 422, "invalid_class_label"


class NotFound(ServiceError):
    """There is nothing at this path."""

    status, code = 404, "not_found"


class MethodNotAllowed(ServiceError):
    """The path is there, but not for this method."""

    status, code = 405, "method_not_allowed"


class NotAcceptable(ServiceError):
    """The client accepts none of the formats that there are."""

    status, code = 406, "not_acceptable"


class UnsupportedMediaType(ServiceError):
    """The body is not of the media type that is taken here, `accept`, or it is compressed."""

    status, code = 415, "unsupported_media_type"

    def __init__(self, message: str, *, accept: str = "application/json") -> None:
        super().__init__(message)
        self._accept = accept

    def headers(self) -> dict[str, str]:
        """What would be taken (RFC 9110, 12.5)."""
        return {"Accept": self._accept, "Accept-Encoding": "identity"}


class BodyTooLarge(ServiceError):
    """The body is longer than any that is read."""

    status, code = 413, "body_too_large"


class Gone(ServiceError):
    """The checkpoint of this address is served no more."""

    status, code = 410, "gone"


class Overloaded(ServiceError):
    """There is no room for this request now; Retry-After says when."""

    status, code = 429, "overloaded"


class NotReady(ServiceError):
    """The service is loading, draining, or its engine is down."""

    status, code = 503, "not_ready"


class DeadlineExceeded(ServiceError):
    """The answer did not come, or could not have come, in time."""

    status, code = 504, "deadline_exceeded"


class StepFailed(ServiceError):
    """A step of this request failed."""

    status, code = 500, "step_failed"


class OutOfMemory(ServiceError):
    """The device has not enough memory for a single image of this request."""

    status, code = 507, "out_of_memory"


class Forbidden(ServiceError):
    """The key is good, but not for this."""

    status, code = 403, "forbidden"


class ModelNotFound(ServiceError):
    """No checkpoint has this name."""

    status, code = 404, "model_not_found"


class ModelConflict(ServiceError):
    """Not now: another checkpoint is being loaded, or requests without a model need this one."""

    status, code = 409, "model_conflict"


class InvalidCheckpoint(ServiceError):
    """The file is not one that can be served. What was served before still is."""

    status, code = 422, "invalid_checkpoint"


class LoadFailed(ServiceError):
    """The checkpoint is good, but the device does not run it. What was served before still is."""

    status, code = 500, "load_failed"


class Cancelled(ServiceError):
    """The client went away. Nobody reads this answer; it ends the request, and 499 marks it in log and metrics."""

    status, code = 499, "cancelled"
