// 3x3 convolutions with stride 1 by Winograd's F(2x2, 3x3): 16 products for 4 outputs in place of 36. Exact for narrow codes: the transformed input is
// a sum of four codes, the transformed filter of nine, so where both fit 8 bits all arithmetic is in integers. The filter is scaled by 4, which
// divides every output's sum.
// Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv:1509.09308, section 4.1.
#pragma once

#include "convolution.h"
#include "params.h"
#include "simd.h"

constexpr int PLACES = 16;  // of a transformed tile
constexpr int TILES = 16;   // of 2x2 outputs, of a piece of work
constexpr int ROWS = 4;     // tiles whose sums are in registers

typedef int8_t Wide __attribute__((vector_size(64)));
typedef int8_t Narrow __attribute__((vector_size(16)));

struct WinogradBuffers {
  uint8_t* inputs;  // [PLACES][TILES][Cb], + 128
  int32_t* sums;    // [PLACES][TILES][16 * MOST_VECTORS]
  explicit WinogradBuffers(int Cb) {
    inputs = (uint8_t*)scratch((size_t)PLACES * TILES * (Cb + 4 * LANES * MOST_VECTORS));
    sums = (int32_t*)(inputs + PLACES * TILES * Cb);
  }
};

struct Tile {
  int sample, y, x;  // of the first output
};

inline Tile tile_of(const ConvParams& p, int64_t index) {
  const int across = (p.Q + 1) / 2, down = (p.P + 1) / 2;
  const int rest = (int)(index % ((int64_t)across * down));
  return {(int)(index / ((int64_t)across * down)), rest / across * 2, rest % across * 2};
}

template <typename Vector>
inline __attribute__((always_inline)) void transform_channels(const int8_t* const (&pixels)[PLACES], int c, uint8_t* to, int64_t place) {
  Vector d[PLACES], rows[PLACES];
  for (int i = 0; i < PLACES; i++) memcpy(&d[i], pixels[i] + c, sizeof(Vector));
  for (int j = 0; j < 4; j++) {
    rows[j] = d[j] - d[8 + j], rows[4 + j] = d[4 + j] + d[8 + j];
    rows[8 + j] = d[8 + j] - d[4 + j], rows[12 + j] = d[4 + j] - d[12 + j];
  }
  for (int i = 0; i < PLACES; i += 4) {
    const Vector columns[4] = {rows[i] - rows[i + 2], rows[i + 1] + rows[i + 2], rows[i + 2] - rows[i + 1], rows[i + 1] - rows[i + 3]};
    for (int j = 0; j < 4; j++) {
      const Vector unsigned_code = columns[j] ^ (int8_t)-128;
      memcpy(to + (i + j) * place + c, &unsigned_code, sizeof(Vector));
    }
  }
}

inline void transform_input(const ConvParams& p, const Tile& tile, uint8_t* to, int64_t place) {
  const int8_t* pixels[PLACES];
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 4; j++) {
      const int y = tile.y - p.padding + i, x = tile.x - p.padding + j;
      const bool inside = (unsigned)y < (unsigned)p.H && (unsigned)x < (unsigned)p.W;
      pixels[4 * i + j] = inside ? p.codes + (((int64_t)tile.sample * p.H + y) * p.W + x) * p.Cb : p.zero;
    }
  int c = 0;
  for (; c + 64 <= p.Cb; c += 64) transform_channels<Wide>(pixels, c, to, place);
  for (; c < p.Cb; c += 16) transform_channels<Narrow>(pixels, c, to, place);
}

// The sums of one place, for ROWS tiles and 16 * VECTORS output channels.
template <int VECTORS>
inline __attribute__((always_inline)) void add_place(const uint8_t* inputs, int Cb, const int8_t* weight, const int32_t* start, int32_t* to) {
  Ints sums[ROWS][VECTORS];
  for (int i = 0; i < ROWS; i++)
    for (int v = 0; v < VECTORS; v++) sums[i][v] = load<Ints>(start + v * LANES);
  for (int c = 0; c < Cb; c += 4) {
    Fours factors[VECTORS];
    for (int v = 0; v < VECTORS; v++) factors[v] = in_register(load<Fours>(weight + v * 4 * LANES));
    for (int i = 0; i < ROWS; i++) {
      const uint32_t codes = load_word(inputs + (int64_t)i * Cb + c);
      for (int v = 0; v < VECTORS; v++) sums[i][v] = sum_of_4(sums[i][v], codes, factors[v]);
    }
    weight += VECTORS * 4 * LANES;
  }
  for (int i = 0; i < ROWS; i++)
    for (int v = 0; v < VECTORS; v++) store(to + (i * MOST_VECTORS + v) * LANES, sums[i][v]);
}

