// Reads memory from end to end, as kernels read weights: what the memory's bandwidth is measured with.
#include "variants.h"

namespace moesaic::MOESAIC_ISA {

uint64_t read_words(const uint64_t *words, int64_t count) {
    constexpr int64_t at_once = 32;  // four cache lines, so that no addition waits for the one before
    uint64_t sums[at_once] = {}, sum = 0;
    int64_t i = 0;
    for (; i + at_once <= count; i += at_once)
        for (int64_t lane = 0; lane < at_once; ++lane) sums[lane] += words[i + lane];
    for (; i < count; ++i) sum += words[i];
    for (uint64_t part : sums) sum += part;
    return sum;  // handed back, so that no compiler leaves the reading out
}

}  // namespace moesaic::MOESAIC_ISA
