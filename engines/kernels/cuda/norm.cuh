// First half of GroupNorm: mean and 1 / sqrt(variance + eps) of each group of channels of each sample, channels last, in two kernels. The first reads x once:
// its blocks share out pixels and channels, and write for every chunk of pixels and every channel the mean and the sum of squared distances from it. The second
// merges these few numbers. Sums are of x - x0, where x0 is the chunk's first pixel: E[x^2] - E[x]^2 would lose all precision where the mean is large. Of n
// numbers none is further than sqrt(n - 1) standard deviations from the mean, so a chunk loses at most a factor n of its sum's precision.
// Source: Chan, Golub and LeVeque, "Algorithms for computing the sample variance", The American Statistician 37(3), 1983 (shifted data, pairwise merging).
#pragma once
#include "quantize.cuh"

// Mean and squared distances of `count` numbers.
struct Moments {
  float mean, squares;
  int count;
};

// Those of two sets of numbers together. Where one is empty, those of the other.
__device__ __forceinline__ Moments merged(const Moments& a, const Moments& b) {
  const int count = a.count + b.count;
  if (b.count == 0) return a;
  const float distance = b.mean - a.mean, share = __int2float_rn(b.count) / __int2float_rn(count);
  return {a.mean + distance * share, a.squares + b.squares + distance * distance * share * __int2float_rn(a.count), count};
}

// How many of a chunk's pixels a lane takes: lane, lane + lanes, ...
__device__ __forceinline__ int pixels_of_lane(int lane, int lanes, int pixels) { return lane < lanes ? divide_up(max(pixels - lane, 0), lanes) : 0; }

// Partial statistics. A thread takes an octet of channels of every `lanes`-th pixel of its chunk: neighbouring threads read neighbouring 16 bytes.
// Block x takes chunk x, block y octets y * STATS_OCTETS onwards, block z sample z.
template <class T>
__device__ __forceinline__ void group_stats_partial(const StatsParams& p) {
  // By channel of the octet, then by thread. The pitch puts the eight channels of four octets, which a warp merges, into 32 banks.
  constexpr int PITCH_FLOATS = THREADS + 4;
  float* const means = reinterpret_cast<float*>(fixed_shared<2 * CHANNELS * PITCH_FLOATS * sizeof(float)>());
  float* const distances = means + CHANNELS * PITCH_FLOATS;
  const int octets = divide_up(p.C, CHANNELS), chunks = divide_up(p.HW, p.chunk);
  const bool wide = p.C % CHANNELS == 0 && aligned_16(p.x);
  for (int n = blockIdx.z; n < p.N; n += gridDim.z)
    for (int octet0 = blockIdx.y * STATS_OCTETS; octet0 < octets; octet0 += gridDim.y * STATS_OCTETS)
      for (int chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
        const int width = min(STATS_OCTETS, octets - octet0), lanes = THREADS / width, column = threadIdx.x % width, lane = threadIdx.x / width;
        const int c0 = (octet0 + column) * CHANNELS, channels = min(p.C - c0, CHANNELS), begin = chunk * p.chunk, end = min(begin + p.chunk, p.HW);
        const T* x = static_cast<const T*>(p.x) + static_cast<long long>(n) * p.HW * p.C + c0;
        float shift[CHANNELS], sum[CHANNELS] = {}, squares[CHANNELS] = {};
        load_values(shift, x + static_cast<long long>(begin) * p.C, channels, wide);
        // The last THREADS % width threads have no whole pixel.
        const int first = lane < lanes ? begin + lane : end;
#pragma unroll 4
        for (int pixel = first; pixel < end; pixel += lanes) {
          float v[CHANNELS];
          load_values(v, x + static_cast<long long>(pixel) * p.C, channels, wide);
#pragma unroll
          for (int e = 0; e < CHANNELS; ++e) {
            const float distance = v[e] - shift[e];
            sum[e] += distance, squares[e] += distance * distance;
          }
        }
        const int count = pixels_of_lane(lane, lanes, end - begin);
        const float inverse = count > 0 ? 1.0f / __int2float_rn(count) : 0.0f;
#pragma unroll
        for (int e = 0; e < CHANNELS; ++e) {
          means[e * PITCH_FLOATS + threadIdx.x] = shift[e] + sum[e] * inverse;
          distances[e * PITCH_FLOATS + threadIdx.x] = squares[e] - sum[e] * sum[e] * inverse;
        }
        __syncthreads();
        for (int item = threadIdx.x; item < min(width * CHANNELS, p.C - octet0 * CHANNELS); item += THREADS) {
          Moments total = {0.0f, 0.0f, 0};
          for (int other = 0; other < lanes; ++other) {
            const int at = item % CHANNELS * PITCH_FLOATS + other * width + item / CHANNELS;
            total = merged(total, {means[at], distances[at], pixels_of_lane(other, lanes, end - begin)});
          }
          float* to = p.partial + ((static_cast<long long>(n) * chunks + chunk) * p.C + octet0 * CHANNELS + item) * 2;
          *reinterpret_cast<float2*>(to) = float2{total.mean, total.squares};
        }
        __syncthreads();  // the next chunk overwrites these
      }
}

// The statistics of a group, from those of its channels in every chunk: a block for each group and sample.
__device__ __forceinline__ void merge_group_stats(const StatsParams& p) {
  Moments* const by_warp = reinterpret_cast<Moments*>(fixed_shared<THREADS / 32 * sizeof(Moments)>());
  const int size = p.C / p.groups, chunks = divide_up(p.HW, p.chunk), items = chunks * size;
  for (int n = blockIdx.y; n < p.N; n += gridDim.y)
    for (int group = blockIdx.x; group < p.groups; group += gridDim.x) {
      Moments own = {0.0f, 0.0f, 0};
      for (int item = threadIdx.x; item < items; item += THREADS) {
        const int chunk = item / size, c = group * size + item - chunk * size;
        const float2 from = reinterpret_cast<const float2*>(p.partial)[(static_cast<long long>(n) * chunks + chunk) * p.C + c];
        own = merged(own, {from.x, from.y, min(p.chunk, p.HW - chunk * p.chunk)});
      }
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) {
        const Moments other = {__shfl_xor_sync(0xFFFFFFFFu, own.mean, distance), __shfl_xor_sync(0xFFFFFFFFu, own.squares, distance),
                               __float_as_int(__shfl_xor_sync(0xFFFFFFFFu, __int_as_float(own.count), distance))};
        own = (threadIdx.x & distance) ? merged(other, own) : merged(own, other);  // the same order in both lanes
      }
      if (threadIdx.x % 32 == 0) by_warp[threadIdx.x / 32] = own;
      __syncthreads();
      if (threadIdx.x == 0) {
        Moments total = by_warp[0];
        for (int warp = 1; warp < THREADS / 32; ++warp) total = merged(total, by_warp[warp]);
        p.mean[n * p.groups + group] = total.mean;
        p.rstd[n * p.groups + group] = 1.0f / sqrtf(total.squares / __int2float_rn(total.count) + p.eps);
      }
      __syncthreads();  // the next group overwrites these
    }
}
