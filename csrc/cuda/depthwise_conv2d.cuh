// depthwise_conv2d between its launches (depthwise_conv2d.cu) and its kernels, in files of their own so that they compile
// side by side: depthwise_conv2d_forward.cu, depthwise_conv2d_backward.cu, depthwise_conv2d_any.cu.
#pragma once
#include "cuda/launch.cuh"

namespace mnops::cuda {

template <class S, class T> struct DepthwiseForward {
  DepthwiseShape size;
  const S* x;
  S* y;
  const T* weight;   // [c][kh * kw]
  T* statistics;     // [3][chunks][c]: count, mean, sum of squared deviations; null: not wanted
  int64_t chunks;
  NormPointers<T> norm;
};

template <class S, class T> struct DepthwiseBackward {
  DepthwiseShape size;
  const S *g, *y, *x;  // y: null where no variance was used
  S* dx;               // null: not wanted
  const T* weight;
  T* taps;             // [chunks][c][kh * kw]; null: not wanted
  T* sums;             // [chunks][2][c]: gp and gp * (x - mean); null: not wanted
  int64_t chunks;
  NormPointers<T> norm;
  IncomingPointers<T> incoming;
};

// The tuned kernels, NHWC. False: there is none for this shape or alignment.
template <class S> bool depthwise_forward(DepthwiseForward<S, float>& a, const Prepare<DepthwiseForward<S, float>>& prepare, cudaStream_t stream);
template <class S> bool depthwise_backward(DepthwiseBackward<S, float>& a, const Prepare<DepthwiseBackward<S, float>>& prepare, cudaStream_t stream);

// Every shape, NHWC or contiguous NCHW.
template <class S, class T>
void depthwise_forward_any(DepthwiseForward<S, T>& a, bool nchw, const Prepare<DepthwiseForward<S, T>>& prepare, cudaStream_t stream);
template <class S, class T>
void depthwise_backward_any(DepthwiseBackward<S, T>& a, bool nchw, const Prepare<DepthwiseBackward<S, T>>& prepare, cudaStream_t stream);

// ---- how the tuned kernels cut a tensor ----

// A lane is a strip of neighbouring columns in a band of rows. A block works on as many lanes at a time as it has rows of
// threads, beside each other where they can be; grid.y blocks share all lanes. Dilation d makes d phases of the rows and of
// the columns, dense convolutions of their own: bands and strips count every phase's.
struct DepthwiseCut {
  dim3 grid, block;
  int64_t lanes;
  int bands, strips, band;
  int first_row, first_column;  // of the cells, backward
};

struct LanePosition {
  int64_t n;
  int phase_h, band, phase_w, strip;
  __device__ __forceinline__ LanePosition(int64_t lane, const DepthwiseCut& k, const DepthwiseShape& s) {
    const unsigned in_image = unsigned(k.bands) * unsigned(k.strips);
    n = lane / in_image;
    const unsigned rest = unsigned(lane - n * in_image), b = rest / unsigned(k.strips), w = rest % unsigned(k.strips);
    phase_h = int(b % unsigned(s.dh)), band = int(b / unsigned(s.dh));
    phase_w = int(w % unsigned(s.dw)), strip = int(w / unsigned(s.dw));
  }
};

// Which of COUNT columns, `step` apart from `first` on, are in [0, size): a bit each.
template <int COUNT> __device__ __forceinline__ uint32_t columns_inside(int first, int step, int size) {
  uint32_t mask = 0;
#pragma unroll
  for (int j = 0; j < COUNT; j++) mask |= uint32_t(unsigned(first + j * step) < unsigned(size)) << j;
  return opaque(mask);
}

// COUNT packs of a row that starts at `row`, `step` elements apart. Where the mask has none the old one stays.
template <class S, int VEC, int COUNT>
__device__ __forceinline__ void load_row(const S* row, unsigned step, uint32_t mask, Bits<S, VEC> (&to)[COUNT]) {
  row = opaque(row);
#pragma unroll
  for (int j = 0; j < COUNT; j++)
    if (mask >> j & 1) to[j] = load_bits<S, VEC>(row + j * step);
}
// Zeros there instead.
template <class S, int VEC, int COUNT>
__device__ __forceinline__ void load_row_padded(const S* row, unsigned step, uint32_t mask, Bits<S, VEC> (&to)[COUNT]) {
#pragma unroll
  for (int j = 0; j < COUNT; j++) to[j] = {};
  load_row<S, VEC>(row, step, mask, to);
}

// rows, columns: of one phase (forward: pixels of y, backward: cells).
template <class Tile, class S> DepthwiseCut depthwise_cut(const DepthwiseShape& s, int64_t rows, int64_t columns) {
  constexpr int line = 128 / (Tile::VEC * int(sizeof(S))) < 32 ? 128 / (Tile::VEC * int(sizeof(S))) : 32;
  constexpr int64_t enough = 1024, most = 8192;  // blocks: a few on every multiprocessor, no more sums than needed
  const auto ceil = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t vectors = s.c / Tile::VEC;
  int64_t x = vectors < line ? vectors : line;  // threads along the channels: a line, or what wastes fewer of them
  for (int64_t less = x - 1; less >= line / 2; less--)
    if (ceil(vectors, less) * less < ceil(vectors, x) * x) x = less;
  DepthwiseCut k{};
  k.block = dim3(unsigned(x), unsigned(Tile::THREADS / x));
  const int64_t blocks = ceil(vectors, x), y = k.block.y, strips = s.dw * ceil(columns, Tile::STRIP);
  const int64_t wanted = ceil(enough * y, s.n * strips * blocks * s.dh);  // bands get shorter where the GPU is not full
  const int64_t shortest = ceil(rows, 4), longest = ceil(rows, Tile::BAND);
  int64_t bands = wanted < shortest ? wanted : shortest;
  bands = bands > longest ? bands : longest;
  k.band = int(ceil(rows, bands));
  k.bands = int(s.dh * ceil(rows, k.band)), k.strips = int(strips);
  k.lanes = s.n * k.bands * k.strips;
  const int64_t tiles = ceil(k.lanes, y), share = ceil(tiles, ceil(most, blocks));
  k.grid = dim3(unsigned(blocks), unsigned(ceil(tiles, share)));
  return k;
}

// Whether a tuned kernel's indices fit: rows, columns and the elements of a row, with a strip's 32 columns, are ints in it.
inline bool depthwise_fits(const DepthwiseShape& s) {
  const int64_t most = 1 << 24;
  return s.h < most && s.w < most && s.ho < most && s.wo < most && s.pad_top < most && s.pad_left < most &&
         s.dh < 4096 && s.dw < 4096 && (s.ho + s.h) * (s.wo + s.w) < int64_t(1) << 31 && s.c < int64_t(1) << 31 &&
         (s.wo + s.w + s.pad_left + 32 * s.dw) * s.c < int64_t(1) << 31;
}

// Calls run(K, STRIDE), both constants, where there are tuned kernels of this size; it says whether they serve.
template <class F> bool depthwise_tuned(const DepthwiseShape& s, F run) {
  const auto is = [&](int kernel, int stride) { return s.kh == kernel && s.kw == kernel && s.sh == stride && s.sw == stride; };
  const std::integral_constant<int, 1> one{};
  const std::integral_constant<int, 2> two{};
  const std::integral_constant<int, 3> three{};
  const std::integral_constant<int, 5> five{};
  if (!depthwise_fits(s)) return false;
  return is(3, 1) ? run(three, one) : is(3, 2) ? run(three, two) : is(5, 1) ? run(five, one) : is(5, 2) && run(five, two);
}

}  // namespace mnops::cuda
