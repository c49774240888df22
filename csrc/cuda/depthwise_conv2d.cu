// The op depthwise_conv2d: tensors in and out, workspaces, and which kernel serves. Contiguous NCHW, fp64 and whatever the
// tuned kernels were not built for goes to the plain ones.
#include "cuda/depthwise_conv2d.cuh"

#include "common/depthwise_shape.h"
#include "cuda/finish.cuh"

namespace mnops::cuda {
namespace {

// x in the layout that its kernel reads, and an empty tensor in the one that it writes.
Tensor in_layout(bool nchw, const Tensor& t) { return nchw ? torch::stable::contiguous(t) : channels_last(t); }
Tensor empty_in_layout(bool nchw, const Tensor& like, const std::vector<int64_t>& size) {
  return nchw ? empty_like_type(like, size, like.scalar_type()) : empty_channels_last(like, size);
}

MeasuredResult forward(const Tensor& x, const Tensor& weight, const MaybeTensor& mean, const MaybeTensor& var,
                       const MaybeTensor& gamma, const MaybeTensor& beta, double eps, std::string act, Ints stride,
                       Ints padding, Ints dilation, bool measure) {
  const OnDeviceOf guard(x);
  const DepthwiseShape s = depthwise_shape(x, weight, stride, padding, dilation);
  const bool nchw = wants_nchw(x);
  const Tensor xl = in_layout(nchw, x), y = empty_in_layout(nchw, x, {s.n, s.c, s.ho, s.wo});
  STD_TORCH_CHECK(!measure || y.numel() > 0, "mnops: statistics of an output with no element are not defined");
  const cudaStream_t stream = current_stream(x);
  return with_storage(x, [&](auto storage) -> MeasuredResult {
    using S = decltype(storage);
    using T = typename Accumulator<S>::type;
    const Tensor mean_y = empty_like_type(x, {measure ? s.c : 0}, scalar_type_of<T>());
    const Tensor var_y = empty_like_type(x, {measure ? s.c : 0}, scalar_type_of<T>());
    if (y.numel() == 0) return {y, mean_y, var_y};
    const NormTensors<T> norm(x, {mean, var, gamma, beta, eps, act}, s.c);
    Arrays arrays;
    DepthwiseForward<S, T> a{};
    a.size = s, a.norm = norm.pointers;
    a.x = static_cast<const S*>(xl.const_data_ptr()), a.y = static_cast<S*>(y.mutable_data_ptr());
    a.weight = arrays.of<T>(weight, x, weight.numel(), "weight");
    std::optional<Tensor> workspace;
    const Prepare<DepthwiseForward<S, T>> prepare = [&](auto& args) {
      if (!measure) return;
      workspace = empty_like_type(x, {3, args.chunks, s.c}, scalar_type_of<T>());
      args.statistics = static_cast<T*>(workspace->mutable_data_ptr());
    };
    bool served = false;
    if constexpr (!std::is_same_v<S, double>) served = !nchw && depthwise_forward<S>(a, prepare, stream);
    if (!served) depthwise_forward_any<S, T>(a, nchw, prepare, stream);
    if (measure)
      launch(finish_statistics<T>, unsigned(s.c), finish_threads, 0, stream, a.statistics, a.chunks, s.c,
             static_cast<T*>(mean_y.mutable_data_ptr()), static_cast<T*>(var_y.mutable_data_ptr()));
    return {y, mean_y, var_y};
  });
}

ConvGradResult backward(const Tensor& g, const MaybeTensor& g_mean, const MaybeTensor& g_var, const Tensor& y,
                        const Tensor& mean_y, const Tensor& x, const Tensor& weight, const MaybeTensor& mean,
                        const MaybeTensor& var, const MaybeTensor& gamma, const MaybeTensor& beta, double eps,
                        std::string act, Ints stride, Ints padding, Ints dilation, bool need_input, bool need_weight) {
  const OnDeviceOf guard(x);
  const DepthwiseShape s = depthwise_shape(x, weight, stride, padding, dilation);
  for (const Tensor* t : {&g, &y}) {
    STD_TORCH_CHECK(t->dim() == 4 && t->size(0) == s.n && t->size(1) == s.c && t->size(2) == s.ho && t->size(3) == s.wo,
                    "depthwise_conv2d_backward: g and y must have the shape that x and weight give");
    STD_TORCH_CHECK(t->scalar_type() == x.scalar_type() && same_device(*t, x),
                    "depthwise_conv2d_backward: g and y must have x's dtype and be on its device");
  }
  const bool nchw = wants_nchw(x);
  const Tensor gl = in_layout(nchw, g), yl = g_var ? in_layout(nchw, y) : gl, xl = in_layout(nchw, x);
  const Tensor dx = need_input ? empty_in_layout(nchw, x, {s.n, s.c, s.h, s.w}) : empty_like_type(x, {0}, x.scalar_type());
  const Tensor dw = empty_like_type(weight, need_weight ? std::vector<int64_t>{s.c, 1, s.kh, s.kw} : std::vector<int64_t>{0},
                                    weight.scalar_type());
  const cudaStream_t stream = current_stream(x);
  return with_storage(x, [&](auto storage) -> ConvGradResult {
    using S = decltype(storage);
    using T = typename Accumulator<S>::type;
    const PendingTensors args{mean, var, gamma, beta, eps, act};
    const NormTensors<T> norm(x, args, s.c);
    const NormGradTensors<T> grads(x, args, s.c, need_input);
    Arrays arrays;
    DepthwiseBackward<S, T> a{};
    a.size = s, a.norm = norm.pointers;
    a.g = static_cast<const S*>(gl.const_data_ptr()), a.x = static_cast<const S*>(xl.const_data_ptr());
    a.y = g_var ? static_cast<const S*>(yl.const_data_ptr()) : nullptr;
    a.dx = need_input ? static_cast<S*>(dx.mutable_data_ptr()) : nullptr;
    a.weight = arrays.of<T>(weight, x, weight.numel(), "weight");
    a.incoming = {arrays.of<T>(g_mean, x, s.c, "g_mean"), arrays.of<T>(g_var, x, s.c, "g_var"),
                  g_var ? arrays.of<T>(mean_y, x, s.c, "mean_y") : nullptr, double(s.n * s.ho * s.wo)};
    std::optional<Tensor> taps, sums;
    const Prepare<DepthwiseBackward<S, T>> prepare = [&](auto& args) {
      if (need_weight) {
        taps = empty_like_type(x, {args.chunks, s.c, s.kh * s.kw}, scalar_type_of<T>());
        args.taps = static_cast<T*>(taps->mutable_data_ptr());
      }
      if (need_input) {
        sums = empty_like_type(x, {args.chunks, 2, s.c}, scalar_type_of<T>());
        args.sums = static_cast<T*>(sums->mutable_data_ptr());
      }
    };
    if ((need_input || need_weight) && s.n > 0) {
      bool served = false;
      if constexpr (!std::is_same_v<S, double>) served = !nchw && depthwise_backward<S>(a, prepare, stream);
      if (!served) depthwise_backward_any<S, T>(a, nchw, prepare, stream);
    }
    if (need_weight)
      with_storage(dw, [&](auto kind) {
        using W = decltype(kind);
        const int64_t count = s.c * s.kh * s.kw;
        launch(finish_matrix<T, W>, unsigned(ceil_div(count, 32)), matrix_threads, 0, stream, a.taps, a.chunks, count,
               static_cast<W*>(dw.mutable_data_ptr()));
      });
    if (grads.mean.numel() || grads.var.numel() || grads.gamma.numel() || grads.beta.numel())
      launch(finish_sums<T>, unsigned(s.c), finish_threads, 0, stream, a.sums, a.chunks, s.c, a.norm, data_or_null<T>(grads.mean),
             data_or_null<T>(grads.var), data_or_null<T>(grads.gamma), data_or_null<T>(grads.beta));
    return {dx, dw, grads.mean, grads.var, grads.gamma, grads.beta};
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnops, CUDA, m) {
  m.impl("depthwise_conv2d", TORCH_BOX(&forward));
  m.impl("depthwise_conv2d_backward", TORCH_BOX(&backward));
}

}  // namespace mnops::cuda
