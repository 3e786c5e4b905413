// One vector of floats per instruction set, and its twin of plain loops. Include only from files that are compiled once
// per instruction set: everything here lives in namespace moesaic::MOESAIC_ISA, so that the linker cannot merge a
// function built for AVX-512 with the portable one. For the same reason these files use no templates of the standard
// library.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__ARM_NEON) && defined(__aarch64__) && !defined(MOESAIC_PORTABLE)
#include <arm_neon.h>
#endif

namespace moesaic::MOESAIC_ISA {

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline float to_float(int8_t x) { return x; }

inline void put(float *p, float x) { *p = x; }
inline void put(bf16 *p, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) bits = 0x7fc00000u;  // rounding up could turn a NaN into an infinity
    else bits += 0x7fffu + ((bits >> 16) & 1u);  // to nearest, ties to even
    p->bits = static_cast<uint16_t>(bits >> 16);
}

#if defined(__AVX512F__)

struct Vec {
    static constexpr int64_t lanes = 16;
    static constexpr int registers = 32;
    __m512 v;
};
inline Vec set(float x) { return {_mm512_set1_ps(x)}; }
inline Vec load(const float *p) { return {_mm512_loadu_ps(p)}; }
inline __m512 widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
inline Vec load(const bf16 *p) { return {widen(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)))}; }
inline Vec load(const int8_t *p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))))};
}
inline __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }
inline Vec load(const float *p, int64_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
inline Vec load(const bf16 *p, int64_t n) { return {widen(_mm256_maskz_loadu_epi16(first(n), p))}; }
inline __m256i narrow_exactly(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    up = _mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
}
#if defined(__AVX512BF16__)
inline __m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }  // denormal numbers become zero
#else
inline __m256i narrow(__m512 x) { return narrow_exactly(x); }
#endif
inline void store(float *p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void store(bf16 *p, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), narrow(a.v)); }
inline void store(float *p, Vec a, int64_t n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
inline void store(bf16 *p, Vec a, int64_t n) { _mm256_mask_storeu_epi16(p, first(n), narrow(a.v)); }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// A NaN in x survives: these instructions return their second operand when either is one.
inline Vec clamp(Vec x, float low, float high) {
    return {_mm512_min_ps(set(high).v, _mm512_max_ps(set(low).v, x.v))};
}
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec sqrt(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
inline Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Vec power_of_two(Vec n) {
    const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23))};
}
inline float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float highest(Vec a) { return _mm512_reduce_max_ps(a.v); }  // of numbers: a NaN may be lost

#elif defined(__AVX2__)

struct Vec {
    static constexpr int64_t lanes = 8;
    static constexpr int registers = 16;
    __m256 v;
};
inline Vec set(float x) { return {_mm256_set1_ps(x)}; }
inline Vec load(const float *p) { return {_mm256_loadu_ps(p)}; }
inline Vec load(const bf16 *p) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16))};
}
inline Vec load(const int8_t *p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p))))};
}
inline void store(float *p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline void store(bf16 *p, Vec a) {
    const __m256i bits = _mm256_castps_si256(a.v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
    up = _mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc00000), nan);
    up = _mm256_srli_epi32(up, 16);
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p),
                     _mm_packus_epi32(_mm256_castsi256_si128(up), _mm256_extracti128_si256(up, 1)));
}
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
// A NaN in x survives: these instructions return their second operand when either is one.
inline Vec clamp(Vec x, float low, float high) {
    return {_mm256_min_ps(set(high).v, _mm256_max_ps(set(low).v, x.v))};
}
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec sqrt(Vec a) { return {_mm256_sqrt_ps(a.v)}; }
inline Vec round(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Vec power_of_two(Vec n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23))};
}
inline float sum(Vec a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
inline float highest(Vec a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

#elif defined(__ARM_NEON) && defined(__aarch64__) && !defined(MOESAIC_PORTABLE)

struct Vec {
    static constexpr int64_t lanes = 4;
    static constexpr int registers = 32;
    float32x4_t v;
};
inline Vec set(float x) { return {vdupq_n_f32(x)}; }
inline Vec load(const float *p) { return {vld1q_f32(p)}; }
inline Vec load(const bf16 *p) {
    return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t *>(p)), 16))};
}
inline Vec load(const int8_t *p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    const int8x8_t bytes = vreinterpret_s8_s32(vdup_n_s32(four));
    return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(bytes))))};
}
inline void store(float *p, Vec a) { vst1q_f32(p, a.v); }
inline void store(bf16 *p, Vec a) {
    float x[4];
    vst1q_f32(x, a.v);
    for (int i = 0; i < 4; ++i) put(p + i, x[i]);
}
inline Vec operator+(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
inline Vec clamp(Vec x, float low, float high) { return {vminq_f32(vmaxq_f32(x.v, set(low).v), set(high).v)}; }
inline Vec max(Vec a, Vec b) { return {vmaxq_f32(a.v, b.v)}; }
inline Vec sqrt(Vec a) { return {vsqrtq_f32(a.v)}; }
inline Vec round(Vec a) { return {vrndnq_f32(a.v)}; }
inline Vec power_of_two(Vec n) {
    return {vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n.v), vdupq_n_s32(127)), 23))};
}
inline float sum(Vec a) { return vaddvq_f32(a.v); }
inline float highest(Vec a) { return vmaxvq_f32(a.v); }

#else

