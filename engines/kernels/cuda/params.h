// Kernel parameters, and the memory layout of packed tensors. The only specification of both; launch.py mirrors the structs.
//
// Codes of an activation:  [N][H][W][Cb] bytes, channels last. Cb = bytes of all channels, rounded up to 16, so that every pixel starts at a
//   16-byte chunk, the unit that the convolution copies. 4 bits: two codes a byte, channel 2k in the low nibble of byte k (ONNX INT4's order).
//   8 bits: one code a byte. The content of the padding channels does not matter: the weight is 0 there.
// Codes of a weight:       [Cout][R * S][Cb] bytes, the same order of channels; padding channels hold 0.
// Signed and unsigned:     an `s4` activation stores the code n in [-8, 7] itself; a `u4` activation stores n - qmin[row] in [0, 15], for ranges
//   such as [-3, 12]. The convolution then sums (n - qmin) * w, and the epilogue adds qmin * sum(w). `s8` stores n.
// Zero padding of the map: the code of real 0 is n = 0, so -qmin[row] in a u4 tensor: the loader copies it from `zero`, one 16-byte chunk a row.
// A Linear is a 1x1 convolution: x [B, L, C] is N = B, H = L, W = 1.
#pragma once

typedef unsigned char byte_t;

// Operations before the rounding; a kernel is compiled for each, but for quantize_branch_*, which choose at run time.
enum Prologue { PLAIN, SILU, NORM, NORM_SILU, GELU, GELU_TANH, GEGLU };

struct QuantizeParams {
  const void* x;           // float16 or bfloat16, channels last [N][HW][C] or channels first [N][C][HW]; GEGLU: [N][HW][2C], values, then gates
  byte_t* codes;           // [N][HW][Cb]
  const int* row;          // [N] table row of each sample
  const float* inv_scale;  // [rows]
  const int* qmin;         // [rows]
  const int* qmax;         // [rows]
  const float* mean;       // [N][groups]; for NORM only, as are the next three
  const float* rstd;       // [N][groups]
  const float* gamma;      // [C] or null
  const float* beta;       // [C] or null
  int N, HW, C, Cb, groups;
  int unsigned_codes;      // 1: store n - qmin[row] (u4), 0: store n
  int rotation;            // channels of a block, a power of two from 2 to 256 that divides C; for the kernels *_rotated
};
// n = rint(clip(value * inv_scale[row], qmin[row], qmax[row])), half to even, float32. NaN becomes qmin[row], -0.0 becomes 0.
// NORM: value = ((x - mean) * rstd) * gamma + beta, each step rounded to float32 separately; a null gamma or beta omits its step.
// SILU: value = v / (1 + exp(-v)) in float32, relative error below 2^-17 where |v| < 64, and below 2^-20 where v > -8 (below -8 the result is in [-0.003, 0]).
// GELU: v * Phi(v), the cumulative normal distribution by a polynomial of degree 12 in v^2 (gelu() in quantize.cuh), fused multiply-adds in the order of that
//   function, so defined bit for bit; within 2^-19 of the exact value, and relative to it within 2^-19 where v > -1. GEGLU: x * GELU(gate), rounded to float32.
// GELU_TANH: v / (1 + exp(-2u)), u = sqrt(2 / pi) (v + 0.044715 v^3), which equals v (1 + tanh(u)) / 2; its error is that of SILU at 2u.
// ROTATED: behind all of these, each block of `rotation` channels is multiplied by the regular Hadamard matrix (edm_deploy/network/rotation.py), factor by factor,
//   neighbouring channels first: where log2(rotation) is odd, (a + b, a - b) of each pair; then y_i = (x_i + x_{i ^ l}) + (x_{i ^ h} - x_{i ^ l ^ h}) for the next two
//   address bits l < h of the channel, and so on; at last times 2^-ceil(log2(rotation) / 2). Each sum is rounded to float32.

