// separable_conv2d, for inference: depthwise convolution, norm, activation and 1x1 convolution in one kernel, NHWC.
//
// A block takes a rectangle of output pixels. 32 channels at a time, it copies the rectangle and its halo of x into shared
// memory (cp.async, the next channels while it works on these), normalises each value once, in place, and convolves; the
// result of all channels, normalised and activated, becomes the slab, [pixels][channels] in shared memory. Then it
// multiplies the slab with the weights, which come in steps of 128 bytes a row, the next on its way: fp16 and bf16 on
// tensor cores, fp32 too where torch.backends.cudnn.conv.fp32_precision is "tf32", else by multiply-adds. The depthwise
// result is rounded to x's dtype on its way to the product, as stock PyTorch stores it.
// Bytes moved: y once, x once and its halo again: (th + 2) (tw + 2) / (th tw) for 3x3, from L2 where neighbours are at work.
// The floor is x and y once. The weights come from L2 once a rectangle: C * O / pixels values a pixel, which bounds layers
// with many channels, as multiply-adds bound fp32 without tf32.
// Where nothing in the table of separable_tile.h fits shared memory (fp32 of some 1500 channels and more on sm_86, huge
// kernels), and for fp64, two plain kernels serve, with the depthwise result in memory.
#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/product.cuh"
#include "cuda/separable_tile.h"

