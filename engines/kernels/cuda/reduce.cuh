// The second half of a split convolution: adds the splits' int32 sums, exact in any order, and applies the epilogue.
#pragma once
#include "epilogue.cuh"

// The sum over the rank that a branch adds to an octet of numbers, whose bits are in `sums`.
template <class T>
__device__ __forceinline__ void add_branch(const ConvParams& p, int m, int k0, int (&sums)[OCTET]) {
  const T* const low = static_cast<const T*>(p.low) + static_cast<long long>(m) * p.low_stride;
  for (int r = 0; r < p.rank; r += OCTET) {
    float a[OCTET], b[OCTET];
    load_values(a, low + r, OCTET, true);
#pragma unroll
    for (int e = 0; e < OCTET; ++e) {
      load_values(b, static_cast<const T*>(p.up) + static_cast<long long>(min(k0 + e, p.K - 1)) * p.rank + r, OCTET, true);
      float y = __int_as_float(sums[e]);
#pragma unroll
      for (int i = 0; i < OCTET; ++i) y = fmaf(a[i], b[i], y);
      sums[e] = __float_as_int(y);
    }
  }
}

// A thread processes an octet of channels of one pixel: neighbouring threads read neighbouring 32 bytes of each split.
template <Kind KIND, class T, bool BRANCH = false>
__device__ __forceinline__ void reduce(const ConvParams& p) {
  const int M = p.N * p.P * p.Q, octets = divide_up(p.K, OCTET), items = M * octets;
  const long long split_size = static_cast<long long>(M) * p.K;
  for (int item = blockIdx.x * THREADS + threadIdx.x; item < items; item += gridDim.x * THREADS) {
    const int m = item / octets, k0 = (item - m * octets) * OCTET;
    const int* from = p.partial + static_cast<long long>(m) * p.K + k0;
    int sums[OCTET] = {};
    for (int split = 0; split < p.splits; ++split, from += split_size) {
      int part[OCTET] = {};
      if (p.K % OCTET == 0) {
        load_octet(part, from);
      } else {
#pragma unroll
        for (int e = 0; e < OCTET; ++e)
          if (k0 + e < p.K) part[e] = from[e];
      }
#pragma unroll
      for (int e = 0; e < OCTET; ++e) sums[e] += part[e];
    }
    const Columns<KIND> columns(p, k0);
    if constexpr (BRANCH) {
      const int row = p.row[m / (p.P * p.Q)];
#pragma unroll
      for (int e = 0; e < OCTET; ++e)
        sums[e] = __float_as_int(dequantized<KIND>(p, row, sums[e], p.act_scale[row], columns.scale[e], columns.weight_sum[e]));
      add_branch<T>(p, m, k0, sums);
    }
    finish<KIND, T, BRANCH>(p, columns, m, k0, sums);
  }
}
