"""GET /: the page. Its policy lets the browser run what stands in it, and nothing else."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib import resources

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

router = APIRouter()

STYLE = "page.css"
SCRIPTS = ("server.js", "gallery.js", "image.js", "repaint.js", "events.js")  # in this order


@router.get("/", include_in_schema=False)
async def page() -> HTMLResponse:
    """All classes being denoised, and one of them large. One answer without a single request to another host."""
    html, policy = _page()
    return HTMLResponse(html, headers={"Content-Security-Policy": policy})


@cache
def _page() -> tuple[str, str]:
    page = {
        name: resources.files("app.web").joinpath(name).read_text("utf-8") for name in ("index.html", STYLE, *SCRIPTS)
    }
    html = page["index.html"].replace("<style></style>", f"<style>\n{page[STYLE]}</style>")
    script = "\n".join(page[name] for name in SCRIPTS)
    html = html.replace("<script></script>", f"<script>\n{script}</script>")

    def within(tag: str) -> str:
        return html.split(f"<{tag}>")[1].split(f"</{tag}>")[0]

    return html, (
        f"default-src 'none'; script-src {hash_of(within('script'))}; style-src {hash_of(within('style'))}; "
        "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def hash_of(content: str) -> str:
    """A source for a Content-Security-Policy that allows exactly this script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
