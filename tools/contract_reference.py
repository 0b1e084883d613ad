"""Write the API reference, a Markdown page, from the protos and their comments.

`make reference` runs `python -m tools.contract_reference docs/reference.md`.
"""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    MethodDescriptorProto,
)

from clients.python.hatch_build import sources
from tools.contract_image import PROTOS, write_image

PAGE = Path(__file__).parents[1] / "docs/reference.md"
PACKAGE = ".roster.v1."
HEAD = (
    "# Reference\n\nGenerated from the [protos](../protos/roster/v1) by `make reference`. "
    "[The API](api.md) describes how to explore and call it.\n"
)
# Field numbers of descriptor messages; the path of a comment consists of them.
MESSAGES, SERVICES, SYNTAX = 4, 6, 12
FIELDS, NESTED_ENUMS, ONEOFS, METHODS, VALUES = 2, 4, 8, 2, 2


class Reference:
    """The section of the page about one proto file."""

    def __init__(self, file: FileDescriptorProto) -> None:
        self.file = file
        self._comments = {tuple(each.path): each.leading_comments for each in file.source_code_info.location}

    def lines(self) -> Iterator[str]:
        """Yield the comment of the file, then its services and its messages."""
        yield f"\n## {Path(self.file.name).name}\n"
        yield from self._text(SYNTAX)
        for number, service in enumerate(self.file.service):
            yield f"\n### {service.name}\n"
            yield from self._text(SERVICES, number)
            for position, method in enumerate(service.method):
                yield f"\n#### {service.name}.{method.name}\n"
                yield f"{signature(method)}\n"
                yield from self._text(SERVICES, number, METHODS, position)
        for number, message in enumerate(self.file.message_type):
            yield from self._message(message, number)

    def _message(self, message: DescriptorProto, number: int) -> Iterator[str]:
        yield f"\n### {message.name}\n"
        yield from self._text(MESSAGES, number)
        for position, oneof in enumerate(message.oneof_decl):
            # The oneofs that protoc creates for optional fields have no comment.
            if comment := self._sentence(MESSAGES, number, ONEOFS, position):
                yield f"\nExactly one field of `{oneof.name}` is set: {comment}"
        yield "\n| | field | type | |\n|---|---|---|---|"
        for position, field in enumerate(message.field):
            comment = self._sentence(MESSAGES, number, FIELDS, position)
            yield f"| {field.number} | `{field.name}` | {kind(field)} | {comment} |"
        for position, enum in enumerate(message.enum_type):
            yield from self._enum(message, enum, MESSAGES, number, NESTED_ENUMS, position)

    def _enum(self, message: DescriptorProto, enum: EnumDescriptorProto, *path: int) -> Iterator[str]:
        yield f"\n#### {message.name}.{enum.name}\n"
        yield from self._text(*path)
        yield "\n| | value | |\n|---|---|---|"
        for position, value in enumerate(enum.value):
            yield f"| {value.number} | `{value.name}` | {self._sentence(*path, VALUES, position)} |"

    def _text(self, *path: int) -> Iterator[str]:
        """Yield the lines of a comment; indented lines, which are tables and examples, become code blocks."""
        lines = [line.removeprefix(" ") for line in self._comments.get(path, "").splitlines()]
        inside = False
        for line, following in zip(lines, [*lines[1:], ""], strict=False):
            is_code = line.startswith("  ") or (inside and not line and following.startswith("  "))
            if is_code != inside:
                yield "```text" if is_code else "```"
            inside = is_code
            yield line.removeprefix("  ") if is_code else line
        if inside:
            yield "```"

    def _sentence(self, *path: int) -> str:
        """Return a comment as one cell of a table."""
        return re.sub(r"\s+", " ", self._comments.get(path, "")).strip().replace("|", "\\|")


def signature(method: MethodDescriptorProto) -> str:
    """Return the request and response types of an RPC, as links."""
    sides = [(method.client_streaming, method.input_type), (method.server_streaming, method.output_type)]
    takes, answers = (("stream of " if streams else "") + link(name) for streams, name in sides)
    return f"Takes {takes}, returns {answers}."


def kind(field: FieldDescriptorProto) -> str:
    """Return the type of a field, as a link if the contract defines it."""
    name = (
        link(field.type_name) if field.type_name else FieldDescriptorProto.Type.Name(field.type)[5:].lower()
    )
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {name}"
    return f"optional {name}" if field.proto3_optional else name


def link(name: str) -> str:
    """Return a link to the section of a type, or just the name of a type of protobuf itself."""
    if not name.startswith(PACKAGE):
        return f"`{name.removeprefix('.')}`"
    short = name.removeprefix(PACKAGE)
    return f"[{short}](#{short.lower().replace('.', '')})"


def page(protos: Path = PROTOS) -> str:
    """Return the page for the current protos."""
    with TemporaryDirectory() as folder:
        image = write_image(Path(folder) / "contract.binpb", protos, comments=True)
        found = {file.name: file for file in FileDescriptorSet.FromString(image.read_bytes()).file}
    files = sources(protos)
    files.sort(key=lambda name: "resources" not in name)  # first, since the others refer to them
    parts = ["\n".join(Reference(found[name]).lines()) for name in files]
    return re.sub(r"\n{3,}", "\n\n", "\n".join([HEAD, *parts, ""]))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the API reference from the protos.")
    parser.add_argument("out", type=Path)
    parser.parse_args().out.write_text(page())


if __name__ == "__main__":
    main()
