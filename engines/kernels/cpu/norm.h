// Statistics of group norms, and norms of tokens in front of a quantizer.
#pragma once

#include <cmath>

#include "params.h"
#include "quantize.h"
#include "simd.h"

template <typename T>
inline void add_chunk(const StatsParams& p, int n, int chunk, float* sums) {
  const T* sample = (const T*)p.x + (int64_t)n * p.HW * p.C;
  const int first = chunk * STATS_CHUNK, last = first + STATS_CHUNK < p.HW ? first + STATS_CHUNK : p.HW;
  const auto columns = [&](auto vectors, int c, int count) __attribute__((always_inline)) {
    constexpr int V = decltype(vectors)::value;
    Floats shift[V], sum[V]{}, squares[V]{};
    for (int v = 0; v < V; v++) shift[v] = values(sample + (int64_t)first * p.C + c + v * LANES, count);
    for (int i = first; i < last; i++)
      for (int v = 0; v < V; v++) {
        const Floats d = values(sample + (int64_t)i * p.C + c + v * LANES, count) - shift[v];
        sum[v] = sum[v] + d, squares[v] = fused(d, d, squares[v]);
      }
    for (int v = 0; v < V; v++) store(sums + c + v * LANES, sum[v], count), store(sums + p.C + c + v * LANES, squares[v], count);
  };
  int c = 0;
  for (; c + 4 * LANES <= p.C; c += 4 * LANES) columns(std::integral_constant<int, 4>{}, c, LANES);
  for (; c < p.C; c += LANES) columns(std::integral_constant<int, 1>{}, c, p.C - c < LANES ? p.C - c : LANES);
}

// Means and squares about them, of each chunk of each channel, merged in float64.
template <typename T>
inline void merge_chunks(const StatsParams& p, int n, int group, int chunks) {
  const T* sample = (const T*)p.x + (int64_t)n * p.HW * p.C;
  const int per = p.C / p.groups;
  double mean = 0, squares = 0, count = 0;
  for (int c = group * per; c < (group + 1) * per; c++)
    for (int chunk = 0; chunk < chunks; chunk++) {
      const float* sums = p.partial + ((int64_t)n * chunks + chunk) * 2 * p.C;
      const int first = chunk * STATS_CHUNK, pixels = p.HW - first < STATS_CHUNK ? p.HW - first : STATS_CHUNK;
      const double about = (double)sums[c] / pixels, own = values(sample + (int64_t)first * p.C + c, 1)[0] + about;
      const double step = own - mean;  // Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979
      mean += step * pixels / (count + pixels);
      squares += sums[p.C + c] - about * sums[c] + step * step * count * pixels / (count + pixels);
      count += pixels;
    }
  p.mean[(int64_t)n * p.groups + group] = (float)mean;
  const double variance = squares / count;
  p.rstd[(int64_t)n * p.groups + group] = (float)(1 / std::sqrt((variance < 0 ? 0 : variance) + p.eps));
}

template <typename T>
inline void group_stats(const StatsParams& p, int thread, int threads) {
  const int chunks = (p.HW + STATS_CHUNK - 1) / STATS_CHUNK;
  const int64_t items = (int64_t)p.N * chunks;
  for (int64_t item = items * thread / threads; item < items * (thread + 1) / threads; item++)
    add_chunk<T>(p, (int)(item / chunks), (int)(item % chunks), p.partial + item * 2 * p.C);
#pragma omp barrier
  const int64_t groups = (int64_t)p.N * p.groups;
  for (int64_t i = groups * thread / threads; i < groups * (thread + 1) / threads; i++)
    merge_chunks<T>(p, (int)(i / p.groups), (int)(i % p.groups), chunks);
}

inline float total(Floats value) {
  float sum = 0;
  for (int i = 0; i < LANES; i++) sum += value[i];
  return sum;
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
  for (int c = 0; c < p.C; c += LANES) {
    const int k = count(c);
    Floats y = (values(x + c, k) - mean) * rstd;
    if (p.gamma) y = y * load<Floats>(p.gamma + c, k);
    if (p.beta) y = y + load<Floats>(p.beta + c, k);
    if (p.scale) y = y * (1.0f + values((const T*)p.scale + (int64_t)n * p.scale_stride + c, k));
    if (p.shift) y = y + values((const T*)p.shift + (int64_t)n * p.shift_stride + c, k);
    store(codes + c, codes_of(y, range), k);
  }
  pad_codes(codes, p.C, p.Cb);
}

template <typename T>
inline void quantize_rows(const RowNormParams& p, int thread, int threads) {
  each_band(p.N, p.HW, thread, threads, [&](int n, int first, int last) {
    const Range range = range_of(p, n);
    for (int i = first; i < last; i++) quantize_row<T>(p, range, n, (int64_t)n * p.HW + i);
  });
}
