// Enough of CUDA to run the kernels of csrc/cuda on a CPU, for tests: the same sources, compiled as plain C++ with
// MNOPS_EMULATE_CUDA. Blocks run one after another; the threads of a block are fibers that change hands only where they
// wait (barriers, exchanges within a warp, cp.async). In which order they run between two waits is up to the hardware, so
// results must not depend on it: order 0 runs them first to last and copies asynchronously at once, 1 last to first and
// copies as late as a wait allows, every other number shuffles blocks, threads and copies at random. What is checked on
// the way: barriers that not every thread reaches, limits of the grid and the block, writes beyond dynamic shared memory,
// which starts as NaN; the compiler adds alignment and the bounds of arrays.
#pragma once
#include <math.h>
#include <setjmp.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // one block at a time

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = void*;
using __half = torch::headeronly::Half;
using __nv_bfloat16 = torch::headeronly::BFloat16;
inline float __half2float(__half v) { return v; }
inline float __bfloat162float(__nv_bfloat16 v) { return v; }
inline __half __float2half_rn(float v) { return v; }
inline __nv_bfloat16 __float2bfloat16_rn(float v) { return v; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace mnops::emulation {

struct Barrier {
  int expected = 0, arrived = 0, phase = 0;
};

struct Copy {  // of cp.async
  void* to;
  const void* from;
  int bytes, size;  // bytes from memory, zeros up to size
};

struct Warp {
  Barrier barrier;
  alignas(16) char exchanged[32][64];
};

struct Fiber {
  ucontext_t beginning;
  jmp_buf here;
  std::unique_ptr<char[]> stack;
  dim3 thread;
  int lane;
  Warp* warp;
  bool begun = false, done;
  std::vector<std::vector<Copy>> copies;  // by group; the last one is open
};

constexpr int stack_bytes = 256 << 10;
constexpr int canary_bytes = 1024;

struct Machine {
  int order = 0;
  std::mt19937 random;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  Barrier block;
  std::vector<double> shared;  // doubles: aligned
  size_t shared_bytes = 0;
  jmp_buf scheduler;
  Fiber* running = nullptr;
  std::function<void()> kernel;
  std::string error;
  int64_t progress = 0, launches = 0;

  void arrange(std::vector<int64_t>& what) {
    if (order == 1) std::reverse(what.begin(), what.end());
    if (order > 1) std::shuffle(what.begin(), what.end(), random);
  }
  // Not by swapcontext, which asks the system to keep and set the signal mask: most of an exchange's time.
  void yield() {
    if (!_setjmp(running->here)) _longjmp(scheduler, 1);
  }
  void resume(Fiber& f) {
    running = &f;
    threadIdx = f.thread;
    if (_setjmp(scheduler)) return;
    if (f.begun) _longjmp(f.here, 1);
    f.begun = true;
    setcontext(&f.beginning);
  }
  void fail(const std::string& what) {  // in a fiber: it never runs again, the scheduler throws
    error = what;
    for (;;) yield();
  }
  void wait(Barrier& b) {
    const int phase = b.phase;
    if (++b.arrived == b.expected) b.arrived = 0, b.phase++, progress++;
    while (b.phase == phase) yield();
  }
  static void enter();  // the first function of a fiber
  void run_block(dim3 block_size);
  void launch(dim3 grid, dim3 block_size, size_t bytes, std::function<void()> body);
};

inline Machine machine;

inline void Machine::enter() {
  for (;;) {  // a kernel's thread in one block after the other
    machine.kernel();
    machine.running->done = true;
    machine.progress++;
    machine.yield();
  }
}

inline void Machine::run_block(dim3 size) {
  const int64_t count = int64_t(size.x) * size.y * size.z;
  while (int64_t(fibers.size()) < count) {
    fibers.push_back(std::make_unique<Fiber>());
    Fiber& f = *fibers.back();
    f.stack.reset(new char[stack_bytes]);
    getcontext(&f.beginning);
    f.beginning.uc_stack.ss_sp = f.stack.get(), f.beginning.uc_stack.ss_size = stack_bytes, f.beginning.uc_link = nullptr;
    makecontext(&f.beginning, &Machine::enter, 0);
  }
  warps.assign(size_t((count + 31) / 32), Warp{});
  block = Barrier{int(count), 0, 0};
  std::memset(shared.data(), 0xff, shared_bytes);
  std::memset(reinterpret_cast<char*>(shared.data()) + shared_bytes, 0x5a, canary_bytes);
  for (int64_t t = 0; t < count; t++) {
    Fiber& f = *fibers[size_t(t)];
    f.thread = dim3(unsigned(t % size.x), unsigned(t / size.x % size.y), unsigned(t / size.x / size.y));
    f.lane = int(t % 32), f.warp = &warps[size_t(t / 32)], f.done = false;
    f.warp->barrier.expected++;
    f.copies.assign(1, {});
  }
  std::vector<int64_t> turn(static_cast<size_t>(count));
  for (int64_t left = count; left;) {
    const int64_t before = progress;
    std::iota(turn.begin(), turn.end(), 0);
    arrange(turn);
    for (const int64_t t : turn) {
      Fiber& f = *fibers[size_t(t)];
      if (f.done) continue;
      resume(f);
      if (!error.empty()) throw std::runtime_error("CUDA emulation: " + std::exchange(error, ""));
      left -= f.done;
    }
    if (progress == before) throw std::runtime_error("CUDA emulation: a barrier that not every thread reaches");
  }
  const char* beyond = reinterpret_cast<char*>(shared.data()) + shared_bytes;
  for (int i = 0; i < canary_bytes; i++)
    if (beyond[i] != 0x5a) throw std::runtime_error("CUDA emulation: a write beyond dynamic shared memory");
}

inline void Machine::launch(dim3 grid, dim3 size, size_t bytes, std::function<void()> body) {
  const int64_t threads = int64_t(size.x) * size.y * size.z;
  if (threads < 1 || threads > 1024 || size.z > 64 || !grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu ||
      grid.y > 65535 || grid.z > 65535 || bytes > 227 << 10)
    throw std::runtime_error("CUDA emulation: the grid, the block or shared memory is beyond the limits");
  shared_bytes = bytes;
  shared.resize((bytes + canary_bytes) / sizeof(double) + 1);
  kernel = std::move(body);
  blockDim = size, gridDim = grid;
  std::vector<int64_t> blocks(size_t(grid.x) * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), 0);
  arrange(blocks);
  for (const int64_t b : blocks) {
    blockIdx = dim3(unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y));
    try {
      run_block(size);
    } catch (...) {
      fibers.clear();  // those that wait would never come out
      throw;
    }
  }
  launches++;
}

