"""Pagination: all rows of a List RPC."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

from google.protobuf.message import Message

RequestT = TypeVar("RequestT", bound=Message)


async def pages(
    method: Callable[[RequestT], Awaitable[Message]], request: RequestT
) -> AsyncGenerator[Any, None]:
    """Yield the rows of every page of a List RPC, fetching pages on demand; raises RosterError."""
    page_request: Any = type(request)()
    page_request.CopyFrom(request)
    while True:
        page: Any = await method(page_request)
        [rows] = (getattr(page, field.name) for field in page.DESCRIPTOR.fields if field.is_repeated)
        for row in rows:
            yield row
        if not page.next_page_token:
            return
        page_request.page_token = page.next_page_token