struct RowNormParams {
  const void* x;           // float16 or bfloat16 [N][HW][C]
  byte_t* codes;           // [N][HW][Cb]
  const int* row;          // [N], as the next three in QuantizeParams
  const float* inv_scale;  // [rows]
  const int* qmin;         // [rows]
  const int* qmax;         // [rows]
  const float* gamma;      // [C] or null
  const float* beta;       // [C] or null
  const void* scale;       // of x's type [N][C], or null
  const void* shift;       // of x's type [N][C], or null
  int N, HW, C, Cb;
  int unsigned_codes;
  int scale_stride, shift_stride;  // elements from one sample to the next
  int lanes;               // threads that share a token: the smallest of 32, 64, 128, 256 with C <= 32 * lanes
  int rms;                 // 1: RMSNorm, mean = 0
  int rotation;            // as in QuantizeParams
  float eps;
};
// value = ((x - mean) * rstd * gamma + beta) * (1 + scale) + shift, each step rounded to float32 separately, then as QuantizeParams; a null operand omits its step.
// mean = S(x) / C, rstd = 1 / sqrt(S((x - mean)^2) / C + eps). S sums in float32: thread t of a token adds channels 8t .. 8t + 7, then those of octets
// t + lanes, t + 2 * lanes, ...; the 32 threads of a warp in five steps, each with the thread whose number differs in bit 4, 3, 2, 1, 0; then warps in order.

struct BranchParams {
  const void* x;           // float16 or bfloat16 [N][HW][C], for GEGLU [N][HW][2C], 16-byte aligned; C a multiple of 8
  byte_t* codes;           // [N][HW][Cb]
  const int* row;          // as in QuantizeParams, until beta
  const float* inv_scale;
  const int* qmin;
  const int* qmax;
  const float* mean;
  const float* rstd;
  const float* gamma;
  const float* beta;
  const void* scale;       // as in RowNormParams
  const void* shift;
  const void* down;        // of x's type [rank][C], 16-byte aligned
  const void* low_scale;   // of x's type [N][rank], or null
  void* low;               // of x's type [N][HW][rank]
  int N, HW, C, Cb, groups;
  int unsigned_codes;
  int rotation;            // 0: none
  int low_rotated;         // 1: the product is of the rotated values
  int scale_stride, shift_stride, low_scale_stride;  // elements from one sample to the next
  int lanes, rms;          // as in RowNormParams
  int rank;                // a multiple of 8, at most 256
  int prologue;            // a Prologue, where tokens are not normalized (*_rows)
  float eps;
};
// What a quantizer rounds, rounded to x's type, before its rotation or behind it, times the first matrix of a low-rank branch, and its codes: low[m][r] = (sum over c of T(value[m][c]) *
// down[r][c]) * low_scale[n][r], products exact, sums in float32 in an order of the tensor cores' own; rounded to x's type. The codes are those of quantize_* and quantize_rows_*.

struct StatsParams {
  const void* x;   // float16 or bfloat16 [N][HW][C]
  float* partial;  // [N][ceil(HW / chunk)][C][2] mean of a chunk's pixels, and sum of their squared distances from it: scratch between the two kernels
  float* mean;     // [N][groups]
  float* rstd;     // [N][groups] 1 / sqrt(variance + eps), the variance of the group itself (divided by its size)
  int N, HW, C, groups;
  int chunk;       // pixels per block
  float eps;
};

struct RotaryParams {
  const void* x;        // float16 or bfloat16 [N][L][H][D], D a multiple of 8
  const float* cosine;  // [L][D]
  const float* sine;    // [L][D]
  void* out;            // as x
  int N, L, H, D;
};
// out[2i] = x[2i] * cosine[2i] - x[2i + 1] * sine[2i], out[2i + 1] = x[2i + 1] * cosine[2i + 1] + x[2i] * sine[2i + 1], products and sums rounded to float32
// separately, then to x's type. All of them start at 16 bytes.

struct ConvParams {
  const byte_t* codes;        // [N][H][W][Cb]
  const byte_t* weight;       // [K][R * S][Cb]
  const byte_t* zero;         // [rows][16] the code of real 0, at every table row
  const int* row;             // [N]
  const float* act_scale;     // [rows]
  const int* qmin;            // [rows]; read by u4 kernels only
  const float* weight_scale;  // [K]
  const int* weight_sum;      // [K] sum of an output channel's codes; read by u4 kernels only
  const float* bias;          // [K] or null
  const void* sample_bias;    // [N][K] of the output's type, or null
  const void* gate;           // [N][K] of the output's type, or null
  const void* residual;       // [M][K] of the output's type, or null
  const void* low;            // [M][rank], rows low_stride apart, of the output's type, the input times the first matrix of a low-rank branch; for the kernels *_branch, as is the next
  const void* up;             // [K][rank] of the output's type, the branch's second matrix
  void* out;                  // [M][K], M = N * P * Q: channels last
  int* partial;               // [splits][M][K] where the sum is split, else null
  int N, H, W, Cb;            // the input
  int K, R, S, P, Q;          // output channels, filter height and width, output height and width
  int padding, stride;
  int splits;                 // blocks that share one output tile, each summing a part of the filter taps and channels
  int sample_bias_stride, gate_stride;  // elements from one sample to the next
  int saturate;               // 1: y is clipped to [-65504, 65504], float16's range
  int rank;                   // of the branch, a multiple of 8
  int low_stride;             // elements from one row of `low` to the next, a multiple of 8
};
// y = (float(acc) * (act_scale[row] * weight_scale[k]) + bias[k] + sample_bias[n][k]) * gate[n][k] + residual, from left to right, each step rounded to float32
// separately (no fused multiply-add), clipped where `saturate` says so (NaN stays NaN), then rounded to the output's type: equal to numpy's result bit for bit.
// BRANCH: sum over r of low[m][r] * up[k][r] is added to float(acc) * (act_scale * weight_scale), before the bias: products exact, sums in float32, their order the
// tensor cores' own (conv_*_branch), or by fused multiply-adds in the order of r (reduce_*_branch).

