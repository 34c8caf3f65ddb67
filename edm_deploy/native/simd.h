// Vectors of 16 lanes for any CPU that GCC or Clang compiles for; only the sum of four products has its own instructions.
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

constexpr int LANES = 16;

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef int8_t Bytes __attribute__((vector_size(16)));
typedef int8_t Fours __attribute__((vector_size(64)));  // four bytes for each lane

struct Bf16 { uint16_t bits; };
struct F16 { uint16_t bits; };

template <typename To, typename From>
inline To as(From value) {
  static_assert(sizeof(To) == sizeof(From), "as() keeps the bits");
  To result;
  memcpy(&result, &value, sizeof(To));
  return result;
}

template <typename Vector>
inline Vector load(const void* from) {
  Vector result;
  memcpy(&result, from, sizeof(Vector));
  return result;
}

inline uint32_t load_word(const void* from) {
  uint32_t result;
  memcpy(&result, from, 4);
  return result;
}

// The first `count` lanes; the others are 0, or stay as they were in memory.
#if defined(__AVX512BW__) && defined(__AVX512VL__)
template <typename Vector>
inline Vector load(const void* from, int count) {
  const uint32_t mask = (1u << count) - 1;
  if constexpr (sizeof(Vector) == 64) return as<Vector>(_mm512_maskz_loadu_epi32((__mmask16)mask, from));
  else if constexpr (sizeof(Vector) == 32) return as<Vector>(_mm256_maskz_loadu_epi16((__mmask16)mask, from));
  else return as<Vector>(_mm_maskz_loadu_epi8((__mmask16)mask, from));
}

template <typename Vector>
inline void store(void* to, Vector value, int count) {
  const uint32_t mask = (1u << count) - 1;
  if constexpr (sizeof(Vector) == 64) _mm512_mask_storeu_epi32(to, (__mmask16)mask, as<__m512i>(value));
  else if constexpr (sizeof(Vector) == 32) _mm256_mask_storeu_epi16(to, (__mmask16)mask, as<__m256i>(value));
  else _mm_mask_storeu_epi8(to, (__mmask16)mask, as<__m128i>(value));
}
#else
template <typename Vector>
inline Vector load(const void* from, int count) {
  Vector result{};
  memcpy(&result, from, count * (sizeof(Vector) / LANES));
  return result;
}

template <typename Vector>
inline void store(void* to, Vector value, int count) {
  memcpy(to, &value, count * (sizeof(Vector) / LANES));
}
#endif

template <typename Vector>
inline void store(void* to, Vector value) {
  memcpy(to, &value, sizeof(Vector));
}

inline Floats all(float value) { return value - Floats{}; }
inline float total(Floats value) {
  float sum = 0;
  for (int i = 0; i < LANES; i++) sum += value[i];
  return sum;
}

inline Floats floats(Ints value) { return __builtin_convertvector(value, Floats); }
inline Floats choose(Ints mask, Floats yes, Floats no) { return mask ? yes : no; }
// The second operand where the first is NaN.
#if defined(__AVX512F__)
inline Floats larger(Floats a, Floats b) { return (Floats)_mm512_max_ps((__m512)a, (__m512)b); }
inline Floats smaller(Floats a, Floats b) { return (Floats)_mm512_min_ps((__m512)a, (__m512)b); }
#else
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }
inline Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
#endif

