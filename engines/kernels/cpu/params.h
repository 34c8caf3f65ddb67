// What the kernels for the CPU read and write. engines/kernels/cpu/launch.py has the same structs; a test compares the offsets.
//
// Activations are [N, HW, C] in bfloat16 or float16 (`type` 0 or 1), channels last. Codes are int8 [N, HW, Cb], Cb a multiple of 16, the channels behind C
// are 0. A kernel is a function of its params, the thread and the number of threads; every thread of the team calls it, and a barrier follows. Results do not
// depend on the number of threads.
#pragma once

#include <cstdint>

// y = ((sum * (act_scale[row] * weight_scale) + bias + sample_bias) * gate + residual), each step rounded to float32.
// By Winograd's algorithm (winograd.h) weight and start have 16 places of a transformed filter in place of R * S taps: weights of a group
// [16][Cb / 4][channels][4], start [16][K filled up to 16].
struct ConvParams {
  const int8_t* codes;
  const int8_t* weight;      // groups [R * S][Cb / 4][channels][4] of 16 * edm_vectors() output channels, K filled up to 16 by 0
  const int32_t* start;      // [K filled up to 16]: -128 * the sum of each filter's weights, because products are of codes + 128
  const int8_t* zero;        // [Cb] of 0, read where a filter reaches beyond the map
  const int32_t* row;        // [N]
  const float* act_scale;    // by row
  const float* weight_scale; // [K]
  const float* bias;         // [K] or null
  const void* sample_bias;   // [N, K] of the output's type, or null
  const void* gate;          // likewise
  const void* residual;      // [N, P, Q, K] or null
  void* out;                 // [N, P, Q, K]
  int32_t N, H, W, Cb, K, R, S, P, Q, padding, stride, sample_bias_stride, gate_stride, saturate, type;
};

// codes = clip(round(v * inv_scale[row])), half to even, NaN to qmin; v = activation(((x - mean) * rstd) * gamma + beta), which is rotated in blocks of `rotation`
// channels (0: not; without a norm), as engines/kernels/cuda/params.h specifies.
struct QuantizeParams {
  const void* x;           // [N, HW, C]; GEGLU: [N, HW, 2C]
  int8_t* codes;
  const int32_t* row;      // [N]
  const float* inv_scale;  // by row
  const int32_t* qmin;
  const int32_t* qmax;
  const float* mean;       // [N, groups], null without a norm
  const float* rstd;
  const float* gamma;      // [C] or null
  const float* beta;
  int32_t N, HW, C, Cb, groups, activation, rotation, type;  // activation: 0 none, 1 SiLU, 2 GELU, 3 GELU by tanh, 4 GEGLU
};

// LayerNorm or RMSNorm of each token, then (1 + scale) and shift per sample, then rotation and codes as above.
struct RowNormParams {
  const void* x;
  int8_t* codes;
  const int32_t* row;
  const float* inv_scale;
  const int32_t* qmin;
  const int32_t* qmax;
  const float* gamma;
  const float* beta;
  const void* scale;  // [N, C] of x's type, or null
  const void* shift;
  float eps;
  int32_t N, HW, C, Cb, scale_stride, shift_stride, rms, rotation, type;
};

// Mean and 1 / sqrt(variance + eps) of each sample's groups.
struct StatsParams {
  const void* x;   // [N, HW, C]
  float* partial;  // [N, chunks, 2, C]: sums and sums of squares of STATS_CHUNK pixels about the first of them
  float* mean;     // [N, groups]
  float* rstd;
  float eps;
  int32_t N, HW, C, groups, type;
};

// Rows of bytes from one place to another: a part of a concatenation.
struct CopyParams {
  const void* source;
  void* target;
  int64_t rows, bytes, source_stride, target_stride;
};

// Each pixel of [N, H, W, `bytes`] repeated `factor` times along both axes.
struct UpsampleParams {
  const void* source;
  void* target;
  int64_t N, H, W, bytes, factor;
};

// softmax(Q K^T * scale) V of each head. Strides of samples, heads and tokens in elements; neighbouring channels lie side by side.
struct AttentionParams {
  const void* query;
  const void* key;
  const void* value;
  void* out;  // [N, queries, heads, D]
  int64_t query_stride[3], key_stride[3], value_stride[3];
  float scale;
  int32_t N, heads, queries, keys, D, type;
};

struct Call {
  int32_t kernel;  // place in KERNELS
  const void* params;
};
