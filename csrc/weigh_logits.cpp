// What drawing a token (draw.h) does to all of a row: the greatest logit of each block, and weights with their sums in
// fp64. Compiled without contraction (CMakeLists.txt): a weight is the same wherever in its row and in memory it is.
#include "draw.h"
#include "variants.h"

namespace moesaic::MOESAIC_ISA {
namespace {

inline int64_t size_of_block(int64_t size, int64_t start) {
    return size - start < draw_block ? size - start : draw_block;
}

inline double sum_of(const float *x, int64_t size) {
    double sums[8] = {};
    for (int64_t i = 0; i + 8 <= size; i += 8)
        for (int64_t j = 0; j < 8; ++j) sums[j] += x[i + j];
    for (int64_t i = size / 8 * 8; i < size; ++i) sums[i % 8] += x[i];
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

}  // namespace

// What is no number is not looked at.
void greatest_logits(const float *logits, int64_t size, float *greatest) {
    for (int64_t start = 0; start < size; start += draw_block, ++greatest) {
        const int64_t count = size_of_block(size, start);
        const float *x = logits + start;
        Vec most = set(-__builtin_inff());
        int64_t i = 0;
        for (; i + Vec::lanes <= count; i += Vec::lanes) most = max(load(x + i), most);
        float found = highest(most);
        if (found != found) i = 0, found = -__builtin_inff();
        for (; i < count; ++i) found = x[i] > found ? x[i] : found;
        *greatest = found;
    }
}

// exp ends at e^-87, which is taken away: what is that unlikely, or minus infinity, weighs nothing.
void weigh_logits(const float *logits, int64_t size, float greatest, float factor, float *weights, double *sums) {
    const Vec high = set(greatest), by = set(factor), least = exp(set(-87.0f)), none = set(0.0f);
    const auto weight = [&](const Vec &x) { return max(exp((x - high) * by) - least, none); };
    for (int64_t start = 0; start < size; start += draw_block, ++sums) {
        const int64_t count = size_of_block(size, start);
        const float *x = logits + start;
        float *to = weights + start;
        along(count, [&](int64_t i) { store(to + i, weight(load(x + i))); },
              [&](int64_t i, int64_t n) { store(to + i, weight(load(x + i, n)), n); });
        *sums = sum_of(to, count);
    }
}

}  // namespace moesaic::MOESAIC_ISA
