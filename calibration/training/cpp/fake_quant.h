// Fake quantization of the rows of a matrix [N, M], and its gradients: the arithmetic of calibration/student/fake_quant.py.
#pragma once

#include "params.h"
#include "simd.h"

struct RowRange {
  Floats inv_scale, scale, low, high;
};

inline RowRange row_range(const FakeQuantParams& p, int64_t row) {
  return {all(1.0f / p.scale[row]), all(p.scale[row]), all(p.qmin[row]), all(p.qmin[row] + p.levels[row])};
}

// NaN stays one. The bounds are integers, so that rounding what lies between them gives the same codes.
inline Floats code_between(Floats position, const RowRange& range) {
  return nearest(smaller(range.high, larger(range.low, position)));
}

// body(row, first place in the matrix, places) of each chunk of this thread, with its number.
template <typename Body>
inline void each_chunk(const FakeQuantParams& p, int thread, int threads, Body body) {
  const int64_t chunks = (p.M + FAKE_QUANT_CHUNK - 1) / FAKE_QUANT_CHUNK, items = p.N * chunks;
  for (int64_t item = items * thread / threads; item < items * (thread + 1) / threads; item++) {
    const int64_t row = item / chunks, first = item % chunks * FAKE_QUANT_CHUNK;
    body(item, row, row * p.M + first, first + FAKE_QUANT_CHUNK < p.M ? FAKE_QUANT_CHUNK : p.M - first);
  }
}

template <typename Body>
inline void each_vector(int64_t first, int64_t places, Body body) {
  int64_t i = first;
  for (; i + LANES <= first + places; i += LANES) body(i, LANES);
  if (i < first + places) body(i, (int)(first + places - i));
}

template <typename T>
inline void fake_quantize(const FakeQuantParams& p, int thread, int threads) {
  const T* x = (const T*)p.x;
  T* y = (T*)p.out;
  each_chunk(p, thread, threads, [&](int64_t, int64_t row, int64_t first, int64_t places) {
    const RowRange range = row_range(p, row);
    each_vector(first, places, [&](int64_t i, int count) __attribute__((always_inline)) {
      put(y + i, code_between(values(x + i, count) * range.inv_scale, range) * range.scale, count);
    });
  });
}

// To x: the incoming gradient within the bounds, 0 elsewhere. To the scale: the sum of gradient times round(u) - u within them, times the bound outside. To qmin: the
// scale times the sum of what is outside.
template <typename T>
inline void fake_quantize_gradients(const FakeQuantParams& p, int thread, int threads) {
  const T *x = (const T*)p.x, *grad = (const T*)p.grad;
  T* grad_x = (T*)p.out;
  each_chunk(p, thread, threads, [&](int64_t item, int64_t row, int64_t first, int64_t places) {
    const RowRange range = row_range(p, row);
    const Floats below = range.low - 0.5f, above = range.high + 0.5f;
    Floats to_scale{}, to_qmin{};
    each_vector(first, places, [&](int64_t i, int count) __attribute__((always_inline)) {
      const Floats g = values(grad + i, count), position = values(x + i, count) * range.inv_scale;
      const Floats within = choose((position > below) & (position < above), g, Floats{});
      put(grad_x + i, within, count);
      to_scale = to_scale + (g * code_between(position, range) - within * position);
      to_qmin = to_qmin + (g - within);
    });
    p.partial[2 * item] = total(to_scale), p.partial[2 * item + 1] = total(to_qmin);
  });
#pragma omp barrier
  const int64_t chunks = (p.M + FAKE_QUANT_CHUNK - 1) / FAKE_QUANT_CHUNK;
  for (int64_t row = p.N * thread / threads; row < p.N * (thread + 1) / threads; row++) {
    double to_scale = 0, to_qmin = 0;
    for (int64_t item = row * chunks; item < (row + 1) * chunks; item++) to_scale += p.partial[2 * item], to_qmin += p.partial[2 * item + 1];
    p.grad_scale[row] = (float)to_scale, p.grad_qmin[row] = (float)(to_qmin * p.scale[row]);
  }
}