template <typename T, int VECTORS>
inline void write_tile(const ConvParams& p, const Tile& tile, const int32_t* sums, int k) {
  Ints outputs[2][2][VECTORS];
  for (int v = 0; v < VECTORS; v++) {
    Ints rows[2][4];
    for (int j = 0; j < 4; j++) {
      const auto at = [&](int i) { return load<Ints>(sums + ((int64_t)(4 * i + j) * TILES * MOST_VECTORS + v) * LANES); };
      const Ints second = at(1), third = at(2);
      rows[0][j] = at(0) + second + third, rows[1][j] = second - third - at(3);
    }
    for (int i = 0; i < 2; i++) {
      const Ints (&row)[4] = rows[i];
      outputs[i][0][v] = (row[0] + row[1] + row[2]) >> 2, outputs[i][1][v] = (row[1] - row[2] - row[3]) >> 2;
    }
  }
  for (int i = 0; i < 2 && tile.y + i < p.P; i++) {
    const int64_t m = ((int64_t)tile.sample * p.P + tile.y + i) * p.Q + tile.x;
    for (int j = 0; j < 2 && tile.x + j < p.Q; j++) write_output<T>(p, tile.sample, m + j, k, outputs[i][j]);
  }
}

template <typename T, int VECTORS>
inline void winograd_group(const ConvParams& p, const Tile* tiles, int count, int k, WinogradBuffers& at) {
  const int channels = (p.K + LANES - 1) / LANES * LANES;
  const int8_t* weight = p.weight + (int64_t)k * PLACES * p.Cb;
  for (int place = 0; place < PLACES; place++)
    for (int i = 0; i < count; i += ROWS)  // rows behind the last tile hold what an earlier piece of work left
      add_place<VECTORS>(at.inputs + ((int64_t)place * TILES + i) * p.Cb, p.Cb, weight + (int64_t)place * p.Cb * VECTORS * LANES,
                         p.start + place * channels + k, at.sums + ((int64_t)place * TILES + i) * MOST_VECTORS * LANES);
  for (int i = 0; i < count; i++) write_tile<T, VECTORS>(p, tiles[i], at.sums + i * MOST_VECTORS * LANES, k);
}

template <typename T>
inline void winograd(const ConvParams& p, int thread, int threads) {
  WinogradBuffers buffers(p.Cb);
  const int64_t all_tiles = (int64_t)p.N * ((p.P + 1) / 2) * ((p.Q + 1) / 2), bands = (all_tiles + TILES - 1) / TILES;
  const int blocks = (p.K + LANES - 1) / LANES, groups = (blocks + MOST_VECTORS - 1) / MOST_VECTORS;
  const int parts = bands < 2 * threads ? groups : 1;  // of the output channels; each transforms its input again
  const int64_t items = bands * parts;
  for (int64_t item = items * thread / threads; item < items * (thread + 1) / threads; item++) {
    const int64_t first = item / parts * TILES;
    const int count = first + TILES < all_tiles ? TILES : (int)(all_tiles - first), part = (int)(item % parts);
    Tile tiles[TILES];
    for (int i = 0; i < count; i++) {
      tiles[i] = tile_of(p, first + i);
      transform_input(p, tiles[i], buffers.inputs + (int64_t)i * p.Cb, (int64_t)TILES * p.Cb);
    }
    for (int group = groups * part / parts; group < groups * (part + 1) / parts; group++) {
      const int block = group * MOST_VECTORS, k = block * LANES;
      switch (blocks - block) {
        case 1: winograd_group<T, 1>(p, tiles, count, k, buffers); break;
#if defined(__AVX512F__)
        case 2: winograd_group<T, 2>(p, tiles, count, k, buffers); break;
        case 3: winograd_group<T, 3>(p, tiles, count, k, buffers); break;
        default: winograd_group<T, 4>(p, tiles, count, k, buffers);
#else
        default: winograd_group<T, 2>(p, tiles, count, k, buffers);
#endif
      }
    }
  }
}