namespace mnops::cuda {

#ifdef MNOPS_EMULATE_CUDA
static DeviceLimits emulated_limits{227 << 10, 228 << 10, 4};
static int forced_row = -1;
#else
constexpr int forced_row = -1;
#endif

namespace {

template <class S, class T> struct SeparableArguments {
  const S* x;
  const S* matrix;   // (O, C)
  const void* taps;  // (C, kh, kw)
  bool wide_taps;    // in T, else in S
  S* y;
  bool packed_x, packed_matrix, packed_y;  // 16 bytes at a time
  SeparableShape s;
  SeparableLayout l;
  int th, tw, groups;
  NormPointers<T> norm, mid;
};

template <class S, class T> __device__ __forceinline__ T tap_at(const SeparableArguments<S, T>& a, int64_t i) {
  return a.wide_taps ? static_cast<const T*>(a.taps)[i] : widen<T>(static_cast<const S*>(a.taps)[i]);
}

// mean, scale, shift of channel c to v[0], v[32], v[64]; zeros beyond the last, so that the slab ends in zeros.
template <class T> __device__ __forceinline__ void set_norm(T* v, const NormPointers<T>& p, int c, bool there) {
  v[0] = there && p.mean ? p.mean[c] : T(0);
  v[separable_chunk] = there ? norm_scale(p, c) : T(0);
  v[2 * separable_chunk] = there && p.beta ? p.beta[c] : T(0);
}

// One element of the table at a time where 16 bytes are not aligned.
template <class S> __device__ __forceinline__ void copy_vector(S* to, const S* from, const S* valid, bool there, int elements, bool packed) {
  constexpr int vec = 16 / sizeof(S);
  if (packed) {
    copy_async<16>(to, there && elements > 0 ? from : valid, there && elements > 0);
    return;
  }
  S zero;
  narrow(0.0f, zero);
#pragma unroll
  for (int i = 0; i < vec; i++) to[i] = there && i < elements ? from[i] : zero;
}

template <class S, class MATH, int ROW>
__global__ void __launch_bounds__(separable_rows[ROW].threads, 512 / separable_rows[ROW].threads)  // 128 registers a thread
separable_kernel(const SeparableArguments<S, float> a) {
  using T = float;
  constexpr int pixels = separable_rows[ROW].pixels, outputs = separable_rows[ROW].outputs;
  constexpr int threads = separable_rows[ROW].threads, warps = threads / 32;
  constexpr int chunk = separable_chunk, vec = 16 / sizeof(S), quads = chunk / 4, together = threads / quads;
  constexpr int mine = pixels / together;  // pixels of a thread in the depthwise part, 4 channels each
  constexpr int step = separable_step_bytes / sizeof(S), step_pitch = step + vec, out_pitch = outputs + vec;
  constexpr int warp_columns = outputs / (warps == 8 ? pixels >= 128 ? 2 : 4 : warps), warp_columns_count = outputs / warp_columns;
  constexpr int warp_rows_count = warps / warp_columns_count, warp_rows = pixels / warp_rows_count;
  using Product = WarpProduct<S, MATH, warp_rows, warp_columns>;
  static_assert(pixels % together == 0 && outputs % vec == 0 && warp_rows * warp_rows_count == pixels, "all at work");
  static_assert(step % Product::depth == 0 && threads % (chunk / vec) == 0, "whole steps; a thread keeps its vector of a chunk");

  const SeparableShape& s = a.s;
  const SeparableLayout& l = a.l;
  unsigned char* const shared = dynamic_shared();
  S* const slab = reinterpret_cast<S*>(shared);
  S* const weights = reinterpret_cast<S*>(shared + l.slab);  // [2][outputs][step_pitch]
  unsigned char* const work = shared + l.slab + l.weights;
  auto patch = [&](int k) { return reinterpret_cast<S*>(work + (k & 1) * l.patch); };
  auto vectors = [&](int k) { return reinterpret_cast<T*>(work + 2 * l.patch + (k & 1) * l.vectors); };
  S* const out = reinterpret_cast<S*>(work);  // when the depthwise part is done

  const unsigned tiles_w = unsigned((s.wo + a.tw - 1) / a.tw), tiles_h = unsigned((s.ho + a.th - 1) / a.th);
  const unsigned tile = blockIdx.x / unsigned(a.groups), group = blockIdx.x % unsigned(a.groups);
  const int64_t n = tile / tiles_w / tiles_h;
  const int row0 = int(tile / tiles_w % tiles_h) * a.th, column0 = int(tile % tiles_w) * a.tw;
  const int h0 = row0 * s.sh - s.pad_top, w0 = column0 * s.sw - s.pad_left;
  const S* const image = a.x + n * s.h * s.w * s.c;
  const int chunks = (s.c + chunk - 1) / chunk;

  // ---- the weights' steps, in the order in which the products take them
  const int steps = (s.c + step - 1) / step, blocks = (s.o + outputs - 1) / outputs;
  const int each = (blocks + a.groups - 1) / a.groups, first_block = int(group) * each;
  const int last_block = first_block + each < blocks ? first_block + each : blocks;
  const int all_steps = (last_block - first_block) * steps;
  auto copy_weights = [&](int i) {
    if (i < all_steps) {
      const int o0 = (first_block + i / steps) * outputs, c0 = i % steps * step;
      S* const to = weights + (i & 1) * outputs * step_pitch;
      for (int e = threadIdx.x; e < outputs * (step / vec); e += threads) {
        const int o = e / (step / vec), c = c0 + e % (step / vec) * vec;
        copy_vector(to + o * step_pitch + c - c0, a.matrix + int64_t(o0 + o) * s.c + c, a.matrix, o0 + o < s.o, s.c - c, a.packed_matrix);
      }
    }
    commit_copies();
  };

  // ---- x, 32 channels of the patch
  const int patch_vectors = l.patch_h * l.patch_w * (chunk / vec);
  auto each_vector = [&](auto f) {  // f(index, row and column of x, both inside?)
    for (int e = threadIdx.x; e < patch_vectors; e += threads) {
      const int p = e / (chunk / vec), h = h0 + p / l.patch_w, w = w0 + p % l.patch_w;
      f(e * vec, h, w, unsigned(h) < unsigned(s.h) && unsigned(w) < unsigned(s.w));
    }
  };
  const int my_channel = threadIdx.x % (chunk / vec) * vec;
  auto copy_patch = [&](int k) {
    if (k < chunks) {
      const int c = k * chunk + my_channel;
      each_vector([&](int e, int h, int w, bool inside) {
        copy_vector(patch(k) + e, image + (int64_t(h) * s.w + w) * s.c + c, image, inside, s.c - c, a.packed_x);
      });
    }
    commit_copies();
  };

  copy_patch(0);
  copy_weights(0);
  const int quad = threadIdx.x % quads * 4, q0 = threadIdx.x / quads;
  int corner[mine];
#pragma unroll
  for (int i = 0; i < mine; i++) {
    const int q = q0 + i * together < a.th * a.tw ? q0 + i * together : 0;  // beyond the rectangle: computed, not stored
    corner[i] = ((q / a.tw * s.sh) * l.patch_w + q % a.tw * s.sw) * chunk + quad;
  }
  const bool plain = !a.norm.mean && a.norm.act == Act::none;
  for (int k = 0; k < chunks; k++) {
    // taps [kh * kw][32], then mean, scale and shift of x's norm and of the depthwise result's
    T* const v = vectors(k);
    const int taps = s.kh * s.kw;
    for (int e = threadIdx.x; e < taps * chunk; e += threads) {
      const int c = k * chunk + e % chunk;
      v[e] = c < s.c ? tap_at(a, int64_t(c) * taps + e / chunk) : T(0);
    }
    for (int e = threadIdx.x; e < 2 * chunk; e += threads) {
      const int c = k * chunk + e % chunk;
      set_norm(v + (taps + e / chunk * 3) * chunk + e % chunk, e < chunk ? a.norm : a.mid, c, c < s.c);
    }
    wait_copies<0>();
    __syncthreads();
    copy_patch(k + 1);
    if (!plain) {  // what this thread copied itself
      const T* const norm = v + taps * chunk + my_channel;
      T mean[vec], scale[vec], shift[vec];
#pragma unroll
      for (int i = 0; i < vec; i++) mean[i] = norm[i], scale[i] = norm[chunk + i], shift[i] = norm[2 * chunk + i];
      each_vector([&](int e, int, int, bool inside) {
        if (!inside) return;
        Pack<S, vec> pack = load_pack<S, vec>(patch(k) + e);
#pragma unroll
        for (int i = 0; i < vec; i++)
          narrow(activate(a.norm.act, (widen<T>(pack.v[i]) - mean[i]) * scale[i] + shift[i]), pack.v[i]);
        store_pack(patch(k) + e, pack);
      });
    }
    __syncthreads();
    T sum[mine][4] = {};
    const T* tap = v + quad;
    for (int i = 0; i < s.kh; i++)
      for (int j = 0; j < s.kw; j++, tap += chunk) {
        const Pack<T, 4> w = load_pack<T, 4>(tap);
        const S* const z = patch(k) + (i * s.dh * l.patch_w + j * s.dw) * chunk;
#pragma unroll
        for (int m = 0; m < mine; m++) {
          const Pack<S, 4> pack = load_pack<S, 4>(z + corner[m]);
#pragma unroll
          for (int e = 0; e < 4; e++) sum[m][e] = fma(widen<T>(pack.v[e]), w.v[e], sum[m][e]);
        }
      }
    const Pack<T, 4> mean = load_pack<T, 4>(v + (taps + 3) * chunk + quad), scale = load_pack<T, 4>(v + (taps + 4) * chunk + quad);
    const Pack<T, 4> shift = load_pack<T, 4>(v + (taps + 5) * chunk + quad);
    if (k * chunk + quad < l.slab_pitch - vec)
#pragma unroll
      for (int m = 0; m < mine; m++) {
        Pack<S, 4> pack;
#pragma unroll
        for (int e = 0; e < 4; e++)
          narrow(activate(a.mid.act, (sum[m][e] - mean.v[e]) * scale.v[e] + shift.v[e]), pack.v[e]);
        store_pack(slab + (q0 + m * together) * l.slab_pitch + k * chunk + quad, pack);
      }
  }

  // ---- the product
  const int warp = threadIdx.x / 32, m0 = warp / warp_columns_count * warp_rows, o1 = warp % warp_columns_count * warp_columns;
  Product product;
  for (int i = 0; i < all_steps; i++) {
    if (i % steps == 0) product.clear();
    copy_weights(i + 1);
    wait_copies<1>();
    __syncthreads();
    const int c0 = i % steps * step, left = l.slab_pitch - vec - c0;
    product.add(slab + m0 * l.slab_pitch + c0, l.slab_pitch, weights + (i & 1) * outputs * step_pitch + o1 * step_pitch, step_pitch,
                left < step ? left : step);
    __syncthreads();
    if (i % steps != steps - 1) continue;
    product.each([&](int row, int o, T value) { narrow(value, out[(m0 + row) * out_pitch + o1 + o]); });
    __syncthreads();
    const int o0 = (first_block + i / steps) * outputs;
    for (int e = threadIdx.x; e < pixels * (outputs / vec); e += threads) {
      const int q = e / (outputs / vec), o = o0 + e % (outputs / vec) * vec;
      const int row = row0 + q / a.tw, column = column0 + q % a.tw;
      if (q >= a.th * a.tw || row >= s.ho || column >= s.wo || o >= s.o) continue;
      const Pack<S, vec> pack = load_pack<S, vec>(out + q * out_pitch + o - o0);
      S* const to = a.y + ((n * s.ho + row) * s.wo + column) * s.o + o;
      if (a.packed_y) {
        store_pack(to, pack);
      } else {
#pragma unroll
        for (int v = 0; v < vec; v++)
          if (o + v < s.o) to[v] = pack.v[v];
      }
    }
  }
}

// ---- plain kernels, for what does not fit

constexpr int plain_threads = 128;

// z[p][c] = act(norm(conv(x))), one value a thread.
template <class S, class T>
__global__ void __launch_bounds__(plain_threads, 4) plain_depthwise(const SeparableArguments<S, T> a, T* __restrict__ z, int64_t values) {
  const SeparableShape& s = a.s;
  const int64_t at = int64_t(blockIdx.x) * plain_threads + threadIdx.x;
  if (at >= values) return;
  const int c = int(at % s.c);
  const int64_t p = at / s.c, n = p / s.wo / s.ho;
  const int h0 = int(p / s.wo % s.ho) * s.sh - s.pad_top, w0 = int(p % s.wo) * s.sw - s.pad_left;
  NormRegisters<T, 1> norm, mid;
  norm.load(a.norm, c), mid.load(a.mid, c);
  T sum = 0;
  for (int i = 0; i < s.kh; i++)
    for (int j = 0; j < s.kw; j++) {
      const int h = h0 + i * s.dh, w = w0 + j * s.dw;
      if (unsigned(h) >= unsigned(s.h) || unsigned(w) >= unsigned(s.w)) continue;
      const T x = widen<T>(a.x[((n * s.h + h) * s.w + w) * s.c + c]);
      sum = fma(activate(a.norm.act, norm.pre(x, 0)), tap_at(a, (int64_t(c) * s.kh + i) * s.kw + j), sum);
    }
  z[at] = activate(a.mid.act, mid.pre(sum, 0));
}

// y[p][o] = sum_c z[p][c] matrix[o][c], 64 pixels by 32 outputs a block.
template <class S, class T>
__global__ void __launch_bounds__(plain_threads) plain_product(const SeparableArguments<S, T> a, const T* __restrict__ z, int64_t rows) {
  constexpr int pixels = 64, outputs = 32, depth = 32, pitch = depth + 16 / sizeof(T);
  __shared__ T left[pixels * pitch], right[outputs * pitch];
  const int64_t p0 = int64_t(blockIdx.x) * pixels;
  const int o0 = blockIdx.y * outputs, warp = threadIdx.x / 32;
  WarpProduct<T, T, 16, outputs> product;
  product.clear();
  for (int c0 = 0; c0 < a.s.c; c0 += depth) {
    __syncthreads();
    for (int e = threadIdx.x; e < (pixels + outputs) * depth; e += plain_threads) {
      const int r = e / depth, c = c0 + e % depth;
      if (r < pixels) {
        left[r * pitch + e % depth] = c < a.s.c && p0 + r < rows ? z[(p0 + r) * a.s.c + c] : T(0);
      } else {
        const int o = o0 + r - pixels;
        right[(r - pixels) * pitch + e % depth] = c < a.s.c && o < a.s.o ? widen<T>(a.matrix[int64_t(o) * a.s.c + c]) : T(0);
      }
    }
    __syncthreads();
    product.add(left + warp * 16 * pitch, pitch, right, pitch, depth);
  }
  product.each([&](int row, int o, T value) {
    const int64_t p = p0 + warp * 16 + row;
    if (p < rows && o0 + o < a.s.o) narrow(value, a.y[p * a.s.o + o0 + o]);
  });
}

// ---- host ----

constexpr int64_t most_size = 1 << 29;  // rows, columns, channels are ints in the kernels, and so are sums of two

DeviceLimits device_limits([[maybe_unused]] const Tensor& x) {
#ifdef MNOPS_EMULATE_CUDA
  return emulated_limits;
#else
  int block = 0, multiprocessor = 0, count = 0;
  const int device = x.get_device_index();
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return {block, multiprocessor, count};
#endif
}

// torch's switch for convolutions, which only Python can ask: mnops/ops/separable_conv2d.py. Where there is no Python: no.
bool allows_tf32(const Tensor& x) {
  StableIValue stack[1] = {torch::stable::detail::from(x)};
  if (torch_call_dispatcher("mnops::allows_tf32", "", stack, TORCH_ABI_VERSION)) return false;
  return torch::stable::detail::to<bool>(stack[0]);
}

SeparableShape shape_of(const Tensor& x, const Tensor& taps, const Tensor& weight, const Ints& stride, const Ints& padding,
                        const Ints& dilation) {
  STD_TORCH_CHECK(x.dim() == 4 && taps.dim() == 4 && taps.size(0) == x.size(1) && taps.size(1) == 1,
                  "separable_conv2d: depthwise_weight must be (C, 1, K, K) with x (N, C, H, W)");
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(1) == x.size(1) && weight.size(2) == 1 && weight.size(3) == 1,
                  "separable_conv2d: weight must be (O, C, 1, 1) with x (N, C, H, W)");
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 4 && dilation.size() == 2,
                  "separable_conv2d: stride and dilation have 2 elements, padding has 4");
  STD_TORCH_CHECK(stride[0] >= 1 && stride[1] >= 1 && dilation[0] >= 1 && dilation[1] >= 1 && taps.size(2) >= 1 && taps.size(3) >= 1,
                  "separable_conv2d: stride, dilation and kernel must be at least 1");
  const int64_t reach_h = dilation[0] * (taps.size(2) - 1), reach_w = dilation[1] * (taps.size(3) - 1);
  for (const int64_t size : {x.size(1), x.size(2), x.size(3), weight.size(0), stride[0], stride[1], padding[0], padding[1], padding[2],
                             padding[3], reach_h, reach_w})
    STD_TORCH_CHECK(size >= 0 && size < most_size, "separable_conv2d: sizes and padding go up to ", most_size, ", got ", size);
  const int64_t h = x.size(2) + padding[0] + padding[1] - reach_h, w = x.size(3) + padding[2] + padding[3] - reach_w;
  STD_TORCH_CHECK(h >= 1 && w >= 1, "separable_conv2d: the padded input must be at least as large as the dilated kernel");
  SeparableShape s{};
  s.n = x.size(0), s.c = int(x.size(1)), s.h = int(x.size(2)), s.w = int(x.size(3)), s.o = int(weight.size(0));
  s.kh = int(taps.size(2)), s.kw = int(taps.size(3)), s.sh = int(stride[0]), s.sw = int(stride[1]);
  s.dh = int(dilation[0]), s.dw = int(dilation[1]), s.pad_top = int(padding[0]), s.pad_left = int(padding[2]);
  s.ho = int((h - 1) / s.sh) + 1, s.wo = int((w - 1) / s.sw) + 1;
  return s;
}

