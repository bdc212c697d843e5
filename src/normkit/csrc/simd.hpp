// Vectors of floats of the instruction set that this file is compiled for, and the few operations the kernels need.
//
// Everything lies in an anonymous namespace: the same source is compiled once per instruction set, and a linker that
// merged two copies of an inline function could put one for AVX-512 where only the baseline may run.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef std::int32_t vi __attribute__((vector_size(4 * W)));
typedef std::uint32_t vu __attribute__((vector_size(4 * W)));

struct bf16 {
    std::uint16_t bits;
};

__attribute__((always_inline)) inline vf splat(float a) { return a - vf{}; }

// True (all bits) in the first n lanes.
__attribute__((always_inline)) inline vi first(int n) {
    vi lanes;
    for (int k = 0; k < W; ++k) lanes[k] = k < n ? -1 : 0;
    return lanes;
}

__attribute__((always_inline)) inline vf keep(vf v, vi lanes) { return (vf)((vi)v & lanes); }

// The sum of the lanes, in double: it ends a block, whose lanes have summed in float.
__attribute__((always_inline)) inline double sum(vf v) {
    double total = 0;
    for (int k = 0; k < W; ++k) total += v[k];
    return total;
}

// --- float -----------------------------------------------------------------------------------------------------------

__attribute__((always_inline)) inline vf load(const float* p) {
    vf v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

__attribute__((always_inline)) inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

// The first n of W values (0 < n < W), zeros behind them; nothing beyond them is read.
__attribute__((always_inline)) inline vf load(const float* p, int n) {
#if defined(__AVX512F__)
    return (vf)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#elif defined(__AVX2__)
    return (vf)_mm256_maskload_ps(p, (__m256i)first(n));
#else
    vf v{};
    for (int k = 0; k < n; ++k) v[k] = p[k];
    return v;
#endif
}

__attribute__((always_inline)) inline void store(float* p, vf v, int n) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
#elif defined(__AVX2__)
    _mm256_maskstore_ps(p, (__m256i)first(n), (__m256)v);
#else
    for (int k = 0; k < n; ++k) p[k] = v[k];
#endif
}

// Past the caches: for outputs that are larger than these, and are not read soon. p is aligned to the vector.
__attribute__((always_inline)) inline void stream(float* p, vf v) {
#if defined(__AVX512F__)
    _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
    _mm256_stream_ps(p, (__m256)v);
#else
    store(p, v);
#endif
}

// --- bfloat16: the upper half of a float -----------------------------------------------------------------------------

__attribute__((always_inline)) inline vf load(const bf16* p) {
#if defined(__AVX512F__)
    const __m256i half = _mm256_loadu_si256((const __m256i*)p);
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
#elif defined(__AVX2__)
    const __m128i half = _mm_loadu_si128((const __m128i*)p);
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
#else
    vu v;
    for (int k = 0; k < W; ++k) v[k] = (std::uint32_t)p[k].bits << 16;
    return (vf)v;
#endif
}

__attribute__((always_inline)) inline vf load(const bf16* p, int n) {
#if defined(__AVX512F__)
    const __m256i half = _mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p);
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
#else
    bf16 whole[W] = {};
    std::memcpy(whole, p, n * sizeof(bf16));
    return load(whole);
#endif
}

// Round to nearest, ties to even; NaN stays NaN. (The instruction vcvtneps2bf16 would flush subnormal numbers.)
__attribute__((always_inline)) inline vu rounded(vf v) {
    const vu bits = (vu)v;
    const vu upper = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return v == v ? upper : vu{} + 0x7fc0u;
}

#if defined(__AVX512F__)
__attribute__((always_inline)) inline __m256i halves(vf v) { return _mm512_cvtepi32_epi16((__m512i)rounded(v)); }
__attribute__((always_inline)) inline void store(bf16* p, vf v) { _mm256_storeu_si256((__m256i*)p, halves(v)); }
__attribute__((always_inline)) inline void stream(bf16* p, vf v) { _mm256_stream_si256((__m256i*)p, halves(v)); }
#elif defined(__AVX2__)
__attribute__((always_inline)) inline __m128i halves(vf v) {
    const __m256i wide = (__m256i)rounded(v), packed = _mm256_packus_epi32(wide, wide);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}
__attribute__((always_inline)) inline void store(bf16* p, vf v) { _mm_storeu_si128((__m128i*)p, halves(v)); }
__attribute__((always_inline)) inline void stream(bf16* p, vf v) { _mm_stream_si128((__m128i*)p, halves(v)); }
#else
__attribute__((always_inline)) inline void store(bf16* p, vf v) {
    const vu upper = rounded(v);
    for (int k = 0; k < W; ++k) p[k].bits = (std::uint16_t)upper[k];
}
__attribute__((always_inline)) inline void stream(bf16* p, vf v) { store(p, v); }
#endif

__attribute__((always_inline)) inline void store(bf16* p, vf v, int n) {
#if defined(__AVX512F__)
    _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), halves(v));
#else
    bf16 whole[W];
    store(whole, v);
    std::memcpy(p, whole, n * sizeof(bf16));
#endif
}

// --- functions -------------------------------------------------------------------------------------------------------

__attribute__((always_inline)) inline vf least(vf a, vf b) { return a < b ? a : b; }

// e^x to 2 units in the last place: x = n ln 2 + r with |r| <= ln(2)/2, a polynomial of degree 6 for e^r, and n added to
// the exponent. Below the range 0 and above it infinity, not the last number of the range: z * sigmoid(z) has to vanish
// for z = -3e38, and is NaN for -infinity, as in PyTorch.
__attribute__((always_inline)) inline vf exponential(vf x) {
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    const vf shifted = x * 1.44269504088896341f + magic;
    const vf n = shifted - magic;
    const vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const vu exponent = ((vu)shifted - 0x4b400000u) << 23;  // unsigned: beyond the range it overflows
    vf y = (vf)((vu)p + exponent);
    y = x < -87.0f ? vf{} : y;
    y = x > 88.72f ? splat(__builtin_inff()) : y;
    return x == x ? y : x;  // the sum of exponents may have made a number of NaN
}

__attribute__((always_inline)) inline vf sigmoid(vf x) { return 1.0f / (1.0f + exponential(-x)); }

// The odd polynomial near 0, where 1 - 2 / (1 + exp(2x)) would lose digits (both as in Cephes, Moshier 1989).
__attribute__((always_inline)) inline vf hyperbolic_tangent(vf x) {
    const vf size = x < 0.0f ? -x : x, z = x * x;
    vf p = splat(-5.70498872745e-3f);
    p = p * z + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    const vf near = p * z * x + x, far = 1.0f - 2.0f / (1.0f + exponential(2.0f * size));
    return size < 0.625f ? near : x < 0.0f ? -far : far;
}

// erf to 1.5e-7 (Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26).
__attribute__((always_inline)) inline vf error_function(vf x) {
    const vf size = x < 0.0f ? -x : x;
    const vf t = 1.0f / (1.0f + 0.3275911f * size);
    vf p = splat(1.061405429f);
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const vf y = 1.0f - p * t * exponential(-size * size);
    return x < 0.0f ? -y : y;
}

}  // namespace