// One rounding, whatever the compiler does with a * b + c.
inline Floats fused(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
  Floats result;
  for (int i = 0; i < LANES; i++) result[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return result;
#endif
}

// Of 16 bits with zeros, and back without the upper ones.
#if defined(__AVX512F__)
inline Words extended(Halves bits) { return (Words)_mm512_cvtepu16_epi32((__m256i)bits); }
inline Halves truncated(Words bits) { return (Halves)_mm512_cvtepi32_epi16((__m512i)bits); }
#else
inline Words extended(Halves bits) { return __builtin_convertvector(bits, Words); }
inline Halves truncated(Words bits) { return __builtin_convertvector(bits, Halves); }
#endif

inline Floats widen(Halves bits, Bf16) { return as<Floats>(extended(bits) << 16); }

// Half to even; NaN stays one. The instruction flushes numbers below 2^-126 to zero.
#if defined(__AVX512BF16__)
inline Halves narrow(Floats value, Bf16) { return (Halves)_mm512_cvtneps_pbh((__m512)value); }
#else
inline Halves narrow(Floats value, Bf16) {
  const Words bits = as<Words>(value);
  const Words rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const Words number = as<Words>(value == value);
  return truncated((rounded & number) | (~number & 0x7fc0));
}
#endif

#if defined(__AVX512F__)
inline Floats widen(Halves bits, F16) { return (Floats)_mm512_cvtph_ps((__m256i)bits); }
inline Halves narrow(Floats value, F16) { return (Halves)_mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
#else
// Without instructions, and without the compiler's own type, which GCC 11 does not have.
inline float widened_half(uint16_t half) {
  const uint32_t magnitude = (uint32_t)(half & 0x7fff) << 13;
  const float value = as<float>(magnitude) * 0x1p112f;  // exact, subnormal numbers too
  const uint32_t bits = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : as<uint32_t>(value);
  return as<float>(bits | (uint32_t)(half & 0x8000) << 16);
}

inline uint16_t narrowed_half(float value) {
  const uint32_t bits = as<uint32_t>(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude >= 0x47800000u) return (uint16_t)(sign | (magnitude > 0x7f800000u ? 0x7e00 : 0x7c00));
  if (magnitude < 0x38800000u)  // subnormal: the addition rounds to half's smallest step
    return (uint16_t)(sign | (as<uint32_t>(as<float>(magnitude) + 0.5f) - 0x3f000000u));
  return (uint16_t)(sign | (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000u) >> 13);
}

inline Floats widen(Halves bits, F16) {
  Floats result;
  for (int i = 0; i < LANES; i++) result[i] = widened_half(bits[i]);
  return result;
}

inline Halves narrow(Floats value, F16) {
  Halves result;
  for (int i = 0; i < LANES; i++) result[i] = narrowed_half(value[i]);
  return result;
}
#endif

template <typename T>
inline Floats values(const T* from, int count = LANES) {
  return widen(count == LANES ? load<Halves>(from) : load<Halves>(from, count), T{});
}

template <typename T>
inline void put(T* to, Floats value, int count = LANES) { store(to, narrow(value, T{}), count); }

inline Floats values(const float* from, int count = LANES) { return count == LANES ? load<Floats>(from) : load<Floats>(from, count); }
inline void put(float* to, Floats value, int count = LANES) { count == LANES ? store(to, value) : store(to, value, count); }

constexpr float LOG2_E = 1.44269504f;
constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: where it is added, the sum is rounded to an integer, half to even

inline Floats nearest(Floats value) { return (value + MAGIC) - MAGIC; }

// Memory of this thread for one kernel's call, at a multiple of 64 bytes, with any content.
inline char* scratch(size_t bytes) {
  static thread_local std::unique_ptr<char[]> memory;
  static thread_local size_t held = 0;
  if (bytes + 64 > held) memory.reset(new char[held = bytes + 64]);
  return memory.get() + (-(uintptr_t)memory.get() & 63);
}

// e^x for any x, to 2 units in the last place; 0 and infinity beyond the range of float32.
inline Floats exponential(Floats x) {
  x = smaller(larger(x, all(-103.97f)), all(88.73f));
  const Floats n = nearest(x * LOG2_E);
  Floats f = fused(n, all(-0.693145752f), x);
  f = fused(n, all(-1.42860677e-6f), f);
  Floats p = all(1.0f / 5040);
  for (const float coefficient : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = fused(p, f, all(coefficient));
#if defined(__AVX512F__)
  return (Floats)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const Ints whole = __builtin_convertvector(n, Ints), half = whole >> 1;  // two steps: 2^n alone may be subnormal or infinite
  return p * as<Floats>((half + 127) << 23) * as<Floats>((whole - half + 127) << 23);
#endif
}

// x / (1 + e) of e >= 0, to 2 units in the last place.
inline Floats over_one_plus(Floats x, Floats e) {
#if defined(__AVX512F__)
  const Floats divisor = 1.0f + smaller(e, all(1e37f));  // infinity has no reciprocal that Newton's step corrects
  const Floats first = (Floats)_mm512_rcp14_ps((__m512)divisor);
  return x * (first * fused(-divisor, first, all(2.0f)));
#else
  return x / (1.0f + e);
#endif
}

// A value that is read several times: the compiler would otherwise load it each time.
inline Fours in_register(Fours value) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(value));
#endif
  return value;
}

// Sixteen sums, each of four products: of unsigned bytes, the same four for every lane, and of signed bytes. Exact.
inline Ints sum_of_4(Ints sums, uint32_t unsigned4, Fours signed4) {
#if defined(__AVX512VNNI__)
  return (Ints)_mm512_dpbusd_epi32((__m512i)sums, _mm512_set1_epi32((int)unsigned4), (__m512i)signed4);
#elif defined(__AVX2__)
  __m256i halves[2], factors[2];
  memcpy(halves, &sums, sizeof(halves));
  memcpy(factors, &signed4, sizeof(factors));
  const __m256i a = _mm256_set1_epi32((int)unsigned4);
  for (int half = 0; half < 2; half++) {
    const __m256i b = factors[half];
#if defined(__AVXVNNI__)
    halves[half] = _mm256_dpbusd_avx_epi32(halves[half], a, b);
#else  // pmaddubsw saturates; 16-bit factors do not
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(a, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
    halves[half] = _mm256_add_epi32(halves[half], _mm256_add_epi32(even, odd));
#endif
  }
  memcpy(&sums, halves, sizeof(halves));
  return sums;
#else
  for (int i = 0; i < LANES; i++)
    for (int j = 0; j < 4; j++) sums[i] += (int32_t)(unsigned4 >> (8 * j) & 255) * signed4[4 * i + j];
  return sums;
#endif
}
