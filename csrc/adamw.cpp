// AdamW, the rounding of what it moved and the average of it, in one pass over memory (arXiv:1711.05101, alg. 2).
//
// Elements are independent, and this file is compiled without contraction: an element's bits do not depend on whether
// it stands in a whole vector. Operations come in the order of torch's fused kernel, which rounds some together.
#include "parallel.h"
#include "variants.h"

namespace moesaic::MOESAIC_ISA {
namespace {

constexpr int64_t piece = 4096;  // elements of an item: an even share for threads, and every vector's multiple

// from + weight * (to - from), from the nearer end: exactly `to` at weight 1.
inline Vec lerp(Vec from, Vec to, float weight) {
    return weight < 0.5f ? fma(set(weight), to - from, from) : fma(set(weight - 1.0f), to - from, to);
}

}  // namespace

void adamw(const AdamTensors &t, const AdamStep &s, int64_t size, int threads) {
    const auto moved = [=](Vec w, Vec first, Vec second) {
        const Vec root = sqrt(second) / set(s.second_root) + set(s.eps);
        return w * set(s.kept) + set(-s.rate) * first / root;
    };
    const auto grown = [=](Vec second, Vec g) { return fma(set(s.fresh2) * g, g, second * set(s.beta2)); };
    const int64_t pieces = (size + piece - 1) / piece;
    parallel_for(pieces, 4, threads_for(size, 16384, threads), [=](int64_t i) {
        const int64_t start = i * piece, left = size - start;
        float *w = t.weight + start, *m = t.first + start, *v = t.second + start;
        const float *slope = t.gradient + start;
        bf16 *rounded = t.rounded ? t.rounded + start : nullptr;
        float *average = t.average ? t.average + start : nullptr;
        along(
            left < piece ? left : piece,
            [=](int64_t j) {
                const Vec g = load(slope + j) * set(s.clip);
                const Vec first = lerp(load(m + j), g, s.fresh1), second = grown(load(v + j), g);
                const Vec now = moved(load(w + j), first, second);
                store(m + j, first), store(v + j, second), store(w + j, now);
                if (rounded) store_exactly(rounded + j, now);
                if (average) store(average + j, lerp(load(average + j), now, s.newest));
            },
            [=](int64_t j, int64_t n) {
                const Vec g = load(slope + j, n) * set(s.clip);
                const Vec first = lerp(load(m + j, n), g, s.fresh1), second = grown(load(v + j, n), g);
                const Vec now = moved(load(w + j, n), first, second);
                store(m + j, first, n), store(v + j, second, n), store(w + j, now, n);
                if (rounded) store_exactly(rounded + j, now, n);
                if (average) store(average + j, lerp(load(average + j, n), now, s.newest), n);
            });
    });
}

}  // namespace moesaic::MOESAIC_ISA
