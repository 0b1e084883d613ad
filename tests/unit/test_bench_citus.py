"""The pure parts of `make bench-citus`."""

from bench.citus_calls import Rows, find_method
from bench.citus_plans import Plan, read_plan
from roster.v1.posts_pb2 import ListPostsRequest
from roster.v1.users_pb2 import DeleteUserRequest

EXPLAINED = """
Custom Scan (Citus Adaptive) (actual rows=1 loops=1)
  ->  Distributed Subplan 7_1
        ->  Custom Scan (Citus Adaptive) (actual rows=320032 loops=1)
              Task Count: 32
              Tuple data received from nodes: 2500 kB
              Tasks Shown: One of 32
              ->  Task
                    Tuple data received from node: 78 kB
                    ->  Seq Scan on posts_102022 posts (actual rows=10001 loops=1)
  Task Count: 1
  Tuple data received from nodes: 512 bytes
""".splitlines()


def test_reads_plan_of_all_steps() -> None:
    """Sums the tasks and the bytes of all steps, for each unit of a call."""
    assert Plan(1, 33, ["posts"], 2500.5) == read_plan(EXPLAINED, 1)
    assert Plan(1.5, 16.5, ["posts"], 1250.25) == read_plan(EXPLAINED, 3, units=2)


def test_finds_method_at_start_of_name() -> None:
    """Every name begins with a method."""
    assert find_method("ListPosts, newest first") == ("/roster.v1.PostService/ListPosts", ListPostsRequest)
    assert find_method("DeleteUser with 20 posts") == ("/roster.v1.UserService/DeleteUser", DeleteUserRequest)


def test_writes_change_different_posts() -> None:
    """A call never changes or deletes a row that another deletes, in nine rounds."""
    rows = Rows(20_000)
    fields = {write.name: write.fields for write in rows.writes()}
    streams = {stream.name: stream.rows for stream in rows.streams()}
    updated = {fields["UpdatePost"](number)["post"].id for number in range(rows.posts)}
    deleted = [fields["DeletePost"](number)["id"] for number in range(1000)]
    deleted += [key.id for number in range(9) for key in streams["BulkDeletePosts"](number)]
    with_author = range(1, rows.posts // 10 + 1)
    assert len(deleted) == len(set(deleted))
    assert updated.isdisjoint(deleted)
    assert updated.isdisjoint(with_author)
    assert {post.id for post in streams["BulkUpdatePosts"](0)} <= updated