// What every lane of the warp gives, to every lane: the ground of shuffles, votes and matrix instructions.
template <class V> struct Lanes {
  V of[32];
};
template <class V> Lanes<V> exchange(const V& mine) {
  static_assert(sizeof(V) <= sizeof(Warp::exchanged[0]) && std::is_trivially_copyable_v<V>);
  Fiber& f = *machine.running;
  std::memcpy(f.warp->exchanged[f.lane], &mine, sizeof(V));
  machine.wait(f.warp->barrier);
  Lanes<V> all;
  for (int lane = 0; lane < 32; lane++) std::memcpy(static_cast<void*>(&all.of[lane]), f.warp->exchanged[lane], sizeof(V));
  machine.wait(f.warp->barrier);
  return all;
}
inline int lane() { return machine.running->lane; }

inline void copy(const Copy& c) {
  std::memcpy(c.to, c.from, size_t(c.bytes));
  std::memset(static_cast<char*>(c.to) + c.bytes, 0, size_t(c.size - c.bytes));
}
inline void copy_async(void* to, const void* from, int bytes, int size) {
  if (reinterpret_cast<uintptr_t>(to) % size_t(size) || reinterpret_cast<uintptr_t>(from) % size_t(size))
    machine.fail("cp.async of an address that is not aligned");
  const Copy c{to, from, bytes, size};
  if (machine.order == 0 || (machine.order > 1 && machine.random() % 2)) copy(c);
  else machine.running->copies.back().push_back(c);
}
inline void copy_async_commit() { machine.running->copies.emplace_back(); }
inline void copy_async_wait(int groups) {  // all but the newest `groups` have landed
  auto& copies = machine.running->copies;
  while (int(copies.size()) - 1 > groups) {
    for (const Copy& c : copies.front()) copy(c);
    copies.erase(copies.begin());
  }
}

}  // namespace mnops::emulation

inline void __syncthreads() { mnops::emulation::machine.wait(mnops::emulation::machine.block); }
inline void __syncwarp(unsigned = ~0u) { mnops::emulation::machine.wait(mnops::emulation::machine.running->warp->barrier); }
template <class V> V __shfl_xor_sync(unsigned, V v, int mask) {
  return mnops::emulation::exchange(v).of[mnops::emulation::lane() ^ mask];
}
template <class V> V __shfl_down_sync(unsigned, V v, int delta) {
  const int from = mnops::emulation::lane() + delta;
  return mnops::emulation::exchange(v).of[from < 32 ? from : mnops::emulation::lane()];
}
template <class V> V __shfl_sync(unsigned, V v, int from) { return mnops::emulation::exchange(v).of[from & 31]; }
