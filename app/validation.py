"""What is wrong with a body or a query, in words of this service: pydantic's are for those who wrote the schema."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from starlette.datastructures import UploadFile

from app.errors import InvalidRequest
from app.wording import Schema, in_words

# Names that other services have for a field of this one.
SYNONYMS = {
    "class_label": ("label", "labels", "class", "classes", "class_id", "class_name", "category", "prompt", "y"),
    "prompt": ("class_label", "label", "class", "class_name", "text", "caption", "positive_prompt"),
    "n": ("num_images", "num_samples", "num_outputs", "number", "count", "images", "samples", "batch_size", "batch"),
    "steps": ("num_steps", "num_inference_steps", "inference_steps", "sample_steps", "timesteps", "num_timesteps"),
    "guidance_scale": ("guidance", "cfg", "cfg_scale", "scale", "w"),
    "sampler": ("scheduler", "method", "solver", "sampler_name"),
    "limit": ("thresholding", "threshold", "clip", "clip_sample", "clip_denoised"),
    "spacing": ("timestep_spacing", "schedule", "discretization"),
    "columns": ("cols", "ncols", "nrow", "grid"),
    "timeout_s": ("timeout",),
    "model": ("model_name", "model_id", "ckpt"),
    "index": ("offset", "start"),
    "frames": ("num_frames",),
    "seed": ("random_seed", "generator"),
    "size": ("width", "height", "image_size", "resolution"),
    "output_format": ("format", "output"),
    "strength": ("denoising_strength", "image_strength", "prompt_strength"),
}
# Wishes for which there is no field.
ELSEWHERE = {
    "the checkpoint decides on the size of its images": ("width", "height", "size", "image_size", "resolution"),
    "the Accept header chooses the format": ("format", "response_format", "output_format", "output"),
    "it is a field of GET /diffusion-sequence": ("frames", "view"),
    "GET /diffusion-sequence?format=gif animates": ("frame_count", "frame_duration_ms"),
    "POST /v1/images/edits takes an image": ("strength", "image", "mask", "init_image", "input_image"),
    "the prompt is a class, and all else is in the checkpoint": ("style", "negative_prompt", "complexity", "svg"),
}


def explain(problem: Mapping[str, Any], fields: Mapping[str, tuple[Schema, str]]) -> InvalidRequest:
    """The answer to one of pydantic's complaints about a request that may have these fields."""
    kind, place, value = problem["type"], problem["loc"], problem.get("input")
    if len(place) < 2:
        known = ", ".join(fields)
        if kind == "missing":
            return InvalidRequest(
                f"the body is empty: send a JSON object with {known}", openai_code="missing_required_parameter"
            )
        if kind == "string_unicode":
            return InvalidRequest(f"{shown(value)} in the body is not a valid text")
        sentence = f'the body must be a JSON object, such as {{"n": 4}}, not {shown(value)}'
        return InvalidRequest(sentence, openai_code="invalid_type")
    name = str(place[1]).encode("utf-8", "replace").decode()
    if kind == "missing":
        sentence = f"{name} is missing: {fields[name][1]}"
        return InvalidRequest(sentence, param=name, openai_code="missing_required_parameter")
    if name not in fields:
        sentence = f"there is no field {name!r:.80}{hint(name, fields)}"
        return InvalidRequest(sentence, param=name, openai_code="unknown_parameter")
    takes = in_words(fields[name][0])
    more = "; send one request for each" if isinstance(value, list) and "numbers" not in takes else ""
    code = "invalid_type" if kind.endswith("_type") else "invalid_value"
    return InvalidRequest(f"{name} must be {takes}, not {shown(value)}{more}", param=name, openai_code=code)


def refuse_repeated(names: Iterable[str]) -> None:
    """Raises InvalidRequest where a query names a field twice: which of the two would count?"""
    for name, times in Counter(names).items():
        if times > 1:
            raise InvalidRequest(f"{name!r:.80} is given {times} times", param=name)


def hint(name: str, known: Iterable[str]) -> str:
    """Which of the known names may be meant by one that is not."""
    known = list(known)
    for field, synonyms in SYNONYMS.items():
        if field in known and name.lower() in synonyms:
            return f"; did you mean {field}?"
    for sentence, wishes in ELSEWHERE.items():
        if name.lower() in wishes:
            return f": {sentence}"
    near = difflib.get_close_matches(name.lower()[:80], known, n=1)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"


def shown(value: Any) -> str:
    """A value as its sender wrote it, where that is short."""
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, UploadFile):
        return "a file"
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:60] + "…"
