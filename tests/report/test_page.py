"""page.py: one page that stands alone, says what a study found, and is read on a phone."""

import io
import os
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest
from click.testing import CliRunner
from matplotlib.image import imread
from matplotlib.text import Text

from optimer_hf.cli import main
from optimer_hf.comparison.sealed import compare
from optimer_hf.comparison.sealed_file import read_comparison
from optimer_hf.report.answer import answer_of
from optimer_hf.report.captions import CARD_FIGURES, Captions
from optimer_hf.report.drawing import DARK, INK, PAPER
from optimer_hf.report.evidence import read_evidence
from optimer_hf.report.page import write_figures, write_report
from optimer_hf.scoring.formatting import Unit
from optimer_hf.scoring.scores import TermScore
from optimer_hf.searching.loop import search
from optimer_hf.searching.runner import InProcess
from optimer_hf.searching.trial import Scored
from optimer_hf.study.directory import load_study
from optimer_hf.study.trials import DecisionLog, TrialLog
from tests.support.landscapes import FunctionPool, TellingPool, config_of, failing_at, with_test

SVG, TITLE = "{http://www.w3.org/2000/svg}svg", "{http://www.w3.org/2000/svg}title"
FIGURES = ["terms", "sealed", "progress", "weights", "slices", "front"]
FILES = ["answer", *FIGURES]  # the page draws the first one as its first screen


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    searched = search(
        with_test(),
        tmp_path_factory.mktemp("report") / "a <b> & $c_1$",
        runner=InProcess(TellingPool),
    )
    compare(searched, pool=TellingPool)
    return searched


@pytest.fixture(scope="module")
def page(study, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("page") / "report.html"
    write_report(study, out)
    return out


def parse(page: Path) -> Element:
    """Return a page as a tree: it is well-formed XML, too."""
    return ElementTree.fromstring(page.read_text(encoding="utf-8").partition("\n")[2])


def text_of(element: Element | None) -> str:
    assert element is not None
    return " ".join("".join(element.itertext()).split())


def test_the_page_begins_with_the_answer_and_folds_the_diagnostics(page):
    tree = parse(page)
    header, main, footer = (tree.find(f"body/{tag}") for tag in ("header", "main", "footer"))
    assert header is not None and main is not None and footer is not None
    assert [text_of(title) for title in header.iter("h2")] == ["Weights", "Build it"]
    assert len(list(header.iter("h1"))) == 1
    sections = [(section.tag, section.get("id")) for section in main]
    assert sections == [
        ("section", "scores"),
        ("details", "rows"),
        ("section", "inputs"),
        *(("details", name) for name in ("search", "digests")),
    ]
    for section in main:
        assert len(section.findall("summary/h2") + section.findall("h2")) == 1


def test_every_figure_has_a_title_a_conclusion_and_a_text(page):
    figures = list(parse(page).iter("figure"))
    assert [figure.get("id") for figure in figures] == FIGURES
    for figure in figures:
        assert text_of(figure.find("figcaption/h3"))
        assert len(text_of(figure.find("figcaption/p"))) > 30
        assert len(figure.find(SVG).get("aria-label")) > 30


def test_marks_say_their_values_under_the_mouse(study, page):
    figures = {figure.get("id"): figure for figure in parse(page).iter("figure")}
    hints = {name: [text_of(t) for t in fig.iter(TITLE)] for name, fig in figures.items()}
    comparison = read_comparison(study)
    merge = Unit.of(comparison.objective).show(
        comparison.value(comparison.merge) - comparison.value(comparison.base)
    )
    assert any(hint.startswith(f"searched merge: {merge} [") for hint in hints["sealed"])
    assert sum(hint.startswith("trial ") for hint in hints["progress"]) == len(study.trials)
    assert {hint.partition(",")[0] for hint in hints["terms"]} == {"t", "u", "q"}


def test_the_page_loads_nothing_and_reads_without_its_script(page):
    tree = parse(page)
    text = page.read_text(encoding="utf-8")
    assert "@import" not in text and not re.findall(r"url\((?!#)", text)
    (script,) = tree.iter("script")
    assert not script.attrib
    assert not re.findall(r"\b(fetch|import|src|innerHTML|eval|XMLHttpRequest)\b", script.text)
    loading = [e for e in tree.iter() if {"src", "srcset", "data", "poster"} & e.attrib.keys()]
    assert loading == []
    assert [link.get("href") for link in tree.iter("link")] == ["data:,"]
    assert not [e for e in tree.iter() if any(name.startswith("on") for name in e.attrib)]
    assert {link.get("href").partition("/")[0] for link in tree.iter("a")} == {"https:"}
    script.text = ""
    assert not list(tree.iter("button"))
    assert all("hidden" not in element.attrib for element in tree.iter())


def test_names_are_escaped(page):
    assert text_of(parse(page).find("body/header/p/b")) == "a <b> & $c_1$"


def test_ids_are_unique_and_references_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert [name for name, n in Counter(ids).items() if n > 1] == []
    used = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text)
    assert used and {a or b for a, b in used} <= set(ids)


