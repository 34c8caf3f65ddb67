// From int32 sums to the output, eight neighbouring channels of one pixel at a time: 16 bytes of float16, one store. The same function ends a convolution and the
// sum over its splits. Arithmetic as specified in params.h: __fmul_rn and __fadd_rn round each step and cannot be fused, so the result equals numpy's bit for bit.
#pragma once
#include "device.cuh"

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

// Eight values of sample n in a tensor [N][K] whose samples are `stride` apart.
template <class T>
__device__ __forceinline__ void load_of_sample(float (&v)[OCTET], const void* tensor, int stride, int n, int k0, int K) {
  const T* from = static_cast<const T*>(tensor) + static_cast<long long>(n) * stride + k0;
  load_values(v, from, K - k0, K % OCTET == 0 && aligned_16(from));
}

// An integer sum as the number it stands for.
template <Kind KIND>
__device__ __forceinline__ float dequantized(const ConvParams& p, int row, int sum, float act_scale, float weight_scale, int weight_sum) {
  if (KIND == U4) sum += p.qmin[row] * weight_sum;  // sum(n * w) = sum((n - qmin) * w) + qmin * sum(w), padding taps included
  return __fmul_rn(__int2float_rn(sum), __fmul_rn(act_scale, weight_scale));
}

// Writes y[m][k0 .. k0 + 7]. m < M; channels from K on are not written. With a branch `sums` are the bits of float32 numbers: dequantized, the branch added.
template <Kind KIND, class T, bool BRANCH = false>
__device__ __forceinline__ void finish(const ConvParams& p, const Columns<KIND>& columns, int m, int k0, const int (&sums)[OCTET]) {
  const int n = m / (p.P * p.Q), row = p.row[n];  // a tile may contain pixels of several samples, each with a different row
  const float act_scale = p.act_scale[row];
  const bool whole = p.K % OCTET == 0;  // then every octet of y is whole and starts at 16 bytes
  float y[OCTET], operand[OCTET];
#pragma unroll
  for (int e = 0; e < OCTET; ++e) {
    y[e] = BRANCH ? __int_as_float(sums[e]) : dequantized<KIND>(p, row, sums[e], act_scale, columns.scale[e], columns.weight_sum[e]);
    if (p.bias) y[e] = __fadd_rn(y[e], columns.bias[e]);
  }
  if (p.sample_bias) {
    load_of_sample<T>(operand, p.sample_bias, p.sample_bias_stride, n, k0, p.K);
#pragma unroll
    for (int e = 0; e < OCTET; ++e) y[e] = __fadd_rn(y[e], operand[e]);
  }
  if (p.gate) {
    load_of_sample<T>(operand, p.gate, p.gate_stride, n, k0, p.K);
#pragma unroll
    for (int e = 0; e < OCTET; ++e) y[e] = __fmul_rn(y[e], operand[e]);
  }
  const long long at = static_cast<long long>(m) * p.K + k0;
  T* out = static_cast<T*>(p.out) + at;
  if (p.residual) {
    load_values(operand, static_cast<const T*>(p.residual) + at, p.K - k0, whole);
#pragma unroll
    for (int e = 0; e < OCTET; ++e) y[e] = __fadd_rn(y[e], operand[e]);
  }
  if (p.saturate) {
#pragma unroll
    for (int e = 0; e < OCTET; ++e) y[e] = y[e] > 65504.0f ? 65504.0f : y[e] < -65504.0f ? -65504.0f : y[e];
  }
  if (whole) {
    *reinterpret_cast<uint4*>(out) = uint4{to_pair<T>(y[0], y[1]), to_pair<T>(y[2], y[3]), to_pair<T>(y[4], y[5]), to_pair<T>(y[6], y[7])};
    return;
  }
#pragma unroll
  for (int e = 0; e < OCTET; ++e) {
    if (k0 + e >= p.K) continue;
    out[e].bits = static_cast<unsigned short>(to_pair<T>(y[e], 0.0f) & 0xFFFF);
  }
}
