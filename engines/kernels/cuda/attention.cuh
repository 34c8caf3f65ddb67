// Attention with 8-bit queries and keys: out = softmax(Q K^T * scale) V, of a head at a time, without a mask.
//
//   sum_keys      K -> sums over chunks of tokens: their mean is subtracted from every key, which adds one number to all scores of a query, so softmax does not see it
//   encode_keys   K - mean -> s8 codes and a scale per token
//   attend        Q -> codes in registers, Q K^T in integers, softmax in float32, P V with 16-bit numbers and float32 sums
//
// Source: Zhang et al., "SageAttention", arXiv 2410.02367, sections 4.2 (smoothing K) and 4.3 (codes per token); the softmax of tiles: Dao, "FlashAttention-2",
// arXiv 2307.08691, algorithm 1. Unlike the former, queries are encoded by the kernel that multiplies them, and the sums of P V are in float32.
#pragma once
#include "device.cuh"

constexpr int WIDEST_HEAD = 160;        // elements of a head
constexpr int CODE_TOKENS = 64;         // tokens of a block of encode_keys: four threads for each
constexpr float LARGEST_HEAD_CODE = 127.0f, LEAST_MAGNITUDE = 1e-30f;  // below the latter x is 0: its reciprocal has to be finite
// Sums of 160 products of codes stay below 2^22 = 4194304 > 160 * 127^2. They start at the bits of 1.5 * 2^23, so that as a float32 they are 1.5 * 2^23 + sum, exactly.
constexpr int SUM_START = 0x4B400000;
constexpr float SUM_OFFSET = 12582912.0f;

// The low byte is the code of a value. As encode in quantize.cuh.
__device__ __forceinline__ unsigned head_code(float value, float inverse) {
  const float clipped = fminf(fmaxf(__fmul_rn(value, inverse), -LARGEST_HEAD_CODE), LARGEST_HEAD_CODE);
  return static_cast<unsigned>(__float_as_int(__fadd_rn(clipped, SUM_OFFSET)));
}
__device__ __forceinline__ unsigned four_codes(unsigned a, unsigned b, unsigned c, unsigned d) {
  return (a & 255) | (b & 255) << 8 | (c & 255) << 16 | d << 24;
}

// The largest, or the sum, over the four neighbouring lanes that share a row of a fragment.
__device__ __forceinline__ float quad_largest(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x = __fadd_rn(x, __shfl_xor_sync(~0u, x, 1));
  return __fadd_rn(x, __shfl_xor_sync(~0u, x, 2));
}

// A block sums a chunk of one head's tokens: a thread an octet of every lanes-th token, then the lanes are added in order.
template <class T>
__device__ __forceinline__ void sum_keys(const AttentionParams& p) {
  float* const sums = reinterpret_cast<float*>(fixed_shared<THREADS * OCTET * 4>());  // [lanes][D]
  const int octets = p.D / OCTET, lanes = THREADS / octets, lane = threadIdx.x / octets, octet = threadIdx.x - lane * octets;
  const T* key = static_cast<const T*>(p.key) + static_cast<long long>(blockIdx.z) * p.key_batch + static_cast<long long>(blockIdx.y) * p.key_head;
  const int first = blockIdx.x * p.chunk, end = min(first + p.chunk, p.Lk);
  if (lane < lanes) {
    float sum[OCTET] = {};
#pragma unroll 4
    for (int token = first + lane; token < end; token += lanes) {
      float v[OCTET];
      to_floats<T>(v, *reinterpret_cast<const uint4*>(key + static_cast<long long>(token) * p.key_token + octet * OCTET));
#pragma unroll
      for (int e = 0; e < OCTET; ++e) sum[e] = __fadd_rn(sum[e], v[e]);
    }
#pragma unroll
    for (int e = 0; e < OCTET; ++e) sums[lane * p.D + octet * OCTET + e] = sum[e];
  }
  __syncthreads();
  for (int d = threadIdx.x; d < p.D; d += THREADS) {
    float sum = 0.0f;
    for (int i = 0; i < lanes; ++i) sum = __fadd_rn(sum, sums[i * p.D + d]);
    p.key_sums[(static_cast<long long>(blockIdx.z * p.H + blockIdx.y) * p.chunks + blockIdx.x) * p.D + d] = sum;
  }
}

