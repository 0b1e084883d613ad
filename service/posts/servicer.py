"""PostService: posts by id, one at a time, in pages, and in bulk."""

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from google.protobuf.empty_pb2 import Empty
from sqlalchemy.ext.asyncio import AsyncSession

from roster.v1 import posts_pb2 as pb
from roster.v1.bulk_pb2 import BulkWriteResponse
from roster.v1.posts_pb2_grpc import PostServiceServicer
from roster.v1.resources_pb2 import Post as PostMessage
from service.auth.policy import GET_POST, GET_USER
from service.auth.views import View, as_written
from service.bulk.operation import Operation
from service.bulk.streams import BulkStreams
from service.db.engine import Database
from service.db.listing import Listing, batches
from service.idempotency import idempotent
from service.interceptors.around import Context
from service.posts.convert import (
    WRITABLE,
    author_id_from_request,
    post_batch_from_messages,
    post_from_message,
    post_to_fields,
    post_to_message,
    post_update_from_request,
    post_with_author_to_fields,
)
from service.posts.model import Post
from service.posts.reader import PostReader
from service.posts.repository import FILTERABLE, SORTABLE, PostRepository
from service.timeslice import add_in_slices
from service.validation import check_id, check_ids
from service.wire import deleted_to_message, deletion_from_request, export_from_request

CREATE_POSTS = Operation(
    method="roster.v1.PostService.BulkCreatePosts",
    request=pb.BulkCreatePostsRequest,
    rows="posts",
    fields=(*WRITABLE, "author_id"),
    writable=WRITABLE,
    read=post_batch_from_messages,
    model=Post,
    write=lambda session, batch, options: PostRepository(session).create_many(batch, options),
)
UPDATE_POSTS = Operation(
    method="roster.v1.PostService.BulkUpdatePosts",
    request=pb.BulkUpdatePostsRequest,
    rows="posts",
    fields=("id", "version"),
    writable=WRITABLE,
    read=post_batch_from_messages,
    model=Post,
    write=lambda session, batch, options: PostRepository(session).update_many(batch, options),
    is_update=True,
)
WITH_AUTHOR = View(PostMessage.View, PostMessage.WITH_AUTHOR, needs=GET_USER)
LISTING = Listing("posts", FILTERABLE, SORTABLE)


class PostServicer(PostServiceServicer):
    """PostService: posts by id, one at a time, in pages, and in bulk."""

    def __init__(self, database: Database, reader: PostReader, bulk: BulkStreams) -> None:
        self.database = database
        self.reader = reader
        self.bulk = bulk

    async def CreatePost(self, request: pb.CreatePostRequest, context: Context) -> PostMessage:
        values = post_from_message(request.post)
        return await idempotent(
            self.database,
            request,
            PostMessage,
            lambda session: PostRepository(session).create(values),
            post_to_message,
        )

    async def GetPost(self, request: pb.GetPostRequest, context: Context) -> PostMessage:
        id = check_id(request.id)
        if not WITH_AUTHOR.is_asked(request.view):
            return PostMessage(**post_to_fields(await self.reader.get(id)))
        async with self.database.read() as session:
            post = await PostRepository(session, with_author=True).get(id)
        return post_to_message(post, with_author=True)

    async def BatchGetPosts(
        self, request: pb.BatchGetPostsRequest, context: Context
    ) -> pb.BatchGetPostsResponse:
        ids = check_ids(request.ids)
        with_author = WITH_AUTHOR.is_asked(request.view)
        async with self.database.read() as session:
            found = await _repository(session, with_author=with_author).get_many(ids)
        response = pb.BatchGetPostsResponse(
            missing_ids=[id for id, post in zip(ids, found, strict=False) if not post],
            remaining_ids=ids[len(found) :],
        )
        await add_in_slices(
            response.posts, _fields_of(with_author=with_author), [post for post in found if post]
        )
        return response

    async def ListPosts(self, request: pb.ListPostsRequest, context: Context) -> pb.ListPostsResponse:
        author_id = author_id_from_request(request)
        scope = [Post.author_id == author_id] if author_id else []
        query = await LISTING.query(request, *scope, scope_key=author_id)
        with_author = WITH_AUTHOR.is_asked(request.view)
        async with self.database.read() as session:
            posts, token = await query.page(_repository(session, with_author=with_author))
        response = pb.ListPostsResponse(next_page_token=token)
        await add_in_slices(response.posts, _fields_of(with_author=with_author), posts)
        return response

    async def UpdatePost(self, request: pb.UpdatePostRequest, context: Context) -> PostMessage:
        update = post_update_from_request(request)
        updated = await idempotent(
            self.database,
            request,
            PostMessage,
            lambda session: PostRepository(session).update(update.id, update.changes, update.version),
            post_to_message,
        )
        return as_written(updated, update.changes, reads=GET_POST)

    async def DeletePost(self, request: pb.DeletePostRequest, context: Context) -> Empty:
        id, version = deletion_from_request(request)
        return await idempotent(
            self.database,
            request,
            Empty,
            lambda session: PostRepository(session).delete(id, version),
            deleted_to_message,
        )

    async def BulkCreatePosts(
        self, requests: AsyncIterator[pb.BulkCreatePostsRequest], context: Context
    ) -> AsyncIterator[BulkWriteResponse]:
        async with aclosing(self.bulk.run(requests, CREATE_POSTS)) as events:
            async for event in events:
                yield event

    async def BulkUpdatePosts(
        self, requests: AsyncIterator[pb.BulkUpdatePostsRequest], context: Context
    ) -> AsyncIterator[BulkWriteResponse]:
        async with aclosing(self.bulk.run(requests, UPDATE_POSTS)) as events:
            async for event in events:
                yield event

    async def ExportPosts(
        self, request: pb.ExportPostsRequest, context: Context
    ) -> AsyncIterator[pb.ExportPostsResponse]:
        conditions = await LISTING.conditions(request.filter)
        after_id, limit = export_from_request(request)
        rows = batches(self.database, PostRepository, conditions, after_id, limit)
        async with aclosing(rows):
            async for posts in rows:
                yield pb.ExportPostsResponse(posts=map(post_to_fields, posts), last_id=posts[-1].id)


def _repository(session: AsyncSession, *, with_author: bool) -> PostRepository:
    """Return what reads entities where the view needs them, otherwise columns."""
    repository = PostRepository(session, with_author=with_author)
    return repository if with_author else repository.as_columns()


def _fields_of(*, with_author: bool) -> Callable[[Any], dict[str, Any]]:
    return post_with_author_to_fields if with_author else post_to_fields
