// Matrix products by vector registers: an M x V block of C stays in registers while K runs, A's elements are broadcast
// and B's come in vectors. B is packed into panels of V vectors, A is read where it lies when its rows run along k.
//
// A unit is what one 32-bit lane holds: a float, or with AVX512-BF16 two neighbours in k as bf16, multiplied and added
// in one instruction. Other instruction sets widen bf16 to floats while packing.
#include "product.h"
#include "scratch.h"
#include "transpose.h"

namespace moesaic::MOESAIC_ISA {
namespace {

constexpr int64_t lanes = Vec::lanes;
// M * V accumulators, V vectors of B and one element of A must fit the registers.
#if defined(__AVX512F__)
constexpr int max_rows = 8, max_vectors = 3;
#elif defined(__AVX2__)
constexpr int max_rows = 4, max_vectors = 3;
#elif defined(__ARM_NEON)
constexpr int max_rows = 8, max_vectors = 3;
#else
constexpr int max_rows = 4, max_vectors = 1;
#endif
constexpr int64_t panel_units = 1024;          // of k in one pass: a panel of them and a few rows of A fit the L2 cache
// B panels packed at once. With AVX2 a processor's second cache tends to have 512 KB: 192 KB of them took 0.9 times as
// long as 512 KB for 16 to 64 rows.
#if defined(__AVX512F__) || defined(__ARM_NEON)
constexpr int64_t pack_bytes = 512 << 10;
#else
constexpr int64_t pack_bytes = 192 << 10;
#endif
constexpr int64_t rows_ahead = 16;             // of B fetched while packing
// Blocks of A's rows up to which packing floats of B costs more than it saves.
constexpr int64_t few_tiles = 2;
constexpr int64_t short_units = 32;            // of k in one pass where B is not packed: reads along its rows stay long
enum Slot { b_slot, a_slot, sum_slot };

#if defined(__AVX512BF16__)
template <class T>
constexpr int64_t per_unit = sizeof(T) == 2 ? 2 : 1;
template <class T>
using Unit = T;
#else
template <class T>
constexpr int64_t per_unit = 1;
template <class T>
using Unit = float;
#endif

// acc + unit * units. U is what a lane holds: a float, or (by two bytes) a pair of bf16.
template <class U>
inline Vec multiply_add(const char *a, Vec b, Vec acc) {
#if defined(__AVX512BF16__)
    if constexpr (sizeof(U) == 2) {
        int32_t pair;
        std::memcpy(&pair, a, 4);
        return {_mm512_dpbf16_ps(acc.v, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)_mm512_castps_si512(b.v))};
    }
#endif
    float x;
    std::memcpy(&x, a, 4);
    return fma(set(x), b, acc);
}

// One block of sums: where its operands are and where it is kept (strides in bytes but for the sums').
struct Tile {
    const char *a;
    int64_t a_row;
    const char *b;
    int64_t b_k, units;
    float *sums;
    int64_t sums_row;
    bool add;  // to what the sums hold
};

// packed: A lies as [unit][M]; else its rows are a_row bytes apart.
template <class U, bool packed, int M, int V>
[[gnu::noinline]] void block(const Tile &t) {
    Vec acc[M][V];
    for (int m = 0; m < M; ++m)
        for (int v = 0; v < V; ++v) acc[m][v] = t.add ? load(t.sums + m * t.sums_row + v * lanes) : set(0.0f);
    const int64_t a_row = packed ? 4 : t.a_row, a_k = packed ? 4 * M : 4, b_k = t.b_k;
    const char *a = t.a, *below = a + 4 * a_row, *b = t.b;  // two bases: addressing reaches rows 0 to 3 of each
    for (int64_t k = t.units; k > 0; --k, a += a_k, below += a_k, b += b_k) {
        Vec bs[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) bs[v] = load(reinterpret_cast<const float *>(b) + v * lanes);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v)
                acc[m][v] = multiply_add<U>(m < 4 ? a + m * a_row : below + (m - 4) * a_row, bs[v], acc[m][v]);
        }
    }
    for (int m = 0; m < M; ++m)
        for (int v = 0; v < V; ++v) store(t.sums + m * t.sums_row + v * lanes, acc[m][v]);
}

template <class U, bool packed, int M>
void block_of_rows(int vectors, const Tile &t) {
    switch (vectors) {
        case 1: return block<U, packed, M, 1>(t);
        case 2: return block<U, packed, M, 2>(t);
        default: return block<U, packed, M, 3>(t);
    }
}

