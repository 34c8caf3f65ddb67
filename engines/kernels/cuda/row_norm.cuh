// LayerNorm or RMSNorm of each token, then per-sample scale and shift (adaLN), then rounding and packing, in one kernel. `lanes` neighbouring threads, one to eight
// warps, share a token and keep its channels in registers: x is read once, 16 bytes at a time, and nothing but codes is written. The variance is summed about
// the mean, from the registers, so neither cancels. Every step is rounded separately and sums have one order (params.h), so the codes are defined bit for bit.
#pragma once
#include "quantize.cuh"

constexpr int HELD = 4;  // octets of a token that a thread keeps

// The sum of `own` over the threads of each row. `slots` is another of two arrays from one call to the next: a thread that has left the barrier of one call may
// write for the second call after it while others still read this one's.
__device__ __forceinline__ float row_sum(float own, float* slots, int lanes) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) own = __fadd_rn(own, __shfl_xor_sync(0xFFFFFFFFu, own, distance));
  if (lanes == 32) return own;
  if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = own;
  __syncthreads();
  const int first = threadIdx.x / lanes * (lanes / 32);
  float total = slots[first];
  for (int warp = 1; warp < lanes / 32; ++warp) total = __fadd_rn(total, slots[first + warp]);
  return total;
}

// Eight consecutive values as they lie in memory, two to a word; those from `count` on are 0. A token is kept so: half the registers of float32.
template <class T>
__device__ __forceinline__ void load_words(unsigned (&words)[CHANNELS / 2], const T* x, int count, bool wide) {
  if (wide && count > 0) {
    const uint4 all = *reinterpret_cast<const uint4*>(x);
    words[0] = all.x, words[1] = all.y, words[2] = all.z, words[3] = all.w;
  } else {
#pragma unroll
    for (int e = 0; e < CHANNELS; e += 2)
      words[e / 2] = (e < count ? x[e].bits : 0u) | (e + 1 < count ? static_cast<unsigned>(x[e + 1].bits) << 16 : 0u);
  }
}
template <class T>
__device__ __forceinline__ float value_of(const unsigned (&words)[CHANNELS / 2], int e) {
  return e % 2 ? high_float<T>(words[e / 2]) : low_float<T>(words[e / 2]);
}

// Eight of one sample's numbers, one per channel, which start `at` elements into a tensor of x's type.
template <class T>
__device__ __forceinline__ void load_row_of_sample(float (&v)[CHANNELS], const void* columns, long long at, int count, bool wide) {
  const T* const from = static_cast<const T*>(columns) + at;
  load_values(v, from, count, wide && aligned_16(from));
}

// Second half of a norm of tokens: what follows (x - mean) * rstd.
template <class T, class Params>
__device__ __forceinline__ void scale_and_shift(float (&v)[CHANNELS], const Params& p, int n, int c0, int count, bool wide) {
  float column[CHANNELS];
  if (p.gamma && count > 0) {
    load_column(column, p.gamma + c0, count, wide && aligned_16(p.gamma));
#pragma unroll
    for (int e = 0; e < CHANNELS; ++e) v[e] = __fmul_rn(v[e], column[e]);
  }
  if (p.beta && count > 0) {
    load_column(column, p.beta + c0, count, wide && aligned_16(p.beta));
#pragma unroll
    for (int e = 0; e < CHANNELS; ++e) v[e] = __fadd_rn(v[e], column[e]);
  }
  if (p.scale && count > 0) {
    load_row_of_sample<T>(column, p.scale, static_cast<long long>(n) * p.scale_stride + c0, count, wide);
#pragma unroll
    for (int e = 0; e < CHANNELS; ++e) v[e] = __fmul_rn(v[e], __fadd_rn(1.0f, column[e]));
  }
  if (p.shift && count > 0) {
    load_row_of_sample<T>(column, p.shift, static_cast<long long>(n) * p.shift_stride + c0, count, wide);
#pragma unroll
    for (int e = 0; e < CHANNELS; ++e) v[e] = __fadd_rn(v[e], column[e]);
  }
}

template <class T, int BITS, bool ROTATED = false>
__device__ __forceinline__ void quantize_rows(const RowNormParams& p) {
  float* const slots = reinterpret_cast<float*>(fixed_shared<2 * THREADS / 32 * sizeof(float)>());
  const int octets = p.Cb / BITS, lane = threadIdx.x % p.lanes, rows = THREADS / p.lanes;
  const bool wide = p.C % CHANNELS == 0 && aligned_16(p.x);
  const float channels = __int2float_rn(p.C);
  int slot = 0;
  for (int n = blockIdx.y; n < p.N; n += gridDim.y) {
    for (int token0 = blockIdx.x * rows; token0 < p.HW; token0 += gridDim.x * rows) {
      const int token = token0 + threadIdx.x / p.lanes;
      const bool exists = token < p.HW;  // the threads of a token past the end take part in the sums
      const T* const x = static_cast<const T*>(p.x) + (static_cast<long long>(n) * p.HW + (exists ? token : 0)) * p.C;
      unsigned held[HELD][CHANNELS / 2];
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < HELD; ++i) {
        const int c0 = (lane + i * p.lanes) * CHANNELS, count = exists ? min(max(p.C - c0, 0), CHANNELS) : 0;
        load_words(held[i], x + c0, count, wide);
#pragma unroll
        for (int e = 0; e < CHANNELS; ++e) sum = __fadd_rn(sum, value_of<T>(held[i], e));
      }
      const float mean = p.rms ? 0.0f : row_sum(sum, slots + (slot ^= THREADS / 32), p.lanes) / channels;
      sum = 0.0f;
#pragma unroll
      for (int i = 0; i < HELD; ++i) {
        const int count = p.C - (lane + i * p.lanes) * CHANNELS;
#pragma unroll
        for (int e = 0; e < CHANNELS; ++e) {
          const float distance = __fsub_rn(value_of<T>(held[i], e), mean);
          sum = __fadd_rn(sum, e < count ? __fmul_rn(distance, distance) : 0.0f);
        }
      }
      const float variance = row_sum(sum, slots + (slot ^= THREADS / 32), p.lanes) / channels;
      const float rstd = 1.0f / sqrtf(__fadd_rn(variance, p.eps));
      const Row row(p, n);
      byte_t* const codes = p.codes + (static_cast<long long>(n) * p.HW + token) * p.Cb;
#pragma unroll
      for (int i = 0; i < HELD; ++i) {
        const int octet = lane + i * p.lanes, c0 = octet * CHANNELS, count = min(max(p.C - c0, 0), CHANNELS);
        if (!ROTATED && (!exists || octet >= octets)) continue;
        float v[CHANNELS];
#pragma unroll
        for (int e = 0; e < CHANNELS; ++e) v[e] = __fmul_rn(__fsub_rn(value_of<T>(held[i], e), mean), rstd);
        scale_and_shift<T>(v, p, n, c0, count, wide);
        if constexpr (ROTATED) {
          hadamard(v, p.rotation);
          if (!exists || octet >= octets) continue;
        }
        int stored[CHANNELS];
#pragma unroll
        for (int e = 0; e < CHANNELS; ++e) stored[e] = e < count ? encode(v[e], row) : 0;
        store_codes<BITS>(codes + octet * BITS, stored);
      }
    }
  }
}
