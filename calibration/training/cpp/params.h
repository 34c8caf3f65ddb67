// What the kernels read and write. calibration/training/cpp/library.py has the same structs; a test compares the offsets.
#pragma once

#include <cstdint>

constexpr int64_t FAKE_QUANT_CHUNK = 8192;  // values of a row whose gradients are summed in float32, and the work of a thread

// Matrices are [N, M] of the type: 0 float32, 1 bfloat16.
struct FakeQuantParams {
  const void* grad;     // to the result; gradients only
  const void* x;
  void* out;            // the result, or the gradient to x
  const float* scale;   // [N]
  const float* qmin;    // [N], integers
  const float* levels;  // [N], integers
  float* partial;       // [N, chunks, 2]
  float* grad_scale;    // [N]
  float* grad_qmin;     // [N]
  int64_t N, M;
  int32_t type;
};

// Feature maps are [N, HW, C] in bfloat16.
struct GroupNormParams {
  const void* grad;    // to the result; gradients only
  const void* x;
  void* out;           // the result, or the gradient to x
  const float* gamma;  // [C]
  const float* beta;   // [C]
  float* mean;         // [N, groups], written by the forward pass
  float* rstd;
  float* grad_gamma;   // [N, C]: of each sample
  float* grad_beta;    // [N, C]
  float eps;
  int32_t N, HW, C, groups, silu;
};
