// Attention by bfloat16 products with float32 sums, two at a time, where the CPU has the instruction. Weights of the softmax are rounded to bfloat16.
#pragma once

#include "attention.h"

#if defined(__AVX512BF16__)

constexpr int BF16_KEYS = 64;  // of a block; even

struct Bf16Buffers {
  uint32_t *queries, *weights, *values;  // pairs of bfloat16: [D / 2][QUERIES], [BF16_KEYS / 2][QUERIES], [BF16_KEYS / 2][D]
  float *scores, *sums;                  // [BF16_KEYS][QUERIES], [D][QUERIES]
  explicit Bf16Buffers(int D) {
    scores = (float*)scratch(((D / 2 + BF16_KEYS / 2 + BF16_KEYS + D) * QUERIES + BF16_KEYS / 2 * D) * sizeof(float));
    sums = scores + BF16_KEYS * QUERIES;
    queries = (uint32_t*)(sums + D * QUERIES), weights = queries + D / 2 * QUERIES, values = weights + BF16_KEYS / 2 * QUERIES;
  }
};

// Of pairs: each lane of a row and each factor holds two numbers.
struct PairProducts {
  using Element = uint32_t;
  using Row = __m512bh;
  static Row factor(const Element* at) { return (Row)_mm512_set1_epi32((int)load_word(at)); }
  static Floats add(Floats sums, Row row, Row factor) { return (Floats)_mm512_dpbf16_ps((__m512)sums, row, factor); }
};

// 2^x of x <= 0, to 2^-14: more than bfloat16 keeps.
inline Floats power_of_2(Floats x) {
  x = larger(x, all(-126.0f));
  const Floats n = nearest(x), f = x - n;
  Floats p = all(0.0096181291f);  // the series of 2^f, powers of ln 2 over factorials
  for (const float coefficient : {0.0555041087f, 0.2402265070f, 0.6931471806f, 1.0f}) p = fused(p, f, all(coefficient));
  return (Floats)_mm512_scalef_ps((__m512)p, (__m512)n);
}

// Two rows of bfloat16 as pairs.
inline void pair_rows(const Bf16* first, const Bf16* second, int D, uint32_t* to) {
  for (int d = 0; d < D; d += LANES) {
    const int count = D - d < LANES ? D - d : LANES;
    const Words low = extended(load<Halves>(first + d, count)), high = second ? extended(load<Halves>(second + d, count)) : Words{};
    store(to + d, low | high << 16, count);
  }
}

inline void attend_bf16(const AttentionParams& p, int n, int head, int first, Bf16Buffers& at) {
  const int D = p.D, count = p.queries - first < QUERIES ? p.queries - first : QUERIES;
  const Bf16* q = (const Bf16*)p.query + n * p.query_stride[0] + head * p.query_stride[1];
  const Bf16* k = (const Bf16*)p.key + n * p.key_stride[0] + head * p.key_stride[1];
  const Bf16* v = (const Bf16*)p.value + n * p.value_stride[0] + head * p.value_stride[1];
  const float scale = p.scale * LOG2_E;  // scores are taken as powers of 2
  for (int i = 0; i < QUERIES; i++) {  // queries behind the last are copies of it
    const Bf16* row = q + (first + (i < count ? i : count - 1)) * p.query_stride[2];
    for (int d = 0; d < D / 2; d++) at.queries[d * QUERIES + i] = load_word(row + 2 * d);
  }
  Floats most[QUERY_VECTORS], total[QUERY_VECTORS];
  for (int w = 0; w < QUERY_VECTORS; w++) most[w] = all(-INFINITY), total[w] = Floats{};
  for (int start = 0; start < p.keys; start += BF16_KEYS) {
    const int keys = p.keys - start < BF16_KEYS ? p.keys - start : BF16_KEYS, pairs = (keys + 1) / 2;
    add_products<PairProducts>(at.queries, (const uint32_t*)(k + start * p.key_stride[2]), keys, p.key_stride[2] / 2, 1, D / 2, at.scores, true);
    for (int j = 0; j < pairs; j++) {
      const Bf16* row = v + (start + 2 * j) * p.value_stride[2];
      pair_rows(row, 2 * j + 1 < keys ? row + p.value_stride[2] : nullptr, D, at.values + j * D);
    }
    if (keys % 2)
      for (int w = 0; w < QUERY_VECTORS; w++) store(at.scores + keys * QUERIES + w * LANES, all(-INFINITY));
    for (int w = 0; w < QUERY_VECTORS; w++) {
      const float* scores = at.scores + w * LANES;
      Floats largest = all(-INFINITY), unordered{};
      for (int j = 0; j < keys; j++) {
        const Floats score = load<Floats>(scores + j * QUERIES);
        largest = larger(score, largest), unordered = fused(score, all(0.0f), unordered);
      }
      largest = larger(largest * scale, most[w]);
      const Floats correction = power_of_2(most[w] - largest);
      Floats sum = total[w] * correction + unordered;  // NaN where a score is none, or infinite: as in torch
      for (int j = 0; j < pairs; j++) {
        const Floats low = power_of_2(fused(load<Floats>(scores + 2 * j * QUERIES), all(scale), -largest));
        const Floats high = power_of_2(fused(load<Floats>(scores + (2 * j + 1) * QUERIES), all(scale), -largest));
        sum = sum + low + high;
        store(at.weights + j * QUERIES + w * LANES, extended(narrow(low, Bf16{})) | extended(narrow(high, Bf16{})) << 16);
      }
      if (start && _mm512_cmp_ps_mask((__m512)correction, (__m512)all(1.0f), _CMP_NEQ_UQ))
        for (int d = 0; d < D; d++) store(at.sums + d * QUERIES + w * LANES, load<Floats>(at.sums + d * QUERIES + w * LANES) * correction);
      most[w] = largest, total[w] = sum;
    }
    add_products<PairProducts>(at.weights, at.values, D, 1, D, pairs, at.sums, start == 0);
  }
  write_queries<Bf16>(p, n, head, first, count, at.sums, total);
}

inline void attention_bf16(const AttentionParams& p, int thread, int threads) {
  Bf16Buffers buffers(p.D);
  each_head(p, thread, threads, [&](int n, int head, int first) { attend_bf16(p, n, head, first, buffers); });
}

// Pairs are read in place: every row of keys and queries must begin at an even channel.
inline bool has_pairs(const AttentionParams& p) {
  bool even = p.D % 2 == 0 && p.scale >= 0;
  for (int i = 0; i < 3; i++) even = even && p.key_stride[i] % 2 == 0 && p.query_stride[i] % 2 == 0;
  return even;
}

#endif
