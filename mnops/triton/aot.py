"""python -m mnops.triton.aot: MobileNet's kernels compiled with no GPU, and what they take of one.

What is compiled is what a launch would compile: Triton's own binder makes the signature. A row is one binary:
registers a thread, bytes a thread spills to local memory, shared memory of a program, and how many programs a
multiprocessor holds at once by registers, shared memory and warps. Exits with 1 if a kernel spills, or is too
large for the device.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

import mnops.triton as ops
from mnops.models import mobilenet
from mnops.triton.launch import ASSUMED, Launch, recorded

REGISTERS, WARPS = 65536, 64  # of a multiprocessor
RESERVED = 1024  # bytes of shared memory that each program takes beside its own
DTYPES = {  # of x, and whether fp32 products may be tf32; without, they are the library's
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
}


class Binary(NamedTuple):
    """One compiled kernel."""

    layer: str
    kernel: str
    dtype: str
    arch: int
    warps: int
    registers: int
    spilled: int  # bytes a thread
    shared: int  # bytes a program
    resident: int  # programs a multiprocessor


def compiled(launch: Launch, arch: int) -> triton.compiler.CompiledKernel:
    """The kernel as `launch` would run it on compute capability `arch`."""
    target = GPUTarget("cuda", arch, 32)
    backend, kernel = make_backend(target), launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(
        **launch.arguments, debug=False, num_warps=launch.warps, num_stages=launch.stages
    )
    options, signature, constexprs, attributes = kernel._pack_args(
        backend, options, bound, specialization, options
    )
    source = ASTSource(kernel, signature, constexprs, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


def measured(launch: Launch, arch: int, layer: str, dtype: str) -> Binary:
    binary = compiled(launch, arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True)
    usage = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", said.stdout)}
    shared = binary.metadata.shared
    per_warp = -(-usage["REG"] // 8) * 8 * 32  # registers are given out in eights
    resident = min(REGISTERS // (per_warp * launch.warps), WARPS // launch.warps, 32)
    if shared:  # a multiprocessor has as much as one program may take, and what is reserved for that
        resident = min(resident, (ASSUMED[arch].shared + RESERVED) // (shared + RESERVED))
    spilled = usage["STACK"] + usage["LOCAL"]
    name = launch.kernel.__name__
    return Binary(layer, name, dtype, arch, launch.warps, usage["REG"], spilled, shared, resident)


# ---- MobileNet's layers ----


def _vectors(channels: int) -> list[Tensor]:
    return [torch.empty(channels, device="meta") for _ in range(4)]


def layers(
    dtype: torch.dtype, arch: int, width: float = 1.0, size: int = 224, batch: int = 128
) -> Iterator[tuple[str, list[Launch]]]:
    """(name, launches) of each distinct layer of MobileNet, in order: a training step, a block's inference.
    """

    def image(channels: int, size: int) -> Tensor:
        return torch.empty(
            batch, channels, size, size, dtype=dtype, device="meta", memory_format=torch.channels_last
        )

    def weight(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    def convolution(name, forward, backward, x, w, *geometry, pending=True):
        norm = _vectors(x.shape[1]) if pending else [None] * 4
        with recorded(arch) as launches:
            y, mean, _ = forward(x, w, *norm, 1e-5, "relu" if pending else "none", *geometry, True)
            incoming = (torch.empty_like(y), *(torch.empty_like(mean) for _ in range(2)), y, mean)
            backward(*incoming, x, w, *norm, 1e-5, "relu" if pending else "none", *geometry, pending, True)
        return name, launches

    square = [1, 1]
    channels = round(32 * width)
    yield convolution(
        f"stem 3->{channels} {size}", ops.stem_conv2d, ops.stem_conv2d_backward, image(3, size),
        weight(channels, 3, 3, 3), [2, 2], [1] * 4, pending=False,
    )  # fmt: skip
    size, seen = (size + 1) // 2, set()
    for out, stride in (block for stage in mobilenet.STAGES for block in stage):
        if (channels, size, stride) not in seen:
            yield convolution(
                f"depthwise {channels} {size}/{stride}", ops.depthwise_conv2d, ops.depthwise_conv2d_backward,
                image(channels, size), weight(channels, 1, 3, 3), [stride] * 2, [1] * 4, square,
            )  # fmt: skip
            norm = *_vectors(channels), 1e-5, "relu"
            weights = weight(channels, 1, 3, 3), weight(round(out * width), channels, 1, 1)
            with recorded(arch) as launches:
                ops.separable_conv2d(
                    image(channels, size), *weights, *norm, *norm, [stride] * 2, [1] * 4, square
                )
            yield f"separable {channels}->{round(out * width)} {size}/{stride}", launches
        seen.add((channels, size, stride))
        size, out = (size + stride - 1) // stride, round(out * width)
        if (channels, size, out) not in seen:
            yield convolution(
                f"pointwise {channels}->{out} {size}", ops.pointwise_conv2d, ops.pointwise_conv2d_backward,
                image(channels, size), weight(out, channels, 1, 1),
            )  # fmt: skip
        seen.add((channels, size, out))
        channels = out
    x, norm = image(channels, size), _vectors(channels)
    with recorded(arch) as launches:
        z = ops.norm_act(x, *norm, 1e-5, "relu")
        ops.norm_act_backward(z, x, *norm, 1e-5, "relu")
        pooled = ops.norm_act_pool(x, *norm, 1e-5, "relu")
        ops.norm_act_pool_backward(pooled, x, *norm, 1e-5, "relu")
    yield f"norm_act {channels} {size}", launches


def binaries(dtypes: Iterable[str], archs: Iterable[int], select: str = "") -> Iterator[Binary]:
    """Binaries of MobileNet-1.0-224's layers of which "name kernel" matches `select`; dtypes: of DTYPES."""
    for name, arch in itertools.product(dtypes, archs):
        dtype, tf32 = DTYPES[name]
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
            found = list(layers(dtype, arch))
        for layer, launches in found:
            for launch in launches:
                if re.search(select, f"{layer} {launch.kernel.__name__}"):
                    yield measured(launch, arch, layer, name)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m mnops.triton.aot", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], choices=sorted(ASSUMED))
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "tf32", "float32"], choices=DTYPES)
    parser.add_argument("--select", default="", metavar="REGEX", help="only where 'layer kernel' matches")
    parser.add_argument("--csv", type=Path, help="write the rows to this file as well")
    args = parser.parse_args(argv)
    print("{:26} {:34} {:9} {:>4} {:>5} {:>9} {:>7} {:>7} {:>8}".format(*Binary._fields))
    rows = []
    for row in binaries(args.dtype, args.arch, args.select):
        print("{:26} {:34} {:9} {:4} {:5} {:9} {:7} {:7} {:8}".format(*row), flush=True)
        rows.append(row)
    if args.csv:
        with args.csv.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([Binary._fields, *rows])
    return int(any(row.spilled or not row.resident for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
