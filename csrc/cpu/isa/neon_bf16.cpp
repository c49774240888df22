// NEON where the CPU has FEAT_BF16: bf16 is stored by bfcvtn, one instruction for nine, and multiplied by bfmmla, one for
// four, in pointwise convolutions. The other dtypes are neon's.
#include "cpu/vec/neon.h"
#include "cpu/kernels/instantiate.h"

namespace mnops {
const Kernels<float> neon_bf16_kernels = kernels<bf16, bf16>();
}
