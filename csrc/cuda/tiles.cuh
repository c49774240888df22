// The tile tables of the tuned kernels, a reason for every row. No GPU has measured them: the reasons are arithmetic, which
// static_assert repeats, and ptxas's report of registers, which tests/test_cuda.py holds to.
#pragma once
#include <type_traits>

namespace mnops::cuda {

// A thread of a depthwise kernel owns VEC channels and STRIP neighbouring pixels (backward: cells of STRIDE x STRIDE
// pixels), and slides down at most BAND rows; RESIDENT blocks of THREADS share a multiprocessor.
template <int VEC_, int STRIP_, int BAND_, int THREADS_, int RESIDENT_> struct Tile {
  static constexpr int VEC = VEC_, STRIP = STRIP_, BAND = BAND_, THREADS = THREADS_, RESIDENT = RESIDENT_;
  static_assert(THREADS % 32 == 0 && THREADS <= 1024 && (VEC == 1 || VEC == 2 || VEC == 4 || VEC == 8));
  // Activations that are no bounds (hardswish, silu) take more registers: 255.
  static constexpr int resident(bool clamp) { return clamp || RESIDENT < 2 ? RESIDENT : 2; }
};

// ---- forward: y from x. Live registers of a thread: the taps, OPEN - 1 rows of sums and the one being finished, the raw
// row that is on its way, the norm and the statistics.
template <class S, int K, int STRIDE> struct ForwardTraits;
// Half: 8 bytes a thread, 16 threads a line, 6 columns for 4. 16 bytes would hold 72 taps a thread, and leave a strip of 2:
// each pixel normalised twice, where half precision is short of instructions, not of bytes.
template <class S> struct ForwardTraits<S, 3, 1> : Tile<4, 4, 28, 128, 3> {};
// fp32 has twice the time for its bytes: 16 bytes a thread, 8 threads a line, 4 columns for 2.
template <> struct ForwardTraits<float, 3, 1> : Tile<4, 2, 28, 128, 3> {};
// 5 columns for 2; two rows on their way beside the two in use.
template <class S> struct ForwardTraits<S, 3, 2> : Tile<4, 2, 14, 128, 3> {};
template <> struct ForwardTraits<float, 3, 2> : Tile<2, 2, 14, 128, 4> {};  // with 4 channels those rows alone are 80 registers
// 25 taps of 4 channels would be 100 registers: 2 channels.
template <class S> struct ForwardTraits<S, 5, 1> : Tile<2, 4, 28, 128, 3> {};
template <> struct ForwardTraits<float, 5, 1> : Tile<2, 4, 28, 128, 2> {};  // at 3 blocks two registers spill
template <class S> struct ForwardTraits<S, 5, 2> : Tile<2, 2, 14, 128, 3> {};
template <> struct ForwardTraits<float, 5, 2> : Tile<2, 2, 14, 128, 2> {};

// ---- backward: dx, the weight gradient and the norm's sums from g, y and x. Live registers: the taps and their gradients,
// OPEN rows of the window of gy, the raw g, y and x on their way, the norm, the incoming vectors, two sums.
template <class S, int K, int STRIDE> struct BackwardTraits;
// Half: 6 columns of gy for 4, 4 bytes a thread, 32 threads a line; 4 channels of a strip of 2 would prepare each pixel of gy
// twice.
template <class S> struct BackwardTraits<S, 3, 1> : Tile<2, 4, 28, 128, 3> {};
// fp32 has twice the time for its bytes: 4 columns for 2. With 4 channels it spills at 255 registers.
template <> struct BackwardTraits<float, 3, 1> : Tile<2, 2, 28, 128, 3> {};
template <class S> struct BackwardTraits<S, 3, 2> : Tile<2, 2, 14, 128, 3> {};  // 3 columns of gy for 4 of x
template <> struct BackwardTraits<float, 3, 2> : Tile<2, 2, 14, 128, 2> {};     // at 3 blocks four registers spill
// 25 taps and 25 gradients: one channel a thread.
template <class S> struct BackwardTraits<S, 5, 1> : Tile<1, 4, 28, 128, 2> {};
template <class S> struct BackwardTraits<S, 5, 2> : Tile<1, 2, 14, 128, 3> {};

template <class S, class T, int K, int STRIDE> struct ForwardTile : ForwardTraits<S, K, STRIDE> {
  using Base = ForwardTraits<S, K, STRIDE>;
  static_assert(K >= STRIDE, "a pixel that no tap reads");
  static constexpr int NEW = STRIDE;          // input rows that an output row adds
  static constexpr int SEEN = K - NEW;        // of its rows, those that earlier rows added
  static constexpr int OPEN = (K + STRIDE - 1) / STRIDE;  // output rows that an input row is part of
  static constexpr int COLUMNS = (Base::STRIP - 1) * STRIDE + K;
  static_assert(COLUMNS <= 32, "masks have 32 bits");
  static constexpr int WIDE = sizeof(T) / 4;
  static constexpr int LIVE = (K * K + OPEN * Base::STRIP + 3 + 3) * Base::VEC * WIDE +
                              NEW * COLUMNS * ((Base::VEC * int(sizeof(S)) + 3) / 4);
  static_assert(LIVE + 24 <= 255, "taps, sums and raw pixels must fit the registers of a thread");
};

template <class S, class T, int K, int STRIDE> struct BackwardTile : BackwardTraits<S, K, STRIDE> {
  using Base = BackwardTraits<S, K, STRIDE>;
  static_assert(K >= STRIDE, "a pixel that no tap reads");
  static constexpr int OPEN = (K + STRIDE - 1) / STRIDE;    // output rows, and columns, that a cell's pixels are part of
  static constexpr int WINDOW = Base::STRIP + OPEN - 1;     // columns of gy
  static constexpr int COLUMNS = Base::STRIP * STRIDE;      // of x and dx
  static_assert(WINDOW <= 32 && COLUMNS <= 32, "masks have 32 bits");
  static constexpr int WIDE = sizeof(T) / 4;
  static constexpr int LIVE = (2 * K * K + OPEN * WINDOW + 3 + 3 + 2) * Base::VEC * WIDE +
                              (2 * WINDOW + STRIDE * COLUMNS) * ((Base::VEC * int(sizeof(S)) + 3) / 4);
  static_assert(LIVE + 24 <= 255, "taps, gradients and the window must fit the registers of a thread");
};

}  // namespace mnops::cuda
