// Chooses the instruction set once, from what the CPU reports and MNOPS_CPU_CAPABILITY.
#pragma once
#include <string>
#include <vector>

#include "cpu/kernels/table.h"

namespace mnops {

struct Capability {
  const InstructionSet* kernels;   // null where this build does not hold it
  const char* name;
  bool supported;                  // by the CPU this runs on
};

const std::vector<Capability>& capabilities();          // best last
const InstructionSet& instruction_set();                // forced or best; throws if the forced one cannot run
const InstructionSet& instruction_set(const std::string& name);

}  // namespace mnops
