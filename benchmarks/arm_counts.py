"""What NEON code costs, without an ARM machine: counts, not times.

    python benchmarks/arm_counts.py instructions     # dynamic instructions, mnops and stock torch
    python benchmarks/arm_counts.py loops            # loads per FMA and llvm-mca cycles of the inner loops

instructions: every MobileNet-1.0-224 depthwise layer and the whole network, on one thread of an emulated
cortex-a76, each call made twice and the second one counted by tools/arm/count.c. Every layer gets as many
images as give it the outputs of the first layer of one, so that what a call costs beside the loops weighs
the same in all; the network gets one image. Beside them the kernels of pointwise layers in bf16, on an emulated
CPU with FEAT_BF16: bfmmla against what the other CPUs get. The counts repeat; they say nothing about caches.
loops: the hottest loop of each kernel, found in the disassembly of isa/neon.cpp and isa/neon_bf16.cpp;
llvm-mca-19 gives its cycles and the limit that the busiest port sets.

Needs what tools/arm/build.sh needs, gcc, and llvm-19 for `loops`. Rows go to benchmarks/results/arm-*.csv.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import functools
import gc
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "arm"
RESULTS = ROOT / "benchmarks" / "results"
# channels, height = width, stride of the depthwise layers
LAYERS = (
    (32, 112, 1),
    (64, 112, 2),
    (128, 56, 1),
    (128, 56, 2),
    (256, 28, 1),
    (256, 28, 2),
    (512, 14, 1),
    (512, 14, 2),
    (1024, 7, 1),
)
OUTPUTS = 32 * 112 * 112  # of a counted call of a layer
POINTWISE = ((32, 64, 112), (64, 128, 56), (256, 256, 28), (512, 512, 14), (1024, 1024, 7))  # in, out, height = width
CPUS = ("cortex-a76", "neoverse-n1", "neoverse-v1")


# ---------------------------------------------------------------- inside the emulator


def counted(only: str, name: str, batch: int, outputs: int, call: Callable[[], object]) -> None:
    """Runs a case between two marks, after naming it on stderr, where the counts go too."""
    if not re.search(only, name):
        return
    mark = ctypes.CDLL(str(BUILD / "libmark.so"))
    call()
    print(f"case {name},{batch},{outputs}", file=sys.stderr, flush=True)
    mark.mark_begin()
    call()
    mark.mark_end()


def guest_bf16(only: str) -> None:
    import numpy as np

    sys.path.insert(0, str(BUILD / "package" / "mnops"))
    import _C  # without mnops, which needs torch

    def bf16(*shape: int) -> np.ndarray:  # its bits
        return (np.random.default_rng(0).normal(size=shape).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)

    def layer(c: int, o: int, h: int, isa: str) -> None:
        x, weight, g = bf16(h * h, c), np.ones((o, c), np.float32), bf16(h * h, o)
        vectors = {name: np.ones(c, np.float32) for name in ("mean", "var", "gamma", "beta")}
        norm, zeros = vectors | {"eps": 1e-5, "act": "relu"}, np.zeros(o, np.float32)
        forward = functools.partial(_C.pointwise_conv2d, isa, x, weight, norm)

        def step() -> None:
            y, mean, _ = forward()
            _C.pointwise_conv2d_backward(isa, g, y, zeros, zeros, mean, x, weight, norm)

        for phase, call in (("forward", forward), ("forward+backward", step)):
            counted(only, f"pointwise {c}->{o} {h}x{h} bf16,{phase},mnops {isa}", 1, o * h * h, call)

    for shape in POINTWISE:
        for isa in ("neon", "neon_bf16"):
            layer(*shape, isa)


def guest(only: str) -> None:
    gc.disable()  # a collection counts for whoever runs when it comes
    import torch
    from torch import nn

    import mnops

    torch.set_num_threads(1)
    torch.manual_seed(0)
    count = functools.partial(counted, only)

    def passes(case: str, contender: str, net: nn.Module, x: torch.Tensor, outputs: int) -> None:
        g = torch.randn_like(net(x))
        with torch.no_grad():
            count(f"{case},infer,{contender}", len(x), outputs, lambda: net.eval()(x))
            count(f"{case},forward,{contender}", len(x), outputs, lambda: net.train()(x))
        x = x.clone().requires_grad_(True)
        count(f"{case},forward+backward,{contender}", len(x), outputs, lambda: net.train()(x).backward(g))

    formats = {"channels_last": torch.channels_last, "NCHW": torch.contiguous_format}
    for c, h, s in LAYERS:
        conv = nn.Conv2d(c, c, 3, s, 1, groups=c, bias=False)
        case, batch = f"depthwise {c}x{h}x{h} stride {s}", OUTPUTS // (c * (h // s) ** 2)
        for layout, fmt in formats.items():
            x = torch.randn(batch, c, h, h).contiguous(memory_format=fmt)
            stock = nn.Sequential(conv, nn.BatchNorm2d(c), nn.ReLU()).to(memory_format=fmt)
            if re.search(only, f"{case},torch"):
                passes(case, f"torch {layout}", stock, x, OUTPUTS)
            if fmt == torch.channels_last:
                passes(case, f"mnops {layout}", mnops.nn.DepthwiseConvBNAct(c, 3, s), x, OUTPUTS)
                # As in a network: the norm of the input is pending, that of the output left to the next op.
                vectors = [torch.rand(c) + 0.5 for _ in range(4)]
                arguments = mnops.Pending(x, *vectors, 1e-5, "relu"), conv.weight, s, 1, 1
                chained = functools.partial(mnops.ops.depthwise_conv2d, *arguments)
                with torch.no_grad():
                    count(f"{case},infer,mnops chained", batch, OUTPUTS, functools.partial(chained, False))
                    count(f"{case},forward,mnops chained", batch, OUTPUTS, functools.partial(chained, True))
    net = mnops.MobileNet()
    for fused in (True, False):
        net.fused = fused
        for layout, fmt in formats.items():
            if fused and layout == "NCHW":
                continue
            x = torch.randn(1, 3, 224, 224).contiguous(memory_format=fmt)
            name = f"{'mnops' if fused else 'torch'} {layout}"
            if re.search(only, f"mobilenet-1.0-224,{name}"):
                passes("mobilenet-1.0-224", name, net.to(memory_format=fmt), x, 1)


# ---------------------------------------------------------------- on the host


def instructions(arguments: argparse.Namespace) -> None:
    cache = subprocess.check_output([ROOT / "tools/arm/environment.sh"], text=True).strip()
    plugin, mark = BUILD / "libcount.so", BUILD / "libmark.so"
    subprocess.check_call(["gcc", "-O2", "-fPIC", "-shared", ROOT / "tools/arm/count.c", "-o", plugin])
    source = b'void mark_begin(void) { __asm("hint #0x6e"); }\nvoid mark_end(void) { __asm("hint #0x6f"); }\n'
    subprocess.run(
        ["aarch64-linux-gnu-gcc", "-O2", "-fPIC", "-shared", "-xc", "-", "-o", mark], input=source, check=True
    )
    env = os.environ | {"QEMU_ARGS": f"-plugin {plugin} -d plugin", "PYTHONSAFEPATH": "1"}
    env |= {"PYTHONPATH": str(BUILD / "package")}
    rows = []
    for what, cpu in (("guest", "cortex-a76"), ("guest-bf16", "max,sve=off")):
        command = [f"{cache}/python", __file__, what, "--only", arguments.only]
        rows += counted_rows(command, env | {"ARM_CPU": cpu})
    write("arm-instructions.csv", rows, arguments.only != "")


def counted_rows(command: list[str], env: dict[str, str]) -> list[dict]:
    run = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    rows, name = [], ""
    for line in run.stderr:
        if line.startswith("case "):
            name = line[5:].strip()
        elif line.startswith("counted "):
            classes = {k: int(v) for k, v in (pair.split("=") for pair in line.split()[1:])}
            case, phase, contender, batch, outputs = name.split(",")
            total = sum(classes.values())
            rows.append(
                {
                    "case": case,
                    "batch": int(batch),
                    "pass": phase,
                    "contender": contender,
                    "outputs": int(outputs),
                    "instructions": total,
                    "per_output": round(total / int(outputs), 2),
                    "fma": classes["fma"],
                    "vector_loads": classes["vector_load"],
                    "vector_stores": classes["vector_store"],
                    "vector_other": classes["vector_other"],
                }
            )
            print(*rows[-1].values(), flush=True)
    if run.wait():
        raise SystemExit(f"the emulated run ended with {run.returncode}")
    return rows


def write(name: str, rows: list[dict], partial: bool) -> None:
    """All rows, or these in place of those of the same case, pass and contender."""
    path = RESULTS / name
    path.parent.mkdir(exist_ok=True)
    if partial and path.exists():
        keys = {tuple(r.values())[:4] for r in rows}
        with path.open(newline="") as file:
            kept = [
                r
                for r in csv.DictReader(file)
                if tuple(type(v)(r[k]) for k, v in list(rows[0].items())[:4]) not in keys
            ]
        rows = kept + rows
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


# The functions whose hottest loop is shown: what it is, its name, of which instruction set if not of neon.
LOOPS = (
    ("depthwise forward 3x3 stride 1, measured", r"finish_group<.*F32x4, 3, 1, 2, true, float"),
    ("depthwise forward 3x3 stride 1", r"finish_group<.*F32x4, 3, 1, 2, false, float"),
    ("depthwise forward 3x3 stride 2, measured", r"finish_group<.*F32x4, 3, 2, 2, true, float"),
    ("depthwise backward 3x3 stride 1", r"gradient_group<.*F32x4, 3, 1, 0, float"),
    ("depthwise backward 3x3 stride 2, even rows", r"gradient_group<.*F32x4, 3, 2, 0, float"),
    ("separable depthwise 3x3 stride 1", r"convolve_to_panels<.*Act.1, .*F32x4, 3, 1, float"),
    ("pointwise product", r"multiply_block<.*F32x4"),
    ("pointwise weight gradient", r"weight_gradient<.*F32x4"),
    ("pointwise product, bf16", r"multiply_block<.*F32x4, mnops::bf16", "neon_bf16"),
    ("pointwise weight gradient, bf16", r"pointwise_backward<mnops::bf16, mnops::bf16", "neon_bf16"),
)


def inner_loops(listing: str) -> Iterator[tuple[str, list[str]]]:
    """(function, instructions) of every loop that holds no other: a backward branch with none inside."""
    name, body = "", []
    for line in [*listing.splitlines(), "0000000000000000 <end>:"]:
        if head := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            address = {a: i for i, (a, _) in enumerate(body)}
            spans = []
            for i, (_, text) in enumerate(body):
                target = re.match(r"(?:b\.\w+|b|cbnz|cbz|tbnz|tbz)\s.*?([0-9a-f]+) <", text)
                if target and address.get(int(target[1], 16), i + 1) <= i:
                    spans.append((address[int(target[1], 16)], i))
            for a, b in spans:
                if not any((c, d) != (a, b) and a <= c and d <= b for c, d in spans):
                    yield name, [text for _, text in body[a : b + 1]]
            name, body = head[1], []
        elif code := re.match(r"\s*([0-9a-f]+):\t(.*)$", line):
            body.append((int(code[1], 16), code[2].strip()))


def loops(arguments: argparse.Namespace) -> None:
    found = {}
    for isa in ("neon", "neon_bf16"):
        compiled = next(ROOT.glob(f"build/cmake-linux-aarch64-*/**/{isa}.cpp.o"))
        command = ["aarch64-linux-gnu-objdump", "-dC", "--no-show-raw-insn", compiled]
        found[isa] = list(inner_loops(subprocess.check_output(command, text=True)))
    rows = []
    for what, pattern, *isa in LOOPS:
        is_fma = re.compile(r"bfmmla\s" if isa else r"f?mla\s|fmul\s+v")
        candidates = [body for name, body in found[isa[0] if isa else "neon"] if re.search(pattern, name)]
        candidates = [body for body in candidates if any(is_fma.match(i) for i in body)]
        if not candidates:
            print(f"{what}: no loop matches {pattern}", file=sys.stderr)
            continue
        straight = [b for b in candidates if sum(bool(re.match(r"b\.|b\s|t?cbn?z", i)) for i in b) == 1]
        body = max(straight or candidates, key=lambda b: sum(bool(is_fma.match(i)) for i in b))
        fma = sum(bool(is_fma.match(i)) for i in body)
        loads = sum((2 if i.startswith("ldp") else 1) for i in body if re.match(r"ldu?[rp]\s+[qds]|ld1", i))
        for cpu in CPUS[-1:] if isa else CPUS:  # the last one has FEAT_BF16
            # a branch target means nothing to the simulator; the label stands for it
            source = "\n".join(re.sub(r"\s[0-9a-f]+ <.*", " 0", re.sub(r"\s*//.*", "", i)) for i in body)
            mca = ["llvm-mca-19", "-mtriple=aarch64", f"-mcpu={cpu}", "-iterations=200", "-"]
            report = subprocess.run(mca, input=source, capture_output=True, text=True, check=True).stdout
            cycles = int(re.search(r"Total Cycles:\s+(\d+)", report)[1]) / 200
            pressure = re.search(r"Resource pressure per iteration:\n.*\n(.*)\n", report)[1]
            port = max(float(p) for p in pressure.split() if p != "-")
            rows.append(
                {
                    "loop": what,
                    "cpu": cpu,
                    "instructions": len(body),
                    "fma": fma,
                    "vector_loads": loads,
                    "loads_per_fma": round(loads / fma, 3),
                    "cycles": round(cycles, 1),
                    "port_limit": port,
                    "over_port_limit": round(cycles / port, 2),
                }
            )
            print(*rows[-1].values(), flush=True)
    write("arm-loops.csv", rows, False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["instructions", "loops", "guest", "guest-bf16"])
    parser.add_argument(
        "--only", default="", help="a regular expression on 'case,pass,contender'; keeps the other rows"
    )
    arguments = parser.parse_args()
    if arguments.what.startswith("guest"):
        {"guest": guest, "guest-bf16": guest_bf16}[arguments.what](arguments.only)
    else:
        {"instructions": instructions, "loops": loops}[arguments.what](arguments)


if __name__ == "__main__":
    main()
