// Vectors of the decoding kernels: 16 numbers with AVX-512 and its products of integers (VNNI), else
// 8, which the compiler makes of whatever the processor has.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__F16C__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define MINILLM_WIDE
#endif

typedef float v8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t i8 __attribute__((vector_size(32), aligned(4), may_alias));
#ifdef MINILLM_WIDE
typedef float vf __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(64), aligned(4), may_alias));
#else
typedef v8 vf;
typedef i8 vi;
#endif
constexpr int64_t LANES = sizeof(vf) / 4;

static v8 halves(const void* p) {
#ifdef __F16C__
  return (v8)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  typedef _Float16 h8 __attribute__((vector_size(16), aligned(2), may_alias));
  return __builtin_convertvector(*(const h8*)p, v8);
#endif
}

static vf wide_halves(const void* p) {
#ifdef MINILLM_WIDE
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#else
  return halves(p);
#endif
}

static v8 load(const float* p) { return *(const v8*)p; }
static v8 load(const uint16_t* p) { return halves(p); }

static void store(const float* from, float* to, int64_t K) { std::memcpy(to, from, 4 * K); }
static void store(const float* from, uint16_t* to, int64_t K) {
  for (int64_t i = 0; i < K; i += 8) {
#ifdef __F16C__
    _mm_storeu_si128((__m128i*)(to + i), _mm256_cvtps_ph((__m256)load(from + i), 0));
#else
    typedef _Float16 h8 __attribute__((vector_size(16), aligned(2), may_alias));
    *(h8*)(to + i) = __builtin_convertvector(load(from + i), h8);
#endif
  }
}

// sum + the two products of 16-bit numbers in each lane
static vi dot(vi sum, vi w, vi x) {
#if defined(MINILLM_WIDE)
  return (vi)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
#elif defined(__AVX2__)
  return sum + (vi)_mm256_madd_epi16((__m256i)w, (__m256i)x);
#else
  return sum + (w << 16 >> 16) * (x << 16 >> 16) + (w >> 16) * (x >> 16);
#endif
}

// two bytes for each lane, as 16-bit numbers
static vi pairs(const uint8_t* p) {
#if defined(MINILLM_WIDE)
  return (vi)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  return (vi)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
#else
  typedef int8_t narrow __attribute__((vector_size(2 * LANES), aligned(1), may_alias));
  typedef int16_t wide __attribute__((vector_size(4 * LANES)));
  return (vi)__builtin_convertvector(*(const narrow*)p, wide);
#endif
}

// the nearest whole numbers
#ifdef __AVX2__
static i8 whole(v8 x) { return (i8)_mm256_cvtps_epi32((__m256)x); }
#else
__attribute__((noinline)) static i8 whole(v8 x) {  // inlined, the product before would lose a rounding
  return (i8)(x + 12582912.0f) - 0x4B400000;
}
#endif

// e^x to the last bits but one: e^x = 2^n e^r, and Taylor's series for r (at most 0.35)
static v8 exp(v8 x) {
  x = x < -87 ? v8{} - 87 : x > 88 ? v8{} + 88 : x;
  const v8 n = x * 1.44269504f + 12582912.0f - 12582912.0f;  // rounds to a whole number
  const v8 r = x - n * 0.693359375f + n * 2.12194440e-4f;
  v8 sum = r * (1 / 5040.0f) + 1 / 720.0f;
  for (float c : {1 / 120.0f, 1 / 24.0f, 1 / 6.0f, 0.5f, 1.0f, 1.0f}) sum = sum * r + c;
  return sum * (v8)((__builtin_convertvector(n, i8) + 127) << 23);
}

static float total(v8 x) {
  x += __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3);
  x += __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5);
  return x[0] + x[1];
}

static float largest(v8 x) {
  float most = x[0];
  for (int i = 1; i < 8; i++) most = most < x[i] ? x[i] : most;
  return most;
}
