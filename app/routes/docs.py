"""GET /docs: /openapi.json as a page to read, without a script and without another host."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from html import escape

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from app.addresses import CLASSLESS, RANDOM
from app.middleware import PUBLIC_PATHS
from app.openapi import fields, resolved
from app.routes.ui import hash_of
from app.wording import Schema, in_words

router = APIRouter()

STYLE = """
:root { color-scheme: light dark; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1.25rem; font: 1rem/1.5 system-ui, sans-serif; }
h2 { margin-top: 2.5rem; font-size: 1.1rem; border-top: 1px solid #8888; padding-top: 1rem; }
h3 { font-size: 1rem; margin-bottom: .25rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
td { padding: .2rem 1rem .2rem 0; vertical-align: top; border-bottom: 1px solid #8884; overflow-wrap: anywhere; }
pre { padding: .5rem .75rem; border: 1px solid #8886; white-space: pre-wrap; overflow-wrap: anywhere; }
td:first-child { width: 12rem; font-family: ui-monospace, monospace; }
"""
FORM = "multipart/form-data"
EXAMPLES = {"seed": "1", "index": "0", "extension": "png"}
HEAD = (
    '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>ddpm-serve: API</title>'
    f"<style>{STYLE}</style></head>"
)
POLICY = f"default-src 'none'; style-src {hash_of(STYLE)}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


@router.get("/docs", include_in_schema=False)
async def docs(http: Request) -> HTMLResponse:
    """Every endpoint with its parameters and answers, as the schema of this server has them."""
    up = "../" if http.scope.get("raw_path", b"").endswith(b"/") else ""  # see middleware.TrailingSlash
    default = http.app.state.service.models.default
    label = RANDOM if default.config.class_names else CLASSLESS
    names = {"model": default.name, "name": default.name, "class_label": label}
    page = render(http.app.openapi(), str(http.base_url), http.app.state.keys.required, names | EXAMPLES, up)
    return HTMLResponse(page, headers={"Content-Security-Policy": POLICY})


def render(schema: Schema, server: str, keys: bool, values: Mapping[str, str], up: str = "") -> str:
    """An OpenAPI 3 description as HTML, with a command for each endpoint. All of its text is escaped.

    `server` is its address; `keys` says whether it needs one. `values` are what the paths of its GET commands have in
    the place of parameters. `up` leads to the folder of the page.
    """
    parts = [
        f"{HEAD}<body><h1>{escape(schema['info']['title'])}</h1>",
        f'<p>The same for programs: <a href="{up}openapi.json">openapi.json</a></p>',
    ]
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            parts.append(f"<h2>{escape(method.upper())} {escape(path)}</h2><p>{_text(operation['summary'])}</p>")
            parts.append(f"<p>{_text(operation.get('description', ''))}</p>")
            place = path.format_map(values) if method == "get" else path
            parts.append(f"<pre>{escape(_curl(schema, method, place, operation, server, keys))}</pre>")
            if found := fields(schema, operation):
                rows = [(name, _takes(field), description) for name, (field, description) in found.items()]
                parts.append("<h3>Parameters</h3>" + _table(rows))
            answers = [
                (status, ", ".join(answer.get("content", {})), answer["description"])
                for status, answer in sorted(operation["responses"].items())
            ]
            parts.append("<h3>Answers</h3>" + _table(answers))
    return "".join(parts) + "</body></html>"


def _curl(schema: Schema, method: str, path: str, operation: Schema, server: str, keys: bool) -> str:
    words = ["curl", *(["-X", method.upper()] if method == "delete" else [])]
    content = operation.get("requestBody", {}).get("content", {})
    query = "".join(f"&{name}={value}" for name, value in operation.get("x-example", {}).items())
    words.append(shlex.quote(server.rstrip("/") + path + query.replace("&", "?", 1)))
    if keys and path not in PUBLIC_PATHS:
        words += ["-H", '"authorization: Bearer $KEY"']
    for media_type, body in content.items():
        example = resolved(schema, body["schema"])["examples"][0]
        if media_type == FORM:
            words += [word for name, value in example.items() for word in ("-F", shlex.quote(f"{name}={value}"))]
            continue
        words += ["-H", f"'content-type: {media_type}'", "-d", shlex.quote(json.dumps(example))]
    return " ".join([*words, *operation.get("x-output", [])])


def _takes(field: Schema) -> str:
    default = field.get("default")
    return in_words(field) + ("" if default is None else f"; left out, {default}")


def _text(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _table(rows: list[tuple[str, str, str]]) -> str:
    lines = (f"<td>{escape(first)}</td>" + "".join(f"<td>{_text(cell)}</td>" for cell in rest) for first, *rest in rows)
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"
