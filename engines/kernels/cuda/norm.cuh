// First half of GroupNorm: mean and 1 / sqrt(variance + eps) of each group of channels of each sample, channels last. Two passes over the data (the second
// reads it from L2): first the mean, then the squared distances from it, because E[x^2] - E[x]^2 loses all precision where the mean is large.
#pragma once
#include "device.cuh"

// A group's channels are a few neighbouring bytes of every pixel. A block takes as many groups as fill 16 channels: 32 bytes, the smallest memory transaction.
constexpr int BUNDLE_CHANNELS = 16;

// The sum over a warp, in every lane. The order is fixed, so results are reproducible bit for bit.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x = __fadd_rn(x, __shfl_xor_sync(0xFFFFFFFFu, x, distance));
  return x;
}

template <class T>
__device__ __forceinline__ void group_stats(const StatsParams& p) {
  const int size = p.C / p.groups, bundle = divide_up(BUNDLE_CHANNELS, size), bundles = divide_up(p.groups, bundle);
  float* const by_thread = reinterpret_cast<float*>(fixed_shared<(THREADS + BUNDLE_CHANNELS) * sizeof(float)>());
  float* const by_group = by_thread + THREADS;  // the mean of each group of the bundle; a bundle has at most 16

  for (int n = blockIdx.y; n < p.N; n += gridDim.y) {
    const T* x = static_cast<const T*>(p.x) + static_cast<long long>(n) * p.HW * p.C;
    for (int b = blockIdx.x; b < bundles; b += gridDim.x) {
      // A thread keeps to one channel where the bundle has no more channels than the block has threads, else to several of the same group.
      const int group0 = b * bundle, groups = min(bundle, p.groups - group0), width = groups * size, lanes = min(width, THREADS);
      const int channel = threadIdx.x % lanes, first_pixel = threadIdx.x / lanes, pixel_step = THREADS / lanes;
      const bool active = first_pixel < pixel_step;  // the last THREADS % lanes threads have no whole pixel
      const int group = width > THREADS ? 0 : channel / size;
      const float count = __int2float_rn(p.HW) * __int2float_rn(size);

      for (int pass = 0; pass < 2; ++pass) {
        const float mean = pass == 0 ? 0.0f : by_group[group];
        float sum = 0.0f;
        for (int pixel = first_pixel; active && pixel < p.HW; pixel += pixel_step)
          for (int c = channel; c < width; c += lanes) {
            const float distance = to_float(x[static_cast<long long>(pixel) * p.C + group0 * size + c]) - mean;
            sum += pass == 0 ? distance : distance * distance;
          }
        by_thread[threadIdx.x] = active ? sum : 0.0f;
        __syncthreads();
        for (int g = threadIdx.x / 32; g < groups; g += THREADS / 32) {  // one warp per group: it adds the threads of that group
          float part = 0.0f;
          for (int t = threadIdx.x % 32; t < THREADS; t += 32)
            if (width > THREADS || t % lanes / size == g) part += by_thread[t];
          const float total = warp_sum(part) / count;
          if (threadIdx.x % 32 != 0) continue;
          const int at = n * p.groups + group0 + g;
          if (pass == 0) p.mean[at] = by_group[g] = total;
          if (pass == 1) p.rstd[at] = 1.0f / sqrtf(total + p.eps);
        }
        __syncthreads();
      }
    }
  }
}
