"""All that a list has, page by page."""

from collections.abc import AsyncGenerator
from typing import Any


async def pages(method: Any, request: Any) -> AsyncGenerator[Any]:
    """Yield the rows of all pages of a List RPC, asked for as they are needed; raises RosterError."""
    asked = type(request)()
    asked.CopyFrom(request)
    while True:
        page = await method(asked)
        [rows] = (getattr(page, field.name) for field in page.DESCRIPTOR.fields if field.is_repeated)
        for row in rows:
            yield row
        if not page.next_page_token:
            return
        asked.page_token = page.next_page_token