// A block encodes 64 tokens of one head: four neighbouring threads take every fourth octet of one token each.
template <class T>
__device__ __forceinline__ void encode_keys(const AttentionParams& p) {
  constexpr int EACH = WIDEST_HEAD / OCTET / 4;
  float* const mean = reinterpret_cast<float*>(fixed_shared<WIDEST_HEAD * 4>());
  const long long head = static_cast<long long>(blockIdx.z) * p.H + blockIdx.y;
  for (int d = threadIdx.x; d < p.D; d += THREADS) {
    float sum = 0.0f;
    for (int chunk = 0; chunk < p.chunks; ++chunk) sum = __fadd_rn(sum, p.key_sums[(head * p.chunks + chunk) * p.D + d]);
    mean[d] = __fdiv_rn(sum, __int2float_rn(p.Lk));
  }
  __syncthreads();
  const int token = blockIdx.x * CODE_TOKENS + threadIdx.x / 4, part = threadIdx.x % 4;
  const T* key = static_cast<const T*>(p.key) + static_cast<long long>(blockIdx.z) * p.key_batch + static_cast<long long>(blockIdx.y) * p.key_head +
                 static_cast<long long>(token) * p.key_token;
  float v[EACH][OCTET], largest = LEAST_MAGNITUDE;
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int d = (part + 4 * i) * OCTET;
    const bool inside = token < p.Lk && d < p.D;
    to_floats<T>(v[i], inside ? *reinterpret_cast<const uint4*>(key + d) : uint4{0, 0, 0, 0});
#pragma unroll
    for (int e = 0; e < OCTET; ++e) {
      if (inside) v[i][e] = __fsub_rn(v[i][e], mean[d + e]);
      largest = fmaxf(largest, fabsf(v[i][e]));
    }
  }
  largest = quad_largest(largest);
  const float inverse = __fdiv_rn(LARGEST_HEAD_CODE, largest);
  byte_t* codes = p.key_codes + (head * p.tokens + token) * p.Cb;
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int d = (part + 4 * i) * OCTET;
    unsigned n[OCTET];
#pragma unroll
    for (int e = 0; e < OCTET; ++e) n[e] = head_code(v[i][e], inverse);
    if (d < p.Cb) *reinterpret_cast<uint2*>(codes + d) = uint2{four_codes(n[0], n[1], n[2], n[3]), four_codes(n[4], n[5], n[6], n[7])};
  }
  if (part == 0) p.key_scale[head * p.tokens + token] = __fdiv_rn(largest, LARGEST_HEAD_CODE);
}

// The work of one block: QUERIES queries of one head, which a ring of two stages of KEYS keys and values passes by. A warp has 16 of the queries, and all keys.
//
// A row in shared memory is 16 bytes longer than what it holds, an odd number of 16-byte chunks: eight consecutive rows, which one phase of ldmatrix reads, are then in
// eight different groups of four banks, and so are the rows of results.
template <int WIDTH_, int WARPS_, int KEYS_>
struct AttentionTile {
  static constexpr int WIDTH = WIDTH_, WARPS = WARPS_, KEYS = KEYS_;  // WIDTH: elements of a head, at most
  static constexpr int THREADS = 32 * WARPS, QUERIES = 16 * WARPS;
  static constexpr int CODES = (WIDTH + 31) / 32 * 32;                // bytes of a token's codes: whole steps of multiply_add
  static constexpr int KEY_PITCH = CODES + 16, VALUE_PITCH = 2 * WIDTH + 16;
  static constexpr int VALUES_AT = KEYS * KEY_PITCH, SCALES_AT = VALUES_AT + KEYS * VALUE_PITCH;
  static constexpr int STAGE_BYTES = SCALES_AT + KEYS * 4, SHARED_BYTES = 2 * STAGE_BYTES;
  static constexpr int STEPS = CODES / 32, FRAGMENTS = KEYS / 8, OUTPUTS = WIDTH / 8;
  static_assert(WIDTH % 16 == 0 && KEYS % 16 == 0 && CODE_TOKENS % KEYS == 0, "fragments come in pairs, and stages of codes are whole");
  static_assert(QUERIES * VALUE_PITCH <= SHARED_BYTES, "results reuse the stages' memory");
};