template <class S, class MATH, int ROW = 0> void launch_row(const SeparablePlan& plan, const SeparableArguments<S, float>& a, cudaStream_t stream) {
  if constexpr (ROW < separable_row_count) {
    if (plan.row != ROW) return launch_row<S, MATH, ROW + 1>(plan, a, stream);
    const int64_t tiles = a.s.n * ((a.s.ho + a.th - 1) / a.th) * int64_t((a.s.wo + a.tw - 1) / a.tw);
    STD_TORCH_CHECK(tiles * a.groups < int64_t(1) << 31, "separable_conv2d: more than 2^31 blocks");
    launch(separable_kernel<S, MATH, ROW>, unsigned(tiles * a.groups), separable_rows[ROW].threads, size_t(a.l.total), stream, a);
  }
}

Tensor forward(const Tensor& x, const Tensor& depthwise_weight, const Tensor& weight, const MaybeTensor& mean,
               const MaybeTensor& var, const MaybeTensor& gamma, const MaybeTensor& beta, double eps, std::string act,
               const MaybeTensor& mid_mean, const MaybeTensor& mid_var, const MaybeTensor& mid_gamma, const MaybeTensor& mid_beta,
               double mid_eps, std::string mid_act, Ints stride, Ints padding, Ints dilation) {
  const SeparableShape s = shape_of(x, depthwise_weight, weight, stride, padding, dilation);
  const ScalarType type = x.scalar_type();
  const bool wide_taps = depthwise_weight.scalar_type() != type;
  STD_TORCH_CHECK(same_device(x, depthwise_weight) && same_device(x, weight) &&
                      (!wide_taps || depthwise_weight.scalar_type() == ScalarType::Float),
                  "separable_conv2d: the weights must be on x's device, in x's dtype or float32");
  const OnDeviceOf guard(x);
  const cudaStream_t stream = current_stream(x);
  const Tensor y = empty_channels_last(x, {s.n, s.o, s.ho, s.wo});
  if (y.numel() == 0) return in_layout_of(x, y);
  const Tensor xl = channels_last(x), taps = torch::stable::contiguous(depthwise_weight);
  const Tensor matrix = torch::stable::contiguous(weight.scalar_type() == type ? weight : torch::stable::to(weight, type));
  with_storage(x, [&](auto storage) {
    using S = decltype(storage);
    using T = typename Accumulator<S>::type;
    const NormTensors<T> norm(x, {mean, var, gamma, beta, eps, act}, s.c);
    const NormTensors<T> mid(x, {mid_mean, mid_var, mid_gamma, mid_beta, mid_eps, mid_act}, s.c);
    SeparableArguments<S, T> a{};
    a.x = static_cast<const S*>(xl.const_data_ptr()), a.matrix = static_cast<const S*>(matrix.const_data_ptr());
    a.taps = taps.const_data_ptr(), a.wide_taps = wide_taps, a.y = static_cast<S*>(y.mutable_data_ptr());
    a.s = s, a.norm = norm.pointers, a.mid = mid.pointers;
    constexpr int vec = 16 / sizeof(S);
    a.packed_x = s.c % vec == 0 && aligned({a.x}, 16), a.packed_matrix = s.c % vec == 0 && aligned({a.matrix}, 16);
    a.packed_y = s.o % vec == 0 && aligned({a.y}, 16);
    if constexpr (sizeof(S) < 8) {
      const SeparablePlan plan = separable_plan(s, sizeof(S), device_limits(x), forced_row);
      if (plan.row >= 0) {
        a.l = plan.layout, a.th = plan.th, a.tw = plan.tw, a.groups = plan.groups;
        if constexpr (sizeof(S) == 4)
          if (allows_tf32(x)) return launch_row<S, Tf32>(plan, a, stream);
        return launch_row<S, S>(plan, a, stream);
      }
    }
    const int64_t rows = s.n * s.ho * s.wo, values = rows * s.c;
    const Tensor z = empty_like_type(x, {rows, s.c}, scalar_type_of<T>());
    T* const between = static_cast<T*>(z.mutable_data_ptr());
    STD_TORCH_CHECK(ceil_div(values, plain_threads) < int64_t(1) << 31 && ceil_div(s.o, 32) <= most_grid_y,
                    "separable_conv2d: more blocks than a grid has");
    launch(plain_depthwise<S, T>, unsigned(ceil_div(values, plain_threads)), plain_threads, 0, stream, a, between, values);
    launch(plain_product<S, T>, dim3(unsigned(ceil_div(rows, 64)), unsigned(ceil_div(s.o, 32))), plain_threads, 0, stream, a,
           static_cast<const T*>(between), rows);
  });
  return in_layout_of(x, y);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnops, CUDA, m) { m.impl("separable_conv2d", TORCH_BOX(&forward)); }

}  // namespace mnops::cuda

#ifdef MNOPS_EMULATE_CUDA
// For tests: another device's limits, a row of the table (-1: the best), and the plan of a shape there.
extern "C" __attribute__((visibility("default"))) void mnops_cuda_emulation_limits(int64_t block, int64_t multiprocessor, int count,
                                                                                  int row) {
  mnops::cuda::emulated_limits = {block, multiprocessor, count}, mnops::cuda::forced_row = row;
}
// out: row, th, tw, groups, bytes of shared memory.
extern "C" __attribute__((visibility("default"))) void mnops_cuda_separable_plan(const int* shape, int itemsize, int64_t* out) {
  mnops::cuda::SeparableShape s{};
  s.n = shape[0], s.c = shape[1], s.h = shape[2], s.w = shape[3], s.o = shape[4], s.ho = shape[5], s.wo = shape[6];
  s.kh = s.kw = shape[7], s.sh = s.sw = shape[8], s.dh = s.dw = shape[9];
  const auto p = mnops::cuda::separable_plan(s, itemsize, mnops::cuda::emulated_limits, mnops::cuda::forced_row);
  out[0] = p.row, out[1] = p.th, out[2] = p.tw, out[3] = p.groups, out[4] = p.layout.total;
}
#endif
