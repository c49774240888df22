// The schemas again, in the namespace of the emulated kernels, and the order in which threads run.
#include "cuda/launch.cuh"

#undef STABLE_TORCH_LIBRARY
#define STABLE_TORCH_LIBRARY(ns, m) STABLE_TORCH_LIBRARY_FRAGMENT(mnops_cuda_emulated, m)
#include "library.cpp"

extern "C" __attribute__((visibility("default"))) void mnops_cuda_emulation_order(int order) {
  mnops::emulation::machine.order = order;
  mnops::emulation::machine.random.seed(unsigned(order));
}
extern "C" __attribute__((visibility("default"))) int64_t mnops_cuda_emulation_launches() {
  return mnops::emulation::machine.launches;
}