// Plain loops over as many floats as two SSE registers hold; the compiler makes of them what the target offers.
struct Vec {
    static constexpr int64_t lanes = 8;
    static constexpr int registers = 16;
    float v[lanes];
};
template <class F>
inline Vec each(F f) {
    Vec r;
    for (int64_t i = 0; i < Vec::lanes; ++i) r.v[i] = f(i);
    return r;
}
inline Vec set(float x) { return each([=](int64_t) { return x; }); }
template <class T>
inline Vec load(const T *p) { return each([=](int64_t i) { return to_float(p[i]); }); }
template <class T>
inline void store(T *p, const Vec &a) {
    for (int64_t i = 0; i < Vec::lanes; ++i) put(p + i, a.v[i]);
}
inline Vec operator+(const Vec &a, const Vec &b) { return each([&](int64_t i) { return a.v[i] + b.v[i]; }); }
inline Vec operator-(const Vec &a, const Vec &b) { return each([&](int64_t i) { return a.v[i] - b.v[i]; }); }
inline Vec operator*(const Vec &a, const Vec &b) { return each([&](int64_t i) { return a.v[i] * b.v[i]; }); }
inline Vec operator/(const Vec &a, const Vec &b) { return each([&](int64_t i) { return a.v[i] / b.v[i]; }); }
inline Vec fma(const Vec &a, const Vec &b, const Vec &c) {
    return each([&](int64_t i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline Vec clamp(const Vec &x, float low, float high) {
    return each([&](int64_t i) { return x.v[i] < low ? low : x.v[i] > high ? high : x.v[i]; });
}
inline Vec max(const Vec &a, const Vec &b) {
    return each([&](int64_t i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Vec sqrt(const Vec &a) { return each([&](int64_t i) { return __builtin_sqrtf(a.v[i]); }); }
// Adding and taking away 1.5 * 2^23 rounds to the nearest whole number, ties to even, for |x| below 2^22.
inline Vec round(const Vec &a) { return each([&](int64_t i) { return (a.v[i] + 12582912.0f) - 12582912.0f; }); }
inline Vec power_of_two(const Vec &n) {
    return each([&](int64_t i) {
        const int32_t bits = (n.v[i] == n.v[i] ? static_cast<int32_t>(n.v[i]) + 127 : 127) << 23;
        float value;
        std::memcpy(&value, &bits, 4);
        return value;
    });
}
inline float sum(const Vec &a) {
    float total = 0;
    for (int64_t i = 0; i < Vec::lanes; ++i) total += a.v[i];
    return total;
}
inline float highest(const Vec &a) {
    float most = a.v[0];
    for (int64_t i = 1; i < Vec::lanes; ++i) most = a.v[i] > most ? a.v[i] : most;
    return most;
}

#endif

// A store that rounds as torch does, to the bit: denormal numbers stay.
#if defined(__AVX512F__)
inline void store_exactly(bf16 *p, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), narrow_exactly(a.v)); }
inline void store_exactly(bf16 *p, Vec a, int64_t n) { _mm256_mask_storeu_epi16(p, first(n), narrow_exactly(a.v)); }
#else
inline void store_exactly(bf16 *p, const Vec &a) { store(p, a); }
inline void store_exactly(bf16 *p, const Vec &a, int64_t n) {
    float lanes[Vec::lanes];
    store(lanes, a);
    for (int64_t i = 0; i < n; ++i) put(p + i, lanes[i]);
}
#endif

// Stores that go past the caches, for outputs that nobody reads soon: `p` must be aligned to 64 bytes, and a call of
// stream_fence must follow before another thread reads.
#if defined(__AVX512F__)
constexpr bool can_stream = true;
inline void stream(float *p, Vec a) { _mm512_stream_ps(p, a.v); }
inline void stream_fence() { _mm_sfence(); }
#else
constexpr bool can_stream = false;
inline void stream(float *p, Vec a) { store(p, a); }
inline void stream_fence() {}
#endif

#if !defined(__AVX512F__)
// The first n elements, zeros after them; never reads or writes past the n-th.
template <class T>
inline Vec load(const T *p, int64_t n) {
    float buffer[Vec::lanes] = {};
    for (int64_t i = 0; i < n; ++i) buffer[i] = to_float(p[i]);
    return load(buffer);
}
template <class T>
inline void store(T *p, Vec a, int64_t n) {
    float buffer[Vec::lanes];
    store(buffer, a);
    for (int64_t i = 0; i < n; ++i) put(p + i, buffer[i]);
}
#endif

// e^x to about 2 units in the last place, for x clamped to where the result is a normal float.
// Cody-Waite reduction and the polynomial of Cephes' expf.
inline Vec exp(Vec x) {
    x = clamp(x, -87.0f, 88.0f);
    const Vec n = round(x * set(1.44269504088896341f));
    Vec r = fma(n, set(-0.693359375f), x);
    r = fma(n, set(2.12194440e-4f), r);
    Vec p = set(1.9875691500e-4f);
    p = fma(p, r, set(1.3981999507e-3f));
    p = fma(p, r, set(8.3334519073e-3f));
    p = fma(p, r, set(4.1665795894e-2f));
    p = fma(p, r, set(1.6666665459e-1f));
    p = fma(p, r, set(5.0000001201e-1f));
    p = fma(p, r * r, r + set(1.0f));
    return p * power_of_two(n);
}

// f(start, vector loader) over a row: whole vectors first, then the tail. `f(i, n)` handles n <= lanes elements at i.
template <class Whole, class Tail>
inline void along(int64_t size, const Whole &whole, const Tail &tail) {
    int64_t i = 0;
    for (; i + Vec::lanes <= size; i += Vec::lanes) whole(i);
    if (i < size) tail(i, size - i);
}

}  // namespace moesaic::MOESAIC_ISA
