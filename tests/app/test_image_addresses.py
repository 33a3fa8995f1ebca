"""GET /images/…: short addresses lead to full ones, which caches may keep for ever and which cost nothing again."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image as Pillow

from app import addresses
from app.addresses import matches
from model import checkpoint
from model.checkpoint import CheckpointConfig
from model.images import Image
from model.sampling.fitted import weights_digest
from model.sampling.schedule import SamplingParams
from tests.app.conftest import BEETLE, CLASSES, GREY, SlowRunner, serving, write_checkpoint
from tests.app.processes import metric
from tests.model.sampling.test_fitted import DIFFUSION, table_like
from tests.networks import randomised

SHORT = "/images/grey/plain/1/6.png"
KEY = "alice-0123456789abcdef"
SECRET = "0123456789abcdef" * 4


@pytest.fixture(scope="module")
def site(grey_checkpoint: Path) -> Iterator[TestClient]:
    with serving(grey_checkpoint) as client:
        client.follow_redirects = False
        yield client


def full(client: TestClient, short: str, **headers: str) -> str:
    """The address that a short one leads to."""
    answer = client.get(short, headers=headers)
    assert answer.status_code == 307, answer.text
    assert answer.headers["cache-control"] == "no-cache"
    location = answer.headers["location"]
    assert location.startswith("../"), "relative, for proxies that add a prefix"
    return str(httpx.URL("http://x" + short).join(location).raw_path.decode())


def pixels(answer: httpx.Response) -> Image:
    assert answer.status_code == 200, answer.text
    return np.array(Pillow.open(io.BytesIO(answer.content)).convert("L"))


def steps(client: TestClient, **headers: str) -> float:
    return metric(client.get("/metrics", headers=headers).text, "ddpm_image_steps_total")


def test_a_short_address_leads_to_hash_and_every_parameter(site: TestClient) -> None:
    address = full(site, SHORT)
    sha256 = site.get("/models").json()["models"][0]["checkpoint"]
    assert address == (
        f"/images/grey@{sha256[:8]}/plain/1/6.png?sampler=ddim&steps=6&eta=0&guidance_scale=1"
        "&guidance_interval=0,1&spacing=trailing&limit=clamp"
    )
    answer = site.get(address)
    assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert answer.headers["cross-origin-resource-policy"] == "cross-origin"
    assert site.get(SHORT).headers["cross-origin-resource-policy"] == "cross-origin", "the way there, too"
    assert re.fullmatch(r'W/"[0-9a-f]{32}"', answer.headers["etag"])
    made = site.post("/generate", json={"class_label": "plain", "seed": 1, "index": 6})
    assert answer.content == made.content
    assert answer.headers["x-ddpm-class-label"] == "plain"


@pytest.mark.parametrize(
    ("path", "query"),
    [
        (f"grey/{quote(BEETLE)}/1/6.png", {}),
        ("grey/1/1/6.png", {"steps": 3}),
        ("grey/0/18446744073709551615/2147483647.png", {"sampler": "ddpm", "steps": 5}),
        ("grey/random/1/6.webp", {"sampler": "dpmpp_2m", "guidance_scale": 2.5}),
        ("grey/plain/007/06.jpg", {"guidance_scale": "2.0", "guidance_interval": "0.25,0.75"}),
        ("grey/plain/1/6.jpeg", {"output_compression": 30, "size": "24x16"}),
        ("grey/plain/1/6.gif", {"frames": 3, "view": "x0", "size": "24x16"}),
        ("grey/plain/1/6.webp", {"frames": 3, "eta": 0.5}),
        ("grey/PLAIN/1/6.gif", {"limit": "dynamic", "spacing": "logsnr"}),
        ("grey/plain/1/6.png/", {"size": "auto"}),
    ],
)
def test_a_full_address_leads_nowhere_else(site: TestClient, path: str, query: dict[str, Any]) -> None:
    address = full(site, str(httpx.URL("/images/" + path, params=query) if query else "/images/" + path))
    answer = site.get(address)
    assert answer.status_code == 200
    kind = {"jpeg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF"}[address.partition("?")[0].rpartition(".")[2]]
    opened = Pillow.open(io.BytesIO(answer.content))
    assert opened.format == kind
    assert answer.headers["content-type"] == f"image/{kind.lower()}"
    assert opened.size == ((24, 16) if "size=24" in address else (12, 8))
    assert getattr(opened, "n_frames", 1) == int(query.get("frames", 7 if kind == "GIF" else 1))
    assert site.get(address.replace(",", "%2C")).status_code == 200


def test_the_order_of_parameters_makes_no_other_address(site: TestClient) -> None:
    path, _, query = full(site, SHORT).partition("?")
    answer = site.get(f"{path}?{'&'.join(reversed(query.split('&')))}")
    assert answer.status_code == 200
    assert answer.headers["etag"] == site.get(f"{path}?{query}").headers["etag"]


def test_a_hash_without_every_parameter_is_no_full_address(site: TestClient) -> None:
    """The checkpoint's defaults may change with its next version of the same weights."""
    address = full(site, SHORT)
    path = address.partition("?")[0]
    assert full(site, path) == full(site, path + "?steps=6") == address
    assert full(site, address.replace("&eta=0", "")) == address
    assert full(site, address.replace("scale=1&", "scale=1.0&")) == address