template <class U, bool packed>
void any_block(int rows, int vectors, const Tile &t) {
    if constexpr (max_rows == 8) {
        switch (rows) {
            case 8: return block_of_rows<U, packed, 8>(vectors, t);
            case 7: return block_of_rows<U, packed, 7>(vectors, t);
            case 6: return block_of_rows<U, packed, 6>(vectors, t);
            case 5: return block_of_rows<U, packed, 5>(vectors, t);
        }
    }
    switch (rows) {
        case 4: return block_of_rows<U, packed, 4>(vectors, t);
        case 3: return block_of_rows<U, packed, 3>(vectors, t);
        case 2: return block_of_rows<U, packed, 2>(vectors, t);
        default: return block_of_rows<U, packed, 1>(vectors, t);
    }
}

// Rounds a block of sums into C, or adds it to what C holds.
template <class C>
void put_block(const float *sums, int64_t sums_row, int rows, int64_t columns, C *c, int64_t c_row, bool accumulate) {
    for (int m = 0; m < rows; ++m)
        along(
            columns,
            [=](int64_t n) {
                const Vec total = load(sums + m * sums_row + n);
                store(c + m * c_row + n, accumulate ? load(c + m * c_row + n) + total : total);
            },
            [=](int64_t n, int64_t left) {
                const Vec total = load(sums + m * sums_row + n);
                store(c + m * c_row + n, accumulate ? load(c + m * c_row + n, left) + total : total, left);
            });
}

// The same for whole vectors of floats on their own cache lines, past the caches.
void stream_block(const float *sums, int64_t sums_row, int rows, int64_t columns, float *c, int64_t c_row) {
    for (int m = 0; m < rows; ++m)
        for (int64_t n = 0; n < columns; n += lanes) stream(c + m * c_row + n, load(sums + m * sums_row + n));
}

#if defined(__AVX512BF16__)
inline __mmask32 first_halves(int64_t n) { return n >= 32 ? ~0u : n <= 0 ? 0u : (1u << n) - 1u; }
// Lane i: low[i] in its lower half, high[i] in its upper; zeros from n on.
inline __m512i interleave(const bf16 *low, const bf16 *high, int64_t n) {
    const __mmask16 mask = n >= 16 ? 0xffff : first(n < 0 ? 0 : n);
    const __m512i a = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, low));
    if (!high) return a;
    return _mm512_or_si512(a, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, high)), 16));
}
#endif

template <class T>
inline Vec load_some(const T *p, int64_t n) { return n >= lanes ? load(p) : n > 0 ? load(p, n) : set(0.0f); }

// `lanes` units of a row that runs along k, zeros past its `left` elements.
template <int64_t per, class T>
inline Vec load_units(const T *p, int64_t left) {
#if defined(__AVX512BF16__)
    if constexpr (per == 2)
        return {_mm512_castsi512_ps(left >= 32 ? _mm512_loadu_si512(p)
                                               : _mm512_maskz_loadu_epi16(first_halves(left), p))};
#endif
    return load_some(p, left);
}

// One vector of units at element k0 of k for the columns from p on, which lie next to each other; rows are b_k apart.
template <int64_t per, class T>
inline Vec load_columns(const T *p, int64_t b_k, int64_t k_left, int64_t columns) {
#if defined(__AVX512BF16__)
    if constexpr (per == 2)
        return {_mm512_castsi512_ps(interleave(p, k_left > 1 ? p + b_k : nullptr, columns))};
#endif
    (void)b_k, (void)k_left;
    return load_some(p, columns);
}

// B's columns n0 to n1 and k from k0 on, as [unit][width], zeros past the last column and the last k. per: elements of
// a unit.
template <int64_t per, class T>
void pack_panel(const T *b, int64_t b_k, int64_t b_col, int64_t columns, int64_t ks, int64_t units, int64_t width,
                float *to) {
    if (b_col == 1) {
        for (int64_t u = 0; u < units; ++u) {
            const T *row = b + u * per * b_k;
            for (int64_t i = 0; i < per; ++i)
                prefetch_lines(row + (rows_ahead + i) * b_k, ceil_div(width * static_cast<int64_t>(sizeof(T)), 64));
            for (int64_t j = 0; j < width; j += lanes)
                store(to + u * width + j, load_columns<per>(row + j, b_k, ks - u * per, columns - j));
        }
        return;
    }
    for (int64_t j = 0; j < width; j += lanes) {
        for (int64_t u = 0; u < units; u += lanes) {
            Vec square[lanes];
            for (int64_t i = 0; i < lanes; ++i)  // the columns after these, which lie behind them
                prefetch(b + (j + lanes) * b_col + (u * lanes + i * lanes) * per);
            for (int64_t i = 0; i < lanes; ++i)
                square[i] = j + i < columns ? load_units<per>(b + (j + i) * b_col + u * per, ks - u * per) : set(0.0f);
            transpose(square);
            const int64_t here = at_most(units - u, lanes);
            for (int64_t i = 0; i < here; ++i) store(to + (u + i) * width + j, square[i]);
        }
    }
}

