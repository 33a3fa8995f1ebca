"""What requests may say and what responses look like. Every limit is checked here."""

from __future__ import annotations

import math
from dataclasses import Field as DataclassField
from dataclasses import fields
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model

from app.errors import InvalidRequest
from app.settings import Settings
from model.sampling.schedule import SamplingParams


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


SETTINGS = fields(SamplingParams)
TYPES: dict[str, Any] = get_type_hints(SamplingParams)
OF_REQUESTS: dict[str, dict[str, Any]] = {  # where they say something else than the settings of a checkpoint
    "sampler": {"description": "left out, the checkpoint's"},
    "steps": {"description": "denoising steps; with a sampler that is not the checkpoint's, GET /models says how many"},
    "guidance_scale": {"bounds": (0, 20)},
}


def _optional(setting: DataclassField[Any]) -> tuple[Any, Any]:
    """A setting that a request may leave out, as pydantic's `create_model` takes a field."""
    told: dict[str, Any] = {**setting.metadata, **OF_REQUESTS.get(setting.name, {})}
    kind: Any = TYPES[setting.name]
    if told["bounds"]:
        low, high = told["bounds"]
        kind = Annotated[kind, Field(ge=low, le=high if math.isfinite(high) else None)]
    if TYPES[setting.name] is int:
        kind = Annotated[kind, Whole]
    elif TYPES[setting.name] == tuple[float, float]:
        kind = Interval
    extra: dict[str, Any] | None = {"enum": list(told["choices"])} if told["choices"] else None
    return kind | None, Field(None, description=told["description"], json_schema_extra=extra)


class _Wanted(BaseModel):
    """The fields of a request that come before its sampler's settings."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str | None = Field(None, description="name of a checkpoint that is served; left out, the default")
    class_label: Annotated[int | str | None, BeforeValidator(_label)] = Field(
        None,
        description='a class, by its name or index ("dog", 7); a name comes first. null for a random mix, or for an '
        "unconditional checkpoint",
    )
    each_class: bool = Field(
        False, description="the classes in turn instead of a random mix: the image at index i has class i, and so on"
    )
    n: Annotated[int, Whole] = Field(1, ge=1, description="images")
    seed: Annotated[int, Field(ge=0, lt=2**64), Whole] | None = Field(
        None, description="left out, one is drawn and returned"
    )
    index: Annotated[int, Whole] = Field(
        0, ge=0, lt=2**31, description="place of the first image in its seed's sequence"
    )


OPTIONAL: dict[str, Any] = {setting.name: _optional(setting) for setting in SETTINGS}
_WithSettings: Any = create_model("_WithSettings", __base__=_Wanted, **OPTIONAL)


class Sampling(_WithSettings):
    """What to sample, and how. Left out, the sampler's settings are the checkpoint's own defaults."""

    timeout_s: float | None = Field(None, gt=0, description="seconds in which an answer is wanted")

    def overrides(self) -> dict[str, Any]:
        """The sampler's settings, for `SamplingParams.with_overrides`; None where the checkpoint's own are wanted."""
        given = {name: getattr(self, name) for name in OPTIONAL}
        interval = given["guidance_interval"]
        return {**given, "guidance_interval": None if interval is None else tuple(interval)}  # which has a hash

    def check(self, settings: Settings) -> None:
        """Raises InvalidRequest where a configured limit is passed."""
        limits = {"n": settings.max_n, "steps": settings.max_steps, "timeout_s": settings.max_timeout_s}
        for name, limit in limits.items():
            value = getattr(self, name)
            if value is not None and value > limit:
                raise InvalidRequest(f"{name} must not be more than {limit:g}", param=name)
        for setting in SETTINGS:
            name, valid, value = setting.name, setting.metadata["choices"], getattr(self, setting.name)
            if valid and value is not None and value not in valid:
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
    every_frame: bool = Field(False, description="a stream skips no frame, however slowly it is read")
    columns: Annotated[int, Field(ge=1), Whole] | None = Field(None, description="columns of the grid")

    def check(self, settings: Settings) -> None:
        """Raises InvalidRequest as well where the frames are too many."""
        super().check(settings)
        if self.frames > settings.max_frames:
            raise InvalidRequest(f"frames must not be more than {settings.max_frames}", param="frames")


class InterpolateQuery(Sampling):
    """Query of GET /interpolate."""

    n: Annotated[int, Whole] = Field(8, ge=2, description="images, those of both seeds included")
    to_seed: Annotated[int, Field(ge=0, lt=2**64), Whole] | None = Field(
        None, description="the seed of the last image; left out, one is drawn and returned"
    )
    format: Literal["png", "gif", "webp"] = Field("png", description="a strip, or an animation")
    columns: Annotated[int, Field(ge=1), Whole] | None = Field(None, description="of a strip; left out, n")


class _AddressOptions(BaseModel):
    """What an image's address may say of its file."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    size: str | None = Field(None, description="larger than the image, of its shape, WIDTHxHEIGHT: enlarged")
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = Field(
        None, description="quality of .jpeg and .webp; left out, 100, which is lossless for .webp"
    )
    frames: Annotated[int, Field(ge=1), Whole] | None = Field(
        None, description="pictures of an animation; left out, 20 for .gif, and .webp is a single image"
    )
    view: Literal["xt", "x0"] | None = Field(None, description="of an animation; left out, xt")
    expires: str | None = Field(None, description="with a signature: when it ends, in seconds since 1970")
    signature: str | None = Field(None, description="what `ddpm-serve sign` adds")


_OptionsWithSettings: Any = create_model("_OptionsWithSettings", __base__=_AddressOptions, **OPTIONAL)


class ImageQuery(_OptionsWithSettings):
    """Query of GET /images/…."""


class StreamedSampling(Sampling):
    """What to sample, and how many pictures to send on the way, none of which is dropped."""

    partial_images: int = 0


class GeneratedImage(BaseModel):
    """One image of a JSON response; sending its seed, index and class again gives it again."""

    png: str = Field(description="base64")
    seed: int
    index: int
    class_label: int | str | None = Field(
        description="the class's index; its name where another class has that number for a name"
    )
    class_name: str | None


class _Made(BaseModel):
    """The fields of a response that come before its sampler's settings."""

    model: str
    checkpoint: str = Field(description="SHA-256 of the checkpoint's file")


REQUIRED: dict[str, Any] = {name: (kind, ...) for name, kind in TYPES.items()}
_MadeWithSettings: Any = create_model("_MadeWithSettings", __base__=_Made, **REQUIRED)


class GenerateResponse(_MadeWithSettings):
    """Response of POST /generate as application/json."""

    nfe: int = Field(description="network rows that each image cost")
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
    distilled: dict[str, Any] | None = Field(
        description="guidance_scale, steps, method and teacher of a student whose guidance is inside, at one network "
        "row a step: another guidance_scale is refused; null for others"
    )
    fitted_steps: list[int] = Field(description="numbers of steps that sampler fitted takes here; others are refused")
    plans: dict[str, dict[str, str | int | float]] = Field(
        description="fast, balanced and exact: sampler, steps, guidance_scale, and nfe, an image's network rows; "
        "{} without fitted tables"
    )
    guidance: bool = Field(description="whether guidance_scale can be other than 1")
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
