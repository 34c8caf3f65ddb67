// Statistics of group norms, and norms of tokens in front of a quantizer.
#pragma once

#include <cmath>

#include "group_stats.h"
#include "params.h"
#include "quantize.h"
#include "simd.h"

template <typename T>
inline void group_stats(const StatsParams& p, int thread, int threads) {
  const int chunks = (p.HW + STATS_CHUNK - 1) / STATS_CHUNK;
  const auto sample = [&](int64_t n) { return (const T*)p.x + n * p.HW * p.C; };
  const int64_t items = (int64_t)p.N * chunks;
  for (int64_t item = items * thread / threads; item < items * (thread + 1) / threads; item++) {
    const int first = (int)(item % chunks) * STATS_CHUNK, last = first + STATS_CHUNK < p.HW ? first + STATS_CHUNK : p.HW;
    add_chunk(sample(item / chunks), p.C, first, last, p.partial + item * 2 * p.C);
  }
#pragma omp barrier
  const int64_t all_groups = (int64_t)p.N * p.groups;
  for (int64_t i = all_groups * thread / threads; i < all_groups * (thread + 1) / threads; i++) {
    const int64_t n = i / p.groups;
    merge_chunks(sample(n), p.partial + n * chunks * 2 * p.C, p.HW, p.C, p.groups, (int)(i % p.groups), p.eps, p.mean[i], p.rstd[i]);
  }
}

template <typename T>
inline void quantize_row(const RowNormParams& p, const Range& range, int n, int64_t token) {
  const T* x = (const T*)p.x + token * p.C;
  int8_t* codes = p.codes + token * p.Cb;
  const auto count = [&](int c) { return p.C - c < LANES ? p.C - c : LANES; };
  const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  Floats sums{};
  float mean = 0;
  if (!p.rms) {
    for (int c = 0; c < p.C; c += LANES) sums = sums + values(x + c, count(c));
    mean = total(sums) / p.C;
  }
  Floats squares{};
  for (int c = 0; c < p.C; c += LANES) {
    const Floats d = choose(lane < count(c), values(x + c, count(c)) - mean, Floats{});
    squares = squares + d * d;
  }
  const float rstd = 1 / std::sqrt(total(squares) / p.C + p.eps);
  const auto value = [&](int c, int k) __attribute__((always_inline)) {
    Floats y = (values(x + c, k) - mean) * rstd;
    if (p.gamma) y = y * load<Floats>(p.gamma + c, k);
    if (p.beta) y = y + load<Floats>(p.beta + c, k);
    if (p.scale) y = y * (1.0f + values((const T*)p.scale + (int64_t)n * p.scale_stride + c, k));
    if (p.shift) y = y + values((const T*)p.shift + (int64_t)n * p.shift_stride + c, k);
    return y;
  };
  if (p.rotation) store_rotated(codes, p.C, p.rotation, range, value);
  else
    for (int c = 0; c < p.C; c += LANES) store(codes + c, codes_of(value(c, count(c)), range), count(c));
  pad_codes(codes, p.C, p.Cb);
}

template <typename T>
inline void quantize_rows(const RowNormParams& p, int thread, int threads) {
  each_band(p.N, p.HW, thread, threads, [&](int n, int first, int last) {
    const Range range = range_of(p, n);
    for (int i = first; i < last; i++) quantize_row<T>(p, range, n, (int64_t)n * p.HW + i);
  });
}
