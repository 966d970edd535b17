#!/usr/bin/env python
"""Write the headline results of benchmarks/results into README's table, between its two markers.

    python benchmarks/readme_table.py            # rewrite the table
    python benchmarks/readme_table.py --check    # exit status 1 where README differs

The markers are `<!-- benchmarks -->` and `<!-- /benchmarks -->`, each on a line of its own. Runs nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from common import RESULTS, Result, shown, target

README = Path(__file__).parent.parent / "README.md"
START, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"


class TableError(Exception):
    """A result or README is not fit for the table."""


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


def with_table(readme: str, new: str) -> str:
    """Return README with another table between its markers.

    Raises:
        TableError: the markers are not there once each, in order.
    """
    before, start, rest = readme.partition(START + "\n")
    _, end, after = rest.partition(END)
    if not start or not end or START in rest or END in after:
        raise TableError(
            f"README: expected {START} and {END} once each, in this order, on lines of their own"
        )
    return f"{before}{start}{new}\n{end}{after}"


def main() -> int:
    """Rewrite or check; exit status 1 where README differs, 2 where there is nothing to make a table of."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit status 1 where README differs"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--readme", type=Path, default=README)
    parsed = parser.parse_args()
    readme = parsed.readme.read_text(encoding="utf-8")
    try:
        new = with_table(readme, table(read_results(parsed.results)))
    except TableError as error:
        print(error, file=sys.stderr)
        return 2
    if new == readme:
        return 0
    if parsed.check:
        print(
            f"{parsed.readme}: its table differs from the results; run benchmarks/readme_table.py",
            file=sys.stderr,
        )
        return 1
    parsed.readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
