// Integer convolution, an implicit matrix product: PIXELS output pixels by 16 * VECTORS output channels in registers.
#pragma once

#include "params.h"
#include "simd.h"

constexpr int CACHED_WEIGHTS = 256 << 10;  // bytes of a group of output channels that the second cache holds beside all else
constexpr int PIECE = 384;                 // channels of a tap whose weights the first cache holds
constexpr int BAND = 96;  // pixels whose codes stay in the cache while all output channels are computed

#if defined(__AVX512F__)
constexpr int MOST_VECTORS = 4;
#else
constexpr int MOST_VECTORS = 2;
#endif

// An output pixel, and the place of its filter's first tap in the input.
struct Pixel {
  const int8_t* codes;
  int y, x, sample;
};

inline Pixel pixel_of(const ConvParams& p, int64_t m) {
  const int area = p.P * p.Q, n = (int)(m / area), rest = (int)(m % area);
  const int y = rest / p.Q * p.stride - p.padding, x = rest % p.Q * p.stride - p.padding;
  return {p.codes + (((int64_t)n * p.H + y) * p.W + x) * p.Cb, y, x, n};
}

inline Pixel next(const ConvParams& p, Pixel pixel) {
  pixel.x += p.stride, pixel.codes += (int64_t)p.stride * p.Cb;
  if (pixel.x + p.padding < p.Q * p.stride) return pixel;
  pixel.x = -p.padding, pixel.y += p.stride;
  if (pixel.y + p.padding >= p.P * p.stride) pixel.y = -p.padding, pixel.sample++;
  pixel.codes = p.codes + (((int64_t)pixel.sample * p.H + pixel.y) * p.W + pixel.x) * p.Cb;
  return pixel;
}

// Adds the products of channels `first` to `last` of one tap of the filter.
template <int PIXELS, int VECTORS>
inline __attribute__((always_inline)) void add_tap(const ConvParams& p, const Pixel* pixels, int r, int s, int first, int last, const int8_t* weight,
                                                   Ints (&sums)[PIXELS][VECTORS]) {
  const int8_t* at[PIXELS];
  for (int i = 0; i < PIXELS; i++) {
    const bool inside = (unsigned)(pixels[i].y + r) < (unsigned)p.H && (unsigned)(pixels[i].x + s) < (unsigned)p.W;
    at[i] = inside ? pixels[i].codes + ((int64_t)r * p.W + s) * p.Cb : p.zero;
  }
  for (int c = first; c < last; c += 4) {
    Fours factors[VECTORS];
    for (int v = 0; v < VECTORS; v++) factors[v] = in_register(load<Fours>(weight + v * 4 * LANES));
#pragma GCC unroll 8
    for (int i = 0; i < PIXELS; i++) {
      const uint32_t codes = load_word(at[i] + c);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) sums[i][v] = sum_of_4(sums[i][v], codes ^ 0x80808080u, factors[v]);
    }
    weight += VECTORS * 4 * LANES;
  }
}

// Output channels k to k + 16 * VECTORS of one pixel; `FULL`: none of them is behind the last.
template <typename T, int VECTORS, bool FULL>
inline __attribute__((always_inline)) void write_channels(const ConvParams& p, int sample, int64_t m, int k, const Ints (&sums)[VECTORS]) {
  const auto count = [&](int v) __attribute__((always_inline)) { return FULL || p.K - k - v * LANES >= LANES ? LANES : p.K - k - v * LANES; };
  const auto column = [&](const float* of, int v) __attribute__((always_inline)) { return FULL ? load<Floats>(of + k + v * LANES) : load<Floats>(of + k + v * LANES, count(v)); };
  const auto vector = [&](const void* of, int64_t at, int v) __attribute__((always_inline)) { return values((const T*)of + at + k + v * LANES, FULL ? LANES : count(v)); };
  const float scale = p.act_scale[p.row[sample]];
  Floats y[VECTORS];
  for (int v = 0; v < VECTORS; v++) y[v] = floats(sums[v]) * (scale * column(p.weight_scale, v));
  if (p.bias)
    for (int v = 0; v < VECTORS; v++) y[v] = y[v] + column(p.bias, v);
  if (p.sample_bias)
    for (int v = 0; v < VECTORS; v++) y[v] = y[v] + vector(p.sample_bias, (int64_t)sample * p.sample_bias_stride, v);
  if (p.gate)
    for (int v = 0; v < VECTORS; v++) y[v] = y[v] * vector(p.gate, (int64_t)sample * p.gate_stride, v);
  if (p.residual)
    for (int v = 0; v < VECTORS; v++) y[v] = y[v] + vector(p.residual, m * p.K, v);
  if (p.saturate)
    for (int v = 0; v < VECTORS; v++) y[v] = choose(y[v] == y[v], smaller(larger(y[v], all(-65504.0f)), all(65504.0f)), y[v]);
  for (int v = 0; v < VECTORS; v++) put((T*)p.out + m * p.K + k + v * LANES, y[v], FULL ? LANES : count(v));
}

