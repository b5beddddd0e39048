"""Change values in a YAML text and keep the rest of it: comments, order, quotes, anchors.

The parser says where each value stands in the text, so only the text of values that change is
replaced. (A round trip through ruamel.yaml would also write other spaces and line breaks.) The
result is read back; a text that does not read as it should is given up.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from optimer_hf.errors import ConfigError
from optimer_hf.files.reading import flow_text, parse_yaml

MERGE_KEY = "<<"


class _CannotEditError(Exception):
    """The text has no form that keeps what it should keep."""


def edit_yaml(text: str, data: Mapping[str, Any]) -> str | None:
    """Return a text that reads as `data` and differs from the given one, which `parse_yaml` reads
    as a mapping, only where a value does; None if there is none and the file has to be written
    anew. Lines end with a line feed alone, as Python reads them.
    """
    try:
        editor, root = _Editor(text), _root_of(text)
        editor.change(root, parse_yaml(text, "text"), dict(data))
        edited = editor.edited_text()
        return edited if _is_same(parse_yaml(edited, "text"), data) else None
    except (_CannotEditError, ConfigError, yaml.YAMLError, RecursionError):
        return None


def _is_same(one: Any, other: Any) -> bool:
    """Whether two values are equal and of one type: true is not 1."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_is_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        pairs = zip(one, other, strict=False)
        return len(one) == len(other) and all(_is_same(*pair) for pair in pairs)
    return type(one) is type(other) and bool(one == other)


# -- where the values stand ------------------------------------------------------------------------


@dataclass(eq=False)
class _Node:
    """A value in a text: text[start:end], with its anchor, without what follows it."""

    kind: str  # scalar, mapping, sequence or alias
    start: int
    end: int
    column: int
    anchor: str | None = None  # that it has or, of an alias, that it stands for
    value: str = ""  # of a scalar
    is_flow: bool = False
    pairs: list[tuple["_Node", "_Node"]] = field(default_factory=list)
    items: list["_Node"] = field(default_factory=list)


def _root_of(text: str) -> _Node:
    """Return the value of a text."""
    events: Iterator[Any] = iter(yaml.parse(text, Loader=yaml.SafeLoader))
    first: Any = next(event for event in events if isinstance(event, yaml.NodeEvent))
    return _read_node(first, events, text)


def _read_node(event: Any, events: Iterator[Any], text: str) -> _Node:
    first, last = _mark(event.start_mark), _mark(event.end_mark)
    start, end, column, anchor = first.index, last.index, first.column, event.anchor
    if isinstance(event, yaml.AliasEvent):
        return _Node("alias", start, end, column, anchor)
    if isinstance(event, yaml.ScalarEvent):
        end = start + len(text[start:end].rstrip())  # a block of text ends with its last line
        return _Node("scalar", start, end, column, anchor, event.value)
    kind = "mapping" if isinstance(event, yaml.MappingStartEvent) else "sequence"
    node = _Node(kind, start, end, column, anchor, is_flow=event.flow_style)
    children: list[_Node] = []
    for inner in events:
        if isinstance(inner, yaml.CollectionEndEvent):
            # the parser ends a block where the next value begins
            node.end = _mark(inner.end_mark).index if node.is_flow else children[-1].end
            break
        children.append(_read_node(inner, events, text))
    if kind == "mapping":
        node.pairs = list(zip(children[::2], children[1::2], strict=True))
    else:
        node.items = children
    return node


def _mark(mark: Any) -> Any:
    """Return a mark of an event, of which the stubs say that it may be None."""
    return mark


# -- what changes ----------------------------------------------------------------------------------


_ANCHOR = re.compile(r"&\S+\s+(#.*\s+)*(?=[^\s#])")  # with the comments behind it
_Change = tuple[int, int, str]  # text[start:stop] becomes the new text


