"""python -m docs.screenshots URL: what the page at URL looks like, into docs/pictures. Needs playwright and a Chromium.

Two pictures: on a wide screen and on a phone's, each while the gallery is denoised, after it, and one image large.
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, sync_playwright

PICTURES = Path(__file__).parent / "pictures"
SCREENS: dict[str, tuple[dict[str, Any], int]] = {  # name → the browser's settings, width of each shot
    "wide": ({"viewport": {"width": 1120, "height": 800}}, 560),
    "phone": ({"viewport": {"width": 390, "height": 800}, "color_scheme": "dark"}, 292),
}


def shots(page: Page, url: str) -> list[Image.Image]:
    """Before, while and after the gallery is denoised, and one image large with a part to be repainted."""
    taken = []

    def take() -> None:
        taken.append(Image.open(io.BytesIO(page.screenshot())).convert("RGB"))

    page.goto(url)
    page.wait_for_selector("#go:not([disabled])")
    page.fill("#seed", "7")
    page.select_option("#sampler", "dpmpp_2m")
    take()
    page.click("#go")
    page.locator("#status", has_text="Step 1").wait_for()
    while not page.inner_text("#status").startswith(("Step 12", "Step 13", "Step 14", "Step 15")):
        page.wait_for_timeout(10)
    take()
    page.locator("#status", has_text="Choose an image").wait_for()
    take()
    page.click("#gallery li:nth-child(6) button")
    page.wait_for_selector("#download:not([hidden])")
    page.locator("#scrub").fill("13")
    take()
    return taken


def main() -> None:
    """Makes the pictures."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, (screen, width) in SCREENS.items():
            pictures = shots(browser.new_page(**screen), sys.argv[1])
            height = round(pictures[0].height * width / pictures[0].width)
            columns = 2 if name == "wide" else 4
            sheet = Image.new(
                "RGB", (columns * width + 8 * (columns - 1), 2 * height + 8 if columns == 2 else height), "#888"
            )
            for i, picture in enumerate(pictures):
                where = (i % columns * (width + 8), i // columns * (height + 8))
                sheet.paste(picture.resize((width, height), Image.Resampling.LANCZOS), where)
            sheet.quantize(128).save(PICTURES / f"page-{name}.png", optimize=True)
        browser.close()


if __name__ == "__main__":
    main()
