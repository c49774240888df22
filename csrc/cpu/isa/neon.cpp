#include "cpu/vec/neon.h"
#include "cpu/kernels/instantiate.h"

namespace mnops {
const InstructionSet neon_kernels = instruction_set("neon");
}