template <typename T, int VECTORS>
inline __attribute__((always_inline)) void write_output(const ConvParams& p, int sample, int64_t m, int k, const Ints (&sums)[VECTORS]) {
  if (k + VECTORS * LANES <= p.K) write_channels<T, VECTORS, true>(p, sample, m, k, sums);
  else write_channels<T, VECTORS, false>(p, sample, m, k, sums);
}

template <typename T, int PIXELS, int VECTORS>
inline void convolve_band(const ConvParams& p, int64_t first, int64_t last, int k) {
  static_assert(BAND % PIXELS == 0, "a band is filled up to whole tiles");
  const int8_t* weights = p.weight + (int64_t)k * p.R * p.S * p.Cb;
  const int count = (int)(last - first);
  Pixel pixels[BAND];
  pixels[0] = pixel_of(p, first);
  for (int m = 1; m < (count + PIXELS - 1) / PIXELS * PIXELS; m++) pixels[m] = m < count ? next(p, pixels[m - 1]) : pixels[m - 1];
  const auto weight = [&](int r, int s, int c) { return weights + (((int64_t)r * p.S + s) * p.Cb + c) * VECTORS * LANES; };
  Ints starts[VECTORS];
  for (int v = 0; v < VECTORS; v++) starts[v] = load<Ints>(p.start + k + v * LANES);

  if ((int64_t)p.R * p.S * p.Cb * VECTORS * LANES <= CACHED_WEIGHTS) {
    for (int m = 0; m < count; m += PIXELS) {
      Ints sums[PIXELS][VECTORS];
      for (int i = 0; i < PIXELS; i++)
        for (int v = 0; v < VECTORS; v++) sums[i][v] = starts[v];
      for (int r = 0; r < p.R; r++)
        for (int s = 0; s < p.S; s++) add_tap<PIXELS, VECTORS>(p, pixels + m, r, s, 0, p.Cb, weight(r, s, 0), sums);
      for (int i = 0; i < PIXELS && m + i < count; i++) write_output<T>(p, pixels[m + i].sample, first + m + i, k, sums[i]);
    }
    return;
  }
  // Each piece of the weights is read once for the whole band, whose sums wait in memory.
  Ints sums[BAND / PIXELS][PIXELS][VECTORS];
  for (int m = 0; m < count; m++)
    for (int v = 0; v < VECTORS; v++) sums[m / PIXELS][m % PIXELS][v] = starts[v];
  for (int tap = 0; tap < p.R * p.S; tap++)
    for (int c = 0; c < p.Cb; c += PIECE) {
      const int end = c + PIECE < p.Cb ? c + PIECE : p.Cb;
      for (int m = 0; m < count; m += PIXELS) {
        Ints tile[PIXELS][VECTORS];
        memcpy(tile, sums[m / PIXELS], sizeof(tile));
        add_tap<PIXELS, VECTORS>(p, pixels + m, tap / p.S, tap % p.S, c, end, weight(tap / p.S, tap % p.S, c), tile);
        memcpy(sums[m / PIXELS], tile, sizeof(tile));
      }
    }
  for (int m = 0; m < count; m++) write_output<T>(p, pixels[m].sample, first + m, k, sums[m / PIXELS][m % PIXELS]);
}

template <typename T>
inline void convolve(const ConvParams& p, int thread, int threads) {
  const int64_t M = (int64_t)p.N * p.P * p.Q;
  const int blocks = (p.K + LANES - 1) / LANES, groups = (blocks + MOST_VECTORS - 1) / MOST_VECTORS;
  int64_t band = BAND;
  while (band > 8 && (M + band - 1) / band * groups < 4 * threads) band /= 2;
  const int64_t items = (M + band - 1) / band * groups;
  for (int64_t item = items * thread / threads; item < items * (thread + 1) / threads; item++) {
    const int64_t first = item / groups * band, last = first + band < M ? first + band : M;
    const int block = (int)(item % groups) * MOST_VECTORS, k = block * LANES;
    switch (blocks - block) {
      case 1: convolve_band<T, 8, 1>(p, first, last, k); break;
#if defined(__AVX512F__)
      case 2: convolve_band<T, 8, 2>(p, first, last, k); break;
      case 3: convolve_band<T, 6, 3>(p, first, last, k); break;
      default: convolve_band<T, 6, 4>(p, first, last, k);
#else
      default: convolve_band<T, 2, 2>(p, first, last, k);
#endif
    }
  }
}
