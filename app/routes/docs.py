"""GET /docs: /openapi.json as a page to read, without a script and without another host."""

from __future__ import annotations

from html import escape
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from app.routes.ui import hash_of

router = APIRouter()

STYLE = """
:root { color-scheme: light dark; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1.25rem; font: 1rem/1.5 system-ui, sans-serif; }
h2 { margin-top: 2.5rem; font-size: 1.1rem; border-top: 1px solid #8888; padding-top: 1rem; }
h3 { font-size: 1rem; margin-bottom: .25rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
td { padding: .2rem 1rem .2rem 0; vertical-align: top; border-bottom: 1px solid #8884; overflow-wrap: anywhere; }
td:first-child { width: 12rem; font-family: ui-monospace, monospace; }
"""
HEAD = (
    '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>ddpm-serve: API</title>'
    f"<style>{STYLE}</style></head>"
)
POLICY = f"default-src 'none'; style-src {hash_of(STYLE)}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


@router.get("/docs", include_in_schema=False)
async def docs(http: Request) -> HTMLResponse:
    """Every endpoint with its parameters and answers, as the schema of this server has them."""
    return HTMLResponse(render(http.app.openapi()), headers={"Content-Security-Policy": POLICY})


def render(schema: dict[str, Any]) -> str:
    """An OpenAPI 3 description as HTML. All of its text is escaped."""
    parts = [
        f"{HEAD}<body><h1>{escape(schema['info']['title'])}</h1>",
        '<p>The same for programs: <a href="openapi.json">openapi.json</a></p>',
    ]
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            parts.append(f"<h2>{escape(method.upper())} {escape(path)}</h2><p>{escape(operation['summary'])}</p>")
            parts.append(f"<p>{escape(operation.get('description', ''))}</p>")
            fields = [(field["name"], field["schema"], field) for field in operation.get("parameters", [])]
            for content in operation.get("requestBody", {}).get("content", {}).values():
                body = _resolved(schema, content["schema"])
                fields += [(name, field, field) for name, field in body.get("properties", {}).items()]
            if fields:
                rows = [(name, _type(field), text.get("description", "")) for name, field, text in fields]
                parts.append("<h3>Parameters</h3>" + _table(rows))
            answers = [
                (status, ", ".join(answer.get("content", {})), answer["description"])
                for status, answer in sorted(operation["responses"].items())
            ]
            parts.append("<h3>Answers</h3>" + _table(answers))
    return "".join(parts) + "</body></html>"


def _resolved(schema: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    name = part.get("$ref", "").rpartition("/")[2]
    found: dict[str, Any] = schema["components"]["schemas"][name] if name else part
    return found


def _type(field: dict[str, Any]) -> str:
    """A field's type, limits and default, in a few words."""
    if "anyOf" in field:
        kinds = " or ".join(_type(kind) for kind in field["anyOf"])
    elif "enum" in field:
        kinds = " | ".join(map(str, field["enum"]))
    else:
        kinds = str(field.get("type", "anything"))
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {field[word]:g}" for word, sign in bounds.items() if word in field]
    default = [f"default {field['default']}"] if field.get("default") is not None else []
    return ", ".join([kinds, *limits, *default])


def _table(rows: list[tuple[str, str, str]]) -> str:
    lines = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"
