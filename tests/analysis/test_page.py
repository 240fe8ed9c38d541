"""The map of tasks: one file that holds everything, and that a browser draws."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from embeddings import make

from t2v_fast import cli
from t2v_fast.analysis.distance import pdist
from t2v_fast.analysis.page import write_map
from t2v_fast.embedding import escaped

NAMES = ["plain", "</script><b>bold</b>", "a & b", "ünïcode", "fifth"]


class Elements(HTMLParser):
    """Elements with their attributes, and the text of the page's data."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.data = ""
        self.reading = False

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, dict(attributes)))
        self.reading = dict(attributes).get("id") == "data"

    def handle_endtag(self, tag: str) -> None:
        self.reading = False

    def handle_data(self, data: str) -> None:
        self.data += data if self.reading else ""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "map.html"
    embeddings = [make(name, k) for k, name in enumerate(NAMES)]
    embeddings[1].hessian[:2] = 0
    write_map(embeddings, NAMES, path, families=["x", "x", "y", "y", "<z>"], title="Tasks & <more>")
    return path


def test_everything_is_inside(page: Path) -> None:
    elements = Elements()
    elements.feed(page.read_text())
    for tag, attributes in elements.tags:
        assert tag not in ("link", "iframe", "img", "b"), tag  # no name became an element
        assert "src" not in attributes
        assert "href" not in attributes
    data = json.loads(elements.data)
    assert [task["name"] for task in data["tasks"]] == NAMES
    assert data["families"] == ["<z>", "x", "y"]
    embeddings = [make(name, k) for k, name in enumerate(NAMES)]
    embeddings[1].hessian[:2] = 0
    distances = pdist(embeddings)
    for k, task in enumerate(data["tasks"]):
        order = [j for j in np.argsort(distances[k]) if j != k]
        assert [j for j, _ in task["nearest"]] == order
        np.testing.assert_allclose([d for _, d in task["nearest"]], distances[k][order])
        want = [embeddings[k].layer(name).mean() for name in embeddings[k].layer_names]
        np.testing.assert_allclose([v or 0 for v in task["layers"]], want)


def test_names_that_hide_or_turn_text(tmp_path: Path) -> None:
    """Control characters and marks of direction are written as escapes, wherever a name goes."""
    names = ["\x1b[31mR\u202e", "a\u2066b", "<img src=x onerror=alert(1)>\x00"]
    layers = (("\u202estem", 0, 2), ("<b>\x07", 2, 5))
    embeddings = [make(name, k, layers=layers) for k, name in enumerate(names)]
    write_map(embeddings, names, tmp_path / "m.html", families=names, title="T\u202e\x1b")
    elements = Elements()
    elements.feed((tmp_path / "m.html").read_text())
    assert not any(tag in ("img", "b") for tag, _ in elements.tags)
    data = json.loads(elements.data)
    assert [task["name"] for task in data["tasks"]] == [escaped(name) for name in names]
    assert data["layers"] == [r"\u202estem", r"<b>\x07"]
    assert r"<title>T\u202e\x1b</title>" in (tmp_path / "m.html").read_text()
    assert not {"\x1b", "\x00", "\u202e", "\u2066"} & set(json.dumps(data, ensure_ascii=False))


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine")
def test_in_a_browser(page: Path, tmp_path: Path) -> None:
    """The map is drawn, and hovering over a task shows it, without any error and without a network."""
    hover = """<script>
    window.errors = [];
    window.addEventListener("error", e => window.errors.push(e.message));
    setTimeout(() => {
      const mark = document.querySelectorAll("#map .points .point")[2].getBoundingClientRect();
      const at = {clientX: mark.x + mark.width / 2, clientY: mark.y + mark.height / 2, bubbles: true};
      const target = document.querySelector("#map .nsewdrag");
      for (const kind of ["mouseover", "mousemove"]) target.dispatchEvent(new MouseEvent(kind, at));
      setTimeout(() => document.body.setAttribute("data-errors", JSON.stringify(window.errors)), 500);
    }, 1000);
    </script></body>"""
    other = tmp_path / "hover.html"
    other.write_text(page.read_text().replace("</body>", hover))
    found = subprocess.run(
        [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=10000",
            "--dump-dom",
            f"file://{other}",
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    ).stdout
    assert 'data-errors="[]"' in found
    body = found[found.index("<h1>") :]
    assert body.count('class="point') >= len(NAMES)  # marks of the map, bars of the profile
    # The third mark, under which the mouse was put: the second task of the second family.
    assert re.search(r'<h2 id="task">&lt;/script&gt;&lt;b&gt;bold', body)
    assert re.search(r'<ol id="nearest">(<li>[^<]*</li>){4}</ol>', body)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for k, name in enumerate(NAMES):
        make(name, k).save(tmp_path / f"{k}.safetensors")
    assert cli.main(["map", str(tmp_path), "--output", str(tmp_path / "m.html"), "--metric", "entropy"]) == 0
    assert (tmp_path / "m.html").stat().st_size > 1_000_000
    for kind in ("heatmap", "dendrogram", "map", "layers"):
        assert cli.main(["plot", str(tmp_path), "--kind", kind, "--output", str(tmp_path / f"{kind}.svg")]) == 0
        assert "<svg" in (tmp_path / f"{kind}.svg").read_text()
    assert cli.main(["plot", str(tmp_path), "--output", str(tmp_path / "x.gif")]) == 1
    assert "png or svg" in capsys.readouterr().err
