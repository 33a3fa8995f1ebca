"""Content negotiation: which of the offered media types a client's Accept header prefers (RFC 9110, 12.5.1)."""

from __future__ import annotations

from collections.abc import Sequence

from app.errors import NotAcceptable


def negotiate(accept: Sequence[str], offers: Sequence[str]) -> str:
    """The offer of highest quality, the first among equals. Raises NotAcceptable where none is wanted.

    `accept` has the value of each Accept header: several are one list (RFC 9110, 5.3).
    """
    wanted = [_parse(part) for line in accept for part in line.split(",") if part.strip()]
    if not wanted:
        return offers[0]
    qualities = [(_quality(offer, wanted), offer) for offer in offers]
    best, offer = max(qualities, key=lambda pair: pair[0])
    if best <= 0:
        raise NotAcceptable(f"none of {', '.join(offers)} is acceptable to the Accept header", param="Accept")
    return offer


def _parse(part: str) -> tuple[str, float]:
    media, *parameters = (piece.strip().lower() for piece in part.split(";"))
    quality = 1.0
    for parameter in parameters:
        if parameter.startswith("q="):
            try:
                quality = float(parameter[2:])
            except ValueError:
                quality = 0.0
    return media, quality if 0 <= quality <= 1 else 0.0


def _quality(offer: str, wanted: Sequence[tuple[str, float]]) -> float:
    """The quality of the most specific range that matches."""
    for pattern in (offer, offer.split("/")[0] + "/*", "*/*"):
        matches = [quality for media, quality in wanted if media == pattern]
        if matches:
            return max(matches)
    return 0.0
