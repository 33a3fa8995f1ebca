"""What requests may say and what responses look like. Every limit is checked here."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.errors import InvalidRequest
from app.settings import Settings
from model.samplers import SAMPLERS

Format = Literal["sse", "multipart", "gif", "webp"]


class Sampling(BaseModel):
    """What to sample, and how. Left out, the sampler's settings are the checkpoint's own defaults."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    class_label: int | str | None = Field(
        None,
        description='class index or name ("7", "dog"); null for a random mix, or for an unconditional checkpoint',
    )
    n: int = Field(1, ge=1, description="images")
    seed: int | None = Field(None, ge=0, lt=2**64, description="left out, one is drawn and returned")
    index: int = Field(0, ge=0, lt=2**31, description="place of the first image in its seed's sequence")
    sampler: str | None = Field(None, json_schema_extra={"enum": list(SAMPLERS)})
    steps: int | None = Field(None, ge=1, description="denoising steps")
    eta: float | None = Field(None, ge=0, le=1, description="ddim's noise: 0 deterministic, 1 ancestral")
    guidance_scale: float | None = Field(None, ge=0, le=20, description="classifier-free guidance; 1 for none")
    timeout_s: float | None = Field(None, gt=0, description="seconds in which an answer is wanted")

    def check(self, settings: Settings) -> None:
        """Raises InvalidRequest where a configured limit is passed."""
        limits = {"n": settings.max_n, "steps": settings.max_steps, "timeout_s": settings.max_timeout_s}
        for name, limit in limits.items():
            value = getattr(self, name)
            if value is not None and value > limit:
                raise InvalidRequest(f"{name} must not be more than {limit:g}", param=name)
        if self.sampler is not None and self.sampler not in SAMPLERS:
            raise InvalidRequest(f"sampler must be one of {', '.join(SAMPLERS)}, not {self.sampler!r}", param="sampler")


class GenerateBody(Sampling):
    """Body of POST /generate."""

    model_config = ConfigDict(
        strict=True,
        json_schema_extra={
            "examples": [
                {"class_label": 7, "n": 16, "seed": 1},
                {"class_label": "3", "n": 4, "sampler": "ddim", "steps": 50, "eta": 0.5},
                {"class_label": None, "n": 25},
            ]
        },
    )

    columns: int | None = Field(None, ge=1, description="columns of the grid; left out, as square as can be")


class SequenceQuery(Sampling):
    """Query of GET /diffusion-sequence."""

    frames: int = Field(20, ge=1, description="pictures on the way, spread evenly over the steps")
    view: Literal["xt", "x0"] = Field("xt", description="the noisy state, or the network's idea of the final image")
    format: Format | None = Field(None, description="left out, Accept decides")
    columns: int | None = Field(None, ge=1, description="columns of the grid")

    def check(self, settings: Settings) -> None:
        super().check(settings)
        if self.frames > settings.max_frames:
            raise InvalidRequest(f"frames must not be more than {settings.max_frames}", param="frames")


class GeneratedImage(BaseModel):
    """One image of a JSON response; sending its seed, index and class again gives it again."""

    png: str = Field(description="base64")
    seed: int
    index: int
    class_label: int | None
    class_name: str | None


class GenerateResponse(BaseModel):
    """Response of POST /generate as application/json."""

    model: str
    checkpoint: str = Field(description="SHA-256 of the checkpoint's file")
    sampler: str
    steps: int
    eta: float
    guidance_scale: float
    images: list[GeneratedImage]


class ModelCard(BaseModel):
    """A checkpoint that is served."""

    name: str
    checkpoint: str = Field(description="SHA-256 of the checkpoint's file")
    image_shape: tuple[int, int, int] = Field(description="channels, height, width")
    class_names: list[str]
    num_timesteps: int
    samplers: list[str]
    defaults: dict[str, Any] = Field(description="sampler, steps, eta and guidance_scale when a request does not say")
    limits: dict[str, int | float]
    provenance: dict[str, Any]


class ModelList(BaseModel):
    models: list[ModelCard]


class Health(BaseModel):
    status: Literal["ok"]


class ErrorDetail(BaseModel):
    type: str
    code: str
    message: str
    param: str | None


class ErrorResponse(BaseModel):
    """The one shape of all errors."""

    error: ErrorDetail
