"""Read untrusted YAML or JSON into plain values, or raise one ConfigError that names the line.

No file can make reading slow: its size, its depth and the number of values that its aliases stand
for are checked before any value is built.
"""

import functools
import json
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from optimer_hf.errors import ConfigError

LARGEST_YAML = 2**20  # bytes; people write these files
LARGEST_JSON = 2**26  # bytes; programs write these, and a record may hold the loss of every step
DEEPEST = 100  # levels
MOST_VALUES = 100_000  # in a YAML file, counting each value as often as aliases repeat it
LARGEST_WHOLE = 2**63 - 1
UNWRITABLE = re.compile("[\0\ud800-\udfff]")  # neither file names nor UTF-8 text can contain these
MERGE = "tag:yaml.org,2002:merge"
WHOLE = "tag:yaml.org,2002:int"

# libyaml is 5 times as fast
_Parser: Any = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML or JSON (`.json`) file.

    Raises ConfigError, with the line if possible, if the file is missing, not UTF-8, too large,
    nested too deeply, malformed, or not a mapping.
    """
    is_json = path.suffix == ".json"
    text = _text_of(path, LARGEST_JSON if is_json else LARGEST_YAML)
    data = _parse_json(text, path) if is_json else parse_yaml(text, path)
    if not isinstance(data, dict):
        found = "an empty file" if data is None else f"a {type(data).__name__}"
        raise ConfigError(f"{path}: found {found}, expected a mapping of fields to values.")
    return data


def read_json(path: Path) -> Any:
    """Return the value in a JSON file; raises the same ConfigErrors as `read_yaml`."""
    return _parse_json(_text_of(path, LARGEST_JSON), path)


def yaml_text(data: Mapping[str, Any], *, inline: bool = False) -> str:
    """Return data as YAML, which `read_yaml` reads back unchanged. With `inline`, a list or mapping
    that contains no other is written in one line.
    """
    flow = None if inline else False
    return yaml.dump(
        dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=flow
    )


def flow_text(value: Any) -> str:
    """Return a value as YAML that can stand anywhere in a line: {a: 1, b: [2, 3]}."""
    text = yaml.dump(
        [value],
        Dumper=_Dumper,
        default_flow_style=True,
        sort_keys=False,
        allow_unicode=True,
        width=float("inf"),
    )
    return str(text).strip()[1:-1]


def line_of(path: Path, location: Sequence[str | int]) -> int | None:
    """Return the line of a field in a YAML file that `read_yaml` accepts.

    If the field does not exist, return the line of its innermost parent that does, or None.
    """
    node, line = yaml.compose(path.read_text(encoding="utf-8-sig"), Loader=_Parser), None
    for part in location:
        inner = _inner(node, part)
        if inner is None:
            break
        line, node = inner
    return line


def _inner(node: yaml.Node | None, part: str | int) -> tuple[int, yaml.Node] | None:
    """Return the line and the node of a key or item in a YAML node."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value == str(part):
                return key.start_mark.line + 1, value
    elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        return node.value[part].start_mark.line + 1, node.value[part]
    return None


def _text_of(path: Path, largest: int) -> str:
    try:
        with open(path, "rb") as file:
            data = file.read(largest + 1)
        if len(data) <= largest:
            return data.decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file.") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: found a directory, expected a file.") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text ({error}).") from None
    raise ConfigError(f"{path}: has more than {largest:,} bytes. Expected a smaller file.")


# -- JSON ------------------------------------------------------------------------------------------


def _parse_json(text: str, path: Path) -> Any:
    try:
        data = json.loads(
            text,
            object_pairs_hook=functools.partial(_mapping_of_pairs, path),
            parse_int=_whole_number,
        )
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: not valid JSON. {error.msg}.") from None
    except RecursionError:
        raise ConfigError(f"{path}: is nested too deeply.") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON. {error}.") from None
    _refuse_unwritable(data, path)
    return data


def _mapping_of_pairs(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        seen: set[str] = set()
        key = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ConfigError(f"{path}: not valid JSON. key {key!r} is given twice.")
    return mapping


def _refuse_unwritable(data: Any, path: Path) -> None:
    waiting = [data]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str) and UNWRITABLE.search(value):
            raise ConfigError(f"{path}: not valid JSON. {_say_unwritable(value)}.")
        if isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list):
            waiting += value


