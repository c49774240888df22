// Memory of large results, kept between calls. A training step asks for the same few dozen blocks again and again, and
// memory fresh from the system costs more than the kernel that fills it: touching 51 MB for the first time took 17 ms where
// the convolution that writes it takes 5. malloc gives large blocks back at once, so large results take their memory here.
#pragma once
#include "common/tensors.h"

namespace mnops {

// A dense channels_last tensor, not initialised; type: float32, float64 or that of `like`.
Tensor empty_result(const Tensor& like, const Ints& size, ScalarType type);
inline Tensor empty_result(const Tensor& like, const Ints& size) { return empty_result(like, size, like.scalar_type()); }

}  // namespace mnops
