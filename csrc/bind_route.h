// A router as Python hands it over.
#pragma once

#include "array_checks.h"
#include "route.h"

namespace moesaic {

// Settings and tensors, kept as long as Python keeps it.
struct BoundRouter {
    RouterSpec spec;
    int64_t vocab_size = 0;
    std::optional<Array> bias, running_mean, running_var, selection_bias, table;
};

}  // namespace moesaic
