// Attention in float32 without a mask: softmax(Q K^T * scale) V, keys in blocks, the softmax corrected from block to block.
// Each lane of a vector is a query, so that nothing is summed across lanes.
// Source: Dao et al., "FlashAttention", arXiv:2205.14135, algorithm 1, for the blocks.
#pragma once

#include <cmath>

#include "params.h"
#include "simd.h"

#if defined(__AVX512F__)
constexpr int QUERY_VECTORS = 4;
#else
constexpr int QUERY_VECTORS = 1;
#endif
constexpr int QUERIES = QUERY_VECTORS * LANES;  // of a piece of work
constexpr int KEYS = 32;                        // of a block
constexpr int TILE = 6;                         // keys, or channels, whose sums are in registers

struct AttentionBuffers {
  float *queries, *keys, *values, *scores, *sums;  // [D][QUERIES], [KEYS][D], [KEYS][D], [KEYS][QUERIES], [D][QUERIES]
  explicit AttentionBuffers(int D) {
    queries = (float*)scratch((2 * (D * QUERIES + KEYS * D) + KEYS * QUERIES) * sizeof(float));
    keys = queries + D * QUERIES, values = keys + KEYS * D;
    scores = values + KEYS * D, sums = scores + KEYS * QUERIES;
  }
};

// Products in float32; those of bfloat16 pairs are in attention_bf16.h.
struct FloatProducts {
  using Element = float;
  using Row = Floats;  // LANES elements
  static Row factor(const Element* at) { return all(*at); }
  static Floats add(Floats sums, Row row, Row factor) { return fused(row, factor, sums); }
};

// to[i][:] += sum over k of a[k][:] * b[i * step + k * stride] for `ROWS` i, where a and to are rows of QUERIES; starts at 0 where `fresh`.
template <typename Products, int ROWS, typename Element = typename Products::Element>
inline __attribute__((always_inline)) void add_tile(const Element* a, const Element* b, int64_t step, int stride, int count, float* to, bool fresh) {
  using Row = typename Products::Row;
  Floats sums[ROWS][QUERY_VECTORS];
  for (int i = 0; i < ROWS; i++)
    for (int v = 0; v < QUERY_VECTORS; v++) sums[i][v] = fresh ? Floats{} : load<Floats>(to + i * QUERIES + v * LANES);
  for (int k = 0; k < count; k++) {
    Row row[QUERY_VECTORS];
    for (int v = 0; v < QUERY_VECTORS; v++) row[v] = load<Row>(a + k * QUERIES + v * LANES);
    for (int i = 0; i < ROWS; i++) {
      const Row factor = Products::factor(b + i * step + k * stride);
      for (int v = 0; v < QUERY_VECTORS; v++) sums[i][v] = Products::add(sums[i][v], row[v], factor);
    }
  }
  for (int i = 0; i < ROWS; i++)
    for (int v = 0; v < QUERY_VECTORS; v++) store(to + i * QUERIES + v * LANES, sums[i][v]);
}

template <typename Products, typename Element = typename Products::Element>
inline void add_products(const Element* a, const Element* b, int rows, int64_t step, int stride, int count, float* to, bool fresh) {
  int i = 0;
  for (; i + TILE <= rows; i += TILE) add_tile<Products, TILE>(a, b + i * step, step, stride, count, to + i * QUERIES, fresh);
  if (i + 4 <= rows) add_tile<Products, 4>(a, b + i * step, step, stride, count, to + i * QUERIES, fresh), i += 4;
  if (i + 2 <= rows) add_tile<Products, 2>(a, b + i * step, step, stride, count, to + i * QUERIES, fresh), i += 2;
  if (i < rows) add_tile<Products, 1>(a, b + i * step, step, stride, count, to + i * QUERIES, fresh);
}

template <typename T>
inline void widen_rows(const T* from, int64_t stride, int rows, int D, float* to) {
  for (int i = 0; i < rows; i++)
    for (int d = 0; d < D; d += LANES) {
      const int count = D - d < LANES ? D - d : LANES;
      store(to + i * D + d, values(from + i * stride + d, count), count);
    }
}

