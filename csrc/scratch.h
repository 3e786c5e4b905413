// Memory that a thread keeps between calls: packed panels would else be mapped and faulted in anew at each.
#pragma once

#include <cstdint>

namespace moesaic {

// At least `bytes` of this thread's own memory, aligned to a cache line, contents undefined. Each `slot` below
// `scratch_slots` is a buffer of its own; a call may move the slot that it names.
constexpr int scratch_slots = 32;
void *scratch(int slot, int64_t bytes);

}  // namespace moesaic