def test_the_same_study_gives_the_same_page(study, page, tmp_path):
    write_report(study, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_bytes() == page.read_bytes()


def test_the_conclusions_say_what_the_numbers_say(study, tmp_path):
    panels = {panel.name: panel for panel in write_report(study, tmp_path / "r.html")}
    comparison = read_comparison(study)
    assert comparison is not None
    merge, baselines = comparison.merge, [row for row in comparison.rows if row.is_baseline]
    answers = [comparison.interval(merge, row).answer for row in baselines]
    said = panels["sealed"].conclusion
    assert f"Of {len(baselines)} baselines" in said
    assert f"better than {answers.count('better')}" in said
    better = [
        label
        for label in comparison.base.scores
        if comparison.term_interval(comparison.merge, label).low > 0
    ]
    assert f"better in {', '.join(better)}" in panels["terms"].conclusion
    best = max(study.trials, key=study.value)
    assert f"The search score of trial {best.number} is" in panels["progress"].conclusion


def test_recorded_rows_are_those_that_compare_scored(study):
    again = compare(study, pool=lambda config: pytest.fail("nothing is left to score"))
    comparison = read_comparison(study)
    assert [row.title for row in comparison.rows] == [row.title for row in again.rows]
    assert [row.weights for row in comparison.rows] == [row.weights for row in again.rows]
    assert comparison.best_baseline() == again.best_baseline()
    assert comparison.base == again.base and comparison.merge == again.merge


def test_a_merge_that_was_not_scored_has_no_sealed_figure(study, tmp_path):
    empty = TrialLog(tmp_path / "trials.jsonl"), DecisionLog(tmp_path / "decisions.jsonl")
    longer = replace(study, log=empty[0], decisions=empty[1])
    longer.log.trials = [t for t in study.log.trials if t.fidelity == "search"][:4]
    longer.take_best_so_far()
    assert read_comparison(longer) is None
    assert "sealed" not in {panel.name for panel in write_report(longer, tmp_path / "r.html")}


def test_a_study_that_still_runs_has_a_report_that_says_so(study, tmp_path):
    shutil.copytree(study.directory, tmp_path / "s")
    lines = (study.directory / "trials.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "s" / "sealed.jsonl").unlink()
    (tmp_path / "s" / "trials.jsonl").write_text("".join(lines[:5]) + lines[5][:20])
    result = CliRunner().invoke(main, ["report", str(tmp_path / "s")])
    assert result.exit_code == 0, result.output
    page = (tmp_path / "s" / "report.html").read_text()
    assert "The search is not finished: 5 of 14 trials have run." in page
    assert "optimer build" not in page
    assert (tmp_path / "s" / "trials.jsonl").read_text().endswith(lines[5][:20])


def test_a_study_of_one_vector_has_a_report(tmp_path):
    config = config_of(
        vectors={"w": {"source": "/nowhere/w"}}, search={"n_trials": 5, "rescore_top": 0}
    )
    searched = search(config, tmp_path / "s", runner=InProcess(FunctionPool))
    panels = {panel.name: panel for panel in write_report(searched, tmp_path / "r.html")}
    assert "cosines" not in panels
    assert all(tick == int(tick) for tick in panels["progress"].figure.axes[0].get_xticks())


def test_weights_that_are_fixed_stand_beside_the_searched_ones(tmp_path):
    vectors = {
        "w": {"source": "/nowhere/w"},
        "x": {"source": "/nowhere/x", "fixed": 0.5},
    } | {name: {"source": f"/nowhere/{name}"} for name in "yz"}
    config = config_of(vectors=vectors, search={"n_trials": 6, "rescore_top": 0})
    searched = search(config, tmp_path / "s", runner=InProcess(FunctionPool))
    panels = {panel.name: panel for panel in write_report(searched, tmp_path / "r.html")}
    assert panels["progress"].conclusion.startswith("The last 5 trials raised the best score")
    assert "The study fixes in every trial: x 0.5." in panels["weights"].conclusion
    assert "The study fixes in every trial: x 0.5." in panels["weights"].shows


class LongNamedPool(FunctionPool):
    """Scores any number of weights, on terms of any names."""

    def score(self, weights, asked, *, gradients=False):
        loss = sum((weight - 0.3) ** 2 for weight in weights.values())
        items = [(3 + loss + noise, 1.0) for noise in (0.0, 0.1, 0.3)]
        scores = {each.label: TermScore(items, False) for each in asked}
        return Scored(scores, {"merge": 0.0, "evaluate": 0.0}, 10)


@pytest.mark.parametrize("fixed", [{}, {"u": 0.25, "v": 0.125}])
@pytest.mark.parametrize("free", ["w", "wxy"])
def test_no_text_of_a_figure_is_cut_off(tmp_path, fixed, free):
    vectors = {name: {"source": f"/nowhere/{name}"} for name in free} | {
        f"a-vector-with-a-long-name-{name}": {"source": f"/nowhere/{name}", "fixed": weight}
        for name, weight in fixed.items()
    }
    names = ["t", "a-term-with-a-name-of-many-letters"]
    config = config_of(
        vectors=vectors,
        objective={"terms": [{"task": "t", "name": name, "metric": "loss"} for name in names]},
        search={"n_trials": 5, "rescore_top": 0},
    )
    searched = search(config, tmp_path / "s", runner=InProcess(LongNamedPool))
    for panel in write_report(searched, tmp_path / "r.html"):
        panel.figure.draw_without_rendering()
        width, height = panel.figure.bbox.size
        ticks = [
            text
            for axes in panel.figure.axes
            for text in [*axes.get_xticklabels(), *axes.get_yticklabels()]
        ]  # some are beyond the limits, and not drawn
        for text in panel.figure.findobj(Text):
            if text.get_text() and text.get_visible() and text not in ticks:
                box = text.get_window_extent()
                assert box.x0 >= -1 and box.x1 <= width + 1, text
                assert box.y0 >= -1 and box.y1 <= height + 1, text


@pytest.mark.parametrize("combine", ["weighted_mean", "worst"])
def test_every_way_to_combine_terms_has_a_report(tmp_path, combine):
    config = with_test(search={"n_trials": 7, "rescore_top": 2})
    data = config.model_dump()
    for part in ("objective", "test"):
        data[part]["combine"] = combine
    searched = search(
        type(config).model_validate(data), tmp_path / "s", runner=InProcess(FunctionPool)
    )
    compare(searched, pool=FunctionPool)
    panels = {panel.name: panel for panel in write_report(searched, tmp_path / "r.html")}
    assert set(panels) == set(FIGURES)
    percent = " %" in panels["sealed"].shows
    assert percent == (combine == "worst")


def test_crashed_trials_and_constraints_leave_a_report(tmp_path):
    objective = {
        "terms": [{"task": name, "metric": "loss"} for name in "tu"],
        "constraints": [{"task": "q", "metric": "loss", "max_relative_to_base": 0.1}],
    }
    config = config_of(objective=objective, search={"n_trials": 9, "rescore_top": 2})
    pool = failing_at({7: RuntimeError("no")})
    searched = search(config, tmp_path / "s", runner=InProcess(pool))
    assert any(trial.status == "crashed" for trial in searched.log.trials_at("search"))
    assert write_report(searched, tmp_path / "r.html")


def test_an_empty_study_is_refused(study, tmp_path):
    (tmp_path / "s").mkdir()
    shutil.copy(study.directory / "study.json", tmp_path / "s")
    result = CliRunner().invoke(main, ["report", str(tmp_path / "s")])
    assert result.exit_code == 1 and "has no trial yet" in result.output
    with pytest.raises(Exception, match="not finished"):
        load_study(tmp_path / "s")


def size_and_colours(png: bytes) -> tuple[int, int, set[str]]:
    """Return the width, the height and the colours of a picture, as #rrggbb."""
    pixels = imread(io.BytesIO(png))
    whole = (255 * pixels.reshape(-1, pixels.shape[2])[:, :3]).round().astype(int)
    packed = whole @ [1 << 16, 1 << 8, 1]
    return pixels.shape[1], pixels.shape[0], {f"#{colour:06x}" for colour in set(packed.tolist())}


def test_figures_are_written_as_png(study, tmp_path):
    arguments = ["report", str(study.directory), str(tmp_path / "r.html")]
    result = CliRunner().invoke(main, [*arguments, "--figures", str(tmp_path / "figures")])
    assert result.exit_code == 0, result.output
    pictures = {path.stem: path.read_bytes() for path in (tmp_path / "figures").glob("*.png")}
    assert set(pictures) == {name + end for name in FILES for end in ("", "-dark")}
    for name, content in pictures.items():
        width, height, colours = size_and_colours(content)
        assert content.startswith(b"\x89PNG") and width == 1664 and height > 300
        paper, ink = (DARK[PAPER], DARK[INK]) if name.endswith("-dark") else (PAPER, INK)
        assert paper in colours and ink in colours
        assert not name.endswith("-dark") or PAPER not in colours
    record = Captions.read(tmp_path / "figures" / "captions.json")
    assert record.weights == study.best_trial.weights
    assert list(record.captions) == FILES
    answer, bars = record.captions["answer"], answer_of(read_evidence(study)).bars
    assert answer.conclusion == record.verdict
    assert all(f"{bar.label} {bar.text}" in answer.shows for bar in bars) and len(bars) == 2


def test_figures_of_a_card_are_the_same_bytes_whoever_draws_them(study, tmp_path):
    write_report(study, tmp_path / "r.html", figures=tmp_path / "with the page")
    for folder in ("once", "twice"):
        write_figures(study, tmp_path / folder)
    drawn = {path.name for path in (tmp_path / "once").glob("*.png")}
    shown = [name for name in FILES if name in CARD_FIGURES]
    assert drawn == {f"{name}{end}.png" for name in shown for end in ("", "-dark")}
    for name in drawn:
        contents = {path.read_bytes() for path in tmp_path.glob(f"*/{name}")}
        assert len(contents) == 1
        assert b"tEXt" not in contents.pop()[:200]  # the version of matplotlib


def read_again(study, tmp_path) -> tuple[str, bytes]:
    """Return what the report says of the cosines, and its page."""
    panels = {panel.name: panel for panel in write_report(study, tmp_path / "r.html")}
    return panels["cosines"].shows, (tmp_path / "r.html").read_bytes()


def test_a_second_report_reads_no_weights_and_a_changed_vector_is_read(
    make_base, make_tuned, tmp_path
):
    base = make_base("llama")
    for seed, name in enumerate("wxyz"):
        shutil.copytree(make_tuned(base, "llama", seed), tmp_path / name)
    vectors = {name: {"source": str(tmp_path / name)} for name in "wxyz"}
    search_of = {"n_trials": 7, "rescore_top": 2}
    config = config_of(base_model=str(base.path), vectors=vectors, search=search_of)
    study = search(config, tmp_path / "s", runner=InProcess(FunctionPool))
    first = read_again(study, tmp_path)
    assert str(tmp_path) not in first[1].decode()
    assert base.path.name in first[1].decode() and str(base.path) not in first[1].decode()
    for name in "wxyz":  # nothing can be read any more, and nothing has to be
        file = tmp_path / name / "model.safetensors"
        state = file.stat()
        (tmp_path / f"{name}.kept").write_bytes(file.read_bytes())
        file.write_bytes(bytes(state.st_size))
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert read_again(study, tmp_path) == first
    for name, other in zip("wxyz", "wxyy", strict=True):
        file = tmp_path / name / "model.safetensors"
        file.write_bytes((tmp_path / f"{other}.kept").read_bytes())
    assert "z, y +1.000" in read_again(study, tmp_path)[0]


# -- in a browser ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    selenium = pytest.importorskip("selenium.webdriver")
    binary = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("needs chromium and chromedriver (Debian: chromium, chromium-driver)")
    options = selenium.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    yield opened
    opened.quit()


def show(browser, page: Path, width: int, height: int, scheme: str = "light") -> None:
    """Open a page as a phone or a screen shows it."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(page.as_uri())
    assert browser.get_log("browser") == []


@pytest.mark.parametrize(("width", "height"), [(390, 844), (1440, 900)])
def test_the_first_screen_has_verdict_bars_weights_and_command(browser, page, width, height):
    show(browser, page, width, height)
    for part in ("h1", ".gains li:last-child", ".weights tr:last-child", ".command"):
        bottom = browser.execute_script(
            f"return document.querySelector('{part}').getBoundingClientRect().bottom"
        )
        assert 0 < bottom < height, part
    heights = "return [...document.querySelectorAll('details')].map(d => d.offsetHeight)"
    assert max(browser.execute_script(heights)) < 150


def test_a_click_on_a_head_sorts_a_table_and_another_turns_it_round(browser, page, study):
    show(browser, page, 1440, 900)
    browser.execute_script("document.querySelector('#search').open = true")
    numbers = (
        "return [...document.querySelectorAll('#search tbody tr')].map(r => +r.cells[0].innerText)"
    )
    values = {trial.number: study.value(trial) for trial in study.trials}
    assert browser.execute_script(numbers) == list(values)
    for turn in (True, False):
        browser.execute_script(
            "[...document.querySelectorAll('#search th button')]"
            ".find(b => b.innerText == 'search score').click()"
        )
        assert browser.execute_script(numbers) == sorted(values, key=values.get, reverse=turn)


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_all_of_it(browser, page, width, scheme):
    show(browser, page, width, 900, scheme)
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    boxes = browser.execute_script(
        "return [...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect())"
        ".map(b => [b.width, b.height, b.right])"
    )
    assert len(boxes) == len(FIGURES)
    assert all(w > 250 and h > 60 and right <= width for w, h, right in boxes)
    ends = browser.execute_script(
        "return [...document.querySelectorAll('caption')].map(c => c.getBoundingClientRect().right)"
    )
    assert ends and max(ends) <= width  # read without scrolling, however wide the table is
    ink, paper = browser.execute_script(
        "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
    )
    brightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, paper)]
    assert (brightness[0] > brightness[1]) == (scheme == "dark")
    text_ink = browser.execute_script(
        "return getComputedStyle(document.querySelector('figure svg text')).fill"
    )
    assert text_ink == ink
    sizes = browser.execute_script(
        "return [...document.querySelectorAll('figure svg')].map(s => s.getScreenCTM().a * 9.5)"
    )
    assert min(sizes) > 8.5  # pixels, of the smallest text
