// GPU instructions without a C++ equivalent, one function each. Everything else in this folder is plain C++, so that the tests can run the same source on a CPU:
// there EDM_EMULATED is defined, and emulator.h defines every function below. No CUDA header is needed; NVRTC and nvcc both provide the built-ins.
// Source of every instruction's meaning and fragment layout: PTX ISA 8.x, chapter 9.7 (cp.async, ldmatrix, mma, cvt).
#pragma once
#include "params.h"

// Operand types of a convolution: activation codes signed or unsigned 4 bits, or signed 8 bits; the weight is s4, s4, s8.
enum Kind { S4 = 0, U4 = 1, S8 = 2 };

// 16-bit floating-point numbers as stored in memory; two types, so that templates can distinguish them.
struct f16 { unsigned short bits; };
struct bf16 { unsigned short bits; };

#ifdef EDM_EMULATED
#include "emulator.h"
#else

// ---- memory ----------------------------------------------------------------------------------------------------------------------------------------

// The block's dynamic shared memory, and a static amount. Aligned to 128 bytes, a row of banks, so that a swizzle may XOR lower address bits.
__device__ __forceinline__ byte_t* dynamic_shared() {
  extern __shared__ __align__(128) byte_t dynamic_bytes[];
  return dynamic_bytes;
}
template <int BYTES>
__device__ __forceinline__ byte_t* fixed_shared() {
  __shared__ __align__(128) byte_t fixed_bytes[BYTES];
  return fixed_bytes;
}
// The 32-bit address that instructions on shared memory take.
__device__ __forceinline__ unsigned shared_address(const void* pointer) { return static_cast<unsigned>(__cvta_generic_to_shared(pointer)); }

// cp.async: copies 16 bytes from global to shared memory without a register in between, past L1 (.cg: the block reads the data only once).
// Where `valid` is false it reads nothing and writes 16 zero bytes. The bytes are valid after wait_copies.
__device__ __forceinline__ void copy_async(unsigned to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
// cp.async.commit_group: closes the group of copies that this thread issued since the last one (it may be empty).
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// cp.async.wait_group: waits until at most PENDING of this thread's newest groups are pending. Copies of other threads also need a barrier.
template <int PENDING>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// ---- tensor cores ----------------------------------------------------------------------------------------------------------------------------------

// ldmatrix.x4: a warp loads four 8x8 matrices of 16-bit elements, here 8 rows x 16 bytes of codes. Lanes 8i..8i+7 give the addresses of matrix i's rows;
// lane l receives in r[i] the 4 bytes at column 4 * (l % 4) of row l / 4. Collective: all 32 lanes together.
__device__ __forceinline__ void load_matrices(unsigned (&r)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// ldmatrix.x4.trans: as load_matrices, and each 8x8 matrix of 16-bit elements transposed: lane l receives in r[i] elements 2 * (l % 4) and 2 * (l % 4) + 1 of column l / 4.
__device__ __forceinline__ void load_matrices_transposed(unsigned (&r)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// mma: C[16][8] += A[16][32 bytes] * B[32 bytes][8], integers exact in 32 bits: 64 codes of 4 bits (m16n8k64) or 32 codes of 8 (m16n8k32). Fragments of
// lane l, with g = l / 4 and t = l % 4; a word holds the 4 bytes at column 4t of its half:
//
//        A    bytes 0..15   bytes 16..31         B    bytes 0..15   bytes 16..31          C   columns 2t, 2t + 1
//   row g         a[0]          a[2]        row g        b0             b1           row g        c[0], c[1]
//   row g + 8     a[1]          a[3]        (B is [n][k], as weights are)            row g + 8    c[2], c[3]
//
// A byte's low nibble is the earlier code. Both operands are read along the sum, so 4 and 8 bits share one byte layout, and all code around this function.
template <Kind KIND>
__device__ __forceinline__ void multiply_add(int (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#define EDM_MMA(SHAPE_AND_TYPES)                                                                                       \
  asm("mma.sync.aligned." SHAPE_AND_TYPES " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"           \
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])                                                                 \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (KIND == S4) EDM_MMA("m16n8k64.row.col.s32.s4.s4.s32");
  if constexpr (KIND == U4) EDM_MMA("m16n8k64.row.col.s32.u4.s4.s32");
  if constexpr (KIND == S8) EDM_MMA("m16n8k32.row.col.s32.s8.s8.s32");
#undef EDM_MMA
}

// mma.m16n8k16: C[16][8] += A[16][16] * B[16][8] of 16-bit numbers, summed in float32. The fragments are those above with two numbers to a word: A's words hold
// columns 2t, 2t + 1 of its left and right half, b0 and b1 rows 2t, 2t + 1 of B's upper and lower half, column g.
template <class T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);
#define EDM_MMA(TYPE, NAME)                                                                                                              \
  template <>                                                                                                                            \
  __device__ __forceinline__ void multiply_add<TYPE>(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {                  \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"     \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                                                 \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                                                 \
  }
EDM_MMA(f16, "f16")
EDM_MMA(bf16, "bf16")
#undef EDM_MMA

// ---- conversions -----------------------------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(f16 h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h.bits));
  return f;
}
// bfloat16 is the upper half of a float32.
__device__ __forceinline__ float to_float(bf16 h) { return __uint_as_float(static_cast<unsigned>(h.bits) << 16); }

// cvt.rn.f16x2: two float32 to 16 bits each, half to even, in one instruction; `low` goes to the lower half of the word, the lower address.
template <class T>
__device__ __forceinline__ unsigned to_pair(float low, float high);
template <>
__device__ __forceinline__ unsigned to_pair<f16>(float low, float high) {
  unsigned pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <>
__device__ __forceinline__ unsigned to_pair<bf16>(float low, float high) {
  unsigned pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// ex2.approx: 2^x, relative error 2^-22. rcp.approx: 1 / x, one unit in the last place. Infinities come out as the limits.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#endif  // EDM_EMULATED

// ---- derived functions ----------------------------------------------------------------------------------------------------------------------------

// The two numbers of a 32-bit word, the one at the lower address first.
template <class T>
__device__ __forceinline__ float low_float(unsigned pair) {
  return to_float(T{static_cast<unsigned short>(pair & 0xFFFF)});
}
template <class T>
__device__ __forceinline__ float high_float(unsigned pair) {
  return to_float(T{static_cast<unsigned short>(pair >> 16)});
}

constexpr int OCTET = 8;  // numbers of 16 bits in 16 bytes

// The eight numbers of 16 bytes.
template <class T>
__device__ __forceinline__ void to_floats(float (&v)[OCTET], const uint4& words) {
  const unsigned pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int e = 0; e < OCTET; e += 2) v[e] = low_float<T>(pairs[e / 2]), v[e + 1] = high_float<T>(pairs[e / 2]);
}
// Eight consecutive numbers, `count` of which exist; those that do not are 0. One 16-byte load where `wide`, which needs all of them, and alignment.
template <class T>
__device__ __forceinline__ void load_values(float (&v)[OCTET], const T* from, int count, bool wide) {
  if (wide) return to_floats<T>(v, *reinterpret_cast<const uint4*>(from));
#pragma unroll
  for (int e = 0; e < OCTET; ++e) v[e] = e < count ? to_float(from[e]) : 0.0f;
}

__device__ __forceinline__ int divide_up(int a, int b) { return (a + b - 1) / b; }
// Whether a pointer may be accessed 16 bytes at a time.
__device__ __forceinline__ bool aligned_16(const void* pointer) { return (reinterpret_cast<unsigned long long>(pointer) & 15) == 0; }
