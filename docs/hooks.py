"""mkdocs hook: fills the tables of fields in reference/files.md from the published JSON Schemas.

`<!-- fields: study -->` becomes the table of study.yaml, `<!-- fields: study.Term -->` that of one
of its parts, and `<!-- fields: objective.Constraint beyond Term -->` only what Term does not have
alike. A table has a row for each field: name, type with bounds and unit, default, example, meaning.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SCHEMAS = Path(__file__).parents[1] / "optimer_hf" / "schemas"
MARKER = re.compile(r"<!-- fields: (\w+)(?:\.(\w+))?(?: beyond (\w+))? -->")
WORDS = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "true or false",
    "object": "mapping",
}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the markers of a page with tables."""
    return MARKER.sub(lambda marker: field_table(*marker.groups()), markdown)


def field_table(kind: str, part: str | None = None, known: str | None = None) -> str:
    """Return the Markdown table of a file's fields, or of one part's, without those that the part
    `known` has alike.
    """
    schema = json.loads((SCHEMAS / f"{kind}.json").read_text(encoding="utf-8"))
    model = schema if part is None else schema["$defs"][part]
    shown_elsewhere = {} if known is None else schema["$defs"][known]["properties"]
    rows = [
        (
            f"`{name}`",
            type_of(field) + (f" ({field['unit']})" if "unit" in field else ""),
            _default(name, field, model),
            ", ".join(f"`{_json(each)}`" for each in field["examples"]),
            _line(field["description"]),
        )
        for name, field in model["properties"].items()
        if field != shown_elsewhere.get(name)
    ]
    header = ["field", "type", "default", "example", "meaning"]
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    return "\n".join([*lines, *("| " + " | ".join(map(_cell, row)) + " |" for row in rows)])


def type_of(field: Mapping[str, Any]) -> str:
    """Return the type of a field in words, with its bounds and choices."""
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"[{name}](#{name})"
    if "anyOf" in field:
        options = [type_of(option) for option in field["anyOf"] if option.get("type") != "null"]
        return " or ".join(dict.fromkeys(options))
    if "const" in field or "enum" in field:
        values = field.get("enum", [field.get("const")])
        return ", ".join(f"`{_json(value)}`" for value in values)
    if field["type"] == "array":
        return _type_of_list(field)
    if isinstance(field.get("additionalProperties"), dict):
        return f"mapping of names to {type_of(field['additionalProperties'])}"
    word = "path" if field.get("format") == "path" else WORDS[field["type"]]
    return f"{word}{_bounds(field)}"


def _type_of_list(field: Mapping[str, Any]) -> str:
    if "prefixItems" not in field:
        return f"list of {type_of(field['items'])}"
    items = [type_of(item) for item in field["prefixItems"]]
    return f"two values: {items[0]}" if len(set(items)) == 1 else f"[{', '.join(items)}]"


def _bounds(field: Mapping[str, Any]) -> str:
    low, above = field.get("minimum"), field.get("exclusiveMinimum")
    high, below = field.get("maximum"), field.get("exclusiveMaximum")
    if above is not None and field["type"] == "integer":
        low, above = above + 1, None
    if below is not None and field["type"] == "integer":
        high, below = below - 1, None
    if low is not None and high is not None:
        return f", {_number(low)} to {_number(high)}"
    if above is not None and high is not None:
        return f", above {_number(above)} to {_number(high)}"
    return ""


def _default(name: str, field: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    if name in model.get("required", []):
        return "required"
    default = field.get("default")
    if isinstance(default, dict) and default:
        return "see there"  # the defaults of another table
    return "" if default is None else f"`{_json(default)}`"


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:g}"


def _line(text: str) -> str:
    return " ".join(text.split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
