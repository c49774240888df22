// Memory of large results, kept between calls. A training step asks for the same few dozen blocks again and again, and
// memory fresh from the system costs more than the kernel that fills it: touching 51 MB for the first time took 17 ms where
// the convolution that writes it takes 5. malloc gives large blocks back at once, so large results take their memory here.
#pragma once
#include "common/tensors.h"

namespace mnops {

// A dense channels_last tensor in the dtype of `like`, not initialised.
Tensor empty_result(const Tensor& like, const std::vector<int64_t>& size);

}  // namespace mnops
