#include "cpu/memory.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sys/mman.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <mutex>

namespace mnops {
namespace {

// Below this malloc keeps the memory itself.
constexpr size_t smallest = 64 << 10;

// First fit in the order of addresses, over address ranges that are reserved by the GiB and never given back: only what was
// written is memory, and that stays about as much as was once in use at the same time.
class Pool {
  static constexpr size_t grain = 4096, reserve = size_t(1) << 30;
  std::mutex mutex;
  std::map<char*, size_t> free;  // by address; neighbours are merged

  void insert(char* begin, size_t size) {
    auto next = free.lower_bound(begin);
    if (next != free.end() && begin + size == next->first) {
      size += next->second;
      next = free.erase(next);
    }
    if (next != free.begin()) {
      const auto previous = std::prev(next);
      if (previous->first + previous->second == begin) {
        previous->second += size;
        return;
      }
    }
    free.emplace_hint(next, begin, size);
  }

  static char* map(size_t size) {
    void* range = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return range == MAP_FAILED ? nullptr : static_cast<char*>(range);
  }

 public:
  static size_t rounded(size_t bytes) { return (bytes + grain - 1) / grain * grain; }

  char* take(size_t bytes) {
    const size_t size = rounded(bytes);
    const std::lock_guard<std::mutex> lock(mutex);
    auto fit = std::find_if(free.begin(), free.end(), [&](const auto& range) { return range.second >= size; });
    if (fit == free.end()) {
      size_t whole = std::max(size, reserve);
      char* range = map(whole);
      if (!range) range = map(whole = size);  // where addresses are limited
      STD_TORCH_CHECK(range, "mnops: no memory for a result of ", bytes, " bytes");
      insert(range, whole);
      fit = std::find_if(free.begin(), free.end(), [&](const auto& range) { return range.second >= size; });
    }
    const auto [begin, available] = *fit;
    const auto next = free.erase(fit);
    if (available > size) free.emplace_hint(next, begin + size, available - size);
    return begin;
  }

  void give(char* block, size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex);
    insert(block, rounded(bytes));
  }

  void empty() {
    const std::lock_guard<std::mutex> lock(mutex);
    for (const auto& [begin, size] : free) madvise(begin, size, MADV_DONTNEED);
  }

  // Held over a fork, so that the child finds it whole and free.
  Pool() {
    static Pool* self = this;
    pthread_atfork([] { self->mutex.lock(); }, [] { self->mutex.unlock(); }, [] { self->mutex.unlock(); });
  }
};

Pool& pool() {
  static Pool* const one = new Pool;  // never destroyed: tensors may outlive a library's static objects
  return *one;
}

// torch_from_blob, which takes a deleter, came with torch 2.11; before that results are torch's own memory.
using FromBlob = AOTITorchError (*)(void*, int64_t, const int64_t*, const int64_t*, int64_t, int32_t, int32_t, int32_t,
                                    AtenTensorHandle*, int32_t, const uint8_t*, int64_t, void (*)(void*, void*), void*);
const FromBlob from_blob = reinterpret_cast<FromBlob>(dlsym(RTLD_DEFAULT, "torch_from_blob"));

bool wanted() {
  const char* setting = std::getenv("MNOPS_KEEP_MEMORY");
  return !setting || std::strcmp(setting, "0");
}
std::atomic<bool> keep{wanted()};

bool keep_memory(bool on) { return keep.exchange(on); }
void empty_cache() { pool().empty(); }

}  // namespace

Tensor empty_result(const Tensor& like, const Ints& size, ScalarType type) {
  const int64_t n = size[0], c = size[1], h = size[2], w = size[3];
  const size_t element = type == ScalarType::Float ? 4 : type == ScalarType::Double ? 8 : like.element_size();
  const size_t bytes = size_t(n * c * h * w) * element;
  if (!from_blob || !keep || bytes < smallest) return empty_channels_last(like, size, type);
  const int64_t strides[4] = {h * w * c, 1, w * c, c};
  char* const block = pool().take(bytes);
  AtenTensorHandle result = nullptr;
  const auto give = [](void* data, void* bytes) { pool().give(static_cast<char*>(data), reinterpret_cast<size_t>(bytes)); };
  TORCH_ERROR_CODE_CHECK(from_blob(block, 4, size.data(), strides, 0, dtype_of(like, type), aoti_torch_device_type_cpu(), -1, &result,
                              aoti_torch_layout_strided(), nullptr, 0, give, reinterpret_cast<void*>(bytes)));
  return Tensor(result);
}

STABLE_TORCH_LIBRARY_IMPL(mnops, CompositeExplicitAutograd, m) {
  m.impl("keep_memory", TORCH_BOX(&keep_memory));
  m.impl("empty_cache", TORCH_BOX(&empty_cache));
}

}  // namespace mnops