// Starts the copies of one stage: keys, values, the keys' scales. Values past the last token, and past the head's width, are 0.
template <class TILE, class T>
__device__ __forceinline__ void load_stage(const AttentionParams& p, unsigned stage, int first) {
  const long long token = (static_cast<long long>(blockIdx.z) * p.H + blockIdx.y) * p.tokens + first;
  constexpr int KEY_CHUNKS = TILE::CODES / 16, VALUE_CHUNKS = TILE::WIDTH / OCTET;
  const byte_t* codes = p.key_codes + token * TILE::CODES;
#pragma unroll
  for (int i = 0; i < (TILE::KEYS * KEY_CHUNKS + TILE::THREADS - 1) / TILE::THREADS; ++i) {
    const int item = threadIdx.x + i * TILE::THREADS, row = item / KEY_CHUNKS, chunk = item % KEY_CHUNKS;
    if (row < TILE::KEYS) copy_async(stage + row * TILE::KEY_PITCH + chunk * 16, codes + item * 16, true);
  }
  const T* value = static_cast<const T*>(p.value) + static_cast<long long>(blockIdx.z) * p.value_batch + static_cast<long long>(blockIdx.y) * p.value_head;
#pragma unroll
  for (int i = 0; i < (TILE::KEYS * VALUE_CHUNKS + TILE::THREADS - 1) / TILE::THREADS; ++i) {
    const int item = threadIdx.x + i * TILE::THREADS, row = item / VALUE_CHUNKS, d = item % VALUE_CHUNKS * OCTET;
    if (row >= TILE::KEYS) continue;
    const bool inside = first + row < p.Lk && d < p.D;
    const T* from = inside ? value + static_cast<long long>(first + row) * p.value_token + d : value;
    copy_async(stage + TILE::VALUES_AT + row * TILE::VALUE_PITCH + d * 2, from, inside);
  }
  if (threadIdx.x < TILE::KEYS / 4) copy_async(stage + TILE::SCALES_AT + threadIdx.x * 16, p.key_scale + token + threadIdx.x * 4, true);
}

// This warp's 16 queries as fragments of multiply_add<S8>, and the factor of each row's scores: row g and row g + 8 of lane 4g + t, which holds bytes 4t .. 4t + 3 of
// each half of a step.
template <class TILE, class T>
__device__ __forceinline__ void encode_queries(const AttentionParams& p, unsigned (&codes)[TILE::STEPS][4], float (&factor)[2]) {
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const T* query = static_cast<const T*>(p.query) + static_cast<long long>(blockIdx.z) * p.query_batch + static_cast<long long>(blockIdx.y) * p.query_head;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int token = min(static_cast<int>(blockIdx.x) * TILE::QUERIES + warp * 16 + g + 8 * r, p.Lq - 1);  // past the end the last one again; not stored
    const T* row = query + static_cast<long long>(token) * p.query_token;
    uint2 held[TILE::STEPS * 2];
    float largest = LEAST_MAGNITUDE;
#pragma unroll
    for (int half = 0; half < TILE::STEPS * 2; ++half) {
      const int d = half * 16 + t * 4;
      held[half] = d < p.D ? *reinterpret_cast<const uint2*>(row + d) : uint2{0, 0};
      largest = fmaxf(largest, fmaxf(fabsf(low_float<T>(held[half].x)), fabsf(high_float<T>(held[half].x))));
      largest = fmaxf(largest, fmaxf(fabsf(low_float<T>(held[half].y)), fabsf(high_float<T>(held[half].y))));
    }
    largest = quad_largest(largest);
    const float inverse = __fdiv_rn(LARGEST_HEAD_CODE, largest);
    factor[r] = __fmul_rn(__fdiv_rn(largest, LARGEST_HEAD_CODE), p.factor);
#pragma unroll
    for (int half = 0; half < TILE::STEPS * 2; ++half) {
      codes[half / 2][half % 2 * 2 + r] =
          four_codes(head_code(low_float<T>(held[half].x), inverse), head_code(high_float<T>(held[half].x), inverse),
                     head_code(low_float<T>(held[half].y), inverse), head_code(high_float<T>(held[half].y), inverse));
    }
  }
}

