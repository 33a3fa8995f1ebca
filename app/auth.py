"""API keys: who may ask, how often, and how much at once. `python -m app.access new NAME` makes one.

The file is TOML, one table per name, and holds no keys but their SHA-256:

    [alice]
    sha256 = "…"                 # or a list of them, while a key is being changed for another
    requests_per_minute = 60     # left out: --key-requests-per-minute
    concurrent = 4               # left out: --key-concurrency
    admin = true                 # may load and remove models; left out: false
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import hmac
import logging
import math
import re
import secrets
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.errors import Overloaded, Unauthorized
from app.settings import Settings

log = logging.getLogger("ddpm.access")

KEY_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")  # what TOML takes without quotes
TOKEN = re.compile(r"[A-Za-z0-9._~+/-]{16,512}=*")  # RFC 6750's b64token, long enough not to be guessed
DIGEST = re.compile(r"[0-9a-fA-F]{64}")
FIELDS = {"sha256", "requests_per_minute", "concurrent", "admin"}
RELOAD_S = 1.0  # between looks at the file


@dataclass(frozen=True)
class Key:
    """Who a key belongs to. Limits of 0 are none."""

    name: str
    digests: tuple[bytes, ...]
    requests_per_minute: int
    concurrent: int
    admin: bool = False


class RateLimiter:
    """What one name has used: a bucket that holds a minute's requests and fills evenly, and what is under way."""

    def __init__(self, now: float) -> None:
        self.spent, self.since, self.running = 0.0, now, 0

    def acquire(self, key: Key, now: float) -> None:
        """Counts one request in. Raises Overloaded, and counts nothing, where a limit is passed."""
        if key.concurrent and self.running >= key.concurrent:
            raise Overloaded(f"this key may have {key.concurrent} requests under way at once", retry_after=1)
        rate = key.requests_per_minute / 60
        self.spent, self.since = max(0.0, self.spent - rate * (now - self.since)), now
        if rate:
            if self.spent + 1 > key.requests_per_minute:
                wait = max(1, math.ceil((self.spent + 1 - key.requests_per_minute) / rate))
                raise Overloaded(
                    f"this key may make {key.requests_per_minute} requests a minute; try again in {wait} s",
                    retry_after=wait,
                )
            self.spent += 1
        self.running += 1


