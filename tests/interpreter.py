"""Triton's interpreter as the tests need it: rounding as a GPU does, and a tenth of the time.

For processes in which TRITON_INTERPRET=1 was set before Triton was imported.
"""

import dataclasses

import torch
import triton.language as tl
from triton.runtime import interpreter


def _rounded_cast(self, source, type_):
    """fp32 to bf16 rounds to the nearest, as the hardware and torch do; the interpreter cuts bits off."""
    there, here = type_.scalar, source.dtype.scalar
    data = source.data
    if here == tl.bfloat16 and there != tl.bfloat16:
        data = torch.from_numpy(data.copy()).view(torch.bfloat16).float().numpy()
    if there == tl.bfloat16:
        if here == tl.bfloat16:
            return source
        data = torch.from_numpy(data.astype("float32")).bfloat16().view(torch.uint16).numpy()
    else:
        data = data.astype(interpreter._get_np_dtype(type_))
    return interpreter.TensorHandle(data, there)


_patched = set()


def _called(self, *args, **kwargs):
    """A call from a kernel. The interpreter patches triton.language anew at each, most of its time."""
    if self.fn not in _patched:
        interpreter._patch_lang(self.fn)
        _patched.add(self.fn)
    return self.rewrite()(*args, **kwargs)


def _tree_sum(self, value):
    """A sum over an axis by halves, as threads do it; the interpreter's, first to last, is less exact."""
    data = value.handle.data
    if self.axis is None:
        data = data.ravel()
    axis = self.axis or 0
    data = data.swapaxes(0, axis)
    while len(data) > 1:
        half = len(data) // 2
        data = data[:half] + data[half:]
    data = data.swapaxes(0, axis)
    return self.to_tensor(data if self.keep_dims else data.squeeze(axis), value.dtype)


_np_dtypes = {}


def _np_dtype(type_, look_up=interpreter._get_np_dtype):
    """Kept: the interpreter makes a dict of all of them at each call."""
    scalar = type_.scalar
    if scalar.name not in _np_dtypes:
        _np_dtypes[scalar.name] = look_up(scalar)
    return _np_dtypes[scalar.name]


def check_overflow(wanted: bool) -> None:
    """Whether integers are computed with 64 bits, too, and compared: two fifths of a kernel's time."""
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=wanted)


def mend() -> None:
    check_overflow(False)
    interpreter._get_np_dtype = _np_dtype
    interpreter.ReduceOps.sum = _tree_sum
    interpreter.InterpreterBuilder.cast_impl = _rounded_cast
    interpreter.InterpretedFunction.__call__ = _called
