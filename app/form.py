"""Multipart bodies: fields and files within limits, or a sentence that says what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.datastructures import FormData
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from app.body import refuse_compressed
from app.errors import Cancelled, InvalidRequest, UnsupportedMediaType
from app.validation import refuse_repeated

MAX_FILES, MAX_FIELDS, MAX_TEXT = 4, 40, 65_536  # bytes of a field that is no file
COMPLAINTS = {
    "Missing boundary": "the Content-Type names no boundary; leave the header to your client",
    "Too many files": f"the form has more than {MAX_FILES} files",
    "Too many fields": f"the form has more than {MAX_FIELDS} fields",
    "Part exceeded": f"a field of the form is longer than {MAX_TEXT} bytes; a picture is sent as a file",
    "The Content-Disposition": "a part of the form has no name",
}
"""The parser's messages by how they begin, in our words."""


class FormRoute(APIRoute):
    """A route whose body is multipart/form-data. A list of one file (`image[]`) is that file."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """As FastAPI's, for a request whose body is a form."""
        handle = super().get_route_handler()

        async def handle_form(request: Request) -> Response:
            read = FormRequest(request.scope, request.receive)
            await read.load()
            return await handle(read)

        return handle_form


class FormRequest(Request):
    """Its body is a form."""

    async def load(self) -> None:
        """Reads the body. Raises UnsupportedMediaType, InvalidRequest, or Cancelled where the client leaves."""
        refuse_compressed(self)
        media_type = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "multipart/form-data":
            found = f"not {media_type:.80}" if media_type else "which is missing"
            raise UnsupportedMediaType(
                f"the body must be a form: send Content-Type: multipart/form-data, {found}",
                accept="multipart/form-data",
            )
        parser = Parser(self.headers, self.stream(), max_files=MAX_FILES, max_fields=MAX_FIELDS, max_part_size=MAX_TEXT)
        try:
            form = await parser.parse()
        except MultiPartException as error:
            known = (said for begin, said in COMPLAINTS.items() if error.message.startswith(begin))
            raise InvalidRequest(next(known, "the body is no form with the boundary that its header names")) from None
        except ClientDisconnect:
            raise Cancelled("the client left before its body was read") from None
        if not parser.ended:
            await form.close()
            raise InvalidRequest("the body is cut short: the form does not end with its boundary")
        items = [(name.removesuffix("[]"), value) for name, value in form.multi_items()]
        self._form = FormData(items)
        refuse_repeated(name for name, _ in items)


class Parser(MultiPartParser):
    """Starlette's, which takes a form without an end for one with it. Nothing is written to a disk."""

    spool_max_size = 2**62
    ended = False

    def on_end(self) -> None:
        """The last boundary was there."""
        self.ended = True