// A's rows as [unit][rows]; writes up to a vector past the end.
template <class T>
void pack_columns_of_a(const T *a, int64_t a_k, int64_t rows, int64_t ks, int64_t units, float *to) {
    for (int64_t u = 0; u < units; ++u) {
        const T *from = a + u * per_unit<T> * a_k;
        if (lanes == 16) {  // cheap masks
            store(to + u * rows, load_columns<per_unit<T>>(from, a_k, ks - u * per_unit<T>, rows));
            continue;
        }
        for (int64_t m = 0; m < rows; ++m) to[u * rows + m] = to_float(from[m]);
    }
}

// A's rows as they are, as units, each `pitch` floats after the one before it.
template <class T>
void pack_rows_of_a(const T *a, int64_t a_row, int64_t rows, int64_t ks, int64_t units, int64_t pitch, float *to) {
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t u = 0; u < units; u += lanes)
            store(to + m * pitch + u, load_units<per_unit<T>>(a + m * a_row + u * per_unit<T>, ks - u * per_unit<T>));
}

// Whether B lies as a packed panel would, and is read too few times to be worth copying.
template <class T, class C, class B>
inline bool reads_b_in_place(const Product<T, C, B> &p, int64_t rows) {
    return sizeof(B) == 4 && p.b_col == 1 && rows <= few_tiles * max_rows;
}

// One pass over a stretch of k for some panels of B: every block of rows against each of them.
template <class T, class C, class B>
struct Pass {
    const Product<T, C, B> &p;
    int64_t m0, m1;
    int64_t k0, ks, units;  // the stretch, in elements and units
    bool first, last;
    float *sums;  // [m1 - m0][sums_row], where C is not reached in one pass
    int64_t sums_row;
    const T *a;
    const B *b;
    C *c;

    bool a_in_place() const { return p.a_k == 1 && (sizeof(T) == 4 || (per_unit<T> == 2 && ks % 2 == 0)); }

    // `first_vector` to `last_vector` of the n range, in panels.
    void run(int64_t n0, int64_t n1) const;
};

// How n is cut into panels of whole vectors.
struct Panels {
    int64_t vectors, count;
    explicit Panels(int64_t n) : vectors(ceil_div(n, lanes)), count(ceil_div(vectors, max_vectors)) {}
    int64_t start(int64_t i) const { return even_cut(vectors, count, i) * lanes; }
    int width(int64_t i) const {
        return static_cast<int>(even_cut(vectors, count, i + 1) - even_cut(vectors, count, i));
    }
};