def _whole_number(text: str) -> int:
    if len(text) > len(str(-LARGEST_WHOLE)) or abs(int(text)) > LARGEST_WHOLE:
        raise ValueError(f"a whole number of {len(text)} digits, expected at most {LARGEST_WHOLE}")
    return int(text)


def _say_unwritable(text: str) -> str:
    return f"found {text[:80]!r}, which holds a null byte or half a character"


# -- YAML ------------------------------------------------------------------------------------------


def parse_yaml(text: str, path: Path | str) -> Any:
    """Return the value in a YAML text; raises ConfigErrors that name `path`."""
    try:
        _refuse_deep_nesting(text)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _refuse_many_values(node)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark is not None else ""
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        if mark is not None and "\t" in _line_at(text, mark.line)[: mark.column + 1]:
            reason = "found a tab, expected spaces: YAML is indented with spaces only"
        raise ConfigError(f"{path}{line}: not valid YAML. {reason}.") from None
    except (yaml.YAMLError, ValueError) as error:  # a character that YAML does not allow
        raise ConfigError(f"{path}: not valid YAML. {' '.join(str(error).split())}.") from None
    except RecursionError:
        raise ConfigError(f"{path}: is nested too deeply.") from None


def _line_at(text: str, number: int) -> str:
    """Return line `number` of a text, counted from 0; empty after its end."""
    lines = text.splitlines()
    return lines[number] if number < len(lines) else ""


def _refuse_deep_nesting(text: str) -> None:
    """Raise YAMLError for more than DEEPEST levels, which would exhaust the stack."""
    depth = 0
    event: Any
    for event in yaml.parse(text, Loader=_Parser):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise yaml.MarkedYAMLError(
                problem=f"nested too deeply, expected at most {DEEPEST} levels",
                problem_mark=event.start_mark,
            )


def _refuse_many_values(root: yaml.Node) -> None:
    """Raise YAMLError if aliases stand for more than MOST_VALUES values, or for themselves."""
    sizes: dict[int, int | None] = {}  # id of a node -> its size; None while it is being counted

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = None
            sizes[id(node)] = 1 + sum(map(size, _children(node)))
        n_values = sizes[id(node)]
        if n_values is None or n_values > MOST_VALUES:
            problem = (
                "an alias stands for a value that contains the alias"
                if n_values is None
                else f"stands for more than {MOST_VALUES:,} values"
            )
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return n_values

    size(root)


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for pair in node.value:
            yield from pair
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


class _Loader(_Parser):
    """A safe loader that refuses duplicate keys and reads 2e-4 as a number.

    PyYAML silently overwrites duplicate keys. YAML 1.2 and JSON also read 2e-4 as a number.
    """

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._flat: set[int] = set()  # ids of the mappings whose merge keys are replaced already

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Return the value of a node; report any failure as an error on its line."""
        try:
            value = super().construct_object(node, deep)
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception as error:  # PyYAML converts a value as its tag says, without a check
            reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise _problem(node, f"this value is not a valid {node.tag} ({reason})") from None
        if isinstance(value, str) and UNWRITABLE.search(value):
            raise _problem(node, _say_unwritable(value))
        return value

    def construct_whole_number(self, node: yaml.ScalarNode) -> int:
        """Return an integer of at most 64 bits."""
        if len(node.value) > 4 * len(str(LARGEST_WHOLE)):  # 64 binary digits, 0b and underscores
            raise _problem(node, f"a whole number of {len(node.value)} digits")
        number: int = self.construct_yaml_int(node)
        if abs(number) > LARGEST_WHOLE:
            raise _problem(node, f"a whole number above {LARGEST_WHOLE}")
        return number

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Replace `<<` by the mapping it names; keys of this mapping take precedence."""
        if id(node) not in self._flat:
            self._flat.add(id(node))
            self._refuse_duplicates(node)
            super().flatten_mapping(node)

    def _refuse_duplicates(self, node: yaml.MappingNode) -> None:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == MERGE:
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # the loader reports it
            if key in seen:
                raise _problem(key_node, f"key {key!r} is given twice")
            seen.add(key)


def _problem(node: yaml.Node, text: str) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, text, node.start_mark)


class _Dumper(yaml.SafeDumper):
    """A safe dumper whose text _Loader reads back unchanged.

    It quotes text that _Loader would read as a number, and line breaks other than \\n, which would
    be folded.
    """

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = '"' if re.search("[\x85\u2028\u2029]", data) else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)
_Loader.add_constructor(WHOLE, _Loader.construct_whole_number)

for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
        [*"-+0123456789"],
    )
