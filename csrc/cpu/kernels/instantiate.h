// Fills the table of the instruction set whose vector type was included before this file.
#pragma once
#include "cpu/kernels/depthwise_conv2d.h"
#include "cpu/kernels/depthwise_conv2d_backward.h"
#include "cpu/kernels/norm_act.h"
#include "cpu/kernels/pointwise_conv2d.h"
#include "cpu/kernels/separable_conv2d.h"
#include "cpu/kernels/stem_conv2d.h"
#include "cpu/kernels/table.h"

namespace mnops {
namespace {

template <class P, class T> constexpr Packing<T> packing() { return {panel_bytes<P, T>, pack_columns<P, T>, pack_rows<P, T>}; }

// S is what is stored, P what is multiplied.
template <class S, class P = typename Arithmetic<S>::type, class T = typename Arithmetic<S>::type> constexpr Kernels<T> kernels() {
  using V = typename Vec<T>::type;
  static_assert(channel_quantum % V::N == 0, "padded channel vectors hold whole vectors");
  static_assert(channel_quantum % Shape<V>::nr == 0, "and whole panels of the matrix product");
  return {V::N, Shape<V>::mr, Shape<V>::nr,
          depthwise_forward_scratch<S>, depthwise_forward<S>, depthwise_backward_scratch<S>, depthwise_backward<S>,
          packing<P, T>(), packing<T, T>(), pointwise_forward_scratch<P, T>, pointwise_backward_scratch<P, T>,
          pointwise_forward<S, P>, pointwise_backward<S, P>, stem_scratch<T>, stem_forward<S>, stem_backward<S>,
          separable_scratch<P, T>, separable_forward<S, P>, separable_depthwise<S, P>, separable_pointwise<S, P>,
          norm_act_forward<S>, norm_act_backward<S>, norm_act_pool_forward<S>, norm_act_pool_backward<S>};
}

constexpr InstructionSet instruction_set(const char* name) {
  return {name, Tile::reason, kernels<float>(), kernels<f16>(), kernels<bf16>(), kernels<double>()};
}

}  // namespace
}  // namespace mnops
