// Block Hadamard rotation of channels in front of a quantizer, in the order of engines/kernels/cuda/params.h (ROTATED).
#pragma once

#include "simd.h"

constexpr int MOST_ROTATED = 1024;  // channels that are rotated at a time: whole blocks

// Lane i of the result is lane i ^ MASK.
template <int MASK>
inline Floats exchanged(Floats v) {
#if __GNUC__ >= 12 || defined(__clang__)
  return __builtin_shufflevector(v, v, 0 ^ MASK, 1 ^ MASK, 2 ^ MASK, 3 ^ MASK, 4 ^ MASK, 5 ^ MASK, 6 ^ MASK, 7 ^ MASK, 8 ^ MASK, 9 ^ MASK, 10 ^ MASK, 11 ^ MASK,
                                 12 ^ MASK, 13 ^ MASK, 14 ^ MASK, 15 ^ MASK);
#else
  Floats result;
  for (int i = 0; i < LANES; i++) result[i] = v[i ^ MASK];
  return result;
#endif
}

template <int LOW, int HIGH>
inline Floats hadamard_4(Floats v) {
  return (v + exchanged<LOW>(v)) + (exchanged<HIGH>(v) - exchanged<LOW + HIGH>(v));
}

// Rotates v[0 .. count - 1] in blocks of a power of two; memory up to the next whole vector is read and written too. The scale is a power of two, so it may come first.
inline void hadamard(float* v, int count, int block) {
  const int log = 31 - __builtin_clz(block);
  const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const float scale = 1.0f / (float)(1 << (log + 1) / 2);
  for (int c = 0; c < count; c += LANES) {
    Floats x = load<Floats>(v + c) * scale;
    if (log % 2) {
      const Floats other = exchanged<1>(x);
      x = choose((lane & 1) == 1, other - x, x + other);
      if (block >= 8) x = hadamard_4<2, 4>(x);
    } else {
      x = hadamard_4<1, 2>(x);
      if (block >= 16) x = hadamard_4<4, 8>(x);
    }
    store(v + c, x);
  }
  if (log % 2 && block >= 32)  // of neighbouring halves of a vector, and neighbouring vectors
    for (int c = 0; c < count; c += 2 * LANES) {
      const Floats a = load<Floats>(v + c), b = load<Floats>(v + c + LANES), other_a = exchanged<8>(a), other_b = exchanged<8>(b);
      store(v + c, (a + other_a) + (b - other_b));
      store(v + c + LANES, (b + other_b) + (a - other_a));
    }
  for (int step = log % 2 ? 32 : 16; step < block; step *= 4)
    for (int start = 0; start < count; start += 4 * step)
      for (int i = start; i < start + step; i += LANES) {
        const Floats a = load<Floats>(v + i), b = load<Floats>(v + i + step), c = load<Floats>(v + i + 2 * step), d = load<Floats>(v + i + 3 * step);
        store(v + i, (a + b) + (c - d));
        store(v + i + step, (b + a) + (d - c));
        store(v + i + 2 * step, (c + d) + (a - b));
        store(v + i + 3 * step, (d + c) + (b - a));
      }
}
