// Softmax cross-entropy of rows of logits, which become its gradient: p, less one at the target.
#include "parallel.h"
#include "variants.h"

namespace moesaic::MOESAIC_ISA {
namespace {

// Elements past the last whole vector are taken one at a time: the zeros that a short load brings would count.
template <class T>
float highest_of(const T *x, int64_t size) {
    Vec high = set(to_float(x[0]));
    int64_t i = 0;
    for (; i + Vec::lanes <= size; i += Vec::lanes) high = max(high, load(x + i));
    float lanes[Vec::lanes];
    store(lanes, high);
    float highest = lanes[0];
    for (float lane : lanes) highest = lane > highest ? lane : highest;
    for (; i < size; ++i) highest = to_float(x[i]) > highest ? to_float(x[i]) : highest;
    return highest;
}

template <class T>
float sum_of_exp(const T *x, int64_t size, float highest) {
    const Vec shift = set(highest);
    Vec total = set(0.0f);
    int64_t i = 0;
    for (; i + Vec::lanes <= size; i += Vec::lanes) total = total + exp(load(x + i) - shift);
    float rest = 0.0f;
    for (; i < size; ++i) rest += __builtin_expf(to_float(x[i]) - highest);
    return sum(total) + rest;
}

}  // namespace

template <class T>
void cross_entropy(T *logits, const int64_t *targets, float *losses, int64_t rows, int64_t vocab, int threads) {
    parallel_for(rows, 1, threads_for(rows * vocab, 16384, threads), [=](int64_t row) {
        T *x = logits + row * vocab;
        const int64_t target = targets[row];
        if (target < 0) {  // does not count
            losses[row] = 0.0f;
            std::memset(static_cast<void *>(x), 0, static_cast<size_t>(vocab) * sizeof(T));
            return;
        }
        const float highest = highest_of(x, vocab);
        const float log_sum = __builtin_logf(sum_of_exp(x, vocab, highest));
        const float log_p = (to_float(x[target]) - highest) - log_sum;  // in this order: log_sum may be tiny
        const Vec high = set(highest), rest = set(log_sum);
        along(
            vocab, [=](int64_t i) { store(x + i, exp(load(x + i) - high - rest)); },
            [=](int64_t i, int64_t n) { store(x + i, exp(load(x + i, n) - high - rest), n); });
        put(x + target, __builtin_expm1f(log_p));  // p - 1 without cancellation where p is near 1
        losses[row] = -log_p;
    });
}

template void cross_entropy(float *, const int64_t *, float *, int64_t, int64_t, int);
template void cross_entropy(bf16 *, const int64_t *, float *, int64_t, int64_t, int);

}  // namespace moesaic::MOESAIC_ISA
