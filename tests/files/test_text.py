"""Values as text."""

from hypothesis import given
from hypothesis import strategies as st

from optimer_hf.files.text import html_table


@given(st.lists(st.text(), min_size=1, max_size=3))
def test_text_in_a_table_is_never_markup(cells):
    page = html_table(cells[0], cells, [cells])
    names = {"table", "caption", "thead", "tbody", "tr", "th", "td"}
    rest = page
    for name in names:
        rest = rest.replace(f"<{name}>", "").replace(f"</{name}>", "")
    assert "<" not in rest and ">" not in rest
