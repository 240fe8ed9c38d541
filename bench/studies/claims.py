"""The paper's qualitative claims about embeddings, measured on the tasks of bench/studies/meta_task.py.

    python -m bench.studies.claims [--output build/claims] [--write docs/selection.md]

Achille et al., 2019, sections 3 and 5.1: the embedding does not depend on the names of the labels, distances follow the
taxonomy of tasks, and the norm follows their difficulty. The study also shows the effect of the size of the data set.
It uses the embeddings that bench/studies/meta_store.py keeps.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from scipy.stats import rankdata, spearmanr

from bench.pages import markdown, replace_section
from bench.studies.meta_store import EXPERTS, ROOT, Results, Settings, Store, fill
from bench.studies.meta_task import TRAIN, MetaTask, meta_tasks
from t2v_fast import Embedding, Task2Vec, load_probe
from t2v_fast.analysis.distance import complexity, pdist

PERMUTED = ("MNIST digits", "Hebrew", "faces")
SIZED = ("MNIST digits", "Thai", "bold or regular", "animals")
SIZES = (40, 80, 160, 320)


def taxonomic(families: Sequence[str], domains: Sequence[str]) -> np.ndarray:
    """Steps up the tree of tasks to a common ancestor [T, T]: 0 itself, 1 the family, 2 the domain, 3 everything."""
    family, domain = np.unique(families, return_inverse=True)[1], np.unique(domains, return_inverse=True)[1]
    out = 3 - (domain[:, None] == domain).astype(int) - (family[:, None] == family)
    np.fill_diagonal(out, 0)
    return out


def auc(distances: np.ndarray, families: np.ndarray) -> float:
    """How often a pair of one family is nearer than a pair of two, of all such pairs of pairs; ties count half."""
    upper = np.triu_indices(len(distances), 1)
    d, same = distances[upper], families[upper[0]] == families[upper[1]]
    ranks = rankdata(d)
    inside, outside = int(same.sum()), int((~same).sum())
    return float(1 - (ranks[same].sum() - inside * (inside + 1) / 2) / (inside * outside))


def nearest_in_family(distances: np.ndarray, families: np.ndarray) -> np.ndarray:
    """For each task [T] whether its nearest other task is of its family."""
    nearest = (distances + np.diag(np.full(len(distances), np.inf))).argmin(1)
    return families[nearest] == families


def interval_over_tasks(
    statistic: Callable[[np.ndarray], float], tasks: int, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 percent bootstrap interval of ``statistic`` (of task indices): tasks are drawn again, not pairs.

    Pairs of a task with its own copy are no pairs; a statistic leaves them out by taking each task drawn once only.
    """
    rng = np.random.default_rng(seed)
    values = [statistic(np.unique(rng.integers(tasks, size=tasks))) for _ in range(resamples)]
    low, high = np.nanquantile(values, [0.025, 0.975])
    return float(low), float(high)


def with_interval(statistic: Callable[[np.ndarray], float], tasks: int) -> str:
    low, high = interval_over_tasks(statistic, tasks)
    return f"{statistic(np.arange(tasks)):.3f} ({low:.3f} to {high:.3f})"


def taxonomy_section(results: Results) -> str:
    """Distances against the tree of tasks, for several metrics and the mean feature."""
    families = np.array(results.families)
    tree = taxonomic(results.families, results.domains)
    means = results.mean_features - results.mean_features.mean(0)
    unit = means / np.linalg.norm(means, axis=1, keepdims=True)
    matrices = {f"Task2Vec, {m}": pdist(results.embeddings, m) for m in ("cosine", "entropy", "plain_cosine")}
    # Some filters are dead in one task and not in another: without epsilon these would be infinite.
    for m in ("jsd", "kl"):
        matrices[f"Task2Vec, {m} with epsilon 1e-8"] = pdist(results.embeddings, m, epsilon=1e-8)
    matrices["mean feature, centred cosine"] = 1 - unit @ unit.T
    rows = [["distance", "AUC, same family or not", "rank correlation with the tree", "nearest of the same family"]]
    t = len(families)
    for name, d in matrices.items():

        def of_auc(k: np.ndarray, d: np.ndarray = d) -> float:
            return auc(d[np.ix_(k, k)], families[k])

        def of_tree(k: np.ndarray, d: np.ndarray = d) -> float:
            upper = np.triu_indices(len(k), 1)
            return float(spearmanr(d[np.ix_(k, k)][upper], tree[np.ix_(k, k)][upper]).statistic)

        hits = nearest_in_family(d, families)
        rows.append([name, with_interval(of_auc, t), with_interval(of_tree, t), f"{hits.sum()} of {t}"])
    return f"{markdown(rows)}\n\nIn brackets 95 percent intervals, tasks drawn again with replacement."


