// Integer convolution by the tile instructions of AMX: 32 output pixels by 32 output channels in four tiles, the codes of 32 pixels' filters laid out in a row each.
#pragma once

#include "convolution.h"
#include "tiles.h"

#if defined(HAS_TILES)

constexpr int TILED_PIXELS = 2 * TILE_ROWS;

// Whether tiles are used: set once by `edm_use_tiles`, before anything runs.
inline bool tiles_in_use = false;

// Sums, int32 [32][stride], of the products of 32 rows of codes and of 16 or 32 (`two`) output channels. Rows of codes can be read up to a multiple of 64.
inline void tile_products(const int8_t* codes, int64_t codes_stride, const int8_t* weight, int64_t weight_stride, int64_t length, bool two, int32_t* sums, int stride) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const auto step = [&](const int8_t* a, const int8_t* b, const int8_t* second, int64_t b_stride) __attribute__((always_inline)) {
    _tile_loadd(4, a, codes_stride);
    _tile_loadd(5, a + TILE_ROWS * codes_stride, codes_stride);
    _tile_loadd(6, b, b_stride);
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(2, 5, 6);
    if (two) {
      _tile_loadd(7, second, b_stride);
      _tile_dpbssd(1, 4, 7);
      _tile_dpbssd(3, 5, 7);
    }
  };
  int64_t k = 0;
  for (; k + TILE_BYTES <= length; k += TILE_BYTES) {
    const int8_t* b = weight + k / 4 * weight_stride;
    step(codes + k, b, b + TILE_BYTES, weight_stride);
  }
  if (k < length) {  // the weights that are left, and zeros for what the codes hold behind them
    alignas(64) int8_t left[2][TILE_ROWS][TILE_BYTES] = {};
    for (int v = 0; v < (two ? 2 : 1); v++)
      for (int row = 0; row < (length - k) / 4; row++) memcpy(left[v][row], weight + (k / 4 + row) * weight_stride + v * TILE_BYTES, TILE_BYTES);
    step(codes + k, left[0][0], left[1][0], TILE_BYTES);
  }
  const int64_t bytes = stride * sizeof(int32_t);
  _tile_stored(0, sums, bytes);
  _tile_stored(2, sums + TILE_ROWS * stride, bytes);
  if (two) {
    _tile_stored(1, sums + LANES, bytes);
    _tile_stored(3, sums + TILE_ROWS * stride + LANES, bytes);
  }
}

// The codes under each pixel's filter, one row for each, taps in the order of the weights.
inline void lay_out(const ConvParams& p, const Pixel* pixels, int count, int8_t* rows, int64_t stride) {
  for (int i = 0; i < count; i++) {
    int8_t* to = rows + i * stride;
    for (int r = 0; r < p.R; r++)
      for (int s = 0; s < p.S; s++, to += p.Cb) {
        const bool inside = (unsigned)(pixels[i].y + r) < (unsigned)p.H && (unsigned)(pixels[i].x + s) < (unsigned)p.W;
        memcpy(to, inside ? pixels[i].codes + ((int64_t)r * p.W + s) * p.Cb : p.zero, p.Cb);
      }
  }
}

template <typename T, int VECTORS>
inline void write_pixels(const ConvParams& p, const Pixel* pixels, int64_t first, int count, int k, const int32_t* sums) {
  for (int i = 0; i < count; i++) {
    Ints row[VECTORS];
    for (int v = 0; v < VECTORS; v++) row[v] = load<Ints>(sums + (i * MOST_VECTORS + v) * LANES);
    write_output<T>(p, pixels[i].sample, first + i, k, row);
  }
}

template <typename T>
inline void convolve_tiles(const ConvParams& p, int thread, int threads) {
  const int64_t M = (int64_t)p.N * p.P * p.Q, length = (int64_t)p.R * p.S * p.Cb, stride = (length + TILE_BYTES - 1) / TILE_BYTES * TILE_BYTES;
  const int blocks = (p.K + LANES - 1) / LANES, groups = (blocks + MOST_VECTORS - 1) / MOST_VECTORS;
  const int64_t bands = (M + TILED_PIXELS - 1) / TILED_PIXELS;
  const int parts = bands < 2 * threads ? groups : 1;  // of the output channels; each lays out its input again
  const bool in_place = p.R == 1 && p.S == 1 && p.stride == 1 && !p.padding && length == stride;
  alignas(64) int32_t sums[TILED_PIXELS * MOST_VECTORS * LANES];
  int8_t* rows = (int8_t*)scratch(TILED_PIXELS * stride);
  memset(rows, 0, TILED_PIXELS * stride);
  const TileConfig config;
  _tile_loadconfig(&config);
  for (int64_t item = bands * parts * thread / threads; item < bands * parts * (thread + 1) / threads; item++) {
    const int64_t first = item / parts * TILED_PIXELS;
    const int count = first + TILED_PIXELS < M ? TILED_PIXELS : (int)(M - first), part = (int)(item % parts);
    Pixel pixels[TILED_PIXELS];
    pixels[0] = pixel_of(p, first);
    for (int i = 1; i < count; i++) pixels[i] = next(p, pixels[i - 1]);
    const bool direct = in_place && count == TILED_PIXELS;
    if (!direct) lay_out(p, pixels, count, rows, stride);
    for (int group = groups * part / parts; group < groups * (part + 1) / parts; group++) {
      const int block = group * MOST_VECTORS, k = block * LANES, vectors = blocks - block < MOST_VECTORS ? blocks - block : MOST_VECTORS;
      for (int v = 0; v < vectors; v += 2)
        tile_products(direct ? p.codes + first * p.Cb : rows, stride, p.weight + k * length + v * TILE_BYTES, (int64_t)vectors * TILE_BYTES, length,
                      v + 1 < vectors, sums + v * LANES, MOST_VECTORS * LANES);
      switch (vectors) {
        case 1: write_pixels<T, 1>(p, pixels, first, count, k, sums); break;
        case 2: write_pixels<T, 2>(p, pixels, first, count, k, sums); break;
#if defined(__AVX512F__)
        case 3: write_pixels<T, 3>(p, pixels, first, count, k, sums); break;
        default: write_pixels<T, 4>(p, pixels, first, count, k, sums);
#endif
      }
    }
  }
  _tile_release();
}

// Whether the system lets this process use tiles, and they compute what they should: no such CPU was at hand when this was written.
inline bool tiles_work() {
  if (!tiles_permitted()) return false;
  constexpr int LENGTH = 80;  // one step, and a part of one
  alignas(64) int8_t codes[TILED_PIXELS][2 * TILE_BYTES] = {}, weight[LENGTH / 4][2 * LANES][4];
  int32_t sums[TILED_PIXELS][2 * LANES];
  uint32_t state = 1;
  const auto draw = [&] { return (int8_t)((state = state * 1664525 + 1013904223) >> 24); };
  for (auto& row : codes)
    for (int8_t& code : row) code = draw();
  for (auto& row : weight)
    for (auto& column : row)
      for (int8_t& value : column) value = draw();
  const TileConfig config;
  _tile_loadconfig(&config);
  tile_products(codes[0], sizeof(codes[0]), &weight[0][0][0], sizeof(weight[0]), LENGTH, true, sums[0], 2 * LANES);
  _tile_release();
  for (int i = 0; i < TILED_PIXELS; i++)
    for (int j = 0; j < 2 * LANES; j++) {
      int32_t sum = 0;
      for (int c = 0; c < LENGTH; c++) sum += codes[i][c] * weight[c / 4][j][c % 4];
      if (sum != sums[i][j]) return false;
    }
  return true;
}

#endif  // HAS_TILES
