"""Tiles, what a program works on at a time: of each kernel a short list, the first guess first, with reasons.

Registers are those that `python -m mnops.triton.aot` shows. Without MNOPS_AUTOTUNE=1 the first guess is taken
(`tune.py`). A list depends on channels, kernel size, dtype and compute capability, never on the batch.
"""

import functools
from typing import NamedTuple

import triton

from mnops.triton.launch import Gpu, cdiv


def _power(size: int, most: int) -> int:
    """The block that holds size, within what a product takes."""
    return max(16, min(most, triton.next_power_of_2(size)))


def _distinct(tiles: list) -> list:
    return list(dict.fromkeys(tiles))


# ---- depthwise ----


class Lanes(NamedTuple):
    """Of a depthwise kernel: its lanes, and how its programs are made of them."""

    strip: int  # neighbouring output pixels (backward: cells of stride x stride input pixels) of a lane
    vector: int  # channels of a thread
    block_c: int  # channels of a program
    band: int = 14  # rows of a lane, at most
    unroll: int = 1
    warps: int = 4
    programs: int = 8  # a multiprocessor

    @property
    def lanes(self) -> int:
        return max(1, 32 * self.warps * self.vector // self.block_c)


def _block_c(channels: int) -> int:
    """Channels of a program: 32 (64 bytes of bf16, two sectors), 16 where that wastes an eighth less."""
    return 16 if cdiv(channels, 16) * 16 <= 7 / 8 * cdiv(channels, 32) * 32 else 32


@functools.cache
def depthwise(channels: int, kernel: int, stride: int, itemsize: int) -> list[Lanes]:
    """Strips of 4 pixels load 6 columns for 4 (3x3). A thread takes 4 bytes of a pixel, 16 to 32 neighbours
    load 64 to 128 bytes of it together: 56 to 128 registers, 16 to 36 warps resident (9.0). A 7x7 holds 49
    taps.

    3x3 at stride 1 in half is bound by instructions: strips of 4 take 221 a row, so that a multiprocessor which
    issues all it can moves 18.5 bytes a clock, as many as an H200's memory gives it. Strips of 8 normalise 10
    columns for 8, not 12, and move 22.3.
    """
    block, vector = _block_c(channels), 4 // itemsize
    first = Lanes(2 if kernel >= 7 else 8 if kernel == 3 and stride == 1 and itemsize == 2 else 4, vector, block)
    return _distinct([first, Lanes(min(first.strip, 4), vector, block), Lanes(2, 2, block), Lanes(4, 1, block)])


@functools.cache
def depthwise_backward(channels: int, kernel: int, stride: int, itemsize: int) -> list[Lanes]:
    """With both gradients a thread holds the taps and their gradients, and the less else the larger they are.

    3x3 at stride 2: strips of 4 cells are 8 columns of x, and take 168 to 209 registers with 8 bytes spilled
    on 8.0; strips of 2 take 138 to 149, and so many more warps are resident that as many bytes are under way.
    """
    block, vector = _block_c(channels), 4 // itemsize
    if kernel >= 7:  # 254 registers; strips of 4, or two channels, spill
        return [Lanes(2, 1, block), Lanes(1, 1, block)]
    narrow = kernel >= 5 or (stride > 1 and vector > 1)  # 5x5: 237 registers, strips of 4 spill
    first = Lanes(2 if narrow else 4, vector, block)
    wide = [] if narrow or stride > 1 or vector == 1 else [Lanes(8, vector, block)]  # 219 registers (9.0)
    return _distinct([first, first._replace(unroll=2), *wide, Lanes(2, 2, block), Lanes(4, 1, block)])


# ---- pointwise ----


class Block(NamedTuple):
    """Of a product: pixels x columns (outputs, or in dgrad channels), `depth` of the sum at a time."""

    pixels: int
    columns: int
    depth: int
    warps: int = 8
    stages: int = 3


class Both(NamedTuple):
    """Blocks of the two gradients, a kernel each."""

    dgrad: Block
    wgrad: Block


WHOLE = 128  # up to so many channels a block holds all of them


SMALL = 128 << 10  # bytes: less shared memory than this has 8.6, 8.9 and 12.0, whose 99 KiB are a limit


@functools.cache
def pointwise(channels: int, out: int, itemsize: int, gpu: Gpu) -> list[Block]:
    """Few channels: bound by memory; all of them in one step, so that the loads of the next pixels are under
    way while these are multiplied; in fp32 150 KB of shared memory. In half, up to 64 x 128, programs of 4 warps:
    two or three are resident (150 to 255 registers, 9.0), and one stores while another multiplies. Many channels:
    128 x 128 and a depth of 128 bytes a row, at most 199 registers of 8 warps; on 9.0 two programs of 4 warps and
    255 registers, for the sums at a tile's end take as long as three of its products.
    """
    columns = _power(out, 128)
    if channels <= (WHOLE if gpu.shared >= SMALL else 2 * WHOLE // itemsize):
        depth = _power(channels, WHOLE)
        # 64 channels in half to 128 outputs spill 248 bytes a thread on 10.0 with 128 pixels, 184 with 4 warps
        tight = gpu.capability // 10 == 10 and columns == 128
        pixels = 64 if depth * itemsize > (64 if tight else 128) else 128
        small = [Block(64, columns, depth, 4)]
        large = [Block(pixels, columns, depth), Block(64, columns, depth), Block(128, columns, depth)]
        few = itemsize == 2 and columns * depth <= 64 * 128 and not tight
        return _distinct(small + large if few else large + small)
    depth = 128 // itemsize
    if itemsize == 4:
        return [Block(128, columns, depth), Block(64, columns, depth)]
    blocks = [
        Block(128, columns, depth), Block(128, columns, depth // 2, 8, 4), Block(64, columns, depth, 4, 3)
    ]
    if gpu.capability // 10 == 9:
        blocks.insert(0, Block(128, columns, depth, 4))
    return blocks + [Block(128, 256, depth), Block(64, 256, depth)] if out >= 256 else blocks


@functools.cache
def pointwise_backward(
    channels: int, out: int, itemsize: int, both: bool, gpu: Gpu
) -> list[Block | Both]:
    """Block: both gradients in one kernel, which holds all channels (columns) and outputs (depth) and dw in
    registers; else a kernel each.

    Compute capability 9 and 10 multiply from shared memory: 128 to 254 registers up to 128 x 128. On others w
    and gy pass through registers beside dw, and 8 warps have room for 64 x 128 weights in bf16 on 8.0, half
    as many in fp32 or elsewhere: twice that spills 632 bytes a thread (8.0, bf16), 256 (8.0, fp32) or 24 to
    48 (8.9 and 12.0, bf16).
    """
    apart = [Both(*pair) for pair in zip(_dgrad(channels, out, itemsize), _wgrad(channels, out, itemsize))]
    columns, depth = _power(channels, WHOLE), _power(out, WHOLE)
    from_shared = 90 <= gpu.capability < 120
    held = WHOLE * WHOLE if from_shared else 64 * (128 if itemsize == 2 and gpu.shared >= SMALL else 64)
    if not both or max(channels, out) > WHOLE or columns * depth > held:
        return apart
    small = 32 if columns * depth > 64 * 64 else 64
    if not from_shared and (small == 32 or gpu.shared < SMALL):
        return [Block(32, columns, depth, 8, 2), apart[0]]
    first = []
    if from_shared and itemsize == 2 and columns * depth <= 64 * 128:
        # half the barriers a pixel; where dw is small 4 warps hold it, and two programs are resident
        first = [Block(64, columns, depth, 4) if columns * depth <= 32 * 64 else Block(64, columns, depth, 8, 2)]
    stages = 2 if itemsize == 4 and small == 32 else 3  # tf32 at 128 x 128 spills 8 bytes with 3 (9.0)
    return _distinct([
        *first, Block(small, columns, depth, 8, stages), Block(64, columns, depth, 8, 2), Block(64, columns, depth),
        Block(small, columns, depth, 8, 2), apart[0],
    ])  # fmt: skip


def _dgrad(channels: int, out: int, itemsize: int) -> list[Block]:
    """As `pointwise`; two operands are loaded for gy, and the stored x joins at the end."""
    columns, depth = _power(channels, 128), min(128 // itemsize, _power(out, 128))
    blocks = [Block(128, columns, depth), Block(128, columns, max(16, depth // 2)), Block(64, columns, depth)]
    return blocks + [Block(64, 256, depth)] if itemsize == 2 and channels >= 256 else blocks


def _wgrad(channels: int, out: int, itemsize: int) -> list[Block]:
    """pixels is the depth here, and columns x depth the block of dw."""
    rows, columns, pixels = _power(out, 128), _power(channels, 128), 128 // itemsize
    blocks = [
        Block(pixels, rows, columns), Block(pixels // 2, rows, columns, 8, 4), Block(pixels, rows, columns, 4)
    ]  # fmt: skip
    return blocks + [Block(pixels, 256, columns)] if itemsize == 2 and out >= 256 else blocks


# ---- separable ----


class Pixels(NamedTuple):
    """Of separable_conv2d: pixels of a program, `depth` channels at a time, and all outputs."""

    pixels: int
    depth: int
    warps: int = 4
    stages: int = 1


@functools.cache
def separable(channels: int, out: int, itemsize: int) -> list[Pixels]:
    """With 64 accumulators a thread and 16 channels at a time (32 bytes of bf16, a sector) 12 to 16 warps are
    resident, and the loads of some hide behind the products of others; with 64 outputs 32 channels do. One
    stage: copies of the taps in shared memory would crowd out the L1 that serves them. fp32 takes 8 warps
    with 128 outputs, too: with 4 it spills a little on 8.0.
    """
    deep = 32 if channels > 16 else 16
    if out <= 64:
        return _distinct([Pixels(64, deep), Pixels(128, deep), Pixels(64, 16)])
    warps = 4 if out <= 128 and itemsize == 2 else 8
    return _distinct([Pixels(64, 16, warps), Pixels(64, deep, warps), Pixels(128, deep, 2 * warps)])