template <class T, class C, class B>
void Pass<T, C, B>::run(int64_t n0, int64_t n1) const {
    const Panels panels(n1 - n0);
    const int64_t tiles = ceil_div(m1 - m0, max_rows);
    const bool b_in_place = reads_b_in_place(p, m1 - m0);
    const B *b_here = b + k0 * p.b_k;
    float *b_panels = nullptr;
    if (!b_in_place || (n1 - n0) % lanes) {
        b_panels = static_cast<float *>(scratch(b_slot, units * panels.vectors * lanes * 4 + 64));
        for (int64_t i = b_in_place ? panels.count - 1 : 0; i < panels.count; ++i) {
            const int64_t start = panels.start(i), width = panels.width(i) * lanes;
            pack_panel<per_unit<T>>(b_here + (n0 + start) * p.b_col, p.b_k, p.b_col, n1 - n0 - start, ks, units, width,
                       b_panels + start * units);
        }
    }
    const int64_t pitch = ceil_div(units, lanes) * lanes + 16;
    float *a_tile = a_in_place() ? nullptr : static_cast<float *>(scratch(a_slot, max_rows * pitch * 4 + 64));
    alignas(64) float tile_sums[max_rows * max_vectors * lanes];
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t m = m0 + even_cut(m1 - m0, tiles, tile);
        const int rows = static_cast<int>(m0 + even_cut(m1 - m0, tiles, tile + 1) - m);
        const T *a_here = a + m * p.a_row + k0 * p.a_k;
        Tile t{reinterpret_cast<const char *>(a_here), p.a_row * static_cast<int64_t>(sizeof(T)), nullptr, 0, units,
               nullptr, sums_row, !first};
        if (a_tile && p.a_k == 1) {
            pack_rows_of_a(a_here, p.a_row, rows, ks, units, pitch, a_tile);
            t.a = reinterpret_cast<const char *>(a_tile);
            t.a_row = pitch * 4;
        } else if (a_tile) {
            pack_columns_of_a(a_here, p.a_k, rows, ks, units, a_tile);
            t.a = reinterpret_cast<const char *>(a_tile);
        }
        for (int64_t i = 0; i < panels.count; ++i) {
            const int64_t start = panels.start(i), n = n0 + start;
            const int width = panels.width(i);
            const int64_t columns = at_most(n1 - n, width * lanes);
            const bool here = b_in_place && columns == width * lanes;
            t.b = here ? reinterpret_cast<const char *>(b_here + n)
                       : reinterpret_cast<const char *>(b_panels + start * units);
            t.b_k = here ? p.b_k * 4 : width * lanes * 4;
            t.sums = sums ? sums + (m - m0) * sums_row + start : tile_sums;
            t.sums_row = sums ? sums_row : max_vectors * lanes;
            if (p.a_k == 1) any_block<Unit<T>, false>(rows, width, t);
            else any_block<Unit<T>, true>(rows, width, t);
            if constexpr (sizeof(C) == 4) {
                if (last && p.stream && columns % lanes == 0) {
                    stream_block(t.sums, t.sums_row, rows, columns, c + m * p.c_row + n, p.c_row);
                    continue;
                }
            }
            if (last) put_block(t.sums, t.sums_row, rows, columns, c + m * p.c_row + n, p.c_row, p.accumulate);
        }
    }
}

}  // namespace

template <class T, class C, class B>
void multiply_vectors(const Product<T, C, B> &p, const Block &block) {
    const bool in_place = reads_b_in_place(p, block.m1 - block.m0);
    const int64_t stretch = in_place ? short_units : panel_units * per_unit<T>;
    const int64_t passes = p.k > 0 ? ceil_div(p.k, stretch) : 1;
    const int64_t units = ceil_div(at_most(p.k, stretch), per_unit<T>);
    int64_t wide = pack_bytes / (4 * (units > 0 ? units : 1)) / (max_vectors * lanes) * (max_vectors * lanes);
    if (wide < max_vectors * lanes) wide = max_vectors * lanes;
    if (in_place) wide = block.n1 - block.n0;
    const int64_t strips = ceil_div(block.n1 - block.n0, wide);
    for (int part = 0; part < p.parts; ++part) {
        for (int64_t s = 0; s < strips; ++s) {
            const int64_t n0 = block.n0 + s * wide, n1 = at_most(n0 + wide, block.n1);
            const int64_t sums_row = ceil_div(n1 - n0, lanes) * lanes;
            float *sums = nullptr;
            if (passes > 1) sums = static_cast<float *>(scratch(sum_slot, (block.m1 - block.m0) * sums_row * 4));
            for (int64_t i = 0; i < passes; ++i) {
                const int64_t k0 = i * stretch, ks = at_most(p.k - k0, stretch);
                Pass<T, C, B>{p, block.m0, block.m1, k0, ks, ceil_div(ks, per_unit<T>), i == 0, i == passes - 1, sums,
                           sums_row, p.a + part * p.a_part, p.b + part * p.b_part, p.c + part * p.c_part}
                    .run(n0, n1);
            }
        }
    }
    if (p.stream) stream_fence();
}

template void multiply_vectors(const Product<float, float> &, const Block &);
template void multiply_vectors(const Product<float, float, bf16> &, const Block &);
#if !defined(__AMX_BF16__)  // whose bf16 goes to multiply_tiles
template void multiply_vectors(const Product<bf16, bf16> &, const Block &);
template void multiply_vectors(const Product<bf16, float> &, const Block &);
#endif

}  // namespace moesaic::MOESAIC_ISA
