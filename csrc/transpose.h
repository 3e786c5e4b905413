// Square blocks of 32-bit lanes turned on their diagonal, in registers where the instruction set has the shuffles.
#pragma once

#include "simd.h"

namespace moesaic::MOESAIC_ISA {

#if defined(__AVX512F__)

// rows[i] lane j becomes rows[j] lane i.
inline void transpose(__m512i (&r)[16]) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}
inline void transpose(Vec (&v)[16]) {
    __m512i r[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm512_castps_si512(v[i].v);
    transpose(r);
    for (int i = 0; i < 16; ++i) v[i].v = _mm512_castsi512_ps(r[i]);
}

#elif defined(__AVX2__)

inline void transpose(Vec (&v)[8]) {
    __m256 t[8], u[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(v[i].v, v[i + 1].v);
        t[i + 1] = _mm256_unpackhi_ps(v[i].v, v[i + 1].v);
    }
    for (int i = 0; i < 8; i += 4) {
        u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
        v[i].v = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
        v[i + 4].v = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
    }
}

#else

inline void transpose(Vec (&v)[Vec::lanes]) {
    float rows[Vec::lanes][Vec::lanes], columns[Vec::lanes][Vec::lanes];
    for (int i = 0; i < Vec::lanes; ++i) store(rows[i], v[i]);
    for (int i = 0; i < Vec::lanes; ++i)
        for (int j = 0; j < Vec::lanes; ++j) columns[i][j] = rows[j][i];
    for (int i = 0; i < Vec::lanes; ++i) v[i] = load(columns[i]);
}

#endif

}  // namespace moesaic::MOESAIC_ISA
