"""python -m mnops report: Markdown tables and figures from the rows, and the README's block of them.

Nothing is typed in: every number on a page comes out of a row of benchmarks/results, and
tests/test_bench_report.py fails where the README says something else.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from . import figures, machine, rows, tables
from .rows import Row

RESULTS = Path(__file__).parent / "results"
README = machine.ROOT / "README.md"
BEGIN, END = "<!-- figures:begin -->", "<!-- figures:end -->"
INTRODUCTION = """# Measured

Made by `python -m mnops report` from the CSV files beside it. benchmarks/README.md tells how they were made.
"""


def by_machine(table: list[Row]) -> dict[str, list[Row]]:
    return {
        name: [r for r in table if r["machine"] == name] for name in sorted({r["machine"] for r in table})
    }


def pictures(table: list[Row], folder: str) -> str:
    prefix = machine.slug(table[0]["machine"])
    return "\n".join(
        f"![{shows}]({folder}/{prefix}-{name}.svg)\n" for name, shows in figures.available(table)
    )


def readme_block(table: list[Row]) -> str:
    """What stands between the markers in the README, markers included."""
    parts = [BEGIN]
    for own in by_machine(table).values():
        if lines := tables.headlines(own):
            parts += [
                lines,
                tables.memory(own),
                tables.conditions(own),
                pictures(own, "benchmarks/results/figures"),
            ]
    return "\n".join([*(p for p in parts if p), END])


def full(table: list[Row]) -> str:
    """The whole report."""
    page = [INTRODUCTION]
    for name, own in by_machine(table).items():
        page += [f"## {name}\n", tables.conditions(own)]
        sections = {
            "Against the best of all others": tables.headlines(own),
            "Memory": tables.memory(own),
            "Figures": pictures(own, "figures"),
            "Where mnops is not the fastest": tables.losses(own),
            "Networks": tables.network_table(own),
            "Layers": tables.layer_table(own, "ops"),
            "Micro-kernels, one thread": tables.layer_table(own, "kernels"),
            "First call": tables.startup_table(own),
        }
        page += [f"### {title}\n\n{text}" for title, text in sections.items() if text]
    return "\n".join(page)


def with_block(readme: str, block: str) -> str:
    """The README with its block replaced."""
    if BEGIN not in readme or END not in readme:
        raise ValueError(f"the README must hold the lines {BEGIN} and {END}")
    return readme[: readme.index(BEGIN)] + block + readme[readme.index(END) + len(END) :]


def main(argv: list[str]) -> int:
    p = argparse.ArgumentParser("python -m mnops report", description=__doc__)
    p.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of the rows; REPORT.md and figures/ go there"
    )
    p.add_argument(
        "--readme", type=Path, default=README, help="its block between the markers is written as well"
    )
    p.add_argument(
        "--check", action="store_true", help="write nothing; 1 if the README and the rows disagree"
    )
    args = p.parse_args(argv)
    table = rows.read_all(args.results)
    if not table:
        raise SystemExit(f"report: no rows in {args.results}: run `python -m mnops bench` first")
    text = args.readme.read_text() if args.readme.exists() else ""
    marked = with_block(text, readme_block(table)) if BEGIN in text else text
    if args.check:
        print("README and rows " + ("agree" if marked == text else "disagree: run `python -m mnops report`"))
        return int(marked != text)
    (args.results / "REPORT.md").write_text(full(table))
    for name, own in by_machine(table).items():
        figures.draw(own, args.results / "figures", machine.slug(name))
    if marked != text:
        args.readme.write_text(marked)
    elif BEGIN not in text:
        print(f"{args.readme} has no {BEGIN}: left alone")
    print(args.results / "REPORT.md")
    return 0
