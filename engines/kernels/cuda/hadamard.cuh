// Block Hadamard rotation of the channels that a quantizer holds. Neighbouring lanes hold neighbouring octets, so a block of 8 * 2^k channels is an octet of 2^k lanes:
// the matrix is a Kronecker product, whose factors exchange values of one thread, then of lanes by shuffles. Nothing is stored in between.
#pragma once
#include "device.cuh"

__device__ __forceinline__ float of_lane(float value, int distance) { return __shfl_xor_sync(0xFFFFFFFFu, value, distance); }

// The factor of size 4 on two address bits of a channel, `low` and `high`, as numbers below 8 in the octet or as lane distances (from 8 on, times 8):
// y_i = (x_i + x_{i ^ low}) + (x_{i ^ high} - x_{i ^ low ^ high}). The sum and the difference over `low` are made once, and one of them is exchanged over `high`.
template <int LOW, int HIGH>
__device__ __forceinline__ void hadamard_4(float (&v)[OCTET]) {
  float sum[OCTET], difference[OCTET];
#pragma unroll
  for (int e = 0; e < OCTET; ++e) {
    const float other = LOW < OCTET ? v[e ^ (LOW % OCTET)] : of_lane(v[e], LOW / OCTET);
    sum[e] = __fadd_rn(v[e], other), difference[e] = __fsub_rn(v[e], other);
  }
#pragma unroll
  for (int e = 0; e < OCTET; ++e) v[e] = __fadd_rn(sum[e], HIGH < OCTET ? difference[e ^ (HIGH % OCTET)] : of_lane(difference[e], HIGH / OCTET));
}

// The rotation in blocks of `block` channels, a power of two, 2 to 256. All lanes of the warp take part, those whose channels do not exist with any values.
__device__ __forceinline__ void hadamard(float (&v)[OCTET], int block) {
  const int log = 31 - __clz(block);
  if (log % 2) {
#pragma unroll
    for (int e = 0; e < OCTET; e += 2) {
      const float a = v[e], b = v[e + 1];
      v[e] = __fadd_rn(a, b), v[e + 1] = __fsub_rn(a, b);
    }
    if (block >= 8) hadamard_4<2, 4>(v);
    if (block >= 32) hadamard_4<8, 16>(v);
    if (block >= 128) hadamard_4<32, 64>(v);
  } else {
    hadamard_4<1, 2>(v);
    if (block >= 16) hadamard_4<4, 8>(v);
    if (block >= 64) hadamard_4<16, 32>(v);
    if (block >= 256) hadamard_4<64, 128>(v);
  }
  const float scale = __int_as_float((127 - (log + 1) / 2) << 23);  // 2^-ceil(log / 2), exact
#pragma unroll
  for (int e = 0; e < OCTET; ++e) v[e] = __fmul_rn(v[e], scale);
}
