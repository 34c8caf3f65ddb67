// The kernels for the CPU: `run` executes a list of calls on a team of threads.
#include <omp.h>

#include <type_traits>

#include "attention.h"
#include "attention_bf16.h"
#include "convolution.h"
#include "convolution_tiles.h"
#include "norm.h"
#include "params.h"
#include "quantize.h"
#include "winograd.h"

namespace {

void run_convolve(const void* params, int thread, int threads) {
  const ConvParams& p = *(const ConvParams*)params;
#if defined(HAS_TILES)
  if (tiles_in_use) return p.type ? convolve_tiles<F16>(p, thread, threads) : convolve_tiles<Bf16>(p, thread, threads);
#endif
  p.type ? convolve<F16>(p, thread, threads) : convolve<Bf16>(p, thread, threads);
}

void run_winograd(const void* params, int thread, int threads) {
  const ConvParams& p = *(const ConvParams*)params;
  p.type ? winograd<F16>(p, thread, threads) : winograd<Bf16>(p, thread, threads);
}

void run_quantize(const void* params, int thread, int threads) {
  const QuantizeParams& p = *(const QuantizeParams*)params;
  p.type ? quantize<F16>(p, thread, threads) : quantize<Bf16>(p, thread, threads);
}

void run_quantize_rows(const void* params, int thread, int threads) {
  const RowNormParams& p = *(const RowNormParams*)params;
  p.type ? quantize_rows<F16>(p, thread, threads) : quantize_rows<Bf16>(p, thread, threads);
}

void run_group_stats(const void* params, int thread, int threads) {
  const StatsParams& p = *(const StatsParams*)params;
  p.type ? group_stats<F16>(p, thread, threads) : group_stats<Bf16>(p, thread, threads);
}

void run_attention(const void* params, int thread, int threads) {
  const AttentionParams& p = *(const AttentionParams*)params;
#if defined(__AVX512BF16__)
  if (!p.type && has_pairs(p)) return attention_bf16(p, thread, threads);
#endif
  p.type ? attention<F16>(p, thread, threads) : attention<Bf16>(p, thread, threads);
}

void run_copy(const void* params, int thread, int threads) {
  const CopyParams& p = *(const CopyParams*)params;
  for (int64_t i = p.rows * thread / threads; i < p.rows * (thread + 1) / threads; i++)
    memcpy((char*)p.target + i * p.target_stride, (const char*)p.source + i * p.source_stride, p.bytes);
}

void run_upsample(const void* params, int thread, int threads) {
  const UpsampleParams& p = *(const UpsampleParams*)params;
  const int64_t rows = p.N * p.H * p.factor, width = p.W * p.factor * p.bytes;
  for (int64_t i = rows * thread / threads; i < rows * (thread + 1) / threads; i++) {
    const char* from = (const char*)p.source + i / p.factor * p.W * p.bytes;
    char* to = (char*)p.target + i * width;
    for (int64_t x = 0; x < p.W * p.factor; x++) memcpy(to + x * p.bytes, from + x / p.factor * p.bytes, p.bytes);
  }
}

using Kernel = void (*)(const void*, int, int);
constexpr Kernel KERNELS[] = {run_convolve, run_winograd, run_quantize, run_quantize_rows, run_group_stats, run_attention, run_copy, run_upsample};

}  // namespace

extern "C" void edm_run(const Call* calls, int count, int threads) {
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num(), team = omp_get_num_threads();
    for (int i = 0; i < count; i++) {
      KERNELS[calls[i].kernel](calls[i].params, thread, team);
#pragma omp barrier
    }
  }
}

// Vectors of 16 output channels that are computed together, whose weights lie side by side.
extern "C" int edm_vectors() { return MOST_VECTORS; }

// Decides whether tiles are used from now on: 1 where they were compiled, the system permits them and they compute what they should.
extern "C" int edm_use_tiles() {
#if defined(HAS_TILES)
  return tiles_in_use = tiles_work();
#else
  return 0;
#endif
}

// What the products are computed by.
extern "C" const char* edm_instructions() {
#if defined(HAS_TILES)
  if (tiles_in_use) return "AMX";
#endif
#if defined(__AVX512VNNI__)
  return "AVX512-VNNI";
#elif defined(__AVXVNNI__)
  return "AVX-VNNI";
#elif defined(__AVX2__)
  return "AVX2";
#else
  return "portable";
#endif
}
