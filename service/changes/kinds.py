"""The entities of the change feed, parents first, listed once."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from roster.v1.changes_pb2 import Change
from service.auth.policy import GET_POST, GET_USER
from service.db.repository import Repository
from service.posts.convert import post_to_fields
from service.posts.repository import PostRepository
from service.users.convert import user_to_fields
from service.users.repository import UserRepository
from service.wire import Fields


@dataclass(frozen=True)
class Kind:
    """An entity in the feed: the fields of a Change that it has, and how its rows are read."""

    entity: Change.Entity.ValueType
    rpc: str  # a caller who may call it may see the entity
    field: str
    repository: type[Repository[Any, Any]]
    to_fields: Callable[[Iterable[Any]], Fields]

    @property
    def table(self) -> str:
        """The name of the table, as the log has it."""
        name: str = self.repository.model.__tablename__
        return name

    @property
    def deleted_field(self) -> str:
        return f"deleted_{self.field}_id"


KINDS = (
    Kind(Change.USERS, GET_USER, "user", UserRepository, user_to_fields),
    Kind(Change.POSTS, GET_POST, "post", PostRepository, post_to_fields),
)
ENTITIES = tuple(kind.entity for kind in KINDS)


def tables_of(entities: Collection[int]) -> list[str]:
    """Return the names of the tables of entities."""
    return [kind.table for kind in KINDS if kind.entity in entities]


def entity_of(change: Change) -> int:
    """Return the entity that a change is of."""
    name = change.WhichOneof("change")
    return next(kind.entity for kind in KINDS if name in (kind.field, kind.deleted_field))
