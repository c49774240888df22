"""python -m mnops info: what was built, what this machine has, which backend serves which op and why not."""

from __future__ import annotations

import argparse
import platform
import sys

import torch


def lines() -> list[tuple[str, str]]:
    """(key, value) pairs, in the order printed."""
    from mnops import _C, _native, backends, measured, ops

    pairs = [(f"build.{key}", value) for key, value in _native.build_info().items()]
    pairs += [
        ("machine.python", platform.python_version()),
        ("machine.torch", torch.__version__),
        ("machine.platform", f"{platform.system()} {platform.machine()}"),
        ("machine.threads", str(torch.get_num_threads())),
        ("machine.cuda", _cuda()),
        ("cpu.capability", f"{_C.cpu_capability()} (MNOPS_CPU_CAPABILITY forces one)"),
    ]
    for capability in _C.cpu_capabilities():
        state = "built" if capability["built"] else "not built"
        state += ", this CPU has it" if capability["supported"] else ", this CPU lacks it"
        pairs.append((f"cpu.{capability['name']}", state))
    cuda = _native.cuda_missing()
    pairs.append(("cuda.library", "loaded" if cuda is None else cuda))
    for backend in backends.BACKENDS.values():
        if backend.fallback:
            pairs.append((f"{backend.name}.fallback", f"{backend.fallback} serves the ops that {backend.name} lacks"))
    pairs.append(("cuda.measured", ", ".join(sorted(measured.OPS)) or "nothing: an op's first backend serves"))
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for device in devices:
        for op in (name for name in ops.__all__ if name != "Pending"):
            reasons = {name: backends.why_not(name, op, device) for name in backends.BACKENDS}
            serving = [name for name, reason in reasons.items() if reason is None]
            missing = [f"{name}: {reason}" for name, reason in reasons.items() if reason is not None]
            value = ", ".join(serving) or "nobody"
            pairs.append((f"op.{op}.{device}", value + (f"  ({'; '.join(missing)})" if missing else "")))
    return pairs


def _cuda() -> str:
    if not torch.cuda.is_available():
        return "none"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()}, sm_{major}{minor}, CUDA {torch.version.cuda}"


def main(argv: list[str]) -> int:
    argparse.ArgumentParser(prog="python -m mnops info", description=__doc__).parse_args(argv)
    pairs = lines()
    width = max(len(key) for key, _ in pairs)
    for key, value in pairs:
        print(f"{key:<{width}}  {value}", file=sys.stdout)
    return 0
