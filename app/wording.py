"""What a field of a JSON schema takes, in words for people."""

from __future__ import annotations

import math
from typing import Any

Schema = dict[str, Any]


def in_words(field: Schema) -> str:
    """What a field takes: "a whole number from 1 to 64"."""
    if "enum" in field:
        return "one of " + ", ".join(map(str, field["enum"]))
    if "const" in field:
        return str(field["const"])
    if "anyOf" in field:
        return " or ".join(in_words(kind) for kind in field["anyOf"] if kind.get("type") != "null")
    if "contentMediaType" in field or field.get("format") == "binary":
        return "a file"
    kind = field.get("type")
    if kind == "array":
        return f"{field['minItems']} numbers" if field.get("minItems") == field.get("maxItems", 0) else "a list"
    if kind in ("integer", "number"):
        return _number(field, whole=kind == "integer")
    if kind == "string" and "maxLength" in field:
        return f"a text of at most {field['maxLength']} characters"
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
