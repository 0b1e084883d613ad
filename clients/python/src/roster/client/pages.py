"""Pagination: all rows of a List RPC."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar, cast

from google.protobuf.message import Message

RequestT = TypeVar("RequestT", bound=Message)


async def pages(
    method: Callable[[RequestT], Awaitable[Message]], request: RequestT
) -> AsyncGenerator[Any, None]:
    """Yield the rows of every page of a List RPC, fetching pages on demand; raises RosterError."""
    page_request: RequestT | None = request
    while page_request:
        page = await method(page_request)
        for row in rows_of(page):
            yield row
        page_request = next_request(page_request, page)


def rows_of(page: Message) -> Any:
    """Return the rows of a page: its only repeated field."""
    [rows] = (getattr(page, field.name) for field in page.DESCRIPTOR.fields if field.is_repeated)
    return rows


def next_request(request: RequestT, page: Any) -> RequestT | None:
    """Return the request for the page after one, None after the last."""
    if not page.next_page_token:
        return None
    following: Any = type(request)()
    following.CopyFrom(request)
    following.page_token = page.next_page_token
    return cast("RequestT", following)