def difficulty_section(results: Results) -> str:
    """Norm and complexity against the best expert's test error."""
    difficulty = np.nanmin(results.errors, axis=1)
    classes = np.array([len(e.meta["classes"]) for e in results.embeddings], float)
    measures = {
        "norm": np.array([e.norm for e in results.embeddings]),
        "complexity (distance from the trivial embedding)": complexity(results.embeddings),
        "number of classes": classes,
    }
    rows = [["measure", "rank correlation with the best expert's test error"]]
    for name, values in measures.items():

        def rank(k: np.ndarray, values: np.ndarray = values) -> float:
            return float(spearmanr(values[k], difficulty[k]).statistic)

        rows.append([name, with_interval(rank, len(difficulty))])
    return markdown(rows)


def permutation_section(tasks: Sequence[MetaTask], store: Store, task2vec: Task2Vec) -> str:
    """The embedding under other names of the labels, in another order of classes."""
    rows = [["task", "estimator", "largest relative difference of an entry", "distance"]]
    for task in tasks:
        drawn = store.data(task, TRAIN)
        images, labels = drawn.images[:40], drawn.labels[:40]
        other = np.random.default_rng(0).permutation(len(drawn.classes))[labels] * 7 + 3
        for estimator in ("exact", "deflated"):
            task2vec.estimator = estimator
            pair = [task2vec.embed((images, names)) for names in (labels, other)]
            a, b = (e.hessian for e in pair)
            difference = np.max(np.abs(a - b) / np.maximum(np.maximum(a, b), 1e-300))
            rows.append([task.name, estimator, f"{difference:.1e}", f"{pdist(pair)[0, 1]:.1e}"])
    task2vec.estimator = "deflated"
    return markdown(rows)


def sizes_section(
    tasks: Sequence[MetaTask], bank: dict[str, Embedding], store: Store, task2vec: Task2Vec, sizes: Sequence[int]
) -> str:
    """What more images of the same task do to norm, to its place, and to its nearest task."""
    rows = [["task", "images", "norm", "distance from the most images", "nearest task of the bank"]]
    for task in tasks:
        drawn = task.draw(max(sizes), TRAIN, store.settings.seed)
        found = [task2vec.embed((drawn.images[:n], drawn.labels[:n]), name=task.name) for n in sizes]
        others = [name for name in bank if name != task.name]
        distances = pdist([*found, *(bank[name] for name in others)])
        for k, n in enumerate(sizes):
            nearest = others[int(distances[k, len(sizes) :].argmin())]
            rows.append([task.name, str(n), f"{found[k].norm:.4g}", f"{distances[k, len(sizes) - 1]:.3f}", nearest])
    return markdown(rows)


def measure(store: Store, task2vec: Task2Vec, permuted: Sequence[str], sized: Sequence[str], sizes: Sequence[int]):
    """All claims as Markdown, one at a time: (heading, text)."""
    results = fill(store, task2vec)
    by_name = {task.name: task for task in store.tasks}
    bank = dict(zip(results.names, results.embeddings, strict=True))
    yield "Distance follows the taxonomy", taxonomy_section(results)
    yield "Norm and difficulty", difficulty_section(results)
    yield "Labels' names", permutation_section([by_name[n] for n in permuted], store, task2vec)
    yield "Size of the data set", sizes_section([by_name[n] for n in sized], bank, store, task2vec, sizes)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "claims")
    parser.add_argument("--write", type=Path, help="put the tables into this page")
    arguments = parser.parse_args(argv)
    settings = Settings()
    probe = load_probe(size=settings.size)
    store, task2vec = Store(arguments.output, settings, meta_tasks(), EXPERTS), Task2Vec(probe, seed=settings.seed)
    text = ""
    for heading, section in measure(store, task2vec, PERMUTED, SIZED, SIZES):
        print(f"### {heading}\n\n{section}\n", flush=True)
        text += f"### {heading}\n\n{section}\n\n"
        if arguments.write:
            replace_section(arguments.write, "claims", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
