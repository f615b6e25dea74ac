# SPDX-License-Identifier: Apache-2.0
"""Plain data out of YAML written by people: every trap of the format is named, none is followed.

YAML 1.1 lets a text of 200 bytes expand to gigabytes (anchors), keeps the last of two equal keys
without a word, and reads an unquoted ``2:4`` as the number 124.  A configuration file needs none
of it, so aliases, tags, merge keys and duplicate keys are refused here, with their line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from spikenm_fx.recipe.mistakes import Mistake, Path

__all__ = ["MAX_BYTES", "MAX_DEPTH", "StrictYaml", "load_strict_yaml"]

MAX_BYTES = 256 * 1024
"""A recipe is a page or two; anything larger is another kind of file."""

MAX_DEPTH = 24
"""Deeper nesting than any recipe needs, and far from Python's recursion limit."""

_PLAIN_TAGS = {
    f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map")
}


@dataclass(frozen=True, slots=True)
class StrictYaml:
    """What a text holds: ``data`` (None where unreadable), its ``mistakes``, and line numbers."""

    data: Any
    mistakes: tuple[Mistake, ...] = ()
    lines: Mapping[Path, int] = field(default_factory=dict)


def load_strict_yaml(text: str) -> StrictYaml:
    """Read ``text`` as one YAML document of plain mappings, lists and scalars.

    Never raises for bad text: all that is wrong with it comes back as mistakes.
    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        return StrictYaml(
            None, (Mistake((), f"larger than {MAX_BYTES // 1024} KiB: no recipe is"),)
        )
    tabs = tuple(_tab_mistakes(text))
    if tabs:
        return StrictYaml(None, tabs)
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        message = f"not text: character {error.character!r} at position {error.position}"
        return StrictYaml(None, (Mistake((), message),))
    try:
        node = loader.get_single_node()
        if node is None:
            return StrictYaml(None, (Mistake((), "the file is empty"),))
        lines = dict(_lines(node, ()))
        mistakes = tuple(_node_mistakes(node, ()))
        data = None if mistakes and _unreadable(node) else loader.construct_document(node)
    except _Refused as refused:
        return StrictYaml(None, (refused.mistake,))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(filter(None, (error.context, error.problem)))
        line = mark.line + 1 if mark is not None else None
        return StrictYaml(None, (Mistake((), f"not valid YAML: {problem}", line),))
    except (yaml.YAMLError, ValueError) as error:
        return StrictYaml(None, (Mistake((), f"not valid YAML: {error}"),))
    finally:
        loader.dispose()
    return StrictYaml(data, mistakes, lines)


class _Refused(Exception):
    def __init__(self, mistake: Mistake) -> None:
        super().__init__(mistake.message)
        self.mistake = mistake


class _Loader(yaml.SafeLoader):
    """SafeLoader that stops at the first alias and at unreasonable depth, before building nodes."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise _Refused(
                Mistake(
                    (),
                    f"*{event.anchor} is an alias; recipes have no anchors and aliases "
                    "(a few of them can expand to gigabytes): write the value out",
                    line,
                )
            )
        if self._depth >= MAX_DEPTH:
            raise _Refused(Mistake((), f"nested deeper than {MAX_DEPTH} levels", line))
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


def _tab_mistakes(text: str) -> Iterator[Mistake]:
    for number, line in enumerate(text.splitlines(), start=1):
        indent = line[: len(line) - len(line.lstrip())]
        if "\t" in indent and line.strip() and not line.lstrip().startswith("#"):
            yield Mistake((), "a tab indents this line; YAML indents with spaces only", number)


def _children(node: yaml.Node, path: Path) -> Iterator[tuple[Path, yaml.Node, yaml.Node]]:
    """``(path, child, node that carries the line)`` of each member of a mapping or list."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*path, str(key.value)), value, key
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*path, index), value, value


def _lines(node: yaml.Node, path: Path) -> Iterator[tuple[Path, int]]:
    if not path:
        yield (), node.start_mark.line + 1
    for child_path, child, carrier in _children(node, path):
        yield child_path, carrier.start_mark.line + 1
        yield from _lines(child, child_path)


def _node_mistakes(node: yaml.Node, path: Path) -> Iterator[Mistake]:
    line = node.start_mark.line + 1
    if node.tag not in _PLAIN_TAGS:
        yield Mistake(path, _tag_message(node), line)
    elif node.tag.endswith(":int") and ":" in str(node.value):
        yield Mistake(path, _base60_message(str(node.value)), line)
    if isinstance(node, yaml.MappingNode):
        yield from _key_mistakes(node, path)
    for child_path, child, _ in _children(node, path):
        yield from _node_mistakes(child, child_path)


def _key_mistakes(node: yaml.MappingNode, path: Path) -> Iterator[Mistake]:
    first: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            yield Mistake(path, "a key must be plain text, not a list or mapping", line)
        elif key.value in first:
            yield Mistake(
                (*path, key.value),
                f"the key {key.value!r} is given twice (first on line {first[key.value]}); "
                "YAML would silently keep the last: remove one",
                line,
            )
        elif key.tag not in _PLAIN_TAGS:
            yield Mistake(path, _tag_message(key), line)
        else:
            first[key.value] = line


def _tag_message(node: yaml.Node) -> str:
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    if kind == "timestamp":
        return f"{node.value} reads as a date; quote it: '{node.value}'"
    if kind == "merge":
        return "'<<' merges another mapping; recipes have no merge keys: write the keys out"
    return f"the tag !{kind} is not allowed; recipes hold plain text, numbers, lists and mappings"


def _base60_message(text: str) -> str:
    value = 0
    for part in re.sub(r"[+_]", "", text).lstrip("-").split(":"):
        value = value * 60 + int(part)
    return f"{text} without quotes is the number {value} in YAML (base 60): quote it, '{text}'"


def _unreadable(node: yaml.Node) -> bool:
    """Whether constructing would fail: a foreign tag or an unhashable key somewhere."""
    if node.tag not in _PLAIN_TAGS:
        return True
    if isinstance(node, yaml.MappingNode) and any(
        not isinstance(key, yaml.ScalarNode) or key.tag not in _PLAIN_TAGS for key, _ in node.value
    ):
        return True
    return any(_unreadable(child) for _, child, _ in _children(node, ()))