// Sums [D][QUERIES] over their totals, to the output.
template <typename T>
inline void write_queries(const AttentionParams& p, int n, int head, int first, int count, const float* sums, const Floats (&total)[QUERY_VECTORS]) {
  float inverse[QUERIES];
  for (int w = 0; w < QUERY_VECTORS; w++) store(inverse + w * LANES, 1.0f / total[w]);
  for (int i = 0; i < count; i++) {
    T* out = (T*)p.out + (((int64_t)n * p.queries + first + i) * p.heads + head) * p.D;
    for (int d = 0; d < p.D; d += LANES) {
      Floats y{};
      for (int e = 0; e < LANES && d + e < p.D; e++) y[e] = sums[(d + e) * QUERIES + i] * inverse[i];
      put(out + d, y, p.D - d < LANES ? p.D - d : LANES);
    }
  }
}

template <typename T>
inline void attend(const AttentionParams& p, int n, int head, int first, AttentionBuffers& at) {
  const int D = p.D, count = p.queries - first < QUERIES ? p.queries - first : QUERIES;
  const T* q = (const T*)p.query + n * p.query_stride[0] + head * p.query_stride[1];
  const T* k = (const T*)p.key + n * p.key_stride[0] + head * p.key_stride[1];
  const T* v = (const T*)p.value + n * p.value_stride[0] + head * p.value_stride[1];
  for (int i = 0; i < QUERIES; i++) {  // transposed; queries behind the last are copies of it
    widen_rows(q + (first + (i < count ? i : count - 1)) * p.query_stride[2], 0, 1, D, at.keys);
    for (int d = 0; d < D; d++) at.queries[d * QUERIES + i] = at.keys[d] * p.scale;
  }
  Floats most[QUERY_VECTORS], total[QUERY_VECTORS];
  for (int w = 0; w < QUERY_VECTORS; w++) most[w] = all(-INFINITY), total[w] = Floats{};
  for (int start = 0; start < p.keys; start += KEYS) {
    const int keys = p.keys - start < KEYS ? p.keys - start : KEYS;
    widen_rows(k + start * p.key_stride[2], p.key_stride[2], keys, D, at.keys);
    widen_rows(v + start * p.value_stride[2], p.value_stride[2], keys, D, at.values);
    add_products<FloatProducts>(at.queries, at.keys, keys, D, 1, D, at.scores, true);
    for (int w = 0; w < QUERY_VECTORS; w++) {
      float* scores = at.scores + w * LANES;
      Floats larger_one = most[w], unordered{};
      for (int j = 0; j < keys; j++) {
        const Floats score = load<Floats>(scores + j * QUERIES);
        larger_one = larger(score, larger_one), unordered = fused(score, all(0.0f), unordered);
      }
      const Floats correction = exponential(most[w] - larger_one);
      Floats sum = total[w] * correction + unordered;  // NaN where a score is none, or infinite: as in torch
      for (int j = 0; j < keys; j++) {
        const Floats e = exponential(load<Floats>(scores + j * QUERIES) - larger_one);
        store(scores + j * QUERIES, e), sum = sum + e;
      }
      if (start)
        for (int d = 0; d < D; d++) store(at.sums + d * QUERIES + w * LANES, load<Floats>(at.sums + d * QUERIES + w * LANES) * correction);
      most[w] = larger_one, total[w] = sum;
    }
    add_products<FloatProducts>(at.scores, at.values, D, 1, D, keys, at.sums, start == 0);
  }
  write_queries<T>(p, n, head, first, count, at.sums, total);
}

// The pieces of work of one thread: body(sample, head, first query).
template <typename Body>
inline void each_head(const AttentionParams& p, int thread, int threads, Body body) {
  const int blocks = (p.queries + QUERIES - 1) / QUERIES;
  const int64_t items = (int64_t)p.N * p.heads * blocks;
  for (int64_t item = items * thread / threads; item < items * (thread + 1) / threads; item++) {
    const int pair = (int)(item / blocks);
    body(pair / p.heads, pair % p.heads, (int)(item % blocks) * QUERIES);
  }
}

template <typename T>
inline void attention(const AttentionParams& p, int thread, int threads) {
  AttentionBuffers buffers(p.D);
  each_head(p, thread, threads, [&](int n, int head, int first) { attend<T>(p, n, head, first, buffers); });
}
