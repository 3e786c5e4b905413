// One expert's matrix product, and what a micro-kernel file offers to compute blocks of it.
#pragma once

#include "simd.h"

namespace moesaic::MOESAIC_ISA {

// C[m, n] = sum over k of A[m, k] * B[k, n], each operand by its two strides (in elements), one of which is 1.
// Summed in fp32 from k = 0 upwards and rounded once to C's type, or added to what C holds. A B of bf16 beside an A of
// floats is widened, which is exact: the same bits as from a B of the same values in floats.
template <class T, class C, class B = T>
struct Product {
    const T *a;
    int64_t a_row, a_k;
    const B *b;
    int64_t b_k, b_col;
    C *c;
    int64_t c_row, c_col;
    int64_t m, n, k;
    bool accumulate;
    bool stream;  // C is too large to be found in a cache later: written past them where lines are whole
    // With parts = 2 there is a second product, whose operands lie this many elements further on (gate, then up).
    int parts;
    int64_t a_part, b_part, c_part;
};

struct Block {
    int64_t m0, m1, n0, n1;
};

// Computes the block of C (of each part) with one thread. The bits of an element depend on its row of A, its column of
// B and k alone: not on the block, nor on what else is in it.
template <class T, class C, class B>
void multiply_vectors(const Product<T, C, B> &product, const Block &block);

// The same for few rows of A, where a_k = b_k = 1 and c_col = 1: reads B where it lies.
template <class T, class B>
void multiply_strips(const Product<T, T, B> &product, const Block &block);

#if defined(__AMX_BF16__)
// The same on the tile unit. Takes c_row = 1 as well as c_col = 1.
template <class C>
void multiply_tiles(const Product<bf16, C> &product, const Block &block);
#endif

#if defined(__AMX_BF16__)
template <class T>
constexpr bool on_tiles = sizeof(T) == 2;
#else
template <class T>
constexpr bool on_tiles = false;
#endif

// The block by the best that this instruction set has.
template <class T, class C, class B>
inline void multiply(const Product<T, C, B> &product, const Block &block) {
#if defined(__AMX_BF16__)
    if constexpr (on_tiles<T>) multiply_tiles(product, block);
    else multiply_vectors(product, block);
#else
    multiply_vectors(product, block);
#endif
}

inline void prefetch(const void *p) {
#if defined(__GNUC__)
    __builtin_prefetch(p);
#else
    (void)p;
#endif
}

// The cache lines from `p` on, for later.
inline void prefetch_lines(const void *p, int64_t lines) {
    for (int64_t i = 0; i < lines; ++i) prefetch(static_cast<const char *>(p) + 64 * i);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

// Where piece i of `size` begins when cut into `pieces` of sizes as even as they can be.
inline int64_t even_cut(int64_t size, int64_t pieces, int64_t i) {
    return size / pieces * i + at_most(i, size % pieces);
}

}  // namespace moesaic::MOESAIC_ISA