// Scores of a stage, less the query's factor: u = sum * key's scale. Keys past the last one get minus infinity.
template <class TILE>
__device__ __forceinline__ void score(float (&u)[TILE::FRAGMENTS][4], const unsigned (&query)[TILE::STEPS][4], unsigned keys, const float* scales, int left) {
  const int lane = threadIdx.x % 32, t = lane % 4;
  int sums[TILE::FRAGMENTS][4];
#pragma unroll
  for (int f = 0; f < TILE::FRAGMENTS; ++f)
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[f][i] = SUM_START;
  // Matrices of a pair of fragments: keys 0..7 | the same, next 16 bytes | keys 8..15 | the same, next 16 bytes.
  const unsigned address = keys + (lane % 8 + lane / 16 * 8) * TILE::KEY_PITCH + lane / 8 % 2 * 16;
#pragma unroll
  for (int f = 0; f < TILE::FRAGMENTS; f += 2)
#pragma unroll
    for (int step = 0; step < TILE::STEPS; ++step) {
      unsigned b[4];
      load_matrices(b, address + f * 8 * TILE::KEY_PITCH + step * 32);
      multiply_add<S8>(sums[f], query[step], b[0], b[1]);
      multiply_add<S8>(sums[f + 1], query[step], b[2], b[3]);
    }
#pragma unroll
  for (int f = 0; f < TILE::FRAGMENTS; ++f) {
    const float2 scale = *reinterpret_cast<const float2*>(scales + f * 8 + t * 2);
#pragma unroll
    for (int i = 0; i < 4; ++i) u[f][i] = __fmul_rn(__fsub_rn(__int_as_float(sums[f][i]), SUM_OFFSET), i % 2 ? scale.y : scale.x);
  }
  if (left < TILE::KEYS) {
    const float minus_infinity = __int_as_float(static_cast<int>(0xFF800000));
#pragma unroll
    for (int f = 0; f < TILE::FRAGMENTS; ++f)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (f * 8 + t * 2 + i % 2 >= left) u[f][i] = minus_infinity;
  }
}

// One row's part of a stage: turns scores into powers relative to the largest score so far, and returns the factor of what was summed relative to an earlier one.
template <class TILE>
__device__ __forceinline__ float exponentiate(float (&u)[TILE::FRAGMENTS][4], int r, float factor, float& largest, float& total) {
  float now = largest, sum = 0.0f;
#pragma unroll
  for (int f = 0; f < TILE::FRAGMENTS; ++f) now = fmaxf(now, fmaxf(u[f][2 * r], u[f][2 * r + 1]));
  now = quad_largest(now);
  const float shift = -__fmul_rn(now, factor);
#pragma unroll
  for (int f = 0; f < TILE::FRAGMENTS; ++f)
#pragma unroll
    for (int i = 2 * r; i < 2 * r + 2; ++i) {
      u[f][i] = exp2_approx(__fmaf_rn(u[f][i], factor, shift));
      sum = __fadd_rn(sum, u[f][i]);
    }
  const float rescale = exp2_approx(__fmul_rn(__fsub_rn(largest, now), factor));  // of the first stage 2^(-infinity) = 0
  largest = now;
  total = __fmaf_rn(total, rescale, sum);
  return rescale;
}

// Adds P V of a stage. The fragments of the scores of 16 keys are, rounded to 16 bits, the fragment of A: lane 4g + t holds columns 2t, 2t + 1 of rows g and g + 8.
template <class TILE, class T>
__device__ __forceinline__ void add_values(float (&out)[TILE::OUTPUTS][4], const float (&p)[TILE::FRAGMENTS][4], unsigned values) {
  const int lane = threadIdx.x % 32;
  // Matrices: keys 0..7 | keys 8..15 | keys 0..7, next 8 elements | keys 8..15, next 8 elements; transposed, as a lane needs two keys of one element.
  const unsigned address = values + lane % 16 * TILE::VALUE_PITCH + lane / 16 * 16;
#pragma unroll
  for (int f = 0; f < TILE::FRAGMENTS; f += 2) {
    const unsigned a[4] = {to_pair<T>(p[f][0], p[f][1]), to_pair<T>(p[f][2], p[f][3]), to_pair<T>(p[f + 1][0], p[f + 1][1]), to_pair<T>(p[f + 1][2], p[f + 1][3])};
#pragma unroll
    for (int n = 0; n < TILE::OUTPUTS; n += 2) {
      unsigned b[4];
      load_matrices_transposed(b, address + f * 8 * TILE::VALUE_PITCH + n * 16);
      multiply_add<T>(out[n], a, b[0], b[1]);
      multiply_add<T>(out[n + 1], a, b[2], b[3]);
    }
  }
}

