// Block Hadamard rotation of channels in front of a quantizer, in the order of engines/kernels/cuda/params.h (ROTATED).
#pragma once

#include "simd.h"

constexpr int MOST_ROTATED = 1024;  // channels that are rotated at a time: whole blocks

// Lane i of the result is lane i ^ MASK.
template <int MASK>
inline Floats exchanged(Floats v) {
  Floats result;
  for (int i = 0; i < LANES; i++) result[i] = v[i ^ MASK];
  return result;
}

template <int LOW, int HIGH>
inline Floats hadamard_4(Floats v) {
  return (v + exchanged<LOW>(v)) + (exchanged<HIGH>(v) - exchanged<LOW + HIGH>(v));
}

// Rotates v[0 .. count - 1] in blocks of a power of two; memory up to the next whole vector is read and written too.
inline void hadamard(float* v, int count, int block) {
  const int log = 31 - __builtin_clz(block);
  const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const float scale = 1.0f / (float)(1 << (log + 1) / 2);
  for (int c = 0; c < count; c += LANES) {
    Floats x = load<Floats>(v + c);
    if (log % 2) {
      const Floats other = exchanged<1>(x);
      x = choose((lane & 1) == 1, other - x, x + other);
      if (block >= 8) x = hadamard_4<2, 4>(x);
    } else {
      x = hadamard_4<1, 2>(x);
      if (block >= 16) x = hadamard_4<4, 8>(x);
    }
    store(v + c, block < 32 ? x * scale : x);
  }
  for (int step = log % 2 ? 8 : 16; step < block; step *= 4)
    for (int start = 0; start < count; start += 4 * step)
      for (int i = start; i < start + step; i++) {
        const float a = v[i], b = v[i + step], c = v[i + 2 * step], d = v[i + 3 * step], factor = 4 * step == block ? scale : 1.0f;
        v[i] = ((a + b) + (c - d)) * factor;
        v[i + step] = ((b + a) + (d - c)) * factor;
        v[i + 2 * step] = ((c + d) + (a - b)) * factor;
        v[i + 3 * step] = ((d + c) + (b - a)) * factor;
      }
}
