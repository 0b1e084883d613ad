"""ChangeServicer: the RPCs of the change feed."""

from collections.abc import Collection, Sequence
from typing import Any

from roster.errors import InvalidField
from roster.v1 import changes_pb2 as pb
from roster.v1.changes_pb2_grpc import ChangeServiceServicer
from service.auth.caller import authorise_again, current_caller
from service.changes.feed import Feed
from service.changes.kinds import ENTITIES, KINDS
from service.changes.token import Token
from service.changes.watcher import Watches
from service.db.paging import page_size
from service.interceptors.audit import audit_watch
from service.interceptors.chain import Context
from service.metrics import CHANGES_LISTED, CHANGES_WATCHED

WATCH_CHANGES = "/roster.v1.ChangeService/WatchChanges"
Entities = tuple[int, ...]


class ChangeServicer(ChangeServiceServicer):
    """Lists and watches changes."""

    def __init__(self, feed: Feed, watches: Watches) -> None:
        self.feed = feed
        self.watches = watches

    # It writes its responses itself: then it knows which of them the client has received.
    async def WatchChanges(self, request: pb.WatchChangesRequest, context: Any) -> None:  # type: ignore[override]
        entities = _entities(request.entities)
        token = Token.parse(request.token, entities) if request.token else None
        sent = {"changes": 0}

        async def send(response: bytes, size: int) -> None:
            authorise_again()
            _require_rights(entities)
            await context.write(response)
            sent["changes"] += size
            CHANGES_WATCHED.inc(size)

        with audit_watch(WATCH_CHANGES, _names(entities), sent):
            await self.watches.run(token, entities, send)

    async def ListChanges(self, request: pb.ListChangesRequest, context: Context) -> pb.ListChangesResponse:
        entities, size = _entities(request.entities), page_size(request.page_size)
        if not request.token:
            token = (await self.feed.now()).for_entities(entities)
            return pb.ListChangesResponse(token=str(token))
        page = await self.feed.read(Token.parse(request.token, entities), size)
        CHANGES_LISTED.inc(len(page.changes))
        return pb.ListChangesResponse(changes=page.changes, token=str(page.token), has_more=page.has_more)


def _entities(given: Sequence[int]) -> Entities:
    """Return the entities that a request is for; raises InvalidField, PermissionDenied."""
    for position, entity in enumerate(given):
        if entity not in ENTITIES:
            known = " or ".join(pb.Change.Entity.Name(kind.entity) for kind in KINDS)
            raise InvalidField(
                f"entities must be {known}; an empty list means all", field=f"entities[{position}]"
            )
    entities = tuple(sorted(set(given) or ENTITIES))
    _require_rights(entities)
    return entities


def _require_rights(entities: Collection[int]) -> None:
    """Raise PermissionDenied unless the caller may see these entities."""
    for kind in KINDS:
        if kind.entity in entities:
            current_caller().require_rpc(kind.rpc, f"the feed of {kind.table}")


def _names(entities: Collection[int]) -> str:
    return ", ".join(pb.Change.Entity.Name(kind.entity) for kind in KINDS if kind.entity in entities)
