"""GET /: the page. Its policy lets the browser run what stands in the file, and nothing else."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib import resources

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

router = APIRouter()


@router.get("/", include_in_schema=False)
async def page() -> HTMLResponse:
    """A form, and the denoising live. One file without a single request to another host."""
    html, policy = _page()
    return HTMLResponse(html, headers={"Content-Security-Policy": policy})


@cache
def _page() -> tuple[str, str]:
    html = resources.files("app.web").joinpath("index.html").read_text("utf-8")

    def within(tag: str) -> str:
        return html.split(f"<{tag}>")[1].split(f"</{tag}>")[0]

    return html, (
        f"default-src 'none'; script-src {hash_of(within('script'))}; style-src {hash_of(within('style'))}; "
        "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def hash_of(content: str) -> str:
    """A source for a Content-Security-Policy that allows exactly this script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
