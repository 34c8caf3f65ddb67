// Quantizers, with what is computed while they read.
#pragma once

#include "hadamard.h"
#include "params.h"
#include "simd.h"

enum Activation { NONE, SILU, GELU, GELU_TANH, GEGLU };

// Of engines/kernels/cuda/quantize.cuh, where its source is; the lowest power first.
constexpr float GELU_POLYNOMIAL[13] = {
    0.14136378467082977f, -0.0702962800860405f, 0.05152052268385887f, -0.040442608296871185f, 0.031442172825336456f,
    -0.023268653079867363f, 0.016402173787355423f, -0.011164339259266853f, 0.006410510279238224f, -0.002685575047507882f,
    0.0017227994976565242f, -0.001613265136256814f, 0.0006087272777222097f};

inline Floats gelu(Floats x) {
  const Floats s = fused(x * x, all(0.08f), all(-1.0f));
  Floats p = all(GELU_POLYNOMIAL[12]);
  for (int i = 11; i >= 0; i--) p = fused(p, s, all(GELU_POLYNOMIAL[i]));
  const Floats inside = x * fused(x, p, all(0.5f));
  return choose((x >= 5.0f) | (x <= -5.0f), larger(x, all(0.0f)), inside);
}

template <int ACTIVATION>
inline Floats activated(Floats x) {
  if constexpr (ACTIVATION == SILU) return over_one_plus(x, exponential(-x));
  if constexpr (ACTIVATION == GELU) return gelu(x);
  if constexpr (ACTIVATION == GELU_TANH) {
    const Floats u = x * (1.0f + 0.044715f * (x * x));
    return over_one_plus(x, exponential(-1.5957691216f * u));
  }
  return x;
}

struct Range {
  Floats inv_scale, low, high;
};

template <typename Params>
inline Range range_of(const Params& p, int sample) {
  const int row = p.row[sample];
  return {all(p.inv_scale[row]), all((float)p.qmin[row]), all((float)p.qmax[row])};
}

// Bounds first: they are integers, so rounding what lies between them gives the same codes, and is exact by one addition.
inline Bytes codes_of(Floats value, const Range& range) {
  const Floats magic = all(MAGIC);
  const Floats clipped = smaller(larger(value * range.inv_scale, range.low), range.high);
  return __builtin_convertvector(as<Ints>((clipped + magic)) - as<Ints>(magic), Bytes);
}

inline void pad_codes(int8_t* codes, int C, int Cb) {
  if (Cb > C) memset(codes + C, 0, Cb - C);
}

constexpr int QUANTIZE_BAND = 128;  // pixels of a thread's next piece of work
constexpr int NORM_CHANNELS = 512;  // channels whose statistics are laid out at a time

// The pieces of work of one thread: body(sample, first pixel, last pixel).
template <typename Body>
inline void each_band(int N, int HW, int thread, int threads, Body body) {
  const int bands = (HW + QUANTIZE_BAND - 1) / QUANTIZE_BAND;
  const int64_t items = (int64_t)N * bands;
  for (int64_t item = items * thread / threads; item < items * (thread + 1) / threads; item++) {
    const int first = (int)(item % bands) * QUANTIZE_BAND, last = first + QUANTIZE_BAND < HW ? first + QUANTIZE_BAND : HW;
    body((int)(item / bands), first, last);
  }
}

