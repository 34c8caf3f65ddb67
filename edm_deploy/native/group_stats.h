// Mean and reciprocal standard deviation of groups of channels, from values in bfloat16 or float16.
#pragma once

#include <cmath>
#include <type_traits>

#include "simd.h"

constexpr int STATS_CHUNK = 256;  // pixels whose statistics are summed in float32

// Sums and sums of squares, [2][C], of the pixels `first` to `last` of a sample [HW, C] about the first of them.
template <typename T>
inline void add_chunk(const T* sample, int C, int first, int last, float* sums) {
  const auto columns = [&](auto vectors, int c, int count) __attribute__((always_inline)) {
    constexpr int V = decltype(vectors)::value;
    Floats shift[V], sum[V]{}, squares[V]{};
    for (int v = 0; v < V; v++) shift[v] = values(sample + (int64_t)first * C + c + v * LANES, count);
    for (int i = first; i < last; i++)
      for (int v = 0; v < V; v++) {
        const Floats d = values(sample + (int64_t)i * C + c + v * LANES, count) - shift[v];
        sum[v] = sum[v] + d, squares[v] = fused(d, d, squares[v]);
      }
    for (int v = 0; v < V; v++) store(sums + c + v * LANES, sum[v], count), store(sums + C + c + v * LANES, squares[v], count);
  };
  int c = 0;
  for (; c + 4 * LANES <= C; c += 4 * LANES) columns(std::integral_constant<int, 4>{}, c, LANES);
  for (; c < C; c += LANES) columns(std::integral_constant<int, 1>{}, c, C - c < LANES ? C - c : LANES);
}

// Means and squares about them, of each chunk of each channel, merged in float64. `partial` is what add_chunk wrote, one chunk after the other.
template <typename T>
inline void merge_chunks(const T* sample, const float* partial, int HW, int C, int groups, int group, float eps, float& mean_out, float& rstd_out) {
  const int per = C / groups;
  double mean = 0, squares = 0, count = 0;
  for (int c = group * per; c < (group + 1) * per; c++)
    for (int first = 0; first < HW; first += STATS_CHUNK) {
      const float* sums = partial + (int64_t)(first / STATS_CHUNK) * 2 * C;
      const int pixels = HW - first < STATS_CHUNK ? HW - first : STATS_CHUNK;
      const double about = (double)sums[c] / pixels, own = values(sample + (int64_t)first * C + c, 1)[0] + about;
      const double step = own - mean;  // Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979
      mean += step * pixels / (count + pixels);
      squares += sums[C + c] - about * sums[c] + step * step * count * pixels / (count + pixels);
      count += pixels;
    }
  const double variance = squares / count;
  mean_out = (float)mean;
  rstd_out = (float)(1 / std::sqrt((variance < 0 ? 0 : variance) + eps));
}