class _Editor:
    """Collects the changes of a text."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._changes: list[_Change] = []
        self._anchored: dict[str, Any] = {}  # what each anchor stands for in the new text

    def edited_text(self) -> str:
        """Return the text with all changes."""
        text, end = self._text, len(self._text) + 1
        in_order = sorted(map(self._behind_dropped, self._changes), key=lambda each: each[:2])
        for start, stop, new in reversed(in_order):
            if stop > end:
                raise _CannotEditError
            text, end = text[:start] + new + text[stop:], start
        return text

    def _behind_dropped(self, change: _Change) -> _Change:
        """Return a change, but lines that are added inside of dropped ones behind them."""
        place, stop, new = change
        for start, end, other in self._changes:
            ends_line = self._text[:end].endswith("\n")
            if place == stop and other == "" and start < place < end + (not ends_line):
                return end, end, new.removeprefix("\n") + "\n" * ends_line
        return change

    def change(self, node: _Node, old: Any, new: Any) -> None:
        """Change the text of a value from `old` to `new`."""
        if node.kind == "alias":
            if node.anchor not in self._anchored or not _is_same(self._anchored[node.anchor], new):
                self._changes.append((node.start, node.end, flow_text(new)))
            return
        if node.kind == "mapping" and isinstance(new, Mapping) and new and node.pairs:
            self._change_mapping(node, old, new)
        elif node.kind == "sequence" and isinstance(new, list) and len(new) >= len(node.items) > 0:
            for item, one, other in zip(node.items, old, new, strict=False):
                self.change(item, one, other)
            if len(new) > len(node.items):
                self._append(node, new[len(node.items) :])
        elif not _is_same(old, new):
            self._replace(node, new)
        if node.anchor is not None:
            self._anchored[node.anchor] = new

    def _replace(self, node: _Node, new: Any) -> None:
        if node.kind == "scalar" and (kept := _ANCHOR.match(self._text, node.start, node.end)):
            self._changes.append((kept.end(), node.end, flow_text(new)))
            return
        anchor = "" if node.anchor is None else f"&{node.anchor} "
        line = self._text.rfind("\n", 0, node.start) + 1
        begins_line = node.kind == "sequence" and not self._text[line : node.start].strip()
        # behind `key:`, and where a list has no indentation
        space = " " if begins_line or node.start == node.end > 0 else ""
        self._changes.append((node.start, node.end, f"{space}{anchor}{flow_text(new)}"))

    def _change_mapping(self, node: _Node, old: Any, new: Mapping[str, Any]) -> None:
        merges = [value for key, value in node.pairs if key.value == MERGE_KEY not in old]
        inherited: dict[str, Any] = {}
        for value in reversed(merges):
            inherited |= self._inherit(value)
        given = {key.value for key, _ in node.pairs if key.kind == "scalar"} & old.keys()
        kept = [key.value in new or value in merges for key, value in node.pairs]
        is_all_text = len(given) + len(merges) == len(node.pairs)
        if not is_all_text or not any(kept) or inherited.keys() - given - new.keys():
            self._replace(node, new)  # nothing takes away what a merge key brings
            return
        for key, value in node.pairs:
            if value not in merges and key.value in new:
                self.change(value, old[key.value], new[key.value])
        self._drop(node, kept)
        added = {
            key: value
            for key, value in new.items()
            if key not in given and not (key in inherited and _is_same(inherited[key], value))
        }
        last = max(index for index, is_kept in enumerate(kept) if is_kept)
        self._add(node, node.pairs[last][1].end, added)

    def _inherit(self, value: _Node) -> dict[str, Any]:
        """Return what a merge key brings in the new text."""
        inherited: dict[str, Any] = {}
        for each in reversed(value.items or [value]):
            brought = self._anchored.get(each.anchor or "") if each.kind == "alias" else None
            if not isinstance(brought, dict):
                raise _CannotEditError
            inherited |= brought
        return inherited

    def _drop(self, node: _Node, kept: Sequence[bool]) -> None:
        """Take the pairs out that are not kept."""
        for index, (key, value) in enumerate(node.pairs):
            if kept[index]:
                continue
            later = [n for n in range(index + 1, len(kept)) if kept[n]]
            line = self._text.rfind("\n", 0, key.start) + 1
            if not node.is_flow and not self._text[line : key.start].strip():
                end = self._end_of_line(value.end, with_newline=True)
                self._changes.append((self._start_of_comments(line, key.column), end, ""))
            elif later:
                if index == 0 or kept[index - 1]:  # a run of pairs goes at once
                    self._changes.append((key.start, node.pairs[later[0]][0].start, ""))
            elif kept[index - 1]:
                before, last = node.pairs[index - 1][1], node.pairs[-1][1]
                self._changes.append((before.end, last.end, ""))

    def _add(self, node: _Node, end: int, added: Mapping[str, Any]) -> None:
        """Add pairs behind the value that ends at `end`."""
        if node.is_flow:
            new = "".join(f", {flow_text(key)}: {flow_text(added[key])}" for key in added)
        else:
            start = f"\n{' ' * node.pairs[0][0].column}"
            new = "".join(f"{start}{flow_text(key)}: {flow_text(added[key])}" for key in added)
            end = self._end_of_line(end)
        if new:
            self._changes.append((end, end, new))

    def _append(self, node: _Node, items: Sequence[Any]) -> None:
        """Add items at the end of a sequence."""
        if node.is_flow:
            end = node.items[-1].end
            new = "".join(f", {flow_text(item)}" for item in items)
        else:
            start = f"\n{' ' * node.column}- "
            end = self._end_of_line(node.end)
            new = "".join(f"{start}{flow_text(item)}" for item in items)
        self._changes.append((end, end, new))

    def _start_of_comments(self, line: int, column: int) -> int:
        """Return where the comments begin that stand in a column directly above a line."""
        above = self._text.rfind("\n", 0, max(line - 1, 0)) + 1
        if above < line and self._text[above:line].startswith(" " * column + "#"):
            return self._start_of_comments(above, column)
        return line

    def _end_of_line(self, place: int, *, with_newline: bool = False) -> int:
        """Return where the line ends that a value ends on."""
        newline = self._text.find("\n", place)
        if newline < 0:
            return len(self._text)
        return newline + with_newline
