#include "cpu/vec/avx2.h"
#include "cpu/kernels/instantiate.h"

namespace mnops {
const InstructionSet avx2_kernels = instruction_set("avx2");
}
