// Rotary position embedding of queries or keys: neighbouring channels are a pair that its token's angle turns. Bound by memory: x is read and written once.
#pragma once
#include "epilogue.cuh"

// A thread takes an octet of channels, four pairs, of one head: neighbouring threads access neighbouring 16 bytes. Heads share their token's cosines.
template <class T>
__device__ __forceinline__ void rotate(const RotaryParams& p) {
  const int octets = p.D / OCTET, items = p.N * p.L * p.H * octets;
  for (int item = blockIdx.x * THREADS + threadIdx.x; item < items; item += gridDim.x * THREADS) {
    const int head = item / octets, octet = item - head * octets, token = head / p.H % p.L;
    const long long at = static_cast<long long>(item) * OCTET, angle = (static_cast<long long>(token) * p.D + octet * OCTET);
    float v[OCTET], y[OCTET];
    load_values(v, static_cast<const T*>(p.x) + at, OCTET, true);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float4 cosine = reinterpret_cast<const float4*>(p.cosine + angle)[half], sine = reinterpret_cast<const float4*>(p.sine + angle)[half];
      const float cosines[4] = {cosine.x, cosine.y, cosine.z, cosine.w}, sines[4] = {sine.x, sine.y, sine.z, sine.w};
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        const float a = v[half * 4 + e], b = v[half * 4 + e + 1];
        y[half * 4 + e] = __fsub_rn(__fmul_rn(a, cosines[e]), __fmul_rn(b, sines[e]));
        y[half * 4 + e + 1] = __fadd_rn(__fmul_rn(b, cosines[e + 1]), __fmul_rn(a, sines[e + 1]));
      }
    }
    *reinterpret_cast<uint4*>(static_cast<T*>(p.out) + at) = uint4{to_pair<T>(y[0], y[1]), to_pair<T>(y[2], y[3]), to_pair<T>(y[4], y[5]), to_pair<T>(y[6], y[7])};
  }
}
