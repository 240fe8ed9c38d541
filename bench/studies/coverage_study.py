"""Hundreds of networks, layers, wrappers and couplings: exact, refused with a true error, or wrong.

    python -m bench.studies.coverage_study --output docs/coverage.md [--only timm peft] [--name swin] [--resume]

Every case of ``bench/coverage_cases`` is judged against plain autograd, one example at a time. The script writes the
page, and keeps the results, one line of JSON each. ``--resume`` continues after an interruption and judges changed
cases again. The exit status is 1 if a case is wrong, or if more than 3 percent are refused needlessly.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # random weights only: nothing is to be fetched

import torch

from bench.coverage_cases import KINDS, cases
from bench.coverage_cases.case import EXACT, Case
from bench.coverage_cases.judge import (
    ABSENT,
    AGREES,
    BROKEN,
    BY_REQUEST,
    NEEDLESS,
    REFUSED,
    SILENT,
    UNTRUE,
    VERDICTS,
    WRONG,
    Verdict,
    judge,
)

ROOT = Path(__file__).resolve().parents[2]
ALLOWED_REFUSALS = 0.03
GOOD = (AGREES, BY_REQUEST, REFUSED)
LIBRARIES = ("torch", "torchvision", "timm", "transformers", "peft")
TITLES = {
    "timm": "timm",
    "torchvision": "torchvision",
    "transformers": "transformers",
    "peft": "PEFT",
    "layers": "Layers, wrappers and couplings",
}


def drawn(kind: str, number: int, date: str) -> list[Case]:
    """Some cases of a kind, others on each date."""
    everything = cases([kind])
    return random.Random(f"{date} {kind}").sample(everything, min(number, len(everything)))


def today() -> str:
    """The date that the drawn part of the study goes by, which T2V_FAST_COVERAGE_DATE sets."""
    return os.environ.get("T2V_FAST_COVERAGE_DATE") or datetime.date.today().isoformat()


def fingerprint(kind: str) -> str:
    """Of all that the verdicts of a kind depend on: the library, the cases and the libraries that they are from."""
    digest = hashlib.sha256()
    folders = [(ROOT / "t2v_fast", "*.py"), (ROOT / "csrc", "*"), (ROOT / "kernels", "*.py")]
    files = [path for folder, pattern in folders for path in folder.rglob(pattern) if path.is_file()]
    here = Path(__file__).resolve().parents[1] / "coverage_cases"
    files += [here / "case.py", here / "judge.py", here / f"{kind}_cases.py"]
    if kind == "peft":  # its networks are those of transformers
        files.append(here / "transformers_cases.py")
    for path in sorted(files):
        digest.update(str(path.relative_to(ROOT)).encode())
        digest.update(path.read_bytes())
    digest.update(str(versions()).encode())
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def known_results(path: Path) -> dict[str, Verdict]:
    """What an earlier run found and still holds."""
    if not path.exists():
        return {}
    prints = {kind: fingerprint(kind) for kind in KINDS}
    found = {}
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # the line that an interruption cut
        if record["fingerprint"] == prints.get(record["kind"]) and record["verdict"] not in (ABSENT, BROKEN):
            verdict = Verdict.from_record(record)
            found[verdict.key] = verdict
    return found


def study(chosen: Sequence[Case], results: Path, resume: bool) -> list[Verdict]:
    """Judge the cases one after the other, and write down each as it is found."""
    known = known_results(results) if resume else {}
    results.parent.mkdir(parents=True, exist_ok=True)
    prints = {kind: fingerprint(kind) for kind in KINDS}
    found = []
    start = time.perf_counter()
    if not resume:
        results.write_text("")
    elif results.exists() and not results.read_text().endswith("\n"):
        with results.open("a") as file:
            file.write("\n")  # after a line that an interruption cut
    with results.open("a") as file:
        for number, case in enumerate(chosen, 1):
            verdict = known.get(case.key)
            if verdict is None or verdict.expect != case.expect:
                verdict = judge(case)
                line = {**verdict.record(), "fingerprint": prints[case.kind]}
                file.write(json.dumps(line) + "\n")
                file.flush()
            found.append(verdict)
            why = "" if verdict.verdict in GOOD else f": {verdict.reason[:160]}"
            place = f"{number}/{len(chosen)} {(time.perf_counter() - start) / 60:.1f} min"
            print(f"{place} {case.key}: {verdict.verdict}{why} ({verdict.seconds:.1f} s)", flush=True)
    return found


def cell(text: str, longest: int = 300) -> str:
    text = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
    return text if len(text) <= longest else text[: longest - 3] + "..."


def row(verdict: Verdict) -> str:
    error = f"{verdict.error:.0e}" if verdict.error == verdict.error else ""
    said = verdict.verdict if verdict.verdict in GOOD else f"**{verdict.verdict}**"
    why = verdict.reason
    if verdict.expect != EXACT:
        why = f"no exact answer: {verdict.expect}. {why}"
    if verdict.float32:
        why = f"computes in float32 here and there. {why}"
    numbers = f"{verdict.numbers:,} in {verdict.tensors}" if verdict.tensors else ""
    return f"| {cell(verdict.name)} | {numbers} | {said} | {error} | {cell(why)} |"


def tally(verdicts: Iterable[Verdict]) -> Counter:
    return Counter(verdict.verdict for verdict in verdicts)


def passes(verdicts: Sequence[Verdict]) -> bool:
    """Whether the study finds nothing to mend: none wrong, and few refused that need not be."""
    counts = tally(verdicts)
    return not any(counts[name] for name in (UNTRUE, SILENT, WRONG, BROKEN, ABSENT)) and counts[
        NEEDLESS
    ] <= ALLOWED_REFUSALS * len(verdicts)


def page(verdicts: Sequence[Verdict]) -> str:
    """The study as Markdown."""
    groups = {kind: [v for v in verdicts if v.kind == kind] for kind in KINDS}
    groups = {kind: found for kind, found in groups.items() if found}
    named = [name for name in VERDICTS if tally(verdicts)[name]]
    lines = [
        "# Coverage",
        "",
        "Written by `make coverage` (`python -m bench.studies.coverage_study`; the cases are in "
        "`bench/coverage_cases`). Each "
        "network has random weights in float64, and is given two or three batches of different sizes and "
        "composition: padded sequences of other lengths, images of other numbers. The library's per-example filter "
        "means (`FisherRecorder`) and its empirical Fisher (`fisher`) are compared with plain autograd of a copy of "
        "the network, an example at a time, for all weights. *Exact* means that no parameter differs by more than "
        "1e-9 of its own norm. Where no exact answer exists (examples interact, or the network is random), the study "
        "expects an error that says so. Refused needlessly are networks that have an exact answer and are given none.",
        "",
        "Networks that compute in float32 here and there agree to what that leaves, and to 1e-9 where float64 takes "
        "its place. `grouped_mm` knows no float64: such networks are compared in float32.",
        "",
        ", ".join(f"{name} {version}" for name, version in versions().items()) + ".",
        "",
        "| | cases | " + " | ".join(named) + " |",
        "| --- |" + " --- |" * (len(named) + 1),
    ]
    for kind, found in groups.items():
        counts = tally(found)
        lines.append(f"| {TITLES[kind]} | {len(found)} | " + " | ".join(str(counts[name]) for name in named) + " |")
    counts = tally(verdicts)
    lines.append(f"| all | {len(verdicts)} | " + " | ".join(str(counts[name]) for name in named) + " |")
    bad = [v for v in verdicts if v.verdict not in GOOD]
    if bad:
        lines += ["", "## To mend", "", "| case | verdict | why |", "| --- | --- | --- |"]
        bad.sort(key=lambda v: -VERDICTS.index(v.verdict))
        lines += [f"| {cell(v.key)} | {v.verdict} | {cell(v.reason, 500)} |" for v in bad]
    for kind, found in groups.items():
        lines += ["", f"## {TITLES[kind]}", ""]
        lines += ["| case | parameters | verdict | largest error | notes |", "| --- | --- | --- | --- | --- |"]
        lines += [row(verdict) for verdict in found]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, help="the page to write, such as docs/coverage.md")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of cases")
    parser.add_argument("--name", nargs="+", help="only the cases whose names contain one of these")
    parser.add_argument("--draw", type=int, help="only so many cases of each kind, drawn by the date")
    parser.add_argument("--date", default=today(), help="the date of the draw")
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "coverage.jsonl")
    parser.add_argument("--resume", action="store_true", help="keep the results that still hold")
    parser.add_argument("--threads", type=int, help="of torch")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.draw:
        print(f"drawn by the date {options.date}: repeat with --draw {options.draw} --date {options.date}")
        chosen = [case for kind in options.only for case in drawn(kind, options.draw, options.date)]
    else:
        chosen = cases(options.only)
    if options.name:
        chosen = [case for case in chosen if any(part in case.name for part in options.name)]
    if not chosen:
        parser.error("no case has such a name")
    verdicts = study(chosen, options.results, options.resume)
    if options.output:
        options.output.write_text(page(verdicts))
    counts = tally(verdicts)
    print(", ".join(f"{counts[name]} {name}" for name in VERDICTS if counts[name]))
    for verdict in verdicts:
        if verdict.verdict == ABSENT:
            print(f"absent: {verdict.key}: {verdict.reason}", file=sys.stderr)
    return 0 if passes(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