template <typename T, int ACTIVATION, bool NORM>
inline void quantize_band(const QuantizeParams& p, int n, int first, int last) {
  const Range range = range_of(p, n);
  const int stride = ACTIVATION == GEGLU ? 2 * p.C : p.C;
  const T* x = (const T*)p.x + ((int64_t)n * p.HW) * stride;
  int8_t* codes = p.codes + (int64_t)n * p.HW * p.Cb;
  alignas(64) float mean[NORM_CHANNELS], rstd[NORM_CHANNELS], gamma[NORM_CHANNELS], beta[NORM_CHANNELS];
  const bool affine = NORM && (p.gamma || p.beta);
  for (int start = 0; start < p.C; start += NORM_CHANNELS) {
    const int end = start + NORM_CHANNELS < p.C ? start + NORM_CHANNELS : p.C;
    if (NORM)
      for (int c = start; c < end;) {
        const int size = p.C / p.groups, group = c / size, last_channel = (group + 1) * size < end ? (group + 1) * size : end;
        const float m = p.mean[(int64_t)n * p.groups + group], r = p.rstd[(int64_t)n * p.groups + group];
        for (; c < last_channel; c++) {
          mean[c - start] = m, rstd[c - start] = r;
          gamma[c - start] = p.gamma ? p.gamma[c] : 1, beta[c - start] = p.beta ? p.beta[c] : 0;
        }
      }
    const auto code = [&](const T* pixel, int c, int count) __attribute__((always_inline)) {
      Floats value = values(pixel + c, count);
      if (NORM) {
        value = (value - load<Floats>(mean + c - start)) * load<Floats>(rstd + c - start);
        if (affine) value = value * load<Floats>(gamma + c - start) + load<Floats>(beta + c - start);
      }
      if constexpr (ACTIVATION == GEGLU) value = value * gelu(values(pixel + p.C + c, count));
      return codes_of(activated<ACTIVATION>(value), range);
    };
    const int whole = start + (end - start) / LANES * LANES;
    for (int i = first; i < last; i++) {
      const T* pixel = x + (int64_t)i * stride;
      int8_t* to = codes + (int64_t)i * p.Cb;
      for (int c = start; c < whole; c += LANES) store(to + c, code(pixel, c, LANES));
      if (whole < end) store(to + whole, code(pixel, whole, end - whole), end - whole);
      if (end == p.C) pad_codes(to, p.C, p.Cb);
    }
  }
}

// Values of whole blocks of channels, value(first channel, how many), are rotated in a buffer and stored as codes.
template <typename Value>
inline void store_rotated(int8_t* codes, int C, int rotation, const Range& range, Value value) {
  alignas(64) float block[MOST_ROTATED];
  for (int start = 0; start < C; start += MOST_ROTATED) {
    const int count = C - start < MOST_ROTATED ? C - start : MOST_ROTATED;
    const int whole = count / LANES * LANES, rest = count - whole;
    for (int c = 0; c < whole; c += LANES) store(block + c, value(start + c, LANES));
    if (rest) store(block + whole, value(start + whole, rest));
    hadamard(block, count, rotation);
    for (int c = 0; c < whole; c += LANES) store(codes + start + c, codes_of(load<Floats>(block + c), range));
    if (rest) store(codes + start + whole, codes_of(load<Floats>(block + whole), range), rest);
  }
}

template <typename T, int ACTIVATION>
inline void quantize_rotated_band(const QuantizeParams& p, int n, int first, int last) {
  const Range range = range_of(p, n);
  const int stride = ACTIVATION == GEGLU ? 2 * p.C : p.C;
  for (int64_t i = (int64_t)n * p.HW + first; i < (int64_t)n * p.HW + last; i++) {
    const T* x = (const T*)p.x + i * stride;
    store_rotated(p.codes + i * p.Cb, p.C, p.rotation, range, [&](int c, int lanes) __attribute__((always_inline)) {
      if constexpr (ACTIVATION == GEGLU) return values(x + c, lanes) * gelu(values(x + p.C + c, lanes));
      return activated<ACTIVATION>(values(x + c, lanes));
    });
    pad_codes(p.codes + i * p.Cb, p.C, p.Cb);
  }
}

template <typename T, int ACTIVATION, bool NORM>
inline void quantize_as(const QuantizeParams& p, int thread, int threads) {
  each_band(p.N, p.HW, thread, threads, [&](int n, int first, int last) {
    if (!NORM && p.rotation) quantize_rotated_band<T, ACTIVATION>(p, n, first, last);
    else quantize_band<T, ACTIVATION, NORM>(p, n, first, last);
  });
}

template <typename T>
inline void quantize(const QuantizeParams& p, int thread, int threads) {
  if (p.mean) return p.activation == SILU ? quantize_as<T, SILU, true>(p, thread, threads) : quantize_as<T, NONE, true>(p, thread, threads);
  switch (p.activation) {
    case SILU: return quantize_as<T, SILU, false>(p, thread, threads);
    case GELU: return quantize_as<T, GELU, false>(p, thread, threads);
    case GELU_TANH: return quantize_as<T, GELU_TANH, false>(p, thread, threads);
    case GEGLU: return quantize_as<T, GEGLU, false>(p, thread, threads);
    default: return quantize_as<T, NONE, false>(p, thread, threads);
  }
}