def test_a_mix_is_one_image_whose_address_names_its_class(site: TestClient) -> None:
    grid = site.post("/generate", json={"seed": 3, "n": 5, "columns": 5})
    tiles = np.split(np.array(Pillow.open(io.BytesIO(grid.content))), 5, axis=1)
    labels = set()
    for i, tile in enumerate(tiles):
        address = full(site, f"/images/grey/random/3/{i}.png")
        labels.add(address.split("/")[3])
        np.testing.assert_array_equal(pixels(site.get(address)), tile)
    assert "random" not in labels
    assert len(labels) > 1


def test_a_checkpoint_without_classes_has_addresses(colour_checkpoint: Path) -> None:
    with serving(colour_checkpoint) as client:
        client.follow_redirects = False
        answer = client.get(full(client, "/images/colour/none/1/0.png"))
        assert answer.content == client.post("/generate", json={"seed": 1}).content
        assert client.get("/images/colour/random/1/0.png").status_code == 422


@pytest.mark.slow
def test_fitted_tables_have_addresses(tmp_path: Path) -> None:
    network = randomised(GREY, 0.3, 0)
    own = SamplingParams("fitted", 4, 0.0, 2.5, spacing="logsnr")
    digest = weights_digest(network.state_dict())
    tables = tuple(table_like(GREY, digest, number) for number in (4, 6))
    config = CheckpointConfig(GREY, DIFFUSION, CLASSES, own, {}, tables)
    checkpoint.save(tmp_path / "fitted.safetensors", network.state_dict(), config)
    with serving(tmp_path / "fitted.safetensors") as client:
        client.follow_redirects = False
        for query in ("", "?steps=6", "?sampler=ddim"):
            address = full(client, "/images/fitted/plain/1/0.png" + query)
            assert client.get(address).status_code == 200
        low = client.post("/v1/images/generations", json={"prompt": "plain", "quality": "low"})
        assert low.headers["x-ddpm-sampler"] == "fitted"


def test_what_a_client_has_costs_no_step(site: TestClient) -> None:
    address = full(site, SHORT)
    etag = site.get(address).headers["etag"]
    before = steps(site)
    for known in (etag, etag.removeprefix("W/"), f'"x", {etag}', "*"):
        answer = site.get(address, headers={"If-None-Match": known})
        assert (answer.status_code, answer.content) == (304, b"")
        assert answer.headers["etag"] == etag
        assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert steps(site) == before
    assert site.get(address, headers={"If-None-Match": '"other"'}).status_code == 200
    assert steps(site) == before + 6


def test_head_takes_no_step_and_says_the_same(site: TestClient) -> None:
    address = full(site, SHORT)
    get = site.get(address)
    before = steps(site)
    head = site.head(address)
    assert (head.status_code, head.content) == (200, b"")
    own = {"x-request-id", "content-length"}
    assert {k: v for k, v in head.headers.items() if k not in own} == {
        k: v for k, v in get.headers.items() if k not in own
    }
    assert site.head(SHORT).headers["location"] == site.get(SHORT).headers["location"]
    assert site.head(address, headers={"If-None-Match": head.headers["etag"]}).status_code == 304
    assert steps(site) == before


