"""One peer at one case: built, run, timed, observed; in this process or in one of its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import traceback
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from . import memory, timing
from .peers import PEERS, Case
from .rows import Row


class Contender:
    """A peer at a case. It raises whatever the peer dies of."""

    def __init__(self, name: str, case: Case, device: str, launch: str) -> None:
        self.case, self.device, self.launch = case, device, launch
        with self._stream():
            self.step = PEERS[name].build(case, device)

    @contextlib.contextmanager
    def _stream(self) -> Iterator[None]:
        """What is to become a CUDA graph runs on the stream of the capture from its first call on."""
        if self.launch != "graph":
            yield
            return
        torch.cuda.synchronize()
        with torch.cuda.stream(timing.capture()[0]):
            yield
        torch.cuda.synchronize()

    def outputs(self) -> list[Tensor]:
        """The results that must agree with the truth."""
        with self._stream():
            return self.step.outputs()

    def ready(self) -> None:
        """To be called once, when the results are right."""
        if self.launch == "graph":
            with self._stream():
                call = timing.graphed(self.step.call, self.step.buffers)
            self.step = replace(self.step, call=call)

    def sample(self, repeats: int, first: int) -> float:
        with self._stream():
            return timing.sample(self.step.call, repeats, first, self.device)

    def observe(self, backend: str) -> Row:
        """Memory and the kernels that ran: what is not a time."""
        with self._stream():
            return self._observe(backend)

    def _observe(self, backend: str) -> Row:
        row, step = {}, self.step
        if step.forward is not None:
            row["saved_bytes"] = memory.saved_bytes(step.forward, self.device)
        if backend.split()[0] in ("torch", "timm", "mnops"):  # the others run out of torch's sight
            if self.case.phase == "train" and self.launch == "call":
                row["peak_bytes"] = memory.peak_bytes(step.call, self.device)
            row["kernel"] = memory.kernels(step.call, self.device)
        return row

    def close(self) -> None:
        del self.step


class Apart:
    """The same in a process of its own: malloc keeps what another contender freed, and gives that back
    without the page faults that its user would see; thread pools, too, are the process's."""

    def __init__(self, name: str, case: Case, device: str, launch: str, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, threads), daemon=True)
        self.process.start()
        other.close()
        self._ask("build", name, case, device, launch)

    def _ask(self, what: str, *args: Any) -> Any:
        try:
            self.pipe.send((what, args))
            good, answer = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            raise RuntimeError(f"its process ended with {self.process.exitcode}") from None
        if not good:
            raise RuntimeError(answer)
        return answer

    def outputs(self) -> list[Tensor]:
        return [torch.from_numpy(a) for a in self._ask("outputs")]

    def ready(self) -> None:
        self._ask("ready")

    def sample(self, repeats: int, first: int) -> float:
        return self._ask("sample", repeats, first)

    def observe(self, backend: str) -> Row:
        return self._ask("observe", backend)

    def close(self) -> None:
        self.pipe.close()  # which ends it
        self.process.join()


def _serve(pipe: Connection, threads: int) -> None:
    torch.set_num_threads(threads)
    contender = None
    while True:
        try:
            what, args = pipe.recv()
        except EOFError:
            return
        try:
            if what == "build":
                contender, answer = Contender(*args), None
            else:
                answer = getattr(contender, what)(*args)
            if what == "outputs":  # tensors would travel as shared memory, whose files run out
                answer = [torch.as_tensor(t).detach().double().numpy() for t in answer]
            pipe.send((True, answer))
        except Exception as error:
            last = traceback.format_exception_only(error)[-1].strip()
            pipe.send((False, last))
