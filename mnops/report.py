"""python -m mnops report: makes the tables and figures from the rows that `python -m mnops bench` wrote."""

from mnops.bench import harness


def main(argv: list[str]) -> int:
    return harness("report").main(argv)
