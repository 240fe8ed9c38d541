"""A map of tasks as one HTML page that needs no network; hovering over a task shows its neighbours and layers."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Sequence

import numpy as np

from ..embedding import Embedding, escaped
from ..files import write_atomically
from .distance import ALPHA, distances_of, symmetric
from .plot import coordinates, family_style, layer_means

NEIGHBOURS = 5  # nearest tasks that are shown
SYMBOLS = ("circle", "square", "triangle-up", "diamond")  # Plotly's names of t2v_fast.analysis.plot.MARKERS

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 14px sans-serif; margin: 1em; display: flex; flex-wrap: wrap; gap: 1em; }}
h1 {{ font-size: 1.2em; width: 100%; margin: 0; }}
#map {{ flex: 3 1 34em; height: 40em; }}
#side {{ flex: 2 1 24em; }}
#layers {{ height: 20em; }}
</style>
<script>{plotly}</script>
</head>
<body>
<h1>{title}</h1>
<div id="map"></div>
<div id="side">
<p>Near tasks are alike. The axes mean nothing: the map shows distances as well as two dimensions can.</p>
<h2 id="task"></h2>
<p id="facts"></p>
<ol id="nearest"></ol>
<div id="layers"></div>
</div>
<script id="data" type="application/json">{data}</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const groups = data.families.map(family => data.tasks.map((t, k) => k).filter(k => data.tasks[k].family === family));
const traces = groups.map((members, g) => ({{
  type: "scatter", mode: "markers+text", name: data.families[g], customdata: members,
  x: members.map(k => data.tasks[k].x), y: members.map(k => data.tasks[k].y),
  text: members.map(k => data.tasks[k].label), textposition: "top center", textfont: {{size: 10}},
  marker: {{size: 10, color: data.colours[g], symbol: data.symbols[g]}}, hoverinfo: "text",
}}));
const axis = {{showticklabels: false, zeroline: false}};
Plotly.newPlot("map", traces, {{
  margin: {{l: 20, r: 20, t: 20, b: 20}}, hovermode: "closest", showlegend: data.families.length > 1,
  legend: {{orientation: "h"}}, xaxis: axis, yaxis: {{...axis, scaleanchor: "x"}},
}}, {{responsive: true, displaylogo: false}});
function show(k) {{
  const task = data.tasks[k];
  document.getElementById("task").textContent = task.name;
  document.getElementById("facts").textContent = task.facts;
  const list = document.getElementById("nearest");
  list.replaceChildren(...task.nearest.map(([other, distance]) => {{
    const item = document.createElement("li");
    item.textContent = `${{data.tasks[other].name}} (${{distance.toPrecision(3)}})`;
    return item;
  }}));
  const bars = {{type: "bar", x: data.layers.map((_, i) => i + 1), y: task.layers, hovertext: data.layers.map(escape),
    hoverinfo: "text+y", marker: {{color: "#0072B2"}}}};
  Plotly.react("layers", [bars], {{
    margin: {{l: 60, r: 10, t: 30, b: 40}}, title: {{text: "mean Fisher value of each layer", font: {{size: 13}}}},
    xaxis: {{title: {{text: "layer"}}}}, yaxis: {{type: "log", range: data.range, exponentformat: "power"}},
  }}, {{responsive: true, displayModeBar: false}});
}}
function escape(text) {{
  return text.replace(/[&<>]/g, c => ({{"&": "&amp;", "<": "&lt;", ">": "&gt;"}})[c]);
}}
document.getElementById("map").on("plotly_hover", event => show(event.points[0].customdata));
show(0);
</script>
</body>
</html>
"""


def write_map(
    embeddings: Sequence[Embedding],
    names: Sequence[str],
    path: str | os.PathLike,
    *,
    families: Sequence[str] | None = None,
    metric: str = "cosine",
    alpha: float = ALPHA,
    title: str = "Map of tasks",
) -> None:
    """Write a map of tasks to an HTML file of about 5 MB, which loads nothing from the network.

    The places of the tasks are their :func:`~t2v_fast.analysis.plot.coordinates`. Hovering over a task shows its
    nearest tasks and the mean Fisher value of each layer.

    Args:
        embeddings: T comparable embeddings, at least two.
        names: The names [T] of the tasks.
        path: The file to write.
        families: The family [T] of each task, which sets its colour and marker.
        metric: A name in :data:`t2v_fast.analysis.distance.ALL_METRICS`. An asymmetric distance is averaged with its
            mirror image.
        alpha: The weight of the complexity in the asymmetric distance.
        title: The title of the page.

    Raises:
        ValueError: For fewer than two tasks, and for infinite distances.
        FingerprintMismatch: If the embeddings cannot be compared.
        ImportError: Without plotly.
    """
    from plotly.offline import get_plotlyjs

    names, title = [escaped(name) for name in names], escaped(title)
    families = [escaped(family) for family in families] if families else None
    distances = symmetric(distances_of(embeddings, metric, alpha=alpha))
    places = coordinates(distances)
    layers = layer_means(embeddings)  # [T, L]
    kinds = sorted(set(families)) if families else ["tasks"]
    positive = layers[layers > 0]
    tasks = []
    for k, (name, embedding) in enumerate(zip(names, embeddings, strict=True)):
        others = [int(j) for j in np.argsort(distances[k], kind="stable") if j != k][:NEIGHBOURS]
        classes = len(embedding.meta.get("classes", [])) or "unknown"
        tasks.append(
            {
                "name": name,
                "label": html.escape(name),  # plotly reads its labels as HTML
                "family": families[k] if families else kinds[0],
                "facts": f"{embedding.num_examples} examples, classes: {classes}, norm {embedding.norm:.4g}",
                "x": float(places[k, 0]),
                "y": float(places[k, 1]),
                "nearest": [[j, float(distances[k, j])] for j in others],
                "layers": [v or None for v in layers[k].tolist()],  # a logarithmic axis has no zero
            }
        )
    styles = [family_style(k) for k in range(len(kinds))]
    data = {
        "tasks": tasks,
        "families": kinds,
        "colours": [colour for colour, _ in styles],
        "symbols": [SYMBOLS[marker] for _, marker in styles],
        "layers": [escaped(name) for name in embeddings[0].layer_names],
        "range": [float(np.log10(positive.min())) - 0.2, float(np.log10(positive.max())) + 0.2]
        if positive.size
        else [],
    }
    # Only "<" can end a script element or open a comment in it.
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    page = _PAGE.format(title=html.escape(title), plotly=get_plotlyjs(), data=text)
    write_atomically(path, page.encode())
