"""Addresses of images that need no key until they expire: HMAC-SHA256 over path and query."""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from app.errors import Forbidden
from app.settings import Settings

ROOT = "/images/"
SIGNATURE, EXPIRES = "signature", "expires"
MIN_SECRET = 32  # characters
LONGEST_S = 10 * 366 * 86_400


class AddressSigner:
    """Signs and checks addresses with one secret. `clock` gives seconds since 1970."""

    def __init__(self, secret: str, clock: Callable[[], float] = time.time) -> None:
        """Raises ValueError, which never tells the secret, where it is too short."""
        if len(secret) < MIN_SECRET:
            raise ValueError(f"the signing key has {len(secret)} characters; it needs {MIN_SECRET} at least")
        self._secret, self._clock = secret.encode(), clock

    @classmethod
    def of(cls, settings: Settings) -> AddressSigner | None:
        """With the settings' secret; None without one. Raises ValueError where the file or its secret is not good."""
        secret, path = settings.signing_key.get_secret_value().strip(), settings.signing_key_file
        if path:
            try:
                secret = Path(path).read_text("utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
                raise ValueError(f"the signing key {path} cannot be read: {why}") from None
        return cls(secret) if secret or path else None

    def sign(self, address: str, seconds: int) -> str:
        """The address, with or without scheme and host, until so many seconds from now. Raises ValueError where it is
        not one of an image."""
        parts = urlsplit(address)
        if ROOT not in parts.path:
            raise ValueError(f"{address!r:.200} is not the address of an image, which has {ROOT} in its path")
        if not 0 < seconds <= LONGEST_S:
            raise ValueError(f"an address is signed for 1 to {LONGEST_S} seconds, not {seconds}")
        query = [pair for pair in parse_qsl(parts.query, True) if pair[0] not in (SIGNATURE, EXPIRES)]
        return parts._replace(query=self.signed(unquote(parts.path), query, int(self._clock()) + seconds)).geturl()

    def signed(self, path: str, query: list[tuple[str, str]], expires: int) -> str:
        """The query [(name, value)], with expiry and signature, percent-encoded."""
        query = [*query, (EXPIRES, str(expires))]
        return encoded([*query, (SIGNATURE, self._signature(path, query))])

    def check(self, path: str, query: list[tuple[str, str]]) -> None:
        """Raises Forbidden where the signature in the query is wrong, or not good any more."""
        given = [value for name, value in query if name == SIGNATURE]
        rest = [pair for pair in query if pair[0] != SIGNATURE]
        expires = [value for name, value in rest if name == EXPIRES]
        good = len(given) == 1 and hmac.compare_digest(self._signature(path, rest).encode(), given[0].encode())
        if not good or len(expires) != 1 or not re.fullmatch(r"\d{1,12}", expires[0], re.ASCII):
            raise Forbidden("the signature does not fit this address: sign it again, whole")
        if int(expires[0]) <= self._clock():
            raise Forbidden("the signature of this address has expired: sign it again")

    def _signature(self, path: str, query: list[tuple[str, str]]) -> str:
        """Over what is decoded and sorted, so that no proxy's encoding breaks it. A prefix of the path is the proxy's."""
        signed = "\n".join([path[path.index(ROOT) :], encoded(sorted(query))])
        return hmac.new(self._secret, signed.encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()


def is_signed(query: list[tuple[str, str]]) -> bool:
    """Whether there is a signature to check."""
    return any(name == SIGNATURE for name, _ in query)


def encoded(query: list[tuple[str, str]]) -> str:
    """A query without what a browser would leave alone."""
    return urlencode(query, quote_via=quote, safe=",", errors="surrogateescape")