// A warp's 16 rows, through its own part of shared memory, so that a lane stores 16 bytes.
template <class TILE, class T>
__device__ __forceinline__ void store_rows(const AttentionParams& p, const float (&out)[TILE::OUTPUTS][4], const float (&total)[2], byte_t* memory) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  byte_t* const rows = memory + warp * 16 * TILE::VALUE_PITCH;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float inverse = __fdiv_rn(1.0f, quad_sum(total[r]));
#pragma unroll
    for (int n = 0; n < TILE::OUTPUTS; ++n) {
      unsigned* to = reinterpret_cast<unsigned*>(rows + (g + 8 * r) * TILE::VALUE_PITCH + n * 16 + t * 4);
      *to = to_pair<T>(__fmul_rn(out[n][2 * r], inverse), __fmul_rn(out[n][2 * r + 1], inverse));
    }
  }
  __syncwarp();
  constexpr int CHUNKS = TILE::WIDTH / OCTET;
  T* to = static_cast<T*>(p.out) + (static_cast<long long>(blockIdx.z) * p.Lq * p.H + blockIdx.y) * p.D;
#pragma unroll
  for (int i = 0; i < 16 * CHUNKS / 32; ++i) {
    const int item = lane + i * 32, row = item / CHUNKS, d = item % CHUNKS * OCTET, token = blockIdx.x * TILE::QUERIES + warp * 16 + row;
    if (token < p.Lq && d < p.D)
      *reinterpret_cast<uint4*>(to + static_cast<long long>(token) * p.H * p.D + d) = *reinterpret_cast<const uint4*>(rows + row * TILE::VALUE_PITCH + d * 2);
  }
}

template <class TILE, class T>
__device__ __forceinline__ void attend(const AttentionParams& p) {
  byte_t* const memory = dynamic_shared();
  const unsigned base = shared_address(memory);
  load_stage<TILE, T>(p, base, 0);
  commit_copies();
  unsigned query[TILE::STEPS][4];
  float factor[2], largest[2], total[2] = {0.0f, 0.0f}, out[TILE::OUTPUTS][4] = {};
  encode_queries<TILE, T>(p, query, factor);
  largest[0] = largest[1] = __int_as_float(static_cast<int>(0xFF800000));
  int reading = 0;
  for (int first = 0; first < p.Lk; first += TILE::KEYS, reading = TILE::STAGE_BYTES - reading) {
    wait_copies<0>();  // this thread's part of the stage has arrived,
    __syncthreads();   // every thread's has; and all threads have finished the previous stage, whose buffer is now refilled
    if (first + TILE::KEYS < p.Lk) load_stage<TILE, T>(p, base + TILE::STAGE_BYTES - reading, first + TILE::KEYS);
    commit_copies();
    float u[TILE::FRAGMENTS][4];
    score<TILE>(u, query, base + reading, reinterpret_cast<const float*>(memory + reading + TILE::SCALES_AT), p.Lk - first);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float rescale = exponentiate<TILE>(u, r, factor[r], largest[r], total[r]);
#pragma unroll
      for (int n = 0; n < TILE::OUTPUTS; ++n) out[n][2 * r] = __fmul_rn(out[n][2 * r], rescale), out[n][2 * r + 1] = __fmul_rn(out[n][2 * r + 1], rescale);
    }
    add_values<TILE, T>(out, u, base + reading + TILE::VALUES_AT);
  }
  __syncthreads();  // the stages' memory is free
  store_rows<TILE, T>(p, out, total, memory);
}
