// Causal softmax attention and its gradients (arXiv:1706.03762, eq. 1), block of queries by block of queries: what a
// block makes of all its keys stays in the cache. Probabilities are computed twice rather than kept, as in
// FlashAttention (arXiv:2205.14135). One thread has all of a key/value head, so no sum is split between threads.
//
// S tokens, A head dimension. Products are summed in fp32; probabilities and their slopes are rounded to the rows' type
// before they are multiplied again.
#include "parallel.h"
#include "product.h"
#include "scratch.h"
#include "variants.h"

namespace moesaic::MOESAIC_ISA {
namespace {

constexpr int64_t block_rows = 64;     // queries at a time
constexpr int64_t grain = 1 << 18;     // multiplications below which waking a second thread costs more than it saves
enum Slot { scores_slot = 3, slopes_slot, p_slot, ds_slot, dk_slot, dv_slot };  // after those of the products

// C[m, n] = A B, rows of C next to each other's at c_row.
template <class T, class C>
void product(const T *a, int64_t a_row, int64_t a_k, const T *b, int64_t b_k, int64_t b_col, C *c, int64_t c_row,
             int64_t m, int64_t n, int64_t k, bool accumulate = false) {
    multiply(Product<T, C>{a, a_row, a_k, b, b_k, b_col, c, c_row, 1, m, n, k, accumulate, false, 1, 0, 0, 0},
             Block{0, m, 0, n});
}

// One query head and its key/value head: where token 0 is, and how far apart tokens are.
template <class T>
struct Head {
    const T *q, *k, *v;
    int64_t q_row, kv_row, length, size;
    float scale;

