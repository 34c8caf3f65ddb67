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

// Eight of one sample's numbers, one per channel, or nothing where there are none.
template <class T>
__device__ __forceinline__ const T* of_sample(const void* columns, int n, int stride) {
  return columns ? static_cast<const T*>(columns) + static_cast<long long>(n) * stride : nullptr;
}

template <class T, int BITS>
__device__ __forceinline__ void quantize_rows(const RowNormParams& p) {
  float* const slots = reinterpret_cast<float*>(fixed_shared<2 * THREADS / 32 * sizeof(float)>());
  const int octets = p.Cb / BITS, lane = threadIdx.x % p.lanes, rows = THREADS / p.lanes;
  const bool wide = p.C % CHANNELS == 0 && aligned_16(p.x);
  const float channels = __int2float_rn(p.C);
  int slot = 0;
  for (int n = blockIdx.y; n < p.N; n += gridDim.y) {
    const Row row(p, n);
    const T* const scale = of_sample<T>(p.scale, n, p.scale_stride);
    const T* const shift = of_sample<T>(p.shift, n, p.shift_stride);
    for (int token0 = blockIdx.x * rows; token0 < p.HW; token0 += gridDim.x * rows) {
      const int token = token0 + threadIdx.x / p.lanes;
      const bool exists = token < p.HW;  // the threads of a token past the end take part in the sums
      const T* const x = static_cast<const T*>(p.x) + (static_cast<long long>(n) * p.HW + (exists ? token : 0)) * p.C;
      float v[HELD][CHANNELS], sum = 0.0f;
#pragma unroll
      for (int i = 0; i < HELD; ++i) {
        const int c0 = (lane + i * p.lanes) * CHANNELS, count = exists ? min(max(p.C - c0, 0), CHANNELS) : 0;
        if (count > 0) load_values(v[i], x + c0, count, wide);
#pragma unroll
        for (int e = 0; e < CHANNELS; ++e) v[i][e] = e < count ? v[i][e] : 0.0f, sum = __fadd_rn(sum, v[i][e]);
      }
      const float mean = p.rms ? 0.0f : row_sum(sum, slots + (slot ^= THREADS / 32), p.lanes) / channels;
      sum = 0.0f;
#pragma unroll
      for (int i = 0; i < HELD; ++i) {
        const int count = p.C - (lane + i * p.lanes) * CHANNELS;
#pragma unroll
        for (int e = 0; e < CHANNELS; ++e) {
          v[i][e] = __fsub_rn(v[i][e], mean);
          sum = __fadd_rn(sum, e < count ? __fmul_rn(v[i][e], v[i][e]) : 0.0f);
        }
      }
      const float variance = row_sum(sum, slots + (slot ^= THREADS / 32), p.lanes) / channels;
      const float rstd = 1.0f / sqrtf(__fadd_rn(variance, p.eps));
      byte_t* const codes = p.codes + (static_cast<long long>(n) * p.HW + token) * p.Cb;
#pragma unroll
      for (int i = 0; i < HELD; ++i) {
        const int octet = lane + i * p.lanes, c0 = octet * CHANNELS, count = min(max(p.C - c0, 0), CHANNELS);
        if (!exists || octet >= octets) continue;
        float column[CHANNELS];
#pragma unroll
        for (int e = 0; e < CHANNELS; ++e) v[i][e] = __fmul_rn(v[i][e], rstd);
        if (p.gamma && count > 0) {
          load_column(column, p.gamma + c0, count, wide && aligned_16(p.gamma));
#pragma unroll
          for (int e = 0; e < CHANNELS; ++e) v[i][e] = __fmul_rn(v[i][e], column[e]);
        }
        if (p.beta && count > 0) {
          load_column(column, p.beta + c0, count, wide && aligned_16(p.beta));
#pragma unroll
          for (int e = 0; e < CHANNELS; ++e) v[i][e] = __fadd_rn(v[i][e], column[e]);
        }
        if (scale && count > 0) {
          load_values(column, scale + c0, count, wide && aligned_16(scale));
#pragma unroll
          for (int e = 0; e < CHANNELS; ++e) v[i][e] = __fmul_rn(v[i][e], __fadd_rn(1.0f, column[e]));
        }
        if (shift && count > 0) {
          load_values(column, shift + c0, count, wide && aligned_16(shift));
#pragma unroll
          for (int e = 0; e < CHANNELS; ++e) v[i][e] = __fadd_rn(v[i][e], column[e]);
        }
        int stored[CHANNELS];
#pragma unroll
        for (int e = 0; e < CHANNELS; ++e) stored[e] = e < count ? encode(v[i][e], row) : 0;
        store_codes<BITS>(codes + octet * BITS, stored);
      }
    }
  }
}
