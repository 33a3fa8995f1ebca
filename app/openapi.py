"""What /openapi.json says, with the limits of this server."""

from __future__ import annotations

from fastapi import FastAPI

from app.settings import Settings
from app.wording import Schema


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