struct AttentionParams {
  const void* query;  // float16 or bfloat16 [B][H][Lq][D] by the strides below; a token's D elements are contiguous and start at 16 bytes
  const void* key;    // [B][H][Lk][D], likewise
  const void* value;  // [B][H][Lk][D], likewise
  void* out;          // [B][Lq][H][D] of the same type, contiguous
  float* key_sums;    // [B][H][chunks][D] sum over the tokens of a chunk: scratch between the first and the second kernel
  byte_t* key_codes;  // [B][H][tokens][Cb] s8: scratch between the second and the third
  float* key_scale;   // [B][H][tokens]
  int H, Lq, Lk, D;
  int Cb;             // bytes of a token's codes: D rounded up to the next width's multiple of 32, zeros behind D
  int tokens;         // Lk rounded up to 64; codes behind Lk are 0
  int chunk, chunks;  // tokens per block of attention_key_sums; chunks = ceil(Lk / chunk)
  int query_batch, query_head, query_token;  // strides in elements, multiples of 8
  int key_batch, key_head, key_token;
  int value_batch, value_head, value_token;
  float factor;       // softmax's scale * log2(e)
};
// Codes of a query or of a key less the mean of its head's keys, float32, each step rounded separately: largest = max(max |x|, 1e-30); n = rint(clip(x * (127 / largest),
// -127, 127)); scale = largest / 127. The mean is the sum of key_sums over chunks in order, / Lk. NaN becomes -127.
// u[i][j] = float(sum n_q n_k) * key_scale[j], exact sums; r[i] = scale_q[i] * factor; p[i][j] = 2^(u r - max_j u r); out = (sum_j T(p) v) / (sum_j p), in float32.

// How the host launches each entry point (grid, threads per block). The only parameter of every kernel is its struct, by value.
//   quantize_last_*    (ceil(HW * channels / 8 / 256), N)              256   channels = Cb * 8 / bits; both axes stride over what a smaller grid leaves
//   quantize_first_*   (ceil(HW / 64), ceil(channels / 64), N)         256   likewise
//   quantize_rows_*    (ceil(HW / (256 / lanes)), N)                   256   likewise
//   quantize_branch_*  (ceil(HW / 32), N)                              256   likewise; BRANCH_BYTES of dynamic shared memory
//   group_stats_partial_*  (ceil(HW / chunk), ceil(C / 8 / STATS_OCTETS), N)  256   likewise
//   group_stats_merge  (groups, N)                                     256   likewise
//   conv_*_BMxBN_*     (ceil(M / BM), ceil(K / BN), splits)            Tile::threads and Tile::shared_bytes of dynamic shared memory (TILES in kernels.cu)
//   rotary_*           (ceil(N * L * H * D / 8 / 256))                 256   likewise
//   reduce_*           (ceil(M * ceil(K / 8) / 256))                   256   likewise
//   attention_key_sums_*   (chunks, H, B)                              256
//   attention_key_codes_*  (tokens / 64, H, B)                         256
//   attention_s8_*_*   (ceil(Lq / queries), H, B)                      AttentionTile::THREADS and SHARED_BYTES of dynamic shared memory (WIDTHS in attention.cu)
constexpr int THREADS = 256;  // of every kernel but conv and attention_s8
constexpr int BRANCH_BYTES = 16640;
constexpr int STATS_OCTETS = 64;  // octets of channels that a block of group_stats_partial takes at most

// Bounds that the host must ensure: M * K < 2^31 and N * HW * channels / 8 < 2^31 for one tensor; 128 * 128 * R * S * C < 2^31, so that no sum overflows;
// codes, weight, zero, partial, low, up start at 16 bytes (out and residual too where K % 8 == 0; otherwise, and for x anywhere, their natural alignment is enough).
