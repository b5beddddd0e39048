"""pictures.py: a notebook shows the figures of a report, all of them or some by name."""

import base64
import io
import re
from html import unescape

import pytest
from matplotlib.image import imread

import optimer_hf as optimer
from optimer_hf.comparison.sealed import compare
from optimer_hf.errors import ConfigError
from optimer_hf.report import page
from optimer_hf.report.page import write_report
from optimer_hf.searching.loop import search
from optimer_hf.searching.runner import InProcess
from tests.support.landscapes import TellingPool, with_test


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    searched = search(
        with_test(), tmp_path_factory.mktemp("a") / "s", runner=InProcess(TellingPool)
    )
    compare(searched, pool=TellingPool)
    return searched


def pictures_in(html: str) -> list[bytes]:
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    return [base64.b64decode(text) for text in found]


def test_a_notebook_shows_every_figure_of_the_report_with_its_conclusion(study, tmp_path):
    panels = write_report(study, tmp_path / "r.html", figures=tmp_path / "figures")
    drawn = optimer.plot(study)
    assert drawn.names == ["answer", *(panel.name for panel in panels)]
    html = drawn._repr_html_()
    pictures = pictures_in(html)
    assert len(pictures) == html.count("<img ") == len(panels) + 1
    assert all(panel.conclusion in unescape(html) for panel in panels)
    for name, content in zip(drawn.names, pictures, strict=True):
        assert content == (tmp_path / "figures" / f"{name}.png").read_bytes(), name


def test_figures_are_drawn_by_their_names(study):
    drawn = optimer.plot(study, "weights", "progress")
    assert drawn.names == ["weights", "progress"]
    assert repr(drawn).startswith("Pictures('weights', 'progress')")
    (picture,) = pictures_in(optimer.plot(study.directory, "weights")._repr_html_())
    shown = imread(io.BytesIO(picture))
    assert shown.shape[1] > 1000 and (shown[0, 0] == 1).all()  # on white, in a dark notebook, too
    with pytest.raises(ConfigError, match=r"no figure 'weigths': .* answer, terms, .*weights, "):
        optimer.plot(study, "weigths")


def test_one_picture_is_saved_to_a_file_and_many_to_a_directory(study, tmp_path):
    one = optimer.plot(study, "weights")
    for suffix, begin in ((".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")):
        path = one.save(str(tmp_path / "new" / f"w{suffix}"))
        assert path.read_bytes().startswith(begin)
    (tmp_path / "v1.2").mkdir()
    for folder in (tmp_path / "figures", tmp_path / "v1.2"):
        optimer.plot(study, "weights", "answer").save(folder)
        assert {file.name for file in folder.iterdir()} == {"weights.png", "answer.png"}
    with pytest.raises(ConfigError, match=r"w\.jpg: expected .* \.png, \.svg, \.pdf"):
        one.save(tmp_path / "w.jpg")
    with pytest.raises(ConfigError, match=r"w\.png: is one file, and there are 7 pictures"):
        optimer.plot(study).save(tmp_path / "w.png")
    assert not (tmp_path / "w.jpg").exists() and not (tmp_path / "w.png").exists()


def test_vectors_are_read_only_if_their_cosines_are_named_or_known(study, monkeypatch):
    asked = []
    monkeypatch.setitem(page.MAKERS, "cosines", lambda evidence: asked.append(evidence))
    optimer.plot(study)
    assert asked == []
    with pytest.raises(ConfigError, match="no figure 'cosines'"):
        optimer.plot(study, "cosines")
    (study.directory / "geometry.json").touch()
    optimer.plot(study)
    (study.directory / "geometry.json").unlink()
    assert len(asked) == 2
