import pytest

from app.errors import NotAcceptable
from app.negotiation import negotiate

OFFERS = ("image/png", "application/json", "application/zip")
PNG, JSON, ZIP = OFFERS


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        (None, PNG),
        ("", PNG),
        ("  ", PNG),
        ("*/*", PNG),
        ("image/*", PNG),
        ("application/*", JSON),
        ("application/json", JSON),
        ("APPLICATION/JSON", JSON),
        ("application/json; charset=utf-8", JSON),
        ("application/zip, application/json", JSON),  # the service's order among equals
        ("application/json;q=0.5, application/zip", ZIP),
        ("application/json;q=0.2, application/zip;q=0.3, image/png;q=0.1", ZIP),
        ("application/json;Q=0.9, */*;q=0.8", JSON),
        ("image/png;q=0, */*", JSON),  # the most specific range counts
        ("application/*;q=0.9, application/json;q=0.1, image/png;q=0.5", ZIP),
        ("text/html, application/xhtml+xml, image/webp, */*;q=0.8", PNG),
        ("image/png;q=nan, application/zip;q=0.1", ZIP),
        ("image/png;q=7, application/zip;q=0.1", ZIP),
        ("image/png;q=high, application/zip;q=0.1", ZIP),
        ("nonsense, ,;, application/zip", ZIP),
    ],
)
def test_the_offer_of_highest_quality_wins(accept: str | None, chosen: str) -> None:
    assert negotiate([] if accept is None else [accept], OFFERS) == chosen
    assert negotiate([] if accept is None else accept.split(","), OFFERS) == chosen  # a line for each


@pytest.mark.parametrize("accept", ["text/html", "image/jpeg, video/*", "image/png;q=0", "*/*;q=0", "png", "*", ";"])
def test_nothing_acceptable_is_refused_with_the_list_of_offers(accept: str) -> None:
    with pytest.raises(NotAcceptable, match=r"image/png, application/json, application/zip"):
        negotiate([accept], OFFERS)
