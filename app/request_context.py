"""What the layers that handle a request know about it together."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.types import Scope

from app.auth import Key
from app.request_params import GenerationJob


@dataclass
class RequestContext:
    """One per HTTP request. Middleware and handlers fill it; the log line, metrics and spans are made of it."""

    request_id: str = ""
    outcome: str = "ok"
    """An error's code. A stream may set it after its status was sent."""
    is_head: bool = False
    """HEAD was asked for: see `middleware.HeadAsGetMiddleware`."""
    key: Key | None = None
    """Whose API key it came with, where keys are configured."""
    job: GenerationJob | None = None
    admitted: bool = False
    """The engine took the job."""
    user: str = ""
    """For whom the client asks, in its own words."""

    @property
    def model(self) -> str:
        """The checkpoint's name, once the handler knows it."""
        return "" if self.job is None else self.job.checkpoint.name

    def job_fields(self) -> dict[str, object]:
        """What log lines and spans say about the job."""
        user: dict[str, object] = {"user": self.user} if self.user else {}
        if self.job is None:
            return user
        request = self.job.request
        return {"n": request.n, "steps": len(request.schedule), "sampler": request.schedule.sampler, **user}


def context_of(scope: Scope) -> RequestContext:
    """The request's context, which begins with the first layer that asks for it."""
    state = scope.setdefault("state", {})
    if "context" not in state:
        state["context"] = RequestContext()
    context: RequestContext = state["context"]
    return context
