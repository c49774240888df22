// The op stem_conv2d: tensors in and out, and workspaces.
#include "cuda/stem_conv2d.cuh"

#include "cuda/finish.cuh"

namespace mnops::cuda {
namespace {

constexpr int64_t most_size = 1 << 29;  // rows, columns, channels, taps are ints in the kernels, and so are sums of two

StemShape shape_of(const Tensor& x, const Tensor& weight, const Ints& stride, const Ints& padding) {
  STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 4 && weight.size(1) == x.size(1),
                  "stem_conv2d: weight must be (O, C, K, K) with x (N, C, H, W)");
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 4, "stem_conv2d: stride has 2 elements, padding has 4");
  STD_TORCH_CHECK(stride[0] >= 1 && stride[1] >= 1, "stem_conv2d: stride must be at least 1");
  const int64_t taps = weight.size(1) * weight.size(2) * weight.size(3);
  for (const int64_t size : {x.size(1), x.size(2), x.size(3), weight.size(0), taps, stride[0], stride[1], padding[0], padding[1],
                             padding[2], padding[3]})
    STD_TORCH_CHECK(size >= 0 && size < most_size, "stem_conv2d: sizes, strides and padding go up to ", most_size, ", got ", size);
  const int64_t h = x.size(2) + padding[0] + padding[1] - weight.size(2), w = x.size(3) + padding[2] + padding[3] - weight.size(3);
  STD_TORCH_CHECK(taps > 0 && h >= 0 && w >= 0, "stem_conv2d: the padded input must be at least as large as the kernel");
  StemShape s{};
  s.c = int(x.size(1)), s.h = int(x.size(2)), s.w = int(x.size(3)), s.o = int(weight.size(0));
  s.kh = int(weight.size(2)), s.kw = int(weight.size(3)), s.taps = int(taps);
  s.sh = int(stride[0]), s.sw = int(stride[1]), s.pad_top = int(padding[0]), s.pad_left = int(padding[2]);
  s.ho = int(h / s.sh) + 1, s.wo = int(w / s.sw) + 1;
  s.n = x.size(0), s.pixels = s.n * s.ho * s.wo;
  s.x = {x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
  STD_TORCH_CHECK(ceil_div(s.o, 32) <= most_grid_y && ceil_div(s.taps, stem::taps_a_step) <= most_grid_y && s.c <= most_grid_y,
                  "stem_conv2d: channels and taps go up to 65535 blocks");
  return s;
}

// A dense weight of x's dtype, or of the arithmetic's.
struct Weight {
  Tensor tensor;
  bool wide;
  Weight(const Tensor& x, const Tensor& weight)
      : tensor(torch::stable::contiguous(weight)), wide(weight.scalar_type() != x.scalar_type()) {
    STD_TORCH_CHECK(same_device(x, weight) && (!wide || weight.scalar_type() == ScalarType::Float),
                    "stem_conv2d: weight must be on x's device, in x's dtype or float32");
  }
  const void* data() const { return tensor.const_data_ptr(); }
};

MeasuredResult forward(const Tensor& x, const Tensor& weight, const MaybeTensor& mean, const MaybeTensor& var,
                       const MaybeTensor& gamma, const MaybeTensor& beta, double eps, std::string act, Ints stride,
                       Ints padding, bool measure) {
  StemShape s = shape_of(x, weight, stride, padding);
  const Weight w(x, weight);
  const OnDeviceOf guard(x);
  const cudaStream_t stream = current_stream(x);
  return with_storage(x, [&](auto storage) -> MeasuredResult {
    using S = decltype(storage);
    using T = typename Accumulator<S>::type;
    const NormTensors<T> norm(x, {mean, var, gamma, beta, eps, act}, s.c);
    const std::vector<int64_t> size{x.size(0), s.o, s.ho, s.wo};
    const Tensor y = wants_nchw(x) ? empty_like_type(x, size, x.scalar_type()) : empty_channels_last(x, size);
    const Tensor mean_y = empty_like_type(x, {measure ? s.o : 0}, scalar_type_of<T>());
    const Tensor var_y = empty_like_type(x, {measure ? s.o : 0}, scalar_type_of<T>());
    STD_TORCH_CHECK(!measure || y.numel() > 0, "mnops: statistics of an output with no element are not defined");
    if (y.numel() == 0) return {y, mean_y, var_y};
    s.y = {y.stride(0), y.stride(1), y.stride(2), y.stride(3)};
    if (s.o == 1) s.y.c = 1;
    StemForward<S, T> a{};
    a.size = s, a.norm = norm.pointers, a.weight = w.data(), a.wide_weight = w.wide;
    a.x = static_cast<const S*>(x.const_data_ptr()), a.y = static_cast<S*>(y.mutable_data_ptr());
    std::optional<Tensor> workspace;
    stem_forward<S, T>(a, [&](auto& args) {
      if (!measure) return;
      workspace = empty_like_type(x, {3, args.chunks, s.o}, ScalarType::Double);
      args.statistics = static_cast<double*>(workspace->mutable_data_ptr());
    }, stream);
    if (measure)
      launch(finish_statistics<T, double>, unsigned(s.o), finish_threads, 0, stream, a.statistics, a.chunks, int64_t(s.o),
             data_or_null<T>(mean_y), data_or_null<T>(var_y));
    return {y, mean_y, var_y};
  });
}

ConvGradResult backward(const Tensor& g, const MaybeTensor& g_mean, const MaybeTensor& g_var, const Tensor& y,
                        const Tensor& mean_y, const Tensor& x, const Tensor& weight, const MaybeTensor& mean,
                        const MaybeTensor& var, const MaybeTensor& gamma, const MaybeTensor& beta, double eps,
                        std::string act, Ints stride, Ints padding, bool need_input, bool need_weight) {
  const StemShape s = shape_of(x, weight, stride, padding);
  const Weight w(x, weight);
  for (const Tensor* t : {&g, &y})
    STD_TORCH_CHECK(t->dim() == 4 && t->size(0) == x.size(0) && t->size(1) == s.o && t->size(2) == s.ho && t->size(3) == s.wo &&
                        t->scalar_type() == x.scalar_type() && same_device(*t, x),
                    "stem_conv2d_backward: g and y must have the shape that x and weight give, x's dtype and device");
  const OnDeviceOf guard(x);
  const cudaStream_t stream = current_stream(x);
  return with_storage(x, [&](auto storage) -> ConvGradResult {
    using S = decltype(storage);
    using T = typename Accumulator<S>::type;
    const PendingTensors args{mean, var, gamma, beta, eps, act};
    const NormTensors<T> norm(x, args, s.c);
    Arrays arrays;
    const Tensor gl = channels_last(g), yl = g_var ? channels_last(y) : gl;
    StemBackward<S, T> a{};
    a.size = s, a.norm = norm.pointers, a.weight = w.data(), a.wide_weight = w.wide;
    a.x = static_cast<const S*>(x.const_data_ptr());
    a.g = static_cast<const S*>(gl.const_data_ptr()), a.y = static_cast<const S*>(yl.const_data_ptr());
    a.incoming = {arrays.of<T>(g_mean, x, s.o, "g_mean"), arrays.of<T>(g_var, x, s.o, "g_var"),
                  g_var ? arrays.of<T>(mean_y, x, s.o, "mean_y") : nullptr, double(s.pixels)};
    std::optional<Tensor> workspace;
    const auto prepare = [&](int64_t values) {  // of a block
      return [&, values](auto& args) {
        workspace = empty_like_type(x, {args.chunks, values}, scalar_type_of<T>());
        args.partial = data_or_null<T>(*workspace);
      };
    };

    const Tensor dw = need_weight ? empty_like_type(x, {s.o, s.c, s.kh, s.kw}, weight.scalar_type())
                                  : empty_like_type(x, {0}, weight.scalar_type());
    if (dw.numel()) {
      stem_backward_weight<S, T>(a, prepare(dw.numel()), stream);
      with_storage(dw, [&](auto kind) {
        using W = decltype(kind);
        launch(finish_matrix<T, W>, unsigned(ceil_div(dw.numel(), 32)), matrix_threads, 0, stream, a.partial, a.chunks, dw.numel(),
               static_cast<W*>(dw.mutable_data_ptr()));
      });
    }

    const Tensor dx = need_input ? empty_channels_last(x, {x.size(0), s.c, s.h, s.w}) : empty_like_type(x, {0}, x.scalar_type());
    const NormGradTensors<T> grads(x, args, s.c, need_input);
    if (need_input) {
      a.dx = static_cast<S*>(dx.mutable_data_ptr());
      stem_backward_input<S, T>(a, prepare(2 * s.c), stream);
      launch(finish_sums<T>, unsigned(s.c), finish_threads, 0, stream, a.partial, a.chunks, int64_t(s.c), a.norm,
             data_or_null<T>(grads.mean), data_or_null<T>(grads.var), data_or_null<T>(grads.gamma), data_or_null<T>(grads.beta));
    }
    return {need_input ? in_layout_of(x, dx) : dx, dw, grads.mean, grads.var, grads.gamma, grads.beta};
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnops, CUDA, m) {
  m.impl("stem_conv2d", TORCH_BOX(&forward));
  m.impl("stem_conv2d_backward", TORCH_BOX(&backward));
}

}  // namespace mnops::cuda