def test_a_known_image_is_answered_while_the_server_warms_up(held: SlowRunner, grey_checkpoint: Path) -> None:
    held.warm.clear()
    with serving(grey_checkpoint, held, cold=True) as client:
        client.follow_redirects = False
        address = full(client, SHORT)
        assert client.get(address, headers={"If-None-Match": "*"}).status_code == 304
        assert client.get(address).status_code == client.head(address).status_code == 503
        held.warm.set()


@pytest.mark.slow
def test_the_tag_changes_with_whatever_decides_the_pixels(
    site: TestClient, grey_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tag(client: TestClient, short: str = SHORT) -> str:
        return client.head(full(client, short)).headers["etag"]

    tags = [tag(site)]
    for other in ("plain/2/6.png", "plain/1/7.png", "0/1/6.png", "plain/1/6.webp", "plain/1/6.png?steps=5"):
        tags.append(tag(site, f"/images/grey/{other}"))
    served = site.app.state.service.models.default
    other_precision = "fp32" if served.runs_on["precision"] == "bf16" else "bf16"  # which "auto" takes differs
    monkeypatch.setitem(served.runs_on, "precision", other_precision)
    tags.append(tag(site))
    monkeypatch.undo()
    monkeypatch.setattr(addresses, "NUMERICS", addresses.NUMERICS + 1)
    tags.append(tag(site))
    monkeypatch.undo()
    write_checkpoint(tmp_path / "grey.safetensors", GREY, CLASSES, seed=1)
    with serving(tmp_path / "grey.safetensors") as client:
        client.follow_redirects = False
        tags.append(tag(client))
        gone = client.get(full(site, SHORT))
        assert (gone.status_code, gone.json()["error"]["code"]) == (410, "gone")
        assert f"there are grey@{client.app.state.service.models.default.sha256[:8]}" in gone.json()["error"]["message"]
        assert gone.headers["cache-control"] == "no-store"
    assert len(set(tags)) == len(tags)
    with serving(grey_checkpoint) as again:
        again.follow_redirects = False
        assert tag(again) == tags[0], "a restart changes nothing"


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("grey@00000000/plain/1/6.png", 410, "there are grey@"),
        ("other@00000000/plain/1/6.png", 410, "there are grey@"),
        ("grey@/plain/1/6.png", 404, "no model 'grey@'"),
        ("grey@xyz/plain/1/6.png", 404, "there are grey"),
        ("other/plain/1/6.png", 404, "there are grey"),
        ("grey/horse/1/6.png", 422, "there are plain"),
        ("grey/plain/-1/6.png", 422, "seed must be a whole number"),
        ("grey/plain/1/2147483648.png", 422, "index must be a whole number"),
        ("grey/plain/1/x.png", 422, "index must be a whole number"),
        ("grey/plain/1/6.svg", 422, "extension must be one of png, webp, jpg, jpeg, gif"),
        ("grey/plain/1/6", 404, "there is nothing at"),
        ("grey/plain/1", 404, "there is nothing at"),
        ("grey/plain/1/6.png?steps=5&steps=6", 422, "'steps' is given 2 times"),
        ("grey/plain/1/6.png?step=5", 422, "did you mean steps?"),
        ("grey/plain/1/6.png?steps=1001", 422, "1000"),
        ("grey/plain/1/6.png?n=2", 422, "there is no field 'n'"),
        ("grey/plain/1/6.png?frames=3", 422, "frames and view are of .gif"),
        ("grey/plain/1/6.webp?view=x0", 422, "frames and view are of .gif"),
        ("grey/plain/1/6.gif?frames=101", 422, "frames must not be more than 100"),
        ("grey/plain/1/6.gif?output_compression=9", 422, "output_compression is of .jpeg"),
        ("grey/plain/1/6.png?size=6x4", 422, "not make them smaller"),
        ("grey/plain/1/6.gif?size=1500x1000&frames=100&steps=100", 422, "bytes of pixels"),
        ("grey/plain/1/6.png?expires=9", 422, "expires needs a signature"),
        ("grey/plain/1/6.png?expires=9&signature=9", 403, "no signing key"),
    ],
)
def test_what_has_no_image_is_refused_with_a_sentence(site: TestClient, path: str, status: int, said: str) -> None:
    for method in (site.get, site.head):
        answer = method("/images/" + path, headers={"If-None-Match": "*"})
        assert answer.status_code == status, answer.text
        assert answer.headers["cache-control"] == "no-store"
    assert said in site.get("/images/" + path).json()["error"]["message"]


