"""docs/how-to/27b.md has the plans that its script prints."""

import runpy
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_about_27b_has_what_its_script_plans(tmp_path: Path):
    script = runpy.run_path(str(ROOT / "benchmarks" / "plan_27b.py"))
    page = (ROOT / "docs" / "how-to" / "27b.md").read_text()
    plans = script["make_plans"](tmp_path)
    for title, plan in plans.items():
        assert textwrap.indent(script["show_plan"](plan), "    ") in page, title
    assert script["show_products"](plans["LoRA"]) in page
