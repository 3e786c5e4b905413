// Keys and values of new tokens into the blocks of a paged cache (paged.h), rounded to the nearest where it holds bf16.
#include "paged.h"
#include "parallel.h"
#include "scratch.h"
#include "transpose.h"
#include "variants.h"

namespace moesaic::MOESAIC_ISA {
namespace {

constexpr int64_t grain = 1 << 14;  // numbers below which waking a second thread costs more than it saves
constexpr int runs_slot = 3;        // of attention.cpp, which never runs at the same time

// Tokens next to each other in one block: written by one thread, as cache lines hold numbers of several tokens.
struct Run {
    int64_t token, count, block, place;
};

int64_t cut_into_runs(const PagedTokens &tokens, Run *runs) {
    int64_t count = 0;
    for (int64_t token = 0; token < tokens.tokens; ++token) {
        const int64_t position = tokens.positions[token], place = position % block_tokens;
        const int64_t block =
            tokens.tables[tokens.sequence_of[token] * tokens.table_width + position / block_tokens];
        const bool follows = count > 0 && runs[count - 1].block == block &&
                             runs[count - 1].place + runs[count - 1].count == place;
        if (follows) ++runs[count - 1].count;
        else runs[count++] = {token, 1, block, place};
    }
    return count;
}

inline void put_exactly(float *p, Vec x) { store(p, x); }
inline void put_exactly(bf16 *p, Vec x) { store_exactly(p, x); }

// `size` numbers, and zeros to the end of a whole sixteen.
template <class T>
void put_row(const float *from, int64_t size, T *to) {
    static_assert(16 % Vec::lanes == 0, "a pitch is whole vectors");
    for (int64_t i = 0; i < (size + 15) / 16 * 16; i += Vec::lanes) {
        const int64_t left = size - i;
        put_exactly(to + i, left >= Vec::lanes ? load(from + i) : load(from + i, left > 0 ? left : 0));
    }
}

// Keys [count] `stride` apart to [size][32]: as many tokens as there are lanes at a time, then one by one.
template <class T>
void turn_keys(const float *from, int64_t stride, int64_t count, int64_t size, T *to) {
    int64_t i = 0;
    for (; i + Vec::lanes <= count; i += Vec::lanes)
        for (int64_t a = 0; a < size; a += Vec::lanes) {
            const int64_t width = size - a < Vec::lanes ? size - a : Vec::lanes;
            const float *corner = from + i * stride + a;
            Vec square[Vec::lanes];
            for (int r = 0; r < Vec::lanes; ++r)
                square[r] = width == Vec::lanes ? load(corner + r * stride) : load(corner + r * stride, width);
            transpose(square);
            for (int64_t r = 0; r < width; ++r) put_exactly(to + (a + r) * block_tokens + i, square[r]);
        }
    for (; i < count; ++i)
        for (int64_t a = 0; a < size; ++a) put(to + a * block_tokens + i, from[i * stride + a]);
}

template <class T>
void write_run(const PagedCache &cache, const Run &run, int64_t group, const float *k, int64_t k_stride, const float *v,
               int64_t v_stride) {
    const int64_t tile = run.block * cache.num_groups + group, pitch = cache.value_pitch();
    const float *key = k + run.token * k_stride + group * cache.key_dim;
    T *keys = static_cast<T *>(cache.keys) + tile * cache.key_tile();
    if (cache.shared) {
        for (int64_t i = 0; i < run.count; ++i)
            put_row(key + i * k_stride, cache.key_dim, keys + (run.place + i) * pitch);
        return;
    }
    turn_keys(key, k_stride, run.count, cache.key_dim, keys + run.place);
    const float *value = v + run.token * v_stride + group * cache.value_dim;
    T *values = static_cast<T *>(cache.values) + tile * cache.value_tile();
    for (int64_t i = 0; i < run.count; ++i)
        put_row(value + i * v_stride, cache.value_dim, values + (run.place + i) * pitch);
}

}  // namespace

void write_cache(const PagedCache &cache, const PagedTokens &tokens, const float *k, int64_t k_stride, const float *v,
                 int64_t v_stride, int threads) {
    Run *runs = static_cast<Run *>(scratch(runs_slot, tokens.tokens * static_cast<int64_t>(sizeof(Run))));
    const int64_t count = cut_into_runs(tokens, runs), groups = cache.num_groups;
    const int64_t numbers = tokens.tokens * groups * (cache.key_dim + cache.value_dim);
    parallel_for(count * groups, 1, threads_for(numbers, grain, threads), [&](int64_t i) {
        const Run &run = runs[i / groups];
        if (cache.is_bf16) write_run<bf16>(cache, run, i % groups, k, k_stride, v, v_stride);
        else write_run<float>(cache, run, i % groups, k, k_stride, v, v_stride);
    });
}

}  // namespace moesaic::MOESAIC_ISA
