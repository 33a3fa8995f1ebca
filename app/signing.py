"""Who may see images by their addresses: all, holders of a key, and holders of an address that is signed.

A signature is the HMAC-SHA256 of path and query, whose `expires` is in seconds since 1970.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from app.errors import Forbidden
from app.settings import Settings

IMAGES = "/images/"
SIGNATURE, EXPIRES = "signature", "expires"
MIN_SECRET = 32  # characters
MAX_VALID_S = 10 * 366 * 86_400
YEAR_S = 31_536_000
LINK_S = 3600  # for which an address in an answer is signed, as OpenAI's are

Query = list[tuple[str, str]]
"""Names and values, decoded."""


class AddressSigner:
    """Signs and checks addresses with one secret. `clock` gives seconds since 1970."""

    def __init__(self, secret: str, clock: Callable[[], float] = time.time) -> None:
        """Raises ValueError, which never tells the secret, where it is too short."""
        if len(secret) < MIN_SECRET:
            raise ValueError(f"the signing key has {len(secret)} characters; it needs {MIN_SECRET} at least")
        self._secret, self._clock = secret.encode(), clock

    def sign(self, address: str, seconds: int) -> str:
        """The address, with or without scheme and host, good for so many seconds from now. Raises ValueError where it
        is not one of an image."""
        if not 0 < seconds <= MAX_VALID_S:
            raise ValueError(f"an address is signed for 1 to {MAX_VALID_S} seconds, not {seconds}")
        parts = urlsplit(address)
        if IMAGES not in parts.path:
            raise ValueError(f"{address!r:.200} is not the address of an image: its path has no {IMAGES}")
        query = [pair for pair in parse_qsl(parts.query, True) if pair[0] not in (SIGNATURE, EXPIRES)]
        signed = self.signed(unquote(parts.path), query, int(self._clock()) + seconds)
        return parts._replace(query=encoded(signed)).geturl()

    def signed(self, path: str, query: Query, expires: int) -> Query:
        """The query with expiry and signature."""
        query = [*query, (EXPIRES, str(expires))]
        return [*query, (SIGNATURE, self._signature(path, query))]

    def check(self, path: str, query: Query) -> int:
        """Seconds for which the signature in the query is still good. Raises Forbidden where it is not."""
        given = [value for name, value in query if name == SIGNATURE]
        rest = [pair for pair in query if pair[0] != SIGNATURE]
        expires = [value for name, value in rest if name == EXPIRES]
        is_right = hmac.compare_digest(self._signature(path, rest).encode(), given[0].encode())
        if not is_right or len(given) > 1 or len(expires) != 1 or not re.fullmatch(r"\d{1,12}", expires[0], re.ASCII):
            raise Forbidden("the signature does not fit this address: sign the whole of it", param=SIGNATURE)
        left = int(expires[0]) - int(self._clock())
        if left <= 0:
            raise Forbidden("the signature of this address has expired: sign it again", param=EXPIRES)
        return left

    def _signature(self, path: str, query: Query) -> str:
        """Of what is decoded and sorted, so that no proxy's encoding breaks it. What comes before /images/ is a proxy's
        own."""
        text = f"{path[path.index(IMAGES) :]}\n{encoded(sorted(query))}"
        return hmac.new(self._secret, text.encode(), hashlib.sha256).hexdigest()


@dataclass(frozen=True)
class ImageAccess:
    """Who may see images by their addresses, and which caches may keep them."""

    keys_required: bool = False
    is_public: bool = False
    signer: AddressSigner | None = None

    def is_open(self, path: str, query_string: bytes) -> bool:
        """Whether this is the address of an image that needs no key. Raises Forbidden for a bad signature."""
        if not path.startswith(IMAGES):
            return False
        return self._signed_for(path, query_string) is not None or self.is_public or not self.keys_required

    def cache_control(self, path: str, query_string: bytes) -> str:
        """Of an image that never changes: as long as the signature is good, or for ever."""
        left = self._signed_for(path, query_string)
        scope = "public" if self.is_open(path, query_string) else "private"
        return f"{scope}, max-age={YEAR_S if left is None else min(left, YEAR_S)}, immutable"

    def link(self, address: str) -> str:
        """An address to give away: signed for an hour where it would need a key."""
        if self.signer is None or self.is_public or not self.keys_required:
            return address
        return self.signer.sign(address, LINK_S)

    def _signed_for(self, path: str, query_string: bytes) -> int | None:
        """Seconds for which the signature is still good; None where there is none. Raises Forbidden."""
        query = parse_qsl(query_string.decode("latin-1"), True)
        if all(name != SIGNATURE for name, _ in query):
            return None
        if self.signer is None:
            raise Forbidden("this server has no signing key, and takes no signed addresses", param=SIGNATURE)
        return self.signer.check(path, query)


def image_access(settings: Settings, keys_required: bool) -> ImageAccess:
    """As the settings say. Raises ValueError where the secret cannot be read, or is too short."""
    secret = settings.signing_key.get_secret_value().strip()
    if path := settings.signing_key_file:
        try:
            secret = Path(path).read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise ValueError(f"the signing key {path} cannot be read: {why}") from None
        if not secret:
            raise ValueError(f"the signing key {path} is empty")
    return ImageAccess(keys_required, settings.public_images, AddressSigner(secret) if secret else None)


def encoded(query: Query) -> str:
    """The text of a query, with nothing encoded that may stand there as it is."""
    return urlencode(query, quote_via=quote, safe=",@:")
