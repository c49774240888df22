// norm_act and norm_act_pool, forward and backward: NHWC and NCHW, bound by memory.
//
// NHWC: a thread owns VEC neighbouring channels (16 bytes where the channel count allows), keeps their norm in registers and
// walks down pixels; neighbouring threads own neighbouring channels, so a warp reads whole cache lines. NCHW (`planes_`): a
// block owns a channel, its threads walk along the planes, 16 bytes each where their size allows; to pool, a warp owns a
// plane. Bytes moved: x and z once forward; g, x and dx once backward; to pool, x once: the floor. Channel sums are
// deterministic: every block writes its own partial sums to a workspace, a second small kernel adds them in order and
// finishes the vectors' gradients.
// It loses where a tensor has so few pixels that the second launch shows.
#include <algorithm>

#include "cuda/finish.cuh"

namespace mnops::cuda {
namespace {

constexpr int threads_per_block = 256;
constexpr int rows_per_thread = 8;  // pixels one thread walks: enough loads in flight, and few partial sums

// Grid: x over blocks of channels, y over chunks of pixels; in a block x over channels, y over pixels.
struct Cut {
  dim3 grid, block;
  int64_t chunk;  // pixels of one block
};

Cut cut(int64_t rows, int64_t c, int vec) {
  const int64_t columns = c / vec;
  int x = 1;
  while (x < 32 && x < columns) x *= 2;
  Cut k;
  k.block = dim3(x, threads_per_block / x);
  k.chunk = int64_t(k.block.y) * rows_per_thread;
  while ((rows + k.chunk - 1) / k.chunk > most_grid_y) k.chunk *= 2;  // the limit of grid.y
  k.grid = dim3(unsigned((columns + x - 1) / x), unsigned((rows + k.chunk - 1) / k.chunk));
  return k;
}

template <class S, class T, int VEC>
__global__ void __launch_bounds__(threads_per_block)
norm_act_forward(const S* __restrict__ x, const S* __restrict__ residual, S* __restrict__ z, int64_t rows, int64_t c,
                 int64_t chunk, NormPointers<T> p) {  // residual: added to z, may be null
  const int64_t c0 = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * VEC;
  if (c0 >= c) return;
  NormRegisters<T, VEC> n;
  n.load(p, c0);
  const int64_t begin = int64_t(blockIdx.y) * chunk, end = begin + chunk < rows ? begin + chunk : rows;
  for (int64_t r = begin + threadIdx.y; r < end; r += blockDim.y) {
    const Pack<S, VEC> in = *reinterpret_cast<const Pack<S, VEC>*>(x + r * c + c0);
    Pack<S, VEC> added = {}, out;  // 0: bits of every S
    if (residual) added = *reinterpret_cast<const Pack<S, VEC>*>(residual + r * c + c0);
#pragma unroll
    for (int i = 0; i < VEC; i++)
      narrow(activate(p.act, (widen<T>(in.v[i]) - n.mean[i]) * n.scale[i] + n.shift[i]) + widen<T>(added.v[i]), out.v[i]);
    *reinterpret_cast<Pack<S, VEC>*>(z + r * c + c0) = out;
  }
}

// partial is [grid.y][2][c]: sums of gp and of gp * (x - mean). hw > 0: g is [n][c], spread over hw pixels each.
template <class S, class T, int VEC>
__global__ void __launch_bounds__(threads_per_block)
norm_act_backward(const S* __restrict__ g, const S* __restrict__ x, S* __restrict__ dx, T* __restrict__ partial, int64_t rows,
                  int64_t c, int64_t chunk, int64_t hw, NormPointers<T> p) {
  __shared__ T shared[2 * threads_per_block * VEC];
  const int64_t c0 = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * VEC;
  T gp[VEC] = {}, gpx[VEC] = {};
  if (c0 < c) {
    NormRegisters<T, VEC> n;
    n.load(p, c0);
    const int64_t begin = int64_t(blockIdx.y) * chunk, end = begin + chunk < rows ? begin + chunk : rows;
    for (int64_t r = begin + threadIdx.y; r < end; r += blockDim.y) {
      const Pack<S, VEC> in = *reinterpret_cast<const Pack<S, VEC>*>(x + r * c + c0);
      const Pack<S, VEC> gi = *reinterpret_cast<const Pack<S, VEC>*>(g + (hw ? r / hw : r) * c + c0);
      Pack<S, VEC> out;
#pragma unroll
      for (int i = 0; i < VEC; i++) {
        const T xc = widen<T>(in.v[i]) - n.mean[i];
        T gz = widen<T>(gi.v[i]);
        if (hw) gz /= T(hw);
        const T v = activate_grad(p.act, gz, xc * n.scale[i] + n.shift[i]);
        gp[i] += v;
        gpx[i] += v * xc;
        narrow(v * n.scale[i], out.v[i]);
      }
      *reinterpret_cast<Pack<S, VEC>*>(dx + r * c + c0) = out;
    }
  }
  T* const mine = shared + (threadIdx.y * blockDim.x + threadIdx.x) * 2 * VEC;
#pragma unroll
  for (int i = 0; i < VEC; i++) mine[i] = gp[i], mine[VEC + i] = gpx[i];
  __syncthreads();
  if (threadIdx.y == 0 && c0 < c)
#pragma unroll
    for (int i = 0; i < VEC; i++) {
      T a = 0, b = 0;
      for (int y = 0; y < int(blockDim.y); y++) {
        const T* of = shared + (y * blockDim.x + threadIdx.x) * 2 * VEC;
        a += of[i], b += of[VEC + i];
      }
      partial[(int64_t(blockIdx.y) * 2 + 0) * c + c0 + i] = a;
      partial[(int64_t(blockIdx.y) * 2 + 1) * c + c0 + i] = b;
    }
}

// One block pools VEC * blockDim.x channels of one image.
template <class S, class T, int VEC>
__global__ void __launch_bounds__(threads_per_block)
norm_act_pool(const S* __restrict__ x, S* __restrict__ z, int64_t hw, int64_t c, NormPointers<T> p) {
  __shared__ T shared[threads_per_block * VEC];
  const int64_t c0 = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * VEC, n0 = int64_t(blockIdx.y);
  T sum[VEC] = {};
  if (c0 < c) {
    NormRegisters<T, VEC> n;
    n.load(p, c0);
    for (int64_t r = threadIdx.y; r < hw; r += blockDim.y) {
      const Pack<S, VEC> in = *reinterpret_cast<const Pack<S, VEC>*>(x + (n0 * hw + r) * c + c0);
#pragma unroll
      for (int i = 0; i < VEC; i++) sum[i] += activate(p.act, (widen<T>(in.v[i]) - n.mean[i]) * n.scale[i] + n.shift[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < VEC; i++) shared[(threadIdx.y * blockDim.x + threadIdx.x) * VEC + i] = sum[i];
  __syncthreads();
  if (threadIdx.y == 0 && c0 < c)
#pragma unroll
    for (int i = 0; i < VEC; i++) {
      T total = 0;
      for (int y = 0; y < int(blockDim.y); y++) total += shared[(y * blockDim.x + threadIdx.x) * VEC + i];
      narrow(total / T(hw), z[n0 * c + c0 + i]);
    }
}

// ---- NCHW: a channel's `rows` = n * hw values lie in planes of hw, c planes apart

// Of value r of a channel the image and the place in its plane, kept up as r grows by `step`: a division of 64 bits, a
// hundred instructions, is for before the loop.
struct PlanePosition {
  int64_t image, rest, images_a_step, rest_a_step;
  __device__ __forceinline__ PlanePosition(int64_t r, int64_t step, int64_t hw)
      : image(r / hw), rest(r % hw), images_a_step(step / hw), rest_a_step(step % hw) {}
  __device__ __forceinline__ void advance(int64_t hw) {
    image += images_a_step, rest += rest_a_step;
    if (rest >= hw) image++, rest -= hw;
  }
};

template <class S, class T, int VEC>
__global__ void __launch_bounds__(threads_per_block)
planes_forward(const S* __restrict__ x, const S* __restrict__ residual, S* __restrict__ z, int64_t rows, int64_t hw, int64_t c,
               int64_t chunk, NormPointers<T> p) {
  NormRegisters<T, 1> n;
  n.load(p, blockIdx.x);
  const int64_t begin = int64_t(blockIdx.y) * chunk, end = begin + chunk < rows ? begin + chunk : rows;
  PlanePosition place(begin + threadIdx.x * VEC, threads_per_block * VEC, hw);
  for (int64_t r = begin + threadIdx.x * VEC; r < end; r += threads_per_block * VEC, place.advance(hw)) {
    const int64_t at = (place.image * c + blockIdx.x) * hw + place.rest;
    const Pack<S, VEC> in = load_pack<S, VEC>(x + at);
    Pack<S, VEC> added = {}, out;  // 0: bits of every S
    if (residual) added = load_pack<S, VEC>(residual + at);
#pragma unroll
    for (int i = 0; i < VEC; i++) narrow(activate(p.act, n.pre(widen<T>(in.v[i]), 0)) + widen<T>(added.v[i]), out.v[i]);
    store_pack(z + at, out);
  }
}

// pooled: g is [n][c], spread over a plane each.
template <class S, class T, int VEC>
__global__ void __launch_bounds__(threads_per_block)
planes_backward(const S* __restrict__ g, const S* __restrict__ x, S* __restrict__ dx, T* __restrict__ partial, int64_t rows,
                int64_t hw, int64_t c, int64_t chunk, bool pooled, NormPointers<T> p) {
  __shared__ T shared[2][threads_per_block];
  const int64_t begin = int64_t(blockIdx.y) * chunk, end = begin + chunk < rows ? begin + chunk : rows;
  PlanePosition place(begin + threadIdx.x * VEC, threads_per_block * VEC, hw);  // first: its divisions are calls
  NormRegisters<T, 1> n;
  n.load(p, blockIdx.x);
  T gp = 0, gpx = 0;
  for (int64_t r = begin + threadIdx.x * VEC; r < end; r += threads_per_block * VEC, place.advance(hw)) {
    const int64_t at = (place.image * c + blockIdx.x) * hw + place.rest;
    const Pack<S, VEC> in = load_pack<S, VEC>(x + at);
    Pack<S, VEC> gi = {}, out;
    if (!pooled) gi = load_pack<S, VEC>(g + at);
    const T spread = pooled ? widen<T>(g[place.image * c + blockIdx.x]) / T(hw) : T(0);
#pragma unroll
    for (int i = 0; i < VEC; i++) {
      const T value = widen<T>(in.v[i]);
      const T v = activate_grad(p.act, pooled ? spread : widen<T>(gi.v[i]), n.pre(value, 0));
      gp += v;
      gpx += v * (value - n.mean[0]);
      narrow(v * n.scale[0], out.v[i]);
    }
    store_pack(dx + at, out);
  }
  shared[0][threadIdx.x] = gp, shared[1][threadIdx.x] = gpx;
  for (int step = threads_per_block / 2; step; step /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < step)
      for (int k = 0; k < 2; k++) shared[k][threadIdx.x] += shared[k][threadIdx.x + step];
  }
  if (threadIdx.x == 0)
    for (int k = 0; k < 2; k++) partial[(int64_t(blockIdx.y) * 2 + k) * c + blockIdx.x] = shared[k][0];
}

template <class S, class T, int VEC>
__global__ void __launch_bounds__(threads_per_block)
planes_pool(const S* __restrict__ x, S* __restrict__ z, int64_t planes, int64_t hw, int64_t c, NormPointers<T> p) {
  const int64_t plane = int64_t(blockIdx.x) * (threads_per_block / 32) + threadIdx.x / 32;
  if (plane >= planes) return;  // a whole warp
  NormRegisters<T, 1> n;
  n.load(p, plane % c);
  T sum = 0;
  for (int64_t r = int64_t(threadIdx.x % 32) * VEC; r < hw; r += 32 * VEC) {
    const Pack<S, VEC> in = load_pack<S, VEC>(x + plane * hw + r);
#pragma unroll
    for (int i = 0; i < VEC; i++) sum += activate(p.act, n.pre(widen<T>(in.v[i]), 0));
  }
#pragma unroll
  for (int mask = 16; mask; mask /= 2) sum += __shfl_xor_sync(~0u, sum, mask);
  if (threadIdx.x % 32 == 0) narrow(sum / T(hw), z[plane]);
}

// Grid: channels, chunks of a channel's values.
Cut planes_cut(int64_t rows, int64_t c, int vec) {
  STD_TORCH_CHECK(c < int64_t(1) << 31, "norm_act: fewer than 2^31 channels, got ", c);
  constexpr int64_t most_chunks = 1024;
  Cut k;
  k.block = dim3(threads_per_block);
  k.chunk = std::max<int64_t>(int64_t(threads_per_block) * rows_per_thread, ceil_div(ceil_div(rows, most_chunks), vec)) * vec;
  k.grid = dim3(unsigned(c), unsigned(ceil_div(rows, k.chunk)));
  return k;
}

// ---- host ----

Tensor run(bool pool, const Tensor& x, const PendingTensors& args, const MaybeTensor& residual) {
  STD_TORCH_CHECK(x.dim() == 4, "norm_act: x must be (N, C, H, W), got ", x.dim(), " dimensions");
  if (residual) check_residual(*residual, x);
  const OnDeviceOf guard(x);
  const int64_t n = x.size(0), c = x.size(1), hw = x.size(2) * x.size(3);
  STD_TORCH_CHECK(!pool || hw > 0, "norm_act_pool: the average of an empty map is not defined");
  const bool nchw = wants_nchw(x);
  auto dense = [&](const Tensor& t) { return nchw ? torch::stable::contiguous(t) : channels_last(t); };
  const Tensor xl = dense(x), rl = residual ? dense(*residual) : xl;
  const std::vector<int64_t> size{n, c, x.size(2), x.size(3)};
  const Tensor z = pool ? empty_like_type(x, {n, c}, x.scalar_type())
                        : nchw ? empty_like_type(x, size, x.scalar_type()) : empty_channels_last(x, size);
  if (z.numel() == 0) return z;
  const cudaStream_t stream = current_stream(x);
  with_storage(x, [&](auto storage) {
    using S = decltype(storage);
    using T = typename Accumulator<S>::type;
    const NormTensors<T> norm(x, args, c);
    const S* in = static_cast<const S*>(xl.const_data_ptr());
    const S* added = residual ? static_cast<const S*>(rl.const_data_ptr()) : nullptr;
    S* out = static_cast<S*>(z.mutable_data_ptr());
    with_vector<S>(nchw ? hw : c, {in, added, pool && nchw ? nullptr : out}, [&](auto vec) {
      constexpr int VEC = decltype(vec)::value;
      if (nchw && pool)
        return launch(planes_pool<S, T, VEC>, unsigned(ceil_div(n * c, threads_per_block / 32)), threads_per_block, 0, stream, in, out,
                      n * c, hw, c, norm.pointers);
      Cut k = nchw ? planes_cut(n * hw, c, VEC) : cut(n * hw, c, VEC);
      if (nchw) {
        launch(planes_forward<S, T, VEC>, k.grid, k.block, 0, stream, in, added, out, n * hw, hw, c, k.chunk, norm.pointers);
      } else if (pool) {
        for (int64_t first = 0; first < n; first += most_grid_y) {  // the limit of grid.y
          k.grid.y = unsigned(n - first < most_grid_y ? n - first : most_grid_y);
          launch(norm_act_pool<S, T, VEC>, k.grid, k.block, 0, stream, in + first * hw * c, out + first * c, hw, c, norm.pointers);
        }
      } else {
        launch(norm_act_forward<S, T, VEC>, k.grid, k.block, 0, stream, in, added, out, n * hw, c, k.chunk, norm.pointers);
      }
    });
  });
  return z;
}

Tensor forward(const Tensor& x, const MaybeTensor& mean, const MaybeTensor& var, const MaybeTensor& gamma,
               const MaybeTensor& beta, double eps, std::string act, const MaybeTensor& residual) {
  return run(false, x, {mean, var, gamma, beta, eps, act}, residual);
}

Tensor forward_pool(const Tensor& x, const MaybeTensor& mean, const MaybeTensor& var, const MaybeTensor& gamma,
                    const MaybeTensor& beta, double eps, std::string act) {
  return run(true, x, {mean, var, gamma, beta, eps, act}, std::nullopt);
}

template <bool pool>
NormGradResult backward(const Tensor& g, const Tensor& x, const MaybeTensor& mean, const MaybeTensor& var,
                        const MaybeTensor& gamma, const MaybeTensor& beta, double eps, std::string act) {
  STD_TORCH_CHECK(x.dim() == 4 && g.scalar_type() == x.scalar_type() && same_device(g, x),
                  "norm_act_backward: g must be as the output, in x's dtype and on its device");
  const OnDeviceOf guard(x);
  const int64_t n = x.size(0), c = x.size(1), hw = x.size(2) * x.size(3), rows = n * hw;
  STD_TORCH_CHECK(g.numel() == (pool ? n * c : rows * c), "norm_act_backward: g must have the shape of the output");
  const bool nchw = wants_nchw(x);
  const Tensor xl = nchw ? x : channels_last(x), gl = pool || nchw ? torch::stable::contiguous(g) : channels_last(g);
  const std::vector<int64_t> size{n, c, x.size(2), x.size(3)};
  const Tensor dx = nchw ? empty_like_type(x, size, x.scalar_type()) : empty_channels_last(x, size);
  const cudaStream_t stream = current_stream(x);
  return with_storage(x, [&](auto storage) -> NormGradResult {
    using S = decltype(storage);
    using T = typename Accumulator<S>::type;
    const PendingTensors args{mean, var, gamma, beta, eps, act};
    const NormTensors<T> norm(x, args, c);
    const NormGradTensors<T> grads(x, args, c);
    const S* in = static_cast<const S*>(xl.const_data_ptr());
    const S* gi = static_cast<const S*>(gl.const_data_ptr());
    S* out = static_cast<S*>(dx.mutable_data_ptr());
    with_vector<S>(nchw ? hw : c, {in, pool && nchw ? nullptr : gi, out}, [&](auto vec) {
      constexpr int VEC = decltype(vec)::value;
      const Cut k = nchw ? planes_cut(rows, c, VEC) : cut(rows, c, VEC);
      const int64_t chunks = rows ? k.grid.y : 0;
      const Tensor partial = empty_like_type(x, {chunks, 2, c}, scalar_type_of<T>());
      T* sums = static_cast<T*>(partial.mutable_data_ptr());
      if (rows && c) {
        if (nchw)
          launch(planes_backward<S, T, VEC>, k.grid, k.block, 0, stream, gi, in, out, sums, rows, hw, c, k.chunk, pool, norm.pointers);
        else
          launch(norm_act_backward<S, T, VEC>, k.grid, k.block, 0, stream, gi, in, out, sums, rows, c, k.chunk, pool ? hw : 0,
                 norm.pointers);
      }
      if (c)
        launch(finish_sums<T>, unsigned(c), finish_threads, 0, stream, sums, chunks, c, norm.pointers, data_or_null<T>(grads.mean),
               data_or_null<T>(grads.var), data_or_null<T>(grads.gamma), data_or_null<T>(grads.beta));
    });
    return {dx, grads.mean, grads.var, grads.gamma, grads.beta};
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnops, CUDA, m) {
  m.impl("norm_act", TORCH_BOX(&forward));
  m.impl("norm_act_backward", TORCH_BOX(&backward<false>));
  m.impl("norm_act_pool", TORCH_BOX(&forward_pool));
  m.impl("norm_act_pool_backward", TORCH_BOX(&backward<true>));
}

}  // namespace mnops::cuda
