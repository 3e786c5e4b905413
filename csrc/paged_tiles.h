// Rows of queries and one tile of a paged cache: keys and values of 32 tokens.
//
// A row's sums run along the key's numbers, or along the tokens, in order and by one fma each, whatever rows share the
// call: its bits are those that it has alone.
#pragma once

#include "paged.h"
#include "simd.h"
#include "transpose.h"

namespace moesaic::MOESAIC_ISA {
namespace {

constexpr int tile_vectors = block_tokens / Vec::lanes;
constexpr int sums_in_registers = Vec::registers * 3 / 4;  // beside what is added to them
constexpr int row_tile = sums_in_registers / tile_vectors;

template <int R>
struct Rows {
    static constexpr int count = R;
};

// f(row, Rows<count>) for the rows before `end`: as many at a time as there are registers for, then fewer.
template <int R = row_tile, class F>
inline void by_rows(int64_t row, int64_t end, const F &f) {
    for (; row + R <= end; row += R) f(row, Rows<R>{});
    if constexpr (R > 1) by_rows<R == 12 ? 8 : R / 2 + R % 2>(row, end, f);
}

// scores [R][32] = queries [R][size] times keys [size][32].
template <int R, class T>
inline void score_tile(const float *q, int64_t size, const T *keys, float *scores) {
    Vec sums[R][tile_vectors];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int i = 0; i < tile_vectors; ++i) sums[r][i] = set(0.0f);
    for (int64_t a = 0; a < size; ++a, keys += block_tokens) {
        Vec k[tile_vectors];
#pragma GCC unroll 8
        for (int i = 0; i < tile_vectors; ++i) k[i] = load(keys + i * Vec::lanes);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const Vec x = set(q[r * size + a]);
#pragma GCC unroll 8
            for (int i = 0; i < tile_vectors; ++i) sums[r][i] = fma(x, k[i], sums[r][i]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int i = 0; i < tile_vectors; ++i) store(scores + r * block_tokens + i * Vec::lanes, sums[r][i]);
}

// The tokens of a tile that a row sees.
struct Span {
    int64_t first, end;

    bool operator==(const Span &other) const { return first == other.first && end == other.end; }
};

// Values of a tile, `pitch` from token to token, and what is made of them: out [R][columns].
template <class T>
struct Weighing {
    const T *values;
    int64_t pitch, columns;
    Span seen;
};

// out = out * factor + weights [R][32] times values, C vectors of columns.
template <int R, int C, class T>
inline void weigh_columns(const Weighing<T> &w, int64_t column, const float *weights, const float *factors,
                          float *out) {
    Vec sums[R][C];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c)
            sums[r][c] = load(out + r * w.columns + column + c * Vec::lanes) * set(factors[r]);
    const T *values = w.values + w.seen.first * w.pitch + column;
    for (int64_t t = w.seen.first; t < w.seen.end; ++t, values += w.pitch) {
        Vec v[C];
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) v[c] = load(values + c * Vec::lanes);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const Vec x = set(weights[r * block_tokens + t]);
#pragma GCC unroll 8
            for (int c = 0; c < C; ++c) sums[r][c] = fma(x, v[c], sums[r][c]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) store(out + r * w.columns + column + c * Vec::lanes, sums[r][c]);
}

constexpr int columns_for(int rows) {
    int columns = 8;
    while (columns * rows > sums_in_registers && columns > 1) columns /= 2;
    return columns;
}

// All columns, of which there are whole vectors.
template <int R, int C = columns_for(R), class T>
inline void weigh_tile(const Weighing<T> &w, const float *weights, const float *factors, float *out,
                       int64_t column = 0) {
    for (; column + C * Vec::lanes <= w.columns; column += C * Vec::lanes)
        weigh_columns<R, C>(w, column, weights, factors, out);
    if constexpr (C > 1) weigh_tile<R, C / 2>(w, weights, factors, out, column);
}

// Tokens [32][pitch], from number `a` on, as [pitch][32].
template <class T>
inline void turn_tile(const T *from, int64_t pitch, float *to, int64_t a = 0) {
    for (; a < pitch; a += Vec::lanes)
        for (int64_t t = 0; t < block_tokens; t += Vec::lanes) {
            Vec square[Vec::lanes];
            for (int i = 0; i < Vec::lanes; ++i) square[i] = load(from + (t + i) * pitch + a);
            transpose(square);
            for (int i = 0; i < Vec::lanes; ++i) store(to + (a + i) * block_tokens + t, square[i]);
        }
}

#if defined(__AVX512F__)
// Two numbers of a token turn as one lane: half the shuffles.
inline void turn_tile(const bf16 *from, int64_t pitch, float *to) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u));
    int64_t a = 0;
    for (; a + 32 <= pitch; a += 32)
        for (int64_t t = 0; t < block_tokens; t += 16) {
            __m512i square[16];
            for (int i = 0; i < 16; ++i) square[i] = _mm512_loadu_si512(from + (t + i) * pitch + a);
            transpose(square);
            float *at = to + a * block_tokens + t;
            for (int i = 0; i < 16; ++i, at += 2 * block_tokens) {
                store(at, Vec{_mm512_castsi512_ps(_mm512_slli_epi32(square[i], 16))});
                store(at + block_tokens, Vec{_mm512_castsi512_ps(_mm512_and_si512(square[i], upper))});
            }
        }
    turn_tile<bf16>(from, pitch, to, a);
}
#endif

// `size` numbers, which fill whole vectors, as floats: what many rows read is widened once.
inline const float *widened(const float *from, int64_t, float *) { return from; }
inline const float *widened(const bf16 *from, int64_t size, float *to) {
    for (int64_t i = 0; i < size; i += Vec::lanes) store(to + i, load(from + i));
    return to;
}

}  // namespace
}  // namespace moesaic::MOESAIC_ISA
