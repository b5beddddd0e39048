"""JSON values with something in them replaced, and texts that keep a parser busy."""

from hypothesis import strategies as st

NUMBERS = st.sampled_from(
    [0, -1, 1, 2**31, 2**62, 2**63, 10**400, 1e18, 1e30, 0.5, "9" * 5000, None, True, "", [], {}]
)

TEXTS = ["\0", "\ud800", "../x", "/etc/passwd", "a" * 5000, "[" * 10_000, '{"a":' * 10_000, "NaN"]


def damage(draw, value):
    """Return a JSON value with something in it replaced."""
    if isinstance(value, dict) and value and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(sorted(value)))
        if not draw(st.integers(0, 5)):
            return {name: item for name, item in value.items() if name != key}
        return value | {key: damage(draw, value[key])}
    if isinstance(value, list) and value and draw(st.integers(0, 1)):
        index = draw(st.integers(0, len(value) - 1))
        return [*value[:index], damage(draw, value[index]), *value[index + 1 :]]
    return draw(NUMBERS | st.sampled_from(TEXTS))


HANGING = r"(([a-z._0-9])+)+!"  # keeps `re` busy for years on a long name
