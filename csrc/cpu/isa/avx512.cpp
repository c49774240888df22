#include "cpu/vec/avx512.h"
#include "cpu/kernels/instantiate.h"

namespace mnops {
const InstructionSet avx512_kernels = instruction_set("avx512");
}
