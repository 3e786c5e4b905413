// The k best of one row of scores, best first; among equals the lower id wins, NaN counts as the greatest.
#pragma once

#include <cstdint>
#include <cstring>

namespace moesaic {

// A whole number that orders as the float does: -0 equals +0, every NaN is the greatest.
inline int32_t order_of(float x) {
    if (x != x) return INT32_MAX;
    x += 0.0f;
    int32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits ^ ((bits >> 31) & INT32_MAX);
}

inline void topk_of_row(const float *scores, int64_t *ids, int64_t count, int64_t top_k) {
    if (top_k == 0) return;
    int64_t kept = 0;
    int32_t worst = INT32_MIN;
    for (int64_t e = 0; e < count; ++e) {
        const int32_t key = order_of(scores[e]);
        if (kept == top_k && key <= worst) continue;
        int64_t place = kept < top_k ? kept++ : top_k - 1;
        for (; place > 0 && order_of(scores[ids[place - 1]]) < key; --place) ids[place] = ids[place - 1];
        ids[place] = e;
        worst = order_of(scores[ids[kept - 1]]);
    }
}

}  // namespace moesaic
