// Which instruction set serves this process.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace moesaic {

// Names of the instruction sets that were compiled in and that this processor has, worst first.
std::vector<std::string> available_isas();

// The chosen table: the best available until `use_isa` names another.
const Kernels &chosen();

// False when `name` is not available.
bool use_isa(const std::string &name);

}  // namespace moesaic
