"""Edits as OpenAI's API has them: the form, how far an image may change, and which plan can begin from one."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import UploadFile
from pydantic import ConfigDict, Field

from app.errors import InvalidRequest
from app.openai.prompt import MAX_PROMPT
from app.openai.schemas import ImagesRequest
from model.checkpoint import SOLVER, CheckpointConfig
from model.sampling.edit import Edit
from model.sampling.schedule import FITTED

STRENGTHS = {"low": 0.6, "high": 0.35}
"""By `input_fidelity`. Without it, what a mask leaves open is painted from noise alone."""


class EditsForm(ImagesRequest):
    """Form of POST /v1/images/edits. In a form, a field that is empty is left out."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"image": "@image.png", "mask": "@mask.png", "prompt": "7", "seed": 1}]}
    )

    prompt: str = Field("", max_length=MAX_PROMPT, description=ImagesRequest.model_fields["prompt"].description)
    image: UploadFile = Field(
        description="a PNG, JPEG or WebP file; its middle is scaled to the checkpoint's size. Without a mask, what is "
        "transparent in it is painted anew"
    )
    mask: UploadFile | None = Field(
        None,
        description="of the image's size: transparent where it is painted anew; if it is opaque, white there",
    )
    strength: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="how far the image may change: 1 begins from noise; left out, 1 with a mask, else 0.6"
    )
    input_fidelity: Literal["low", "high"] | None = Field(None, description="high is strength 0.35, low 0.6")

    def check_fields(self) -> None:
        """Raises InvalidRequest where two fields contradict each other."""
        super().check_fields()
        if self.response_format == "url":
            raise InvalidRequest(
                "an edit has no address, since its image is not in it: response_format must be b64_json",
                param="response_format",
            )
        if self.strength is not None and self.input_fidelity is not None:
            raise InvalidRequest("input_fidelity chooses the strength: send one of the two", param="input_fidelity")

    def strength_of(self, edit: Edit) -> float:
        """That of a decoded image and mask."""
        if self.strength is not None:
            return self.strength
        if self.input_fidelity is not None:
            return STRENGTHS[self.input_fidelity]
        return STRENGTHS["low"] if edit.mask is None else 1.0

    def unfitted(self, config: CheckpointConfig) -> tuple[EditsForm, str | None]:
        """The same without a fitted table, and a sentence where it would have been one's."""
        settings = self.sampler_settings
        if (settings["sampler"] or config.sampling.sampler) != FITTED:
            return self, None
        note = f"sampler {SOLVER} instead of {FITTED}, whose tables begin from noise alone"
        if settings["sampler"] is None:
            return self, note
        return self.model_copy(update={"sampler": SOLVER, "steps": None}), note
