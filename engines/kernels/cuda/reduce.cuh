// The second half of a split convolution: adds the splits' int32 sums, exact in any order, and applies the epilogue.
#pragma once
#include "epilogue.cuh"

// A thread processes an octet of channels of one pixel: neighbouring threads read neighbouring 32 bytes of each split.
template <Kind KIND, class T>
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
    finish<KIND, T>(p, Columns<KIND>(p, k0), m, k0, sums);
  }
}
