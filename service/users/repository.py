"""UserRepository: all SQL about users."""

from collections.abc import Sequence
from contextlib import suppress
from typing import ClassVar

from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError

from roster.errors import DatabaseUnavailable, EmailTaken, UserHasPosts, UserNotFound
from service.db.base import Column, Session, Values
from service.db.bulk.batch import Result
from service.db.bulk.table import BulkTable, Dependents, UniqueKey
from service.db.dialect import insert
from service.db.paging import ListQuery, Page, SortKey
from service.db.repository import Repository, SessionT
from service.db.selection import Row, Selection, columns_by_name, readable_columns
from service.posts.model import Post
from service.users.model import User
from service.users.newest_posts import add_newest_posts, add_newest_posts_of_shards, size_with_posts
from service.users.rules import email_spellings, normalise_email_part, other_spellings, stored_spellings

MAX_ATTEMPTS = 10  # to create a user whose e-mail others take and free again
CREDENTIALS: tuple[Column, ...] = (User.id, User.email, User.hashed_password, User.is_active)


class UserRepository(Repository[User, SessionT]):
    """Users."""

    model = User
    not_found = UserNotFound
    filterable = columns_by_name(User, "id", "email", "full_name", "is_active", "created_at", "updated_at")
    sortable: ClassVar = {
        "id": [User.id],
        "email": [User.email],
        "created_at": [User.created_at, User.id],
    }
    normalise: ClassVar = {"email": normalise_email_part}
    spellings: ClassVar = {"email": email_spellings}

    async def get_by_email(
        self, email: str, selection: Selection | None = None, others: Sequence[str] = ()
    ) -> Row:
        """Return the user with this normalised e-mail, otherwise with the first of the others.

        Raises UserNotFound.
        """
        *spellings, last = [email, *others]
        for spelling in spellings:
            with suppress(UserNotFound):
                return await self.get_by(User.email == spelling, selection=selection)
        return await self.get_by(User.email == last, selection=selection)

    async def list_active(self, *, after: SortKey | None = None, limit: int) -> Page[Row]:
        """Return a page of the active users, in id order."""
        return await self.page(ListQuery([User.is_active.expression], self.by_id(), after, limit))

    async def create(self: "UserRepository[Session]", values: Values) -> Row:
        """Insert a user; raises EmailTaken with the `existing_id`."""
        created = await self._insert(values)
        if created is None:
            raise email_taken(await self._owner(values["email"]))
        return created

    async def ensure(
        self: "UserRepository[Session]", values: Values, changes: Values | None
    ) -> tuple[Row, Result]:
        """Insert a user, or update the one who has the e-mail; without changes, only return that one.

        Raises DatabaseUnavailable if others keep creating and deleting the user.
        """
        for _ in range(MAX_ATTEMPTS):
            if created := await self._insert(values):
                return created, Result.CREATED
            for email in (values["email"], *other_spellings(values["email"])):
                existing = await self._write_by_email(email, changes)
                if existing:
                    return existing, Result.SKIPPED if changes is None else Result.UPDATED
            # The user has been deleted, or has got another e-mail, since the insert.
        raise DatabaseUnavailable("other writes keep conflicting with this user; nothing was done, try again")

    async def update(self: "UserRepository[Session]", id: int, changes: Values, version: int = 0) -> Row:
        """Update a user; raises the errors of the base class, and EmailTaken."""
        if "email" in changes:
            email = changes["email"]
            owner = await self._owner(email)
            if owner not in (None, id):
                raise email_taken(owner)
        try:
            return await super().update(id, changes, version)
        except IntegrityError:  # a concurrent write took the e-mail
            raise email_taken(None) from None

    async def replace_hash(self: "UserRepository[Session]", id: int, old: str, new: str) -> None:
        """Store a stronger hash of the same password, unless the password has been changed meanwhile."""
        await self.session.execute(
            update(User)
            .where(User.id == id, User.hashed_password == old)
            .values(hashed_password=new)
            .execution_options(synchronize_session=False)
        )

    async def _insert(self: "UserRepository[Session]", values: Values) -> Row | None:
        """Insert a user; return None if another one has the e-mail, in this spelling or another."""
        if await self._owner_of_spelling(values["email"]):
            return None
        statement = insert(self.session, User).values(**values).on_conflict_do_nothing()
        inserted = await self.session.execute(statement.returning(*self.basic().columns))
        return inserted.one_or_none()

    async def _write_by_email(
        self: "UserRepository[Session]", email: str, changes: Values | None
    ) -> Row | None:
        """Update the user with this e-mail, or lock it without changes; return None if there is none."""
        if changes is None:
            # The lock makes a deletion wait until the answer is stored, so that it erases that too. And it is
            # written to the log of PostgreSQL, so that the commit waits until the user is safe on a standby.
            locked = select(*self.basic().columns).where(User.email == email)
            found = await self.session.execute(locked.with_for_update(read=True, key_share=True))
        else:
            statement = self._update(changes).where(User.email == email)
            found = await self.session.execute(
                statement.returning(*self.basic().columns),
                execution_options={"synchronize_session": False},
            )
        return found.one_or_none()

    async def _owner(self, email: str) -> int | None:
        """Return the id of the user who has this e-mail, in this spelling or another."""
        return await self._id_by_email(email) or await self._owner_of_spelling(email)

    async def _owner_of_spelling(self, email: str) -> int | None:
        """Return the id of a user for whom an earlier release stored another spelling of this e-mail."""
        for spelling in other_spellings(email):
            if owner := await self._id_by_email(spelling):
                return owner
        return None

    async def _id_by_email(self, email: str) -> int | None:
        return await self.session.scalar(select(User.id).where(User.email == email))


def credentials_from_row(row: Row | None) -> tuple[int, str]:
    """Return id and hash of an active user with a password, otherwise (0, "")."""
    if row and row.is_active and row.hashed_password:
        return row.id, row.hashed_password
    return 0, ""


def email_taken(existing_id: int | None) -> EmailTaken:
    """Return the error for an e-mail that belongs to another user."""
    facts = {"existing_id": existing_id} if existing_id else {}
    return EmailTaken("email belongs to another user", field="email", **facts)


def user_has_posts() -> UserHasPosts:
    """Return the error for a user who is not to be deleted together with posts."""
    return UserHasPosts("the user has posts; delete those first")


USERS = BulkTable(
    User,
    UserRepository.missing,
    unique=[UniqueKey(User.email, email_taken, other_spellings=stored_spellings)],
    sort_by=User.email,
    dependents=Dependents(Post.author_id, user_has_posts),
)


# On Citus the posts are on several servers, and cut to the size of an answer once they have been read.
WITH_POSTS = Selection(
    User,
    readable_columns(User),
    size=size_with_posts(),
    add_related=add_newest_posts,
    related=Post,
    if_distributed=Selection(User, readable_columns(User), add_related=add_newest_posts_of_shards),
)
