"""FLOP formulas of the ops for torch.utils.flop_counter, given to it when somebody imports it.

It imports triton where that is installed (0.2 s), which `import mnops` is not to wait for.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

COUNTER = "torch.utils.flop_counter"

_formulas: list[tuple[Any, Callable]] = []


class _WhenImported(MetaPathFinder):
    """Finds the counter as the other finders do, and registers the formulas behind its import."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            for op, formula in _formulas:
                module.register_flop_formula(op)(formula)

        spec.loader.exec_module = execute_and_register
        return spec


def register(op: Any, formula: Callable) -> None:
    """formula is torch.utils.flop_counter.register_flop_formula's, of the op packet `op`."""
    if COUNTER in sys.modules:
        sys.modules[COUNTER].register_flop_formula(op)(formula)
    else:
        _formulas.append((op, formula))


if COUNTER not in sys.modules:
    sys.meta_path.insert(0, _WhenImported())
