"""python -m mnops bench: finds the harness, which lives in the checkout beside the package, and runs it."""

import importlib
import importlib.util
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent


def harness(module: str) -> object:
    """benchmarks.`module` of the checkout that this package, or the current directory, is in."""
    for root in (CHECKOUT, Path.cwd()):
        if (root / "benchmarks" / "harness.py").exists():
            if str(root) not in sys.path:
                sys.path.insert(0, str(root))
            return importlib.import_module(f"benchmarks.{module}")
    raise SystemExit(
        "mnops: benchmarks run from a checkout of the repository: clone it, and call this inside it"
    )


def main(argv: list[str]) -> int:
    return harness("cli").main(argv)
