"""The page in a real Chromium, against a real server: what a person does with it, and what they see."""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.app.conftest import CLASSES
from tests.app.processes import ServerProcess

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")]
DENIED = "Object.defineProperty(window, 'sessionStorage', {get() { throw new DOMException('denied'); }})"
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page that fails the test where its script fails, or where the policy stops it."""
    context = browser.new_context(viewport={"width": 390, "height": 844})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page, faults = context.new_page(), []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if "Policy" in message.text else None)
    page.set_default_timeout(60_000)
    yield page
    context.close()
    assert not faults


def pixels(page: Any, selector: str) -> Any:
    """What is on a canvas, uint8 [H, W], of its red channel."""
    script = "c => [c.height, c.width, ...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"
    height, width, *values = page.locator(selector).evaluate(script)
    return np.array(values, np.uint8).reshape(height, width, 4)[:, :, 0]


def generated(server: ServerProcess, **fields: Any) -> Any:
    """What POST /generate makes of the same request, uint8 [H, W]."""
    response = server.client.post("/generate", json=fields)
    assert response.status_code == 200, response.text
    return np.asarray(Image.open(io.BytesIO(response.content)))


def finished(page: Any) -> None:
    page.wait_for_selector("#download:not([hidden])")


def test_the_gallery_denoises_every_class_at_once(page: Any, server: ServerProcess) -> None:
    page.goto(server.url)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.fill("#seed", str(2**63 + 1))  # which a float cannot hold
    page.click("#go")
    page.wait_for_selector("text=Choose an image to see it large.")
    assert len(asked) == 1
    for i, name in enumerate(CLASSES):
        expected = generated(server, class_label=name, seed=2**63 + 1, index=i)
        assert np.array_equal(pixels(page, f"#gallery li:nth-child({i + 1}) canvas"), expected)


def test_an_image_opens_large_with_a_slider(page: Any, server: ServerProcess) -> None:
    page.goto(server.url + "/#seed=3&steps=4")
    page.click("#gallery li:nth-child(2) button")
    finished(page)
    expected = generated(server, class_label=CLASSES[1], seed=3, index=1, steps=4)
    assert page.inner_text("#title") == CLASSES[1]
    assert np.array_equal(pixels(page, "#xt"), expected)
    assert np.array_equal(pixels(page, "#x0"), expected)
    page.focus("#scrub")
    page.keyboard.press("Home")
    assert page.inner_text("#count") == "step 0 of 4"
    assert not np.array_equal(pixels(page, "#xt"), pixels(page, "#x0"))
    page.keyboard.press("End")
    assert np.array_equal(pixels(page, "#xt"), expected)


def test_the_slider_is_at_the_end_of_a_longer_second_run(page: Any, server: ServerProcess) -> None:
    page.goto(server.url + "/#seed=3&steps=3&image=0")
    finished(page)
    page.keyboard.press("Escape")
    page.fill("#steps", "9")
    page.click("#gallery li:nth-child(1) button")
    finished(page)
    assert (page.input_value("#scrub"), page.get_attribute("#scrub", "max")) == ("9", "9")
    assert page.inner_text("#count") == "step 9 of 9"


def test_an_address_shows_the_same_image_to_somebody_else(page: Any, server: ServerProcess) -> None:
    page.goto(server.url)
    page.select_option("#sampler", "dpmpp_2m")
    page.fill("#steps", "3")
    page.fill("#guidance", "2")
    page.click("#gallery li:nth-child(3) button")
    finished(page)
    first = pixels(page, "#xt")
    page.click("#copy_address")
    address = page.evaluate("navigator.clipboard.readText()")
    page.goto("about:blank")
    page.goto(address)
    finished(page)
    assert np.array_equal(pixels(page, "#xt"), first)
    assert "dpmpp_2m, 3 steps, guidance 2" in page.inner_text("#facts")


def test_what_is_copied_makes_the_same_image(page: Any, server: ServerProcess, tmp_path: Path) -> None:
    page.goto(server.url + f"/#seed={2**64 - 1}&steps=2&image=1")
    finished(page)
    made = pixels(page, "#xt")
    page.click("#copy_curl")
    command = page.evaluate("navigator.clipboard.readText()")
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "image.png")), made)
    page.click("#copy_python")
    program = page.evaluate("navigator.clipboard.readText()") + '\nimage.save("by-python.png")'
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=60)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "by-python.png")), made)


def test_the_image_address_copied_is_that_image(page: Any, server: ServerProcess) -> None:
    page.goto(server.url + "/#seed=8&steps=2&image=1")
    finished(page)
    page.click("#copy_image")
    response = server.client.get(page.evaluate("navigator.clipboard.readText()"), follow_redirects=True)
    assert response.headers["content-type"] == "image/png"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(response.content))), pixels(page, "#xt"))


def test_samplers_are_compared_on_one_seed(page: Any, server: ServerProcess) -> None:
    page.goto(server.url + "/#seed=4&image=0")
    finished(page)
    page.click("#comparison summary")
    samplers = server.client.get("/models").json()["models"][0]["default_steps"]
    for i, (sampler, steps) in enumerate(samplers.items()):
        caption = page.locator(f"#compared li:nth-child({i + 1}) .caption")
        assert caption.inner_text().startswith(f"{sampler}, {steps} steps")
    page.wait_for_load_state("networkidle")
    expected = generated(server, class_label=CLASSES[0], seed=4, index=0, sampler="ddim", steps=samplers["ddim"])
    assert np.array_equal(pixels(page, f"#compared li:nth-child({list(samplers).index('ddim') + 1}) canvas"), expected)


def test_the_steps_follow_the_sampler(page: Any, server: ServerProcess) -> None:
    page.goto(server.url)
    model = server.client.get("/models").json()["models"][0]
    for sampler in ("ddpm", model["defaults"]["sampler"]):
        page.select_option("#sampler", sampler)
        assert int(page.input_value("#steps")) == model["default_steps"][sampler]


# In the page: on a busy machine a click from outside may come when all the steps are done.
STOP_AFTER_A_FRAME = """() => new Promise(done => {  // before the next one, however fast the server is
  const find = id => document.querySelector(id), scrub = find("#scrub");
  const watch = new MutationObserver(() => {
    if (scrub.disabled) return;
    watch.disconnect();
    done(find("#halt").click());
  });
  watch.observe(scrub, {attributes: true});
  find("#gallery li:nth-child(1) button").click();
})"""


def test_stopping_keeps_frames_and_seed(page: Any, server: ServerProcess) -> None:
    page.goto(server.url)
    page.select_option("#sampler", "ddpm")
    page.fill("#steps", "1000")
    page.evaluate(STOP_AFTER_A_FRAME)
    page.wait_for_selector("text=Stopped. What came is kept")
    assert "image=0" in page.url
    assert "seed=" in page.url
    assert pixels(page, "#xt").any()
    assert page.evaluate("document.activeElement.id") == "close"


def test_a_seed_too_large_is_told_before_it_is_sent(page: Any, server: ServerProcess) -> None:
    page.goto(server.url)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.fill("#seed", str(2**64))
    page.click("#go")
    assert "below 2^64" in page.locator("#seed").evaluate("input => input.validationMessage")
    assert not asked


def test_an_error_of_the_server_is_shown(page: Any, server: ServerProcess) -> None:
    page.goto(server.url)
    page.fill("#steps", "5000")  # waits until the page knows its models
    page.evaluate("document.getElementById('steps').max = 99999")
    page.click("#go")
    page.wait_for_selector("#alert.alert")
    assert "422 invalid_request: steps" in page.inner_text("#alert")


def test_nothing_is_typed_before_the_models_are_known(page: Any, server: ServerProcess) -> None:
    held: list[Any] = []
    page.route("**/models", lambda route: held.append(route))
    page.goto(server.url)
    page.wait_for_function("document.readyState === 'complete'")
    assert page.locator("#steps").is_disabled()
    assert page.locator("#go").is_disabled()
    held[0].continue_()
    page.fill("#steps", "3")
    assert page.input_value("#steps") == "3"


def test_a_part_is_drawn_over_and_repainted(page: Any, server: ServerProcess) -> None:
    page.goto(server.url + "/#seed=3&steps=4&image=1")
    finished(page)
    page.click("#repaint summary")
    mask = page.locator("#mask")
    mask.scroll_into_view_if_needed()
    box = mask.bounding_box()
    x, y = box["x"] + box["width"] / 8, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x, y + box["height"] / 8, steps=3)
    page.mouse.up()
    page.click("#paint")
    page.wait_for_selector("text=Repainted. Once more gives another one.")
    before, after = pixels(page, "#xt"), pixels(page, "#repainted")
    assert np.array_equal(after[:, 6:], before[:, 6:])
    assert not np.array_equal(after[:, :3], before[:, :3])


def test_it_is_used_by_keyboard_alone(page: Any, server: ServerProcess) -> None:
    page.goto(server.url)
    page.focus("#seed")
    page.keyboard.type("5")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=Choose an image to see it large.")
    page.focus("#gallery li:nth-child(1) button")
    page.keyboard.press("Enter")
    finished(page)
    page.keyboard.press("Escape")
    assert not page.locator("#detail").is_visible()
    assert page.evaluate("document.activeElement.innerText").strip() == CLASSES[0]


def test_a_part_drawn_over_is_painted_again(page: Any, server: ServerProcess) -> None:
    page.goto(server.url + "/#seed=8&image=0")
    finished(page)
    page.click("#repaint summary")
    page.click("#paint")
    page.wait_for_selector("text=Draw over a part of the image first.")
    box = page.locator("#mask").bounding_box()
    page.mouse.move(box["x"] + 0.1 * box["width"], box["y"] + 0.5 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 0.5 * box["height"], steps=5)
    page.mouse.up()
    page.focus("#mask")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Space")  # in the middle, one to the right
    page.select_option("#paint_class", "1")
    page.click("#paint")
    page.wait_for_selector("text=Repainted.")
    before, after = pixels(page, "#xt"), pixels(page, "#repainted")
    changed = np.abs(after.astype(int) - before) > 1
    assert changed[:, :3].any()
    assert changed[:, 6:10].any()  # by the keyboard; one pixel alone may come out as it was
    assert not changed[:, 10:].any()  # which nobody drew over


def test_an_image_stands_on_any_page_and_costs_once(page: Any, server: ServerProcess, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text(f'<img src="{server.url}/images/grey/{CLASSES[0]}/1/6.png">')
    steps = []
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path)) as site:
        threading.Thread(target=site.serve_forever, daemon=True).start()
        for _ in range(2):
            page.goto(f"http://127.0.0.1:{site.server_port}")
            page.wait_for_function("() => document.images[0].naturalWidth === 12")
            steps.append(server.metric("ddpm_image_steps_total"))
        site.shutdown()
    assert steps[0] == steps[1]


@pytest.mark.parametrize("missing", ["model", "sampler"])
def test_a_link_to_what_is_not_served_says_so(page: Any, server: ServerProcess, missing: str) -> None:
    page.goto(f"{server.url}/#{missing}=other&seed=1&image=0")
    page.wait_for_selector(f"text=This link names the {missing} other, which is not served here.")
    assert not page.locator("#detail").is_visible()
    page.click("#go")
    page.wait_for_selector("text=Choose an image to see it large.")
    assert page.inner_text("#alert") == ""


def test_an_unconditional_model_asks_for_no_class(page: Any, colour_checkpoint: Path) -> None:
    with ServerProcess("app", "--checkpoint", str(colour_checkpoint)) as server:
        page.goto(server.url + "/#seed=8&image=2")
        finished(page)
        page.click("#repaint summary")
        assert not page.locator("#paint_class").is_visible()
        page.click("#mask")
        page.click("#paint")
        page.wait_for_selector("text=Repainted.")


def test_what_came_is_kept_where_the_server_dies(page: Any) -> None:
    with ServerProcess("app", "--checkpoint", "mnist-teacher") as server:  # a minute's work, so it dies within it
        page.goto(server.url)
        page.select_option("#sampler", "ddpm")
        page.fill("#steps", "1000")
        page.click("#go")
        page.wait_for_selector("text=/Step [0-9]+ of 1000/")
        server.process.kill()
        page.wait_for_selector("text=The connection to the server broke.")
        assert "The images are as they were after step" in page.inner_text("#status")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_has_no_faults_of_accessibility(browser: Any, server: ServerProcess, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed")
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme=scheme, bypass_csp=True)
    page = context.new_page()
    page.goto(server.url)
    found = axe.Axe().run(page)
    page.goto(server.url + "/#seed=1&steps=2&image=0")
    page.reload()
    finished(page)
    page.click("#repaint summary")
    found_large = axe.Axe().run(page)
    wide = page.evaluate("document.documentElement.scrollWidth")
    context.close()
    assert found.violations_count == found_large.violations_count == 0, found.generate_report()
    assert wide == 390  # nothing has to be scrolled sideways


def test_a_key_is_asked_for_without_scolding(page: Any, grey_checkpoint: Path, tmp_path: Path) -> None:
    key = "alice-0123456789abcdef"
    keys = tmp_path / "keys.toml"
    keys.write_text(f'[alice]\nsha256 = "{hashlib.sha256(key.encode()).hexdigest()}"\n')
    with ServerProcess("app", "--checkpoint", str(grey_checkpoint), "--api-keys-file", str(keys)) as server:
        page.goto(server.url)
        page.wait_for_selector("#entrance:not([hidden])")
        assert page.inner_text("#alert") == ""
        assert page.evaluate("document.activeElement.id") == "key"
        page.fill("#key", "short")
        page.keyboard.press("Enter")
        assert "at least 16" in page.inner_text("#alert")
        page.fill("#key", "bob-0123456789abcdef")
        page.keyboard.press("Enter")
        page.wait_for_selector("text=does not know this key")
        page.fill("#key", key)
        page.keyboard.press("Enter")
        page.wait_for_selector("#form:not([hidden])")
        assert page.inner_text("#alert") == ""
        page.fill("#steps", "2")
        page.click("#go")
        page.wait_for_selector("text=Choose an image to see it large.")
        page.reload()
        page.wait_for_selector("#go:not([disabled])")
        page.add_init_script(DENIED)
        page.reload()
        page.fill("#key", key)
        page.keyboard.press("Enter")
        page.wait_for_selector("#go:not([disabled])")


def test_the_page_offers_fitted_steps_by_name(page: Any, fitted_checkpoint: Path) -> None:
    def controls() -> list[str]:
        return [page.locator(f"#{name}").input_value() for name in ("plan", "sampler", "steps", "guidance")]

    with ServerProcess("app", "--checkpoint", str(fitted_checkpoint)) as server:
        page.goto(server.url)
        page.wait_for_selector("#plans:not([hidden])")
        assert controls() == ["fast", "fitted", "3", "1.5"]
        page.select_option("#plan", "exact")
        assert controls() == ["exact", "dpmpp_2m", "20", "1.5"]
        page.fill("#guidance", "3")
        page.press("#guidance", "Tab")
        assert controls() == ["", "dpmpp_2m", "20", "3"]
        page.select_option("#sampler", "fitted")
        assert controls() == ["fast", "fitted", "3", "1.5"]
        page.click("#go")
        page.wait_for_selector("text=Choose an image to see it large.")
