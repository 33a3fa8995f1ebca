"""What /openapi.json says of a field, with the limits of this server, and the same in words for people."""

from __future__ import annotations

import math
from typing import Any

from fastapi import FastAPI

from app.settings import Settings

Schema = dict[str, Any]


class DescribedApp(FastAPI):
    """FastAPI, whose description has the limits of the settings."""

    settings: Settings

    def openapi(self) -> Schema:
        """As FastAPI's."""
        known = self.openapi_schema is not None
        schema = super().openapi()
        if not known:
            _add_limits(schema, self.settings)
        return schema


def _add_limits(schema: Schema, settings: Settings) -> None:
    most = {
        "n": settings.max_n,
        "steps": settings.max_steps,
        "frames": settings.max_frames,
        "timeout_s": settings.max_timeout_s,
    }
    for path in schema["paths"].values():
        for operation in path.values():
            for name, (field, _) in fields(schema, operation).items():
                if name in most:
                    for part in field.get("anyOf", [field]):
                        if part.get("type") in ("integer", "number"):
                            part["maximum"] = most[name]


def fields(schema: Schema, operation: Schema) -> dict[str, tuple[Schema, str]]:
    """Schema and description of each parameter of an operation, those of its body among them."""
    found = {
        field["name"]: (field["schema"], field.get("description", "")) for field in operation.get("parameters", [])
    }
    for content in operation.get("requestBody", {}).get("content", {}).values():
        body = resolved(schema, content["schema"])
        found |= {name: (field, field.get("description", "")) for name, field in body.get("properties", {}).items()}
    return found


def resolved(schema: Schema, part: Schema) -> Schema:
    """The part itself, or what it refers to."""
    part = next((kind for kind in part.get("anyOf", []) if "$ref" in kind), part)
    name = part.get("$ref", "").rpartition("/")[2]
    found: Schema = schema["components"]["schemas"][name] if name else part
    return found


def in_words(field: Schema) -> str:
    """What a field takes: "a whole number from 1 to 64"."""
    if "enum" in field:
        return "one of " + ", ".join(map(str, field["enum"]))
    if "const" in field:
        return str(field["const"])
    if "anyOf" in field:
        return " or ".join(in_words(kind) for kind in field["anyOf"] if kind.get("type") != "null")
    kind = field.get("type")
    if kind == "array":
        return f"{field['minItems']} numbers" if field.get("minItems") == field.get("maxItems", 0) else "a list"
    if kind in ("integer", "number"):
        return _number(field, whole=kind == "integer")
    return {"string": "a text", "boolean": "true or false", "object": "an object"}.get(str(kind), "any value")


def _number(field: Schema, whole: bool) -> str:
    least, above = field.get("minimum"), field.get("exclusiveMinimum")
    most, below = field.get("maximum"), field.get("exclusiveMaximum")
    if whole and below is not None:
        most, below = math.ceil(below) - 1, None

    def shown(limit: float) -> str:
        return str(int(limit)) if whole else f"{limit:g}"

    if least is not None and most is not None:
        words = [f"from {shown(least)} to {shown(most)}"]
    else:
        limits = {"of at least": least, "above": above, "of at most": most, "below": below}
        words = [f"{word} {shown(limit)}" for word, limit in limits.items() if limit is not None]
    return " ".join(["a whole number" if whole else "a number", " and ".join(words)]).strip()
