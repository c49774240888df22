"""Results on the CPU lie in memory that is kept and used again (csrc/cpu/memory.h)."""

import copy
import io
import os
import random
import subprocess
import sys
import threading

import pytest
import torch

import mnops

KEPT = torch.__version__ >= (2, 11)
kept = pytest.mark.skipif(not KEPT, reason="torch before 2.11 cannot take memory of another's")
PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


def result(value: float, pixels: int = 64, channels: int = 16) -> torch.Tensor:
    """A result of norm_act that is `value` everywhere."""
    x = torch.full((1, channels, pixels, pixels), float(value)).to(memory_format=torch.channels_last)
    return mnops.ops.norm_act(mnops.Pending(x, act="relu"))


def resident() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * PAGE


@kept
def test_memory_is_used_again():
    address = result(1).data_ptr()
    assert result(2).data_ptr() == address


def churn(seed: int, rounds: int = 300) -> None:
    draw = random.Random(seed)
    alive: list[tuple[float, torch.Tensor]] = []
    for i in range(rounds):
        value = float(seed * rounds + i)
        alive.append((value, result(value, draw.randint(20, 90), draw.choice([8, 16, 40]))))
        if len(alive) > 12:
            value, tensor = alive.pop(draw.randrange(len(alive)))
            assert (tensor == value).all()
    for value, tensor in alive:
        assert (tensor == value).all()


def test_results_never_overlap():
    churn(0)


def test_results_of_several_threads_never_overlap():
    failed = []

    def run(seed: int) -> None:
        try:
            churn(seed, 100)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failed


@kept
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="resident memory is read from /proc")
def test_empty_cache_gives_memory_back():
    y = result(1, 1024, 32)  # 128 MiB
    size = y.numel() * 4
    before = resident()
    del y
    assert resident() > before - size // 2  # kept
    mnops.empty_cache()
    assert resident() < before - size * 3 // 4
    assert (result(3) == 3).all()


def test_a_child_of_a_fork_has_it_too():
    y = result(5)
    child = os.fork()
    if child == 0:
        # No torch thread pool in the child: the allocation alone is looked at, with one thread.
        torch.set_num_threads(1)
        ok = bool((y == 5).all()) and bool((result(6) == 6).all())
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert (y == 5).all()


def test_results_are_tensors_like_any_other():
    y = result(7)
    assert y.device == torch.device("cpu") and y.is_contiguous(memory_format=torch.channels_last)
    buffer = io.BytesIO()
    torch.save(y, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(y), torch.load(buffer), y.clone().share_memory_(), torch.from_numpy(y.numpy())):
        assert torch.equal(other, y)
    view = y[:, 3:5]
    del y
    assert (result(8) == 8).all() and (view == 7).all()  # a view keeps the memory


@pytest.mark.parametrize("setting", ["0", "1"])
def test_the_switch(setting: str):
    code = (
        "import torch, mnops\n"
        "x = torch.ones(1, 16, 512, 512).to(memory_format=torch.channels_last)\n"
        "y = mnops.ops.norm_act(mnops.Pending(x, act='relu'))\n"
        "print(y.untyped_storage().resizable(), bool((y == 1).all()))"
    )
    environment = {**os.environ, "MNOPS_KEEP_MEMORY": setting}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.split() == [str(setting == "0" or not KEPT), "True"]


def test_the_profiler_sees_memory_that_is_torchs():
    x = torch.ones(1, 16, 512, 512).to(memory_format=torch.channels_last)
    with mnops.memory.from_torch(), torch.profiler.profile(profile_memory=True) as prof:
        y = mnops.ops.norm_act(mnops.Pending(x, act="relu"))
    assert y.untyped_storage().resizable()
    seen = sum(e.nbytes() for e in prof.profiler.kineto_results.events() if e.name() == "[memory]")
    assert seen == y.numel() * y.element_size()
    assert mnops.ops.norm_act(mnops.Pending(x, act="relu")).untyped_storage().resizable() != KEPT
