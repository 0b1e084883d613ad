"""The annotations of the contract are complete, and say what the server does."""

import ast
import re
from collections.abc import Collection, Iterator
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import protovalidate._gen.buf.validate.validate_pb as original
import pytest
from google.api.annotations_pb2 import http
from google.api.field_behavior_pb2 import (
    IDENTIFIER,
    IMMUTABLE,
    INPUT_ONLY,
    OPTIONAL,
    OUTPUT_ONLY,
    REQUIRED,
    field_behavior,
)
from google.api.field_info_pb2 import FieldInfo, field_info
from google.api.http_pb2 import HttpRule
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto
from google.protobuf.message import Message

from clients.python.hatch_build import RULES, describe
from roster.v1.posts_pb2 import CreatePostRequest
from roster.v1.resources_pb2 import Post, User
from roster.v1.users_pb2 import CreateUserRequest
from service.db.base import Entity, column_names
from service.posts import rules as posts
from service.posts.model import Post as PostModel
from service.posts.rules import CREATE_RULES
from service.services import RPCS
from service.users import rules as users
from service.users.model import User as UserModel
from tests.support.checks import VALID, is_refused
from tools.contract_image import PROTOS

CHECKOUT = Path(__file__).parents[2]
REQUESTS = {method.input_type for method in RPCS.values()}
UNARY = [method for method in RPCS.values() if not (method.client_streaming or method.server_streaming)]
COMPLETE = [method for method in RPCS.values() if not method.client_streaming]
RESOURCES = [(User, UserModel, users.RULES), (Post, PostModel, posts.RULES)]
# By the first word of a method: https://google.aip.dev/130
METHODS = {"Get": "get", "List": "get", "Create": "post", "Update": "patch", "Delete": "delete"}
PATH = re.compile(r"/v1(/[a-z][A-Za-z]*|/\{[a-z_.]+\})+(:[a-z][A-Za-z]*)?")


def sent(message: Descriptor, seen: set[str]) -> Iterator[FieldDescriptor]:
    """Yield the fields of a message and of the messages of the contract in it."""
    if message.full_name in seen or not message.full_name.startswith("roster."):
        return
    seen.add(message.full_name)
    for field in message.fields:
        yield field
        if field.message_type:
            yield from sent(field.message_type, seen)


FIELDS = {field.full_name: field for request in REQUESTS for field in sent(request, set())}


def behaviours(field: Any) -> list[Any]:
    return list(field.GetOptions().Extensions[field_behavior])


def names_of(resource: type[Message], *several: Any) -> set[str]:
    """Return the names of the fields of a resource that have one of several behaviours."""
    return {field.name for field in resource.DESCRIPTOR.fields if {*several} & {*behaviours(field)}}


def test_each_field_that_is_sent_has_a_behaviour() -> None:
    """Those of messages that are only returned need none: https://google.aip.dev/203."""
    one_of = {OUTPUT_ONLY, REQUIRED, OPTIONAL, IDENTIFIER}
    missing = [name for name, field in FIELDS.items() if len(one_of & {*behaviours(field)}) != 1]
    assert missing == []


@pytest.mark.parametrize("method", COMPLETE, ids=lambda method: method.name)
async def test_required_fields_are_those_without_which_a_request_is_refused(method: MethodDescriptor) -> None:
    """The others can be left out."""
    [request_type] = [known for known in VALID if method.input_type == known.DESCRIPTOR]
    for field in method.input_type.fields:
        if field.containing_oneof is None:
            request = request_type(**VALID[request_type])
            request.ClearField(field.name)
            assert await is_refused(request) is (REQUIRED in behaviours(field)), field.full_name


@pytest.mark.parametrize(("resource", "model", "rules"), RESOURCES, ids=["User", "Post"])
def test_fields_of_resources_are_read_and_written_as_annotated(
    resource: type[Message], model: type[Entity], rules: Collection[str]
) -> None:
    """`version` is a check, and `author_email` a key, so an update writes neither."""
    names = {*resource.DESCRIPTOR.fields_by_name}
    returned = {*column_names(model), "posts", "author"} & names
    assert names_of(resource, INPUT_ONLY) == names - returned
    not_updated = names_of(resource, OUTPUT_ONLY, IMMUTABLE, IDENTIFIER) | {"version", "author_email"}
    assert {*rules} == names - not_updated


def test_only_creates_write_immutable_fields() -> None:
    """The author of a post."""
    assert names_of(Post, IMMUTABLE) == CREATE_RULES.keys() - posts.RULES.keys()


async def test_creates_ignore_output_fields() -> None:
    """Whatever they contain."""
    user = User(email="ada@example.org", posts=[Post(id=-1)])
    user.created_at.seconds = user.updated_at.nanos = -1
    assert not await is_refused(CreateUserRequest(user=user))
    post = Post(author_id=7, title="Notes", author=User(email="?"))
    post.created_at.seconds = post.updated_at.nanos = -1
    assert not await is_refused(CreatePostRequest(post=post))


