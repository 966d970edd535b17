#!/usr/bin/env python
"""Write what is generated into README and docs: benchmarks' results, tables of arrays and of policies.

    python benchmarks/readme_table.py            # rewrite them
    python benchmarks/readme_table.py --check    # exit status 1 where one differs

What is rewritten stands between two markers, each on a line of its own: `<!-- benchmarks -->` and
`<!-- /benchmarks -->` around the table in docs/benchmarks.md, `figures` around README's best ones (both made
of benchmarks/results), `schema` around the table in docs/store.md, and `policies` around the one in
docs/policies.md. Runs no benchmark.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import RESULTS, Result, shown, target

from lerobot_attn.policies import ADAPTERS
from lerobot_attn.policies.families import markdown
from lerobot_attn.store.schema import schema_table

ROOT = Path(__file__).parent.parent
PAGES = [*(ROOT / "docs" / f"{name}.md" for name in ("benchmarks", "policies", "store")), ROOT / "README.md"]
# What the implementation that this package succeeds is reported to write for an episode: suffix-only maps, a
# `.pt` for each action. Reported, not measured here: which layers and which dtype it kept is not known.
ORIGINAL_BYTES = 2.8e9


class TableError(Exception):
    """A result or a page is not fit to be written."""


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Return the documents that the benchmarks wrote, by name.

    Raises:
        TableError: there is none, or one is of a quick run.
    """
    documents = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    if not documents:
        raise TableError(f"{folder}: holds no *.json, expected results; run the benchmarks first")
    for document in documents:
        if document["quick"]:
            raise TableError(
                f"{document['benchmark']}: its result is of a --quick run, expected a full one; run it again"
            )
    return documents


def table(documents: list[dict[str, Any]]) -> str:
    """Return the headline results as a Markdown table, and below it what they were measured on."""
    rows = ["| what | result | target | met? |", "|---|---|---|---|"]
    machines: dict[str, list[str]] = {}
    for document in documents:
        results = [Result(**fields) for fields in document["results"]]
        headlines = [result for result in results if result.headline]
        for result in headlines:
            met = {None: "", True: "yes", False: "**no**"}[result.met]
            rows.append(f"| {result.what} | {shown(result)} | {target(result)} | {met} |")
        if headlines:
            machines.setdefault(measured_on(document["machine"]), []).append(document["benchmark"])
    notes = [f"On {where}: {', '.join(names)}." for where, names in machines.items()]
    return "\n".join([*rows, "", "Medians (smallest–largest). " + " ".join(notes)])


def measured_on(machine: dict[str, Any]) -> str:
    """Return a machine in a few words."""
    device = "" if machine["device"] == "cpu" else f"{machine['device']}, "
    cores = "one core" if machine["cores"] == 1 else f"{machine['cores']} cores"
    return f"{device}{cores} of {machine['processor']}"


def figures(documents: list[dict[str, Any]]) -> str:
    """Return README's lines: what watching costs, what an episode weighs, how soon one sees something.

    Raises:
        TableError: a result that they quote is not there.
    """
    by_name = {document["benchmark"]: document for document in documents}

    def found(benchmark: str, start: str) -> Result:
        for fields in by_name.get(benchmark, {"results": []})["results"]:
            if fields["what"].startswith(start):
                return Result(**fields)
        raise TableError(
            f"{benchmark}: has no result that begins with {start!r}, expected one to quote in README"
        )

    stored = found("size", "an episode's store: 145 steps")
    store_bytes = statistics.median(by_name["size"]["details"]["store bytes"]["float32"])
    same_layers = "`.pt` per action of the same two layers, float32 policy"
    against_float32 = found("size", f"an episode: times smaller than a float32 {same_layers}")
    against_float16 = found("size", f"an episode: times smaller than a float16 {same_layers}")
    once = found(
        "size", "an episode: times smaller than float32 `.pt` files of the same tensors, each once, float32"
    )
    rollout = found("overhead", "LIBERO rollout of 60 frames, capture default over without")
    frame = found("explorer", "explorer, next frame, key held: p95")
    overlay = found("overlay_speed", "overlay of 280 full-size frames")
    anew = found("read", "one heatmap, store opened anew")
    lines = [
        f"**Size.** An episode of 145 steps takes {stored.value:.0f} MB, lossless: "
        f"{ORIGINAL_BYTES / store_bytes:.0f} times less than the 2.8 GB that the original implementation "
        f"reports (suffix-only maps, one `.pt` an action), {against_float32.value:.2g} times less than the "
        f"same two layers in float32 `.pt` files, {against_float16.value:.2g} times less than in float16, "
        f"and {once.value:.2g} times less than float32 with each tensor saved once.",
        f"**Recording.** A LIBERO rollout of 60 frames takes {shown(rollout)} the time it takes without, on "
        "two CPU cores with the demo policy. On a GPU it is not measured yet.",
        f"**Looking.** A heatmap from a store that is opened anew takes {anew.value:.2g} ms, the explorer's "
        f"next frame {frame.value:.2g} ms (95th percentile), and an overlay is drawn at {overlay.value:.0f} "
        "frames a second.",
    ]
    return "\n".join(textwrap.fill(f"- {line}", 120, subsequent_indent="  ") for line in lines)


PARTS: dict[str, Callable[[list[dict[str, Any]]], str]] = {
    "benchmarks": table,
    "figures": figures,
    "schema": lambda documents: schema_table(),
    "policies": lambda documents: markdown(ADAPTERS),
}


def rewritten(page: Path, documents: list[dict[str, Any]]) -> tuple[str, str]:
    """Return a page as it is, and with what stands between its markers written anew.

    Raises:
        TableError: it has none of the markers, or not once each and in order.
    """
    old = page.read_text(encoding="utf-8")
    new = old
    parts = [name for name in PARTS if f"<!-- {name} -->" in old or f"<!-- /{name} -->" in old]
    if not parts:
        raise TableError(
            f"{page.name}: expected <!-- benchmarks --> or <!-- figures --> in it, found neither"
        )
    for name in parts:
        new = with_part(new, name, PARTS[name](documents), page.name)
    return old, new


def with_part(text: str, name: str, part: str, where: str) -> str:
    """Return a text with another part between the markers of that name."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, found, rest = text.partition(start + "\n")
    _, closed, after = rest.partition(end)
    if not found or not closed or start in rest or end in after:
        raise TableError(
            f"{where}: expected {start} and {end} once each, in this order, on lines of their own"
        )
    return f"{before}{start}\n{part}\n{end}{after}"


def main() -> int:
    """Rewrite or check; exit status 1 where a page differs, 2 where there is nothing to write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit status 1 where a page differs"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--pages", type=Path, nargs="+", default=PAGES, help="Markdown files with markers")
    parsed = parser.parse_args()
    try:
        documents = read_results(parsed.results)
        pages = {page: rewritten(page, documents) for page in parsed.pages}
    except TableError as error:
        print(error, file=sys.stderr)
        return 2
    stale = [page for page, (old, new) in pages.items() if old != new]
    for page in stale:
        if parsed.check:
            print(f"{page}: differs from the results; run benchmarks/readme_table.py", file=sys.stderr)
        else:
            page.write_text(pages[page][1], encoding="utf-8")
    return 1 if stale and parsed.check else 0


if __name__ == "__main__":
    sys.exit(main())
