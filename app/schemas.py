"""What requests may say and what responses look like. Every limit is checked here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from app.errors import InvalidRequest
from app.settings import Settings
from model.sampling.schedule import THRESHOLDING
from model.sampling.solvers import SAMPLERS
from model.sampling.timestep_spacing import SPACINGS


def _numbers(value: Any) -> Any:
    """A query has ?x=0.2,0.8 as ["0.2,0.8"], where a body has [0.2, 0.8]."""
    is_text = isinstance(value, list) and len(value) == 1 and isinstance(value[0], str)
    return value[0].split(",") if is_text else value


def _whole(value: Any) -> Any:
    """1.0 is an integer, to JSON Schema and to those whose language writes it so; beyond 2**53 it may not be the one
    that was meant."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53 else value


def _label(value: Any) -> Any:
    """As a query has it, where 2.0 is a text, too: a class may have that name."""
    return repr(value) if isinstance(value, float) else value


Whole = BeforeValidator(_whole)
Interval = Annotated[list[float], Field(min_length=2, max_length=2), BeforeValidator(_numbers)]
Format = Literal["sse", "multipart", "gif", "webp"]


class Sampling(BaseModel):
    """What to sample, and how. Left out, the sampler's settings are the checkpoint's own defaults."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str | None = Field(None, description="name of a checkpoint that is served; left out, the default")
    class_label: Annotated[int | str | None, BeforeValidator(_label)] = Field(
        None,
        description='a class, by its name or index ("dog", 7); a name comes first. null for a random mix, or for an '
        "unconditional checkpoint",
    )
    n: Annotated[int, Whole] = Field(1, ge=1, description="images")
    seed: Annotated[int, Field(ge=0, lt=2**64), Whole] | None = Field(
        None, description="left out, one is drawn and returned"
    )
    index: Annotated[int, Whole] = Field(
        0, ge=0, lt=2**31, description="place of the first image in its seed's sequence"
    )
    sampler: str | None = Field(
        None, description="left out, the checkpoint's", json_schema_extra={"enum": list(SAMPLERS)}
    )
    steps: Annotated[int, Field(ge=1), Whole] | None = Field(
        None,
        description="denoising steps; with a sampler that is not the checkpoint's, GET /models says how many",
    )
    eta: float | None = Field(None, ge=0, le=1, description="ddim's noise: 0 deterministic, 1 ancestral")
    guidance_scale: float | None = Field(None, ge=0, le=20, description="classifier-free guidance; 1 for none")
    guidance_interval: Interval | None = Field(
        None, description="where guidance acts, from one level of noise to another: 0 is the finished image, 1 is noise"
    )
    spacing: str | None = Field(
        None, description="which timesteps the steps visit", json_schema_extra={"enum": list(SPACINGS)}
    )
    limit: str | None = Field(
        None,
        description="what keeps the predicted image within black and white at every step: "
        "nothing, clamping, or scaling by its own 99.5 % quantile",
        json_schema_extra={"enum": list(THRESHOLDING)},
    )
    timeout_s: float | None = Field(None, gt=0, description="seconds in which an answer is wanted")

    def check(self, settings: Settings) -> None:
        """Raises InvalidRequest where a configured limit is passed."""
        limits = {"n": settings.max_n, "steps": settings.max_steps, "timeout_s": settings.max_timeout_s}
        for name, limit in limits.items():
            value = getattr(self, name)
            if value is not None and value > limit:
                raise InvalidRequest(f"{name} must not be more than {limit:g}", param=name)
        for name, valid in (("sampler", SAMPLERS), ("spacing", SPACINGS), ("limit", THRESHOLDING)):
            value = getattr(self, name)
            if value is not None and value not in valid:
                raise InvalidRequest(f"{name} must be one of {', '.join(valid)}, not {value!r:.80}", param=name)


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

    columns: Annotated[int, Field(ge=1), Whole] | None = Field(
        None, description="columns of the grid; left out, as square as can be"
    )


class SequenceQuery(Sampling):
    """Query of GET /diffusion-sequence."""

    frames: Annotated[int, Whole] = Field(20, ge=1, description="pictures on the way, spread evenly over the steps")
    view: Literal["xt", "x0"] = Field("xt", description="the noisy state, or the network's idea of the final image")
    format: Format | None = Field(None, description="left out, Accept decides")
    columns: Annotated[int, Field(ge=1), Whole] | None = Field(None, description="columns of the grid")

    def check(self, settings: Settings) -> None:
        """Raises InvalidRequest as well where the frames are too many."""
        super().check(settings)
        if self.frames > settings.max_frames:
            raise InvalidRequest(f"frames must not be more than {settings.max_frames}", param="frames")


class GeneratedImage(BaseModel):
    """One image of a JSON response; sending its seed, index and class again gives it again."""

    png: str = Field(description="base64")
    seed: int
    index: int
    class_label: int | str | None = Field(
        description="the class's index; its name where another class has that number for a name"
    )
    class_name: str | None


class GenerateResponse(BaseModel):
    """Response of POST /generate as application/json."""

    model: str
    checkpoint: str = Field(description="SHA-256 of the checkpoint's file")
    sampler: str
    steps: int
    eta: float
    guidance_scale: float
    guidance_interval: tuple[float, float]
    spacing: str
    limit: str
    images: list[GeneratedImage]


class ModelCard(BaseModel):
    """A checkpoint that is served."""

    name: str
    default: bool = Field(description="whether it answers requests that name no model")
    state: Literal["starting", "ready", "loading"] = Field(
        description="warming up for the first time, serving, or serving while its file is loaded anew"
    )
    checkpoint: str = Field(description="SHA-256 of the checkpoint's file")
    runs_on: dict[str, str] = Field(description="device, runtime and precision; with others images differ a little")
    batch_rows: int | None = Field(
        description="most network rows in a step, for a crowd: configured, or measured when it was warmed up; null "
        "until then. Less for a while after the device had no memory"
    )
    image_shape: list[int] = Field(description="channels, height, width", min_length=3, max_length=3)
    class_names: list[str]
    num_timesteps: int
    samplers: list[str]
    defaults: dict[str, Any] = Field(description="sampler, steps, eta, … when a request does not say")
    default_steps: dict[str, int] = Field(description="by sampler, when a request names it without steps")
    limits: dict[str, int | float]
    provenance: dict[str, Any]


class ModelList(BaseModel):
    """The checkpoints that are served."""

    models: list[ModelCard]
    loading: str | None = Field(description="the checkpoint that is being loaded now, served already or not")


class LoadBody(BaseModel):
    """Body of POST /models."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": [{"name": "mnist"}]})

    name: str = Field(description="a checkpoint that is served, or NAME of NAME.safetensors in the folder of models")


class LoadedModel(ModelCard):
    """The checkpoint that new requests get from now on."""

    replaced: str | None = Field(
        description="SHA-256 of what was served under the name before; null where nothing was, `checkpoint` where the "
        "file has not changed"
    )


class Health(BaseModel):
    """There is no other status: trouble is an error."""

    status: Literal["ok"]


class ErrorDetail(BaseModel):
    """What went wrong, for programs and for people; `param` names the field at fault."""

    type: str
    code: str
    message: str
    param: str | None


class ErrorResponse(BaseModel):
    """The one shape of all errors."""

    error: ErrorDetail