def test_request_ids_are_uuids() -> None:
    """Generated clients fill in fields of this format: https://google.aip.dev/client-libraries/4235."""
    formats = {field.name: field.GetOptions().Extensions[field_info].format for field in FIELDS.values()}
    assert [name for name in formats if formats[name]] == ["request_id"]
    assert formats["request_id"] == FieldInfo.UUID4


def test_secrets_are_redacted() -> None:
    """Passwords and hashes of passwords, wherever they are."""
    texts = [field for field in FIELDS.values() if field.type == FieldDescriptor.TYPE_STRING]
    redacted = {field.full_name for field in texts if field.GetOptions().debug_redact}
    assert redacted == {field.full_name for field in texts if "password" in field.name}


def bindings(method: MethodDescriptor) -> list[HttpRule]:
    """Return the ways to call an RPC over HTTP."""
    rule = method.GetOptions().Extensions[http]
    return [rule, *rule.additional_bindings] if method.GetOptions().HasExtension(http) else []


def verb_and_path(binding: HttpRule) -> tuple[str, str]:
    verb = binding.WhichOneof("pattern")
    assert verb
    return verb, getattr(binding, verb)


def test_unary_rpcs_have_paths() -> None:
    """Streams have none: bidirectional ones can't be called over HTTP/1.1."""
    assert [method.name for method in RPCS.values() if bindings(method)] == [method.name for method in UNARY]


@pytest.mark.parametrize("method", UNARY, ids=lambda method: method.name)
def test_paths_and_bodies_name_fields_of_the_request(method: MethodDescriptor) -> None:
    """With the verbs of https://google.aip.dev/130; GET and DELETE have no body."""
    for binding in bindings(method):
        verb, path = verb_and_path(binding)
        assert PATH.fullmatch(path)
        assert METHODS.get(re.findall("[A-Z][a-z]+", method.name)[0], verb) == verb
        assert (verb in ("post", "patch")) is bool(binding.body)
        assert binding.body in ("", "*", *method.input_type.fields_by_name)
        for variable in re.findall(r"\{(.*?)\}", path):
            field = _field(method.input_type, variable)
            assert field.message_type is None
            assert not field.is_repeated


def _field(message: Any, path: str) -> FieldDescriptor:
    first, _, rest = path.partition(".")
    field: FieldDescriptor = message.fields_by_name[first]
    return _field(field.message_type, rest) if rest else field


def test_no_two_rpcs_share_a_path() -> None:
    """Whatever the names of the variables."""
    used = [verb_and_path(binding) for method in UNARY for binding in bindings(method)]
    shapes = [(verb, re.sub(r"\{.*?\}", "*", path)) for verb, path in used]
    assert len(set(shapes)) == len(shapes)


@pytest.fixture(scope="module")
def image() -> dict[str, FileDescriptorProto]:
    """The files of the contract, with those that they import."""
    return {file.name: file for file in describe(PROTOS).file}


def test_rules_are_those_of_the_original(image: dict[str, FileDescriptorProto]) -> None:
    """Names, numbers and types, so that the tools of protovalidate read them."""
    code = ast.walk(ast.parse(Path(original.__file__).read_text()))
    literals = [
        node.value for node in code if isinstance(node, ast.Constant) and isinstance(node.value, bytes)
    ]
    theirs = FileDescriptorProto.FromString(max(literals, key=len))

    ours = image[RULES]
    assert (ours.name, ours.package) == ("buf/validate/validate.proto", theirs.package)
    assert {*_facts(ours)} <= {*_facts(theirs)}


def _facts(file: FileDescriptorProto) -> Iterator[tuple[Any, ...]]:
    """Yield what wire, JSON and text formats depend on."""
    yield from (("", extended.extendee, *_fact(extended)) for extended in file.extension)
    for message in file.message_type:
        yield from ((message.name, _oneof(message, field), *_fact(field)) for field in message.field)
    for enum in file.enum_type:
        yield from ((enum.name, value.name, value.number) for value in enum.value)


def _oneof(message: DescriptorProto, field: FieldDescriptorProto) -> str:
    return message.oneof_decl[field.oneof_index].name if field.HasField("oneof_index") else ""


def _fact(field: FieldDescriptorProto) -> tuple[Any, ...]:
    return field.name, field.number, field.type, field.type_name, field.label


def test_stubs_import_no_rules(image: dict[str, FileDescriptorProto]) -> None:
    """A caller need not install protovalidate; nor does the server."""
    assert [name for name in image if RULES in image[name].dependency]
    for path in (PROTOS / "roster/v1").glob("*_pb2*.py*"):
        assert not re.search(r"^(from|import) buf", path.read_text(), re.MULTILINE), path
    for folder in ("service", "clients/python/src"):
        for path in (CHECKOUT / folder).rglob("*.py"):
            assert "protovalidate" not in path.read_text(), path
    assert not [name for name in requires("roster-client") or [] if "protovalidate" in name]