class APIKeyStore:
    """The keys of the settings' file and variable. Raises ValueError, which never tells a key, where they are wrong.

    Used on the event loop only. Without keys in the settings, `required` is false.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings, self._clock = settings, clock
        self._path = Path(settings.api_keys_file) if settings.api_keys_file else None
        self._usage: dict[str, RateLimiter] = {}
        self._keys: tuple[Key, ...] = ()
        self._stamp: object = None
        self._reload_requested = asyncio.Event()
        self.required = bool(self._path or settings.api_keys.get_secret_value().strip())
        if self.required:
            self._stamp = self._file_stamp()
            self._keys = self._read()

    @property
    def names(self) -> list[str]:
        """Whose keys there are."""
        return [key.name for key in self._keys]

    def find(self, token: str) -> Key | None:
        """Whose key this is. Takes the same time whichever it is, and however much of it is right."""
        digest = hashlib.sha256(token.encode()).digest()
        found = None
        for key in self._keys:
            for known in key.digests:
                if hmac.compare_digest(known, digest):
                    found = key  # and on with the others
        return found

    def authenticate(self, headers: Iterable[tuple[bytes, bytes]]) -> Key:
        """The key of a request with these headers (names in lower case). Raises Unauthorized."""
        given = [value for name, value in headers if name == b"authorization"]
        if not given:
            raise Unauthorized("a key is needed: send the header Authorization: Bearer KEY")
        if len(given) > 1:
            raise Unauthorized("more than one Authorization header", rejected=True)
        scheme, _, token = given[0].decode("latin-1").partition(" ")
        token = token.strip(" ")
        if scheme.lower() != "bearer" or not TOKEN.fullmatch(token):
            raise Unauthorized(
                "the Authorization header must be Bearer KEY, with a KEY of 16 to 512 letters, digits or -._~+/",
                rejected=True,
            )
        key = self.find(token)
        if key is None:
            raise Unauthorized("no such key", rejected=True)
        return key

    def admit(self, key: Key) -> RateLimiter:
        """Counts a request in; the caller counts it out, by `running -= 1`. Raises Overloaded beyond a limit."""
        usage = self._usage.setdefault(key.name, RateLimiter(self._clock()))
        usage.acquire(key, self._clock())
        return usage

    async def watch(self) -> None:
        """Reads the file again when it has changed or `request_reload` was called. A wrong one is logged and changes
        nothing. Python is told of no change to a file, so this looks at its stamp every RELOAD_S."""
        while self._path:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._reload_requested.wait(), RELOAD_S)
            self.refresh()

    def request_reload(self) -> None:
        """`watch` reads the file again now, changed or not. For a signal handler."""
        self._reload_requested.set()

    def refresh(self) -> None:
        """Reads the file again if it changed or that was requested. Usage is kept by name, across versions of it."""
        stamp = self._file_stamp()
        if stamp == self._stamp and not self._reload_requested.is_set():
            return
        self._stamp = stamp
        self._reload_requested.clear()
        try:
            self._keys = self._read()
        except ValueError as error:
            log.error("API key file rejected, keeping current keys: %s", error)
            return
        for name in set(self._usage) - set(self.names):
            if not self._usage[name].running:
                del self._usage[name]
        log.info("keys reloaded", extra={"keys": self.names})

    def _file_stamp(self) -> object:
        """Something that changes when the file does; None where there is none."""
        try:
            stat = self._path.stat() if self._path else None
        except OSError:
            return None
        return stat and (stat.st_mtime_ns, stat.st_size, stat.st_ino, stat.st_dev)

    def _read(self) -> tuple[Key, ...]:
        keys = [*self._from_variable(), *(self._from_file(self._path) if self._path else [])]
        if not keys:
            raise ValueError("there are no keys in it" if not self._path else f"{self._path} has no keys")
        if len({key.name for key in keys}) < len(keys):
            raise ValueError("two API keys have the same name")
        digests = [digest for key in keys for digest in key.digests]
        if len(set(digests)) < len(digests):
            raise ValueError("the same API key is given twice")
        return tuple(keys)

    def _from_variable(self) -> Iterator[Key]:
        limits = (self._settings.key_requests_per_minute, self._settings.key_concurrency)
        for number, entry in enumerate(
            re.split(r"[\s,]+", self._settings.api_keys.get_secret_value().strip(" ,\n")), 1
        ):
            name, colon, token = entry.partition(":")
            if not entry:
                continue
            where = f"DDPM_API_KEYS, entry {number}"
            if not colon:
                raise ValueError(f"{where}: must be NAME:KEY")
            if not KEY_NAME.fullmatch(name):
                raise ValueError(f"{where}: a name is 1 to 64 letters, digits, hyphens or underscores")
            if not TOKEN.fullmatch(token):
                raise ValueError(f"{where}: a key is 16 to 512 letters, digits or -._~+/")
            yield Key(name, (hashlib.sha256(token.encode()).digest(),), *limits)

    def _from_file(self, path: Path) -> Iterator[Key]:
        try:
            tables = tomllib.loads(path.read_text("utf-8"))
        except OSError as error:
            raise ValueError(f"the file of API keys {path} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ValueError(f"the file of API keys {path} is not UTF-8") from None
        except tomllib.TOMLDecodeError as error:
            place = re.search(r"\(at .*\)$", str(error))  # and nothing else of the message, which quotes the file
            raise ValueError(f"the file of API keys {path} is not TOML {place[0] if place else ''}") from None
        for number, (name, table) in enumerate(tables.items(), 1):
            where = f"{path}, entry {number}"
            if not KEY_NAME.fullmatch(name):
                raise ValueError(f"{where}: a name is 1 to 64 letters, digits, hyphens or underscores")
            if not isinstance(table, dict) or "sha256" not in table or set(table) - FIELDS:
                raise ValueError(
                    f"{where}: must be a table [NAME] with sha256, and maybe requests_per_minute, concurrent, admin"
                )
            if not isinstance(table.get("admin", False), bool):
                raise ValueError(f"{where}: admin must be true or false")
            hashes = table["sha256"] if isinstance(table["sha256"], list) else [table["sha256"]]
            if not hashes or not all(isinstance(text, str) and DIGEST.fullmatch(text) for text in hashes):
                raise ValueError(
                    f"{where}: sha256 must be 64 hexadecimal digits (or a list of such); "
                    "`python -m app.access new NAME` makes them"
                )
            yield Key(
                name,
                tuple(bytes.fromhex(text) for text in hashes),
                _limit(table, "requests_per_minute", self._settings.key_requests_per_minute, where),
                _limit(table, "concurrent", self._settings.key_concurrency, where),
                table.get("admin", False),
            )


def _limit(table: dict[str, Any], field: str, otherwise: int, where: str) -> int:
    value = table.get(field, otherwise)
    if type(value) is not int or not 0 <= value <= 1_000_000:
        raise ValueError(f"{where}: {field} must be a whole number from 0 (no limit) to 1000000")
    return value


def new(name: str) -> tuple[str, str]:
    """A key of 256 random bits, and its table for the file."""
    token = "ddpm_" + secrets.token_urlsafe(32)
    return token, f'[{name}]\nsha256 = "{hashlib.sha256(token.encode()).hexdigest()}"\n'


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m app.access", description="Makes API keys.")
    commands = parser.add_subparsers(required=True)
    making = commands.add_parser("new", help="make a key: the key to standard error, its table to standard output")
    making.add_argument("name", help="whose it is, for logs and metrics")
    name = parser.parse_args(argv).name
    if not KEY_NAME.fullmatch(name):
        parser.error("a name is 1 to 64 letters, digits, hyphens or underscores")
    token, table = new(name)
    print(table, end="")
    print(f"The key of {name}, shown only now: {token}", file=sys.stderr)
