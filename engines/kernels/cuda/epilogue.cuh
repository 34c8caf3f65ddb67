// From int32 sums to the output, eight neighbouring channels of one pixel at a time: 16 bytes of float16, one store. The same function ends a convolution and the
// sum over its splits. Arithmetic as specified in params.h: __fmul_rn and __fadd_rn round each step and cannot be fused, so the result equals numpy's bit for bit.
#pragma once
#include "device.cuh"

constexpr int OCTET = 8;

// Values that depend on the output channel only. A thread of a convolution keeps one of these for all of its pixels.
template <Kind KIND>
struct Columns {
  float scale[OCTET], bias[OCTET];
  int weight_sum[OCTET];

  __device__ __forceinline__ Columns(const ConvParams& p, int k0) {
#pragma unroll
    for (int e = 0; e < OCTET; ++e) {
      const int k = min(k0 + e, p.K - 1);  // channels past the end repeat the last one and are not stored
      scale[e] = p.weight_scale[k];
      bias[e] = p.bias ? p.bias[k] : 0.0f;
      weight_sum[e] = KIND == U4 ? p.weight_sum[k] : 0;
    }
  }
};

// Eight consecutive int32, two 16-byte accesses.
__device__ __forceinline__ void load_octet(int (&v)[OCTET], const int* from) {
  const int4 low = reinterpret_cast<const int4*>(from)[0], high = reinterpret_cast<const int4*>(from)[1];
  v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w, v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
}
__device__ __forceinline__ void store_octet(int* to, const int (&v)[OCTET]) {
  reinterpret_cast<int4*>(to)[0] = int4{v[0], v[1], v[2], v[3]};
  reinterpret_cast<int4*>(to)[1] = int4{v[4], v[5], v[6], v[7]};
}

// Writes y[m][k0 .. k0 + 7]. m < M; channels from K on are not written.
template <Kind KIND, class T>
__device__ __forceinline__ void finish(const ConvParams& p, const Columns<KIND>& columns, int m, int k0, const int (&sums)[OCTET]) {
  const int row = p.row[m / (p.P * p.Q)];  // a tile may contain pixels of several samples, each with a different row
  const float act_scale = p.act_scale[row];
  float y[OCTET];
#pragma unroll
  for (int e = 0; e < OCTET; ++e) {
    int sum = sums[e];
    if (KIND == U4) sum += p.qmin[row] * columns.weight_sum[e];  // sum(n * w) = sum((n - qmin) * w) + qmin * sum(w), padding taps included
    y[e] = __fmul_rn(__int2float_rn(sum), __fmul_rn(act_scale, columns.scale[e]));
    if (p.bias) y[e] = __fadd_rn(y[e], columns.bias[e]);
  }
  const long long at = static_cast<long long>(m) * p.K + k0;
  T* out = static_cast<T*>(p.out) + at;
  const T* residual = static_cast<const T*>(p.residual) + (p.residual ? at : 0);

  if (p.K % OCTET == 0) {  // then every octet is whole and starts at 16 bytes
    if (p.residual) {
      const uint4 r = *reinterpret_cast<const uint4*>(residual);
      const unsigned pairs[4] = {r.x, r.y, r.z, r.w};
#pragma unroll
      for (int e = 0; e < OCTET; e += 2) {
        y[e] = __fadd_rn(y[e], low_float<T>(pairs[e / 2]));
        y[e + 1] = __fadd_rn(y[e + 1], high_float<T>(pairs[e / 2]));
      }
    }
    *reinterpret_cast<uint4*>(out) = uint4{to_pair<T>(y[0], y[1]), to_pair<T>(y[2], y[3]), to_pair<T>(y[4], y[5]), to_pair<T>(y[6], y[7])};
    return;
  }
#pragma unroll
  for (int e = 0; e < OCTET; ++e) {
    if (k0 + e >= p.K) continue;
    if (p.residual) y[e] = __fadd_rn(y[e], to_float(residual[e]));
    out[e].bits = static_cast<unsigned short>(to_pair<T>(y[e], 0.0f) & 0xFFFF);
  }
}
