"""Bodies and answers of /v1, as OpenAI's schema has them, with the fields of a diffusion sampler beside."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from app.errors import InvalidRequest
from app.openai.prompt import MAX_PROMPT
from app.picture_format import Extension
from app.schemas import OPTIONAL, StreamedSampling, Whole

Quality = Literal["low", "medium", "high", "auto", "standard", "hd"]


class _Asked(BaseModel):
    """The fields of a request for images, new or edited, that are OpenAI's."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: str = Field(
        max_length=MAX_PROMPT,
        description='a class: its name or number, or a sentence with one class word ("a photo of a horse"); '
        '"random" is a mix. `revised_prompt` says what was understood',
    )
    model: str | None = Field(
        None,
        description="name of a checkpoint that is served; left out, or one of OpenAI's (`gpt-image-…`), the default",
    )
    n: Annotated[int, Field(ge=1), Whole] | None = Field(None, description="images; left out, 1")
    size: str | None = Field(
        None, description='"auto", the checkpoint\'s own size, or a larger one of its shape, WIDTHxHEIGHT: enlarged'
    )
    quality: Quality | None = Field(
        None,
        description="low, medium and high are the plans fast, balanced and exact, where the checkpoint has them; "
        "else low halves its steps and high doubles them. hd is high, standard medium, auto the checkpoint's default",
    )
    response_format: Literal["b64_json", "url"] | None = Field(
        None, description="url: an address that makes the image when it is fetched; left out, b64_json"
    )
    output_format: Literal["png", "webp", "jpeg"] | None = Field(None, description="left out, png")
    output_compression: Annotated[int, Field(ge=0, le=100), Whole] | None = Field(
        None, description="quality of webp and jpeg; left out, 100, which is lossless for webp"
    )
    background: Literal["auto", "opaque"] | None = Field(None, description="images are opaque")
    moderation: Literal["auto", "low"] | None = Field(None, description="taken, and nothing is filtered: see `prompt`")
    stream: bool | None = Field(None, description="send events")
    partial_images: Annotated[int, Field(ge=0, le=3), Whole] | None = Field(
        None, description="with stream: images on the way, as the network expects them at the end; left out, 0"
    )
    user: str | None = Field(None, max_length=512, description="written to the log")
    safety_identifier: str | None = Field(None, max_length=512, description="the same, and returned")
    seed: Annotated[int, Field(ge=0, lt=2**64), Whole] | None = Field(
        None, description="left out, one is drawn and returned"
    )
    index: Annotated[int, Field(ge=0, lt=2**31), Whole] | None = Field(
        None, description="place of the first image in its seed's sequence; left out, 0"
    )
    timeout_s: Annotated[float, Field(gt=0)] | None = Field(None, description="seconds in which an answer is wanted")


_AskedWithSettings: Any = create_model("_AskedWithSettings", __base__=_Asked, **OPTIONAL)


class ImagesRequest(_AskedWithSettings):
    """What generations and edits have in common. Left out or null, a field is the default."""

    @property
    def picture_format(self) -> Extension:
        """Of the files."""
        return self.output_format or "png"

    @property
    def compression(self) -> int:
        """From 0 to 100."""
        return 100 if self.output_compression is None else self.output_compression

    @property
    def logged_user(self) -> str:
        """Whom the client asks for, in its own words."""
        return self.safety_identifier or self.user or ""

    @property
    def sampler_settings(self) -> dict[str, Any]:
        """The sampler's, None where the checkpoint's own are wanted."""
        return {name: getattr(self, name) for name in OPTIONAL}

    def check_fields(self) -> None:
        """Raises InvalidRequest where two fields contradict each other."""
        if self.partial_images and not self.stream:
            raise InvalidRequest("partial_images needs stream: true", param="partial_images")
        if self.stream and self.response_format == "url":
            raise InvalidRequest("a stream carries images: response_format must be b64_json", param="response_format")
        if self.output_compression not in (None, 100) and self.picture_format == "png":
            raise InvalidRequest("output_compression is of webp and jpeg; png has none", param="output_compression")
        if self.quality not in (None, "auto") and self.sampler_settings["steps"] is not None:
            raise InvalidRequest("quality chooses the steps: send one of the two", param="quality")

    def sampling(self, class_label: str | None) -> StreamedSampling:
        """The same for `build_request`; the class by its name."""
        return StreamedSampling(
            class_label=class_label,
            n=self.n or 1,
            seed=self.seed,
            index=self.index or 0,
            timeout_s=self.timeout_s,
            partial_images=self.partial_images or 0,
            **self.sampler_settings,
        )


class GenerationsBody(ImagesRequest):
    """Body of POST /v1/images/generations."""

    model_config = ConfigDict(
        strict=True,
        json_schema_extra={
            "examples": [
                {"prompt": "7", "seed": 1},
                {"prompt": "a handwritten seven", "n": 4, "size": "112x112", "output_format": "webp"},
                {"prompt": "random", "quality": "high", "stream": True, "partial_images": 2},
            ]
        },
    )


class ImageData(BaseModel):
    """One image; sending its prompt, seed and index again gives it again."""

    b64_json: str | None = None
    url: str | None = None
    revised_prompt: str = Field(description="the name of its class")
    seed: int
    index: int


class TokensDetails(BaseModel):
    """There are no tokens."""

    image_tokens: int
    text_tokens: int


class Usage(BaseModel):
    """OpenAI counts tokens. Here an output token is a denoising step of one image."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: TokensDetails
    output_tokens_details: TokensDetails


class ImagesResponse(BaseModel):
    """Answer of /v1/images/…, with `model` and `enlarged_from` beside OpenAI's fields."""

    created: int = Field(description="seconds since 1970")
    model: str
    background: Literal["opaque"]
    output_format: str
    quality: str | None = Field(None, description="low, medium or high; absent where the request chose the steps")
    size: str
    enlarged_from: str | None = Field(None, description="the checkpoint's own size where `size` is another")
    safety_identifier: str | None = None
    note: str | None = Field(None, description="what was done otherwise than asked")
    data: list[ImageData]
    usage: Usage | None = Field(None, description="absent for response_format url: nothing was made yet")


class ModelObject(BaseModel):
    """A checkpoint as OpenAI lists models. GET /models says more."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="when this server loaded it, in seconds since 1970")
    owned_by: Literal["ddpm-serve"] = "ddpm-serve"


class ModelObjects(BaseModel):
    """The list of them."""

    object: Literal["list"] = "list"
    data: list[ModelObject]
