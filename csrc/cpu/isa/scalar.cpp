#include "cpu/vec/scalar.h"
#include "cpu/kernels/instantiate.h"

namespace mnops {
const InstructionSet scalar_kernels = instruction_set("scalar");
}
