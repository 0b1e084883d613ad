"""Pagination: all rows of a List RPC."""

from collections.abc import AsyncGenerator
from typing import Any


async def pages(method: Any, request: Any) -> AsyncGenerator[Any]:
    """Yield the rows of every page of a List RPC, fetching pages on demand; raises RosterError."""
    page_request = type(request)()
    page_request.CopyFrom(request)
    while True:
        page = await method(page_request)
        [rows] = (getattr(page, field.name) for field in page.DESCRIPTOR.fields if field.is_repeated)
        for row in rows:
            yield row
        if not page.next_page_token:
            return
        page_request.page_token = page.next_page_token
