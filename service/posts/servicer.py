"""PostService: posts by id, one at a time, in pages, and in bulk."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from google.protobuf.empty_pb2 import Empty
from sqlalchemy import ColumnElement

from roster.v1 import posts_pb2 as pb
from roster.v1.bulk_pb2 import BulkWriteResponse
from roster.v1.posts_pb2_grpc import PostServiceServicer
from roster.v1.resources_pb2 import Post as PostMessage
from service.auth.policy import GET_POST, GET_USER
from service.auth.views import View, Views, limit_to_written
from service.bulk.operation import Kind, Operation
from service.bulk.stream import BulkStreams
from service.changes.export import Exports
from service.db.engine import Database
from service.db.reads import Reader
from service.idempotency import Writer
from service.interceptors.chain import Context
from service.posts.convert import (
    POST_ENCODER,
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
from service.posts.repository import POSTS, WITH_AUTHOR, PostRepository
from service.validation import check_id, check_ids
from service.wire import at_most_from_request, missing_ids

CREATE_POSTS = Operation(
    pb.BulkCreatePostsRequest,
    POSTS,
    post_batch_from_messages,
    WRITABLE,
    create_only=("author_id",),
)
UPDATE_POSTS = Operation(
    pb.BulkUpdatePostsRequest, POSTS, post_batch_from_messages, WRITABLE, kind=Kind.UPDATE
)
DELETE_POSTS = Operation(pb.BulkDeletePostsRequest, POSTS, post_batch_from_messages, (), kind=Kind.DELETE)
BASIC = View(PostRepository.basic(), post_to_fields, POST_ENCODER)
VIEWS = Views(
    PostMessage.View,
    {
        PostMessage.BASIC: BASIC,
        PostMessage.WITH_AUTHOR: View(WITH_AUTHOR, post_with_author_to_fields, needs=GET_USER),
    },
)


class PostServicer(PostServiceServicer):
    """PostService: posts by id, one at a time, in pages, and in bulk."""

    def __init__(self, database: Database, reader: Reader, bulk: BulkStreams, exports: Exports) -> None:
        self.database = database
        self.reader = reader
        self.writer = Writer(database, PostRepository, PostMessage, post_to_message)
        self.bulk = bulk
        self.exports = exports

    async def CreatePost(self, request: pb.CreatePostRequest, context: Context) -> PostMessage:
        return await self.writer.create(request, post_from_message(request.post))

    async def GetPost(self, request: pb.GetPostRequest, context: Context) -> PostMessage:
        id = check_id(request.id)
        view = VIEWS.get(request.view)
        if view is BASIC:
            return post_to_message(await self.reader.get(id))
        post = await self.reader.read(lambda session: PostRepository(session).get(id, view.selection))
        return PostMessage(**view.to_fields(post))

    async def BatchGetPosts(self, request: pb.BatchGetPostsRequest, context: Context) -> Any:
        ids = check_ids(request.ids)
        view = VIEWS.get(request.view)
        found = await self.reader.get_many(ids, view.selection)
        response = pb.BatchGetPostsResponse(**missing_ids(ids, found))
        return await view.response([post for post in found if post], response, response.posts)

    async def ListPosts(self, request: pb.ListPostsRequest, context: Context) -> Any:
        author_id = author_id_from_request(request)
        query = await self.reader.list_query(request, *_scope(author_id), scope_key=author_id)
        view = VIEWS.get(request.view)
        page = await self.reader.page(query, view.selection)
        response = pb.ListPostsResponse(next_page_token=query.next_token(page))
        return await view.response(page.rows, response, response.posts)

    async def CountPosts(self, request: pb.CountPostsRequest, context: Context) -> pb.CountPostsResponse:
        scope, at_most = _scope(author_id_from_request(request)), at_most_from_request(request)
        return pb.CountPostsResponse(**await self.reader.count(request.filter, *scope, at_most=at_most))

    async def UpdatePost(self, request: pb.UpdatePostRequest, context: Context) -> PostMessage:
        update = post_update_from_request(request)
        updated = await self.writer.update(request, update)
        return limit_to_written(updated, update.changes, reads=GET_POST)

    async def DeletePost(self, request: pb.DeletePostRequest, context: Context) -> Empty:
        return await self.writer.delete(request)

    def BulkCreatePosts(
        self, requests: AsyncIterator[pb.BulkCreatePostsRequest], context: Context
    ) -> AsyncIterator[BulkWriteResponse]:
        return self.bulk.run(requests, CREATE_POSTS)

    def BulkUpdatePosts(
        self, requests: AsyncIterator[pb.BulkUpdatePostsRequest], context: Context
    ) -> AsyncIterator[BulkWriteResponse]:
        return self.bulk.run(requests, UPDATE_POSTS)

    def BulkDeletePosts(
        self, requests: AsyncIterator[pb.BulkDeletePostsRequest], context: Context
    ) -> AsyncIterator[BulkWriteResponse]:
        return self.bulk.run(requests, DELETE_POSTS)

    async def ExportPosts(self, request: pb.ExportPostsRequest, context: Context) -> AsyncIterator[Any]:
        responses = self.exports.run(self.reader, POST_ENCODER, pb.ExportPostsResponse, request)
        async with aclosing(responses):
            async for response in responses:
                yield response


def _scope(author_id: int) -> list[ColumnElement[bool]]:
    """Return the conditions that restrict posts to those of an author; none if the id is 0."""
    return [Post.author_id == author_id] if author_id else []