    // Of a row of scores; whole cache lines, and not a power of two.
    int64_t pitch() const { return ceil_div(length, 32) * 32 + 32; }
    void scores(int64_t start, int64_t rows, float *to) const {
        product(q + start * q_row, q_row, 1, k, 1, kv_row, to, pitch(), rows, start + rows, size);
    }
};

template <class T>
T *room(int slot, int64_t elements) {
    return static_cast<T *>(scratch(slot, elements * static_cast<int64_t>(sizeof(T))));
}

// p = softmax(scale * scores) over the first `seen` of `keys`, zeros after them; returns the log of the sum.
template <class T>
float softmax(float *scores, int64_t seen, int64_t keys, float scale, T *p) {
    const int64_t end = ceil_div(seen, Vec::lanes) * Vec::lanes;
    for (int64_t i = seen; i < end; ++i) scores[i] = -__builtin_inff();
    Vec high = set(-__builtin_inff());
    for (int64_t i = 0; i < end; i += Vec::lanes) high = max(high, load(scores + i));
    float lanes[Vec::lanes];
    store(lanes, high);
    float highest = lanes[0];
    for (float lane : lanes) highest = lane > highest ? lane : highest;
    const Vec shift = set(-highest * scale);
    Vec total = set(0.0f);
    for (int64_t i = 0; i < end; i += Vec::lanes) {
        const Vec e = exp(fma(load(scores + i), set(scale), shift));  // e^-87 past `seen`: lost beside e^0 in the sum
        store(scores + i, e);
        total = total + e;
    }
    const float whole = sum(total);
    const Vec share = set(1.0f / whole);
    along(
        seen, [=](int64_t i) { store(p + i, load(scores + i) * share); },
        [=](int64_t i, int64_t n) { store(p + i, load(scores + i, n) * share, n); });
    std::memset(static_cast<void *>(p + seen), 0, static_cast<size_t>(keys - seen) * sizeof(T));
    return highest * scale + __builtin_logf(whole);
}

template <class T>
float dot(const T *a, const T *b, int64_t size) {
    Vec total = set(0.0f);
    along(
        size, [&](int64_t i) { total = fma(load(a + i), load(b + i), total); },
        [&](int64_t i, int64_t n) { total = fma(load(a + i, n), load(b + i, n), total); });
    return sum(total);
}

// p again, and the slopes of the scores: p (dp - delta) scale.
template <class T>
void softmax_grad(const float *scores, const float *dp, int64_t seen, int64_t keys, float scale, float log_sum,
                  float delta, T *p, T *ds) {
    const auto again = [=](Vec x) { return exp(fma(x, set(scale), set(-log_sum))); };
    along(
        seen,
        [=](int64_t i) {
            const Vec e = again(load(scores + i));
            store(p + i, e);
            store(ds + i, e * (load(dp + i) - set(delta)) * set(scale));
        },
        [=](int64_t i, int64_t n) {
            const Vec e = again(load(scores + i, n));
            store(p + i, e, n);
            store(ds + i, e * (load(dp + i, n) - set(delta)) * set(scale), n);
        });
    std::memset(static_cast<void *>(p + seen), 0, static_cast<size_t>(keys - seen) * sizeof(T));
    std::memset(static_cast<void *>(ds + seen), 0, static_cast<size_t>(keys - seen) * sizeof(T));
}

template <class T>
void forward(const Head<T> &head, T *out, float *log_sum) {
    const int64_t pitch = head.pitch();
    float *scores = room<float>(scores_slot, block_rows * pitch);
    T *p = room<T>(p_slot, block_rows * pitch);
    for (int64_t start = 0; start < head.length; start += block_rows) {
        const int64_t rows = at_most(head.length - start, block_rows), keys = start + rows;
        head.scores(start, rows, scores);
        for (int64_t i = 0; i < rows; ++i)
            log_sum[start + i] = softmax(scores + i * pitch, start + i + 1, keys, head.scale, p + i * pitch);
        product(p, pitch, 1, head.v, head.kv_row, 1, out + start * head.q_row, head.q_row, rows, head.size, keys);
    }
}

// Adds to dk and dv [S, A], which lie without gaps.
template <class T>
void backward(const Head<T> &head, const T *d_out, const T *out, const float *log_sum, T *dq, float *dk, float *dv) {
    const int64_t pitch = head.pitch(), row = head.q_row, size = head.size;
    float *scores = room<float>(scores_slot, block_rows * pitch), *dp = room<float>(slopes_slot, block_rows * pitch);
    T *p = room<T>(p_slot, block_rows * pitch), *ds = room<T>(ds_slot, block_rows * pitch);
    for (int64_t start = 0; start < head.length; start += block_rows) {
        const int64_t rows = at_most(head.length - start, block_rows), keys = start + rows;
        const T *d = d_out + start * row;
        head.scores(start, rows, scores);
        product(d, row, 1, head.v, 1, head.kv_row, dp, pitch, rows, keys, size);
        for (int64_t i = 0; i < rows; ++i)
            softmax_grad(scores + i * pitch, dp + i * pitch, start + i + 1, keys, head.scale, log_sum[start + i],
                         dot(d + i * row, out + (start + i) * row, size), p + i * pitch, ds + i * pitch);
        product(ds, pitch, 1, head.k, head.kv_row, 1, dq + start * row, row, rows, size, keys);
        product(p, 1, pitch, d, row, 1, dv, size, keys, size, rows, true);
        product(ds, 1, pitch, head.q + start * row, row, 1, dk, size, keys, size, rows, true);
    }
}

// f(offset in elements, offset in log_sum) of each query head that the key/value head `pair` serves.
template <class F>
void for_heads(const AttentionShape &s, int64_t pair, const F &f) {
    const int64_t shared = s.num_heads / s.num_groups, batch = pair / s.num_groups, group = pair % s.num_groups;
    for (int64_t head = group * shared; head < (group + 1) * shared; ++head)
        f((batch * s.length * s.num_heads + head) * s.head_dim, (batch * s.num_heads + head) * s.length);
}

template <class T>
Head<T> head_at(const AttentionShape &s, const T *q, const T *k, const T *v, int64_t q_at, int64_t kv_at) {
    return {q + q_at, k + kv_at, v + kv_at, s.num_heads * s.head_dim, s.num_groups * s.head_dim, s.length, s.head_dim,
            1.0f / __builtin_sqrtf(static_cast<float>(s.head_dim))};
}

inline int64_t key_value_offset(const AttentionShape &s, int64_t pair) {
    return (pair / s.num_groups * s.length * s.num_groups + pair % s.num_groups) * s.head_dim;
}

inline int64_t work_of(const AttentionShape &s) { return s.batch * s.num_heads * s.length * s.length * s.head_dim; }

}  // namespace

template <class T>
void causal_attention(const T *q, const T *k, const T *v, T *out, float *log_sum, const AttentionShape &s,
                      int threads) {
    parallel_for(s.batch * s.num_groups, 1, threads_for(work_of(s), grain, threads), [&](int64_t pair) {
        const int64_t kv_at = key_value_offset(s, pair);
        for_heads(s, pair, [&](int64_t q_at, int64_t sum_at) {
            forward(head_at(s, q, k, v, q_at, kv_at), out + q_at, log_sum + sum_at);
        });
    });
}

template <class T>
void causal_attention_grad(const AttentionGrad<T> &g, const AttentionShape &s, int threads) {
    parallel_for(s.batch * s.num_groups, 1, threads_for(2 * work_of(s), grain, threads), [&](int64_t pair) {
        const int64_t kv_at = key_value_offset(s, pair), elements = s.length * s.head_dim;
        float *dk = room<float>(dk_slot, elements), *dv = room<float>(dv_slot, elements);
        std::memset(dk, 0, static_cast<size_t>(elements) * 4);
        std::memset(dv, 0, static_cast<size_t>(elements) * 4);
        for_heads(s, pair, [&](int64_t q_at, int64_t sum_at) {
            backward(head_at(s, g.q, g.k, g.v, q_at, kv_at), g.d_out + q_at, g.out + q_at, g.log_sum + sum_at,
                     g.dq + q_at, dk, dv);
        });
        for (int64_t token = 0; token < s.length; ++token)
            for (int64_t i = 0; i < s.head_dim; ++i) {
                const int64_t to = kv_at + token * s.num_groups * s.head_dim + i, from = token * s.head_dim + i;
                put(g.dk + to, dk[from]);
                put(g.dv + to, dv[from]);
            }
    });
}

#define MOESAIC_FOR(T)                                                                                            \
    template void causal_attention(const T *, const T *, const T *, T *, float *, const AttentionShape &, int);   \
    template void causal_attention_grad(const AttentionGrad<T> &, const AttentionShape &, int);
MOESAIC_FOR(float)
MOESAIC_FOR(bf16)

}  // namespace moesaic::MOESAIC_ISA
