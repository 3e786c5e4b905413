// Rotary positions in the half-split layout: dimension i of a head turns with i + A/2 (RoFormer, arXiv:2104.09864).
#include "parallel.h"
#include "variants.h"

namespace moesaic::MOESAIC_ISA {

template <class T>
void rotate(const T *x, const T *cos, const T *sin, T *y, const Heads &heads, float sign, int threads) {
    const int64_t size = heads.head_dim, half = size / 2;
    const int useful = threads_for(heads.tokens * heads.num_heads * size, 16384, threads);
    parallel_for(heads.tokens, 4, useful, [=](int64_t token) {
        const T *c = cos + token % heads.positions * size, *s = sin + token % heads.positions * size;
        const Vec by = set(sign);
        for (int64_t head = token * heads.num_heads; head < (token + 1) * heads.num_heads; ++head) {
            const T *first = x + head * size, *second = first + half;
            T *out = y + head * size;
            along(
                half,
                [=](int64_t i) {
                    const Vec a = load(first + i), b = load(second + i), turn = load(s + i) * by;
                    store(out + i, a * load(c + i) - b * turn);
                    store(out + half + i, fma(a, turn, b * load(c + half + i)));
                },
                [=](int64_t i, int64_t n) {
                    const Vec a = load(first + i, n), b = load(second + i, n), turn = load(s + i, n) * by;
                    store(out + i, a * load(c + i, n) - b * turn, n);
                    store(out + half + i, fma(a, turn, b * load(c + half + i, n)), n);
                });
        }
    });
}

template void rotate(const float *, const float *, const float *, float *, const Heads &, float, int);
template void rotate(const bf16 *, const bf16 *, const bf16 *, bf16 *, const Heads &, float, int);

}  // namespace moesaic::MOESAIC_ISA