def test_names_with_slashes_and_signs_have_addresses(tmp_path: Path) -> None:
    names = ("a/b", "0", "50% @ ?")
    path = write_checkpoint(tmp_path / "odd@1234abcd.safetensors", GREY, names)
    shutil.copy(path, tmp_path / "plain.safetensors")
    with serving(path) as client:
        client.follow_redirects = False
        for name in names:
            address = full(client, f"/images/odd%401234abcd/{quote(name, safe='')}/1/0.png")
            answer = client.get(address)
            assert answer.status_code == 200, address
            assert answer.content == client.post("/generate", json={"class_label": name, "seed": 1}).content


@pytest.fixture(scope="module")
def guarded(grey_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    key = tmp_path_factory.mktemp("signing") / "key"
    key.write_text(SECRET)
    with serving(grey_checkpoint, api_keys=f"alice:{KEY}", signing_key_file=str(key)) as client:
        client.follow_redirects = False
        yield client


BEARER = {"Authorization": f"Bearer {KEY}"}


def test_other_methods_are_refused_whatever_the_signature(site: TestClient) -> None:
    for method in ("TRACE", "POST"):
        answer = site.request(method, SHORT + "?signature=x")
        assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")


def test_with_keys_images_need_one_and_are_private(guarded: TestClient) -> None:
    assert guarded.get(SHORT, headers={"If-None-Match": "*"}).status_code == 401
    address = full(guarded, SHORT, **BEARER)
    answer = guarded.get(address, headers=BEARER)
    assert answer.headers["cache-control"] == "private, max-age=31536000, immutable"
    for shown in (answer, guarded.get(SHORT, headers=BEARER)):
        assert shown.headers["cross-origin-resource-policy"] == "same-origin"
    assert guarded.get(address, headers={"If-None-Match": answer.headers["etag"]}).status_code == 401


def test_a_signed_address_needs_no_key(guarded: TestClient) -> None:
    signer = guarded.app.state.service.images.signer
    address = full(guarded, signer.sign(SHORT, 60))
    assert "signature=" in address
    answer = guarded.get(address)
    assert answer.status_code == 200, "the full address is signed, too"
    found = re.fullmatch(r"public, max-age=(\d+), immutable", answer.headers["cache-control"])
    assert found
    assert 0 < int(found[1]) <= 60
    assert guarded.get(address, headers={"If-None-Match": answer.headers["etag"]}).status_code == 304
    for spoiled in (address.replace("steps=6", "steps=7"), address + "0", signer.sign("/images/x/0/1/1.png", 60)[:-1]):
        refused = guarded.get(spoiled)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden")
    assert guarded.get("/models?" + address.partition("?")[2]).status_code == 401


def test_links_in_answers_are_signed(guarded: TestClient) -> None:
    body = {"prompt": "plain", "n": 2, "response_format": "url", "size": "24x16", "output_format": "jpeg"}
    made = guarded.post("/v1/images/generations", json=body, headers=BEARER).json()
    for image in made["data"]:
        answer = guarded.get(image["url"])
        assert (answer.status_code, answer.headers["content-type"]) == (200, "image/jpeg")


def test_public_images_need_no_key(grey_checkpoint: Path) -> None:
    with serving(grey_checkpoint, api_keys=f"alice:{KEY}", public_images=True) as client:
        client.follow_redirects = False
        answer = client.get(full(client, SHORT))
        assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
        assert client.get("/models").status_code == client.post("/generate").status_code == 401


@pytest.mark.parametrize(
    ("header", "known"),
    [('W/"a"', True), ('"a"', True), ('"b", W/"a"', True), ("*", True), ("", False), ('"b"', False), ("a", False)],
)
def test_tags_are_compared_weakly(header: str, known: bool) -> None:
    assert matches(header, 'W/"a"') is known


def test_tags_may_stand_in_several_headers(site: TestClient) -> None:
    path = full(site, SHORT)
    known = [("If-None-Match", '"other"'), ("If-None-Match", site.head(path).headers["etag"])]
    assert site.get(path, headers=known).status_code == 304  # type: ignore[arg-type]
