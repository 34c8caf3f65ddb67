// A CUDA block on one CPU thread: the kernels of engines/kernels/cuda compile against this instead of a GPU's instructions. device.cuh includes it.
//
// Every CUDA thread is a fiber. A fiber runs until it needs others: a warp's collective (ldmatrix, mma, shuffle, __syncwarp) or the block's barrier. The scheduler
// carries a collective out once all 32 lanes have arrived at the same one. Nothing here knows the kernels; what they get wrong shows as
//   - a wrong result: shared memory starts as 0xA5; the target of a cp.async is 0xEE until its own thread has waited for it; a thread runs as far as it can before
//     the next one starts, so a missing barrier reads what is not there yet. Odd blocks run their warps backwards.
//   - an error: lanes of a warp at different collectives, a barrier that some threads have left, a misaligned address, copies never waited for,
//     shared memory past its end. (Global memory past its end, and undefined behaviour of C++: the sanitizers, see sanitized.py.)
// Not shown: bank conflicts, time, the memory model's finer points.
#pragma once
#include <dlfcn.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define EDM_SANITIZED 1
#endif

#define __global__ __attribute__((visibility("default")))
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct Index3 { unsigned x, y, z; };

template <class TO, class FROM>
inline TO same_bits(FROM from) {
  TO to;
  static_assert(sizeof to == sizeof from, "");
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline float to_float(f16 h) { return static_cast<float>(same_bits<_Float16>(h.bits)); }
inline float to_float(bf16 h) { return same_bits<float>(static_cast<unsigned>(h.bits) << 16); }

namespace emulated {

enum class State { RUNS, AT_COLLECTIVE, AT_BARRIER, EXITED };
enum class Collective { SYNCWARP, LOAD_MATRICES, LOAD_TRANSPOSED, MULTIPLY_S4, MULTIPLY_U4, MULTIPLY_S8, MULTIPLY_F16, MULTIPLY_BF16, SHUFFLE };

struct Copy { unsigned to; unsigned char bytes[16]; };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state;
  Index3 thread;
  Collective collective;   // what it waits for, with its arguments: in and out lie on the fiber's own stack
  const void* in;
  void* out;
  std::vector<Copy> open;               // cp.async since the last commit
  std::deque<std::vector<Copy>> groups;  // committed, not waited for
  void* fake_stack;  // AddressSanitizer's
};

// All of a launch. One at a time in a thread of the CPU; several CPU threads may each run their own.
struct Machine {
  std::function<void()> kernel;
  Index3 grid, block_size, block;
  std::vector<Fiber> fibers;
  Fiber* current = nullptr;
  ucontext_t scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
  unsigned char *shared = nullptr, *fixed = nullptr;
  size_t shared_bytes = 0, fixed_bytes = 0;
  std::string error;
};
inline thread_local Machine machine;

#ifdef EDM_SANITIZED
constexpr size_t STACK = 1 << 18;
#else
constexpr size_t STACK = 1 << 16;
#endif

// ---- fibers ----------------------------------------------------------------------------------------------------------------------------------------

// Leaves a fiber for the scheduler. A fiber that has exited never comes back.
inline void yield(State state) {
  Fiber* self = machine.current;
  self->state = state;
#ifdef EDM_SANITIZED
  __sanitizer_start_switch_fiber(state == State::EXITED ? nullptr : &self->fake_stack, machine.scheduler_stack, machine.scheduler_stack_size);
#endif
  swapcontext(&self->context, &machine.scheduler);
#ifdef EDM_SANITIZED
  __sanitizer_finish_switch_fiber(self->fake_stack, &machine.scheduler_stack, &machine.scheduler_stack_size);
#endif
}

// Ends the launch with an error: the scheduler sees it and never resumes anybody.
[[gnu::cold]] inline void fail(const std::string& what) {
  if (machine.error.empty()) machine.error = what;
  for (;;) yield(State::EXITED);
}
inline void require(bool holds, const char* what) {
  if (!holds) fail(what);
}

inline void fiber_main() {
#ifdef EDM_SANITIZED
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack, &machine.scheduler_stack_size);
#endif
  machine.kernel();
  require(machine.current->open.empty(), "a thread exits with cp.async never committed");
  for (const auto& group : machine.current->groups) require(group.empty(), "a thread exits with cp.async never waited for");
  yield(State::EXITED);
}

inline void start(Fiber& fiber, unsigned thread) {
  if (!fiber.stack) fiber.stack.reset(new char[STACK]);
  fiber.thread = {thread, 0, 0};
  fiber.state = State::RUNS;
  fiber.open.clear();
  fiber.groups.clear();
  fiber.fake_stack = nullptr;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = STACK;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
}

inline void resume(Fiber& fiber) {
  machine.current = &fiber;
#ifdef EDM_SANITIZED
  __sanitizer_start_switch_fiber(&machine.scheduler_fake_stack, fiber.stack.get(), STACK);
#endif
  swapcontext(&machine.scheduler, &fiber.context);
#ifdef EDM_SANITIZED
  __sanitizer_finish_switch_fiber(machine.scheduler_fake_stack, nullptr, nullptr);
#endif
}

// ---- collectives -----------------------------------------------------------------------------------------------------------------------------------

inline void collective(Collective which, const void* in, void* out) {
  machine.current->collective = which;
  machine.current->in = in;
  machine.current->out = out;
  yield(State::AT_COLLECTIVE);
}

// mma.m16n8k64 (4 bits) and m16n8k32 (8 bits), from the PTX ISA's figures: word h of lane 4g + t of B holds codes of row g, bytes 16h + 4t onwards; of A likewise,
// words 2h (row g) and 2h + 1 (row g + 8); register i of C is row g + 8 (i / 2), column 2t + i % 2.
struct MultiplyIn { unsigned a[4], b[2]; };

template <int BITS, bool A_SIGNED>
inline void multiply(Fiber* lanes) {
  constexpr int CODES = 32 / BITS, DEPTH = 8 * CODES;  // codes a word, codes of the sum
  int a[16][DEPTH], b[8][DEPTH];
  const auto decode = [](int* to, unsigned word, bool is_signed) {
    for (int e = 0; e < CODES; ++e) {
      const int code = (word >> (BITS * e)) & ((1 << BITS) - 1);
      to[e] = is_signed && code >= 1 << (BITS - 1) ? code - (1 << BITS) : code;
    }
  };
  for (int lane = 0; lane < 32; ++lane) {
    const auto& in = *static_cast<const MultiplyIn*>(lanes[lane].in);
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      const int first = (half * 4 + t) * CODES;
      decode(&a[g][first], in.a[2 * half], A_SIGNED);
      decode(&a[g + 8][first], in.a[2 * half + 1], A_SIGNED);
      decode(&b[g][first], in.b[half], true);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    int* c = static_cast<int*>(lanes[lane].out);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
      int sum = 0;
      for (int d = 0; d < DEPTH; ++d) sum += a[row][d] * b[column][d];
      c[i] += sum;
    }
  }
}

// mma.m16n8k16 of 16-bit numbers: the same fragments with two numbers to a word. The products are exact in float64; a tensor core's own rounding is not specified.
template <class T>
inline void multiply_floats(Fiber* lanes) {
  double a[16][16], b[16][8];
  const auto number = [](unsigned word, int e) { return static_cast<double>(to_float(T{static_cast<unsigned short>(word >> (16 * e))})); };
  for (int lane = 0; lane < 32; ++lane) {
    const auto& in = *static_cast<const MultiplyIn*>(lanes[lane].in);
    const int g = lane / 4, t = lane % 4;
    for (int e = 0; e < 2; ++e)
      for (int half = 0; half < 2; ++half) {
        const int k = half * 8 + 2 * t + e;
        a[g][k] = number(in.a[2 * half], e), a[g + 8][k] = number(in.a[2 * half + 1], e);
        b[k][g] = number(in.b[half], e);
      }
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* c = static_cast<float*>(lanes[lane].out);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
      double sum = c[i];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      c[i] = static_cast<float>(sum);
    }
  }
}

inline const unsigned char* at_shared(unsigned address, unsigned bytes) {
  require(address % bytes == 0, "misaligned address in shared memory");
  require(static_cast<size_t>(address) + bytes <= machine.shared_bytes, "address past the end of shared memory");
  return machine.shared + address;
}

// lanes 8i..8i+7 give the rows of matrix i; lane l gets word l % 4 of row l / 4 of each. The addresses were checked by their lanes.
inline void load_matrices(Fiber* lanes) {
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const unsigned row = *static_cast<const unsigned*>(lanes[8 * i + lane / 4].in);
      std::memcpy(static_cast<unsigned*>(lanes[lane].out) + i, machine.shared + row + lane % 4 * 4, 4);
    }
}

// Likewise, and lane l gets rows 2 (l % 4) and the next of column l / 4.
inline void load_transposed(Fiber* lanes) {
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      for (int e = 0; e < 2; ++e) {
        const unsigned row = *static_cast<const unsigned*>(lanes[8 * i + lane % 4 * 2 + e].in);
        std::memcpy(static_cast<unsigned char*>(lanes[lane].out) + 4 * i + 2 * e, machine.shared + row + lane / 4 * 2, 2);
      }
}

struct ShuffleIn { float value; int distance; };
inline void shuffle(Fiber* lanes) {
  for (int lane = 0; lane < 32; ++lane) {
    const int from = lane ^ static_cast<const ShuffleIn*>(lanes[lane].in)->distance;
    *static_cast<float*>(lanes[lane].out) = static_cast<const ShuffleIn*>(lanes[from].in)->value;
  }
}

inline void carry_out(Fiber* lanes) {
  switch (lanes[0].collective) {
    case Collective::SYNCWARP: break;
    case Collective::LOAD_MATRICES: load_matrices(lanes); break;
    case Collective::LOAD_TRANSPOSED: load_transposed(lanes); break;
    case Collective::MULTIPLY_F16: multiply_floats<f16>(lanes); break;
    case Collective::MULTIPLY_BF16: multiply_floats<bf16>(lanes); break;
    case Collective::MULTIPLY_S4: multiply<4, true>(lanes); break;
    case Collective::MULTIPLY_U4: multiply<4, false>(lanes); break;
    case Collective::MULTIPLY_S8: multiply<8, true>(lanes); break;
    case Collective::SHUFFLE: shuffle(lanes); break;
  }
}

// ---- the scheduler ---------------------------------------------------------------------------------------------------------------------------------

// Runs a warp until all its lanes stand at the barrier or have exited. False: the launch has failed.
inline bool run_warp(Fiber* lanes) {
  for (;;) {
    int waiting = 0;
    for (int lane = 0; lane < 32; ++lane) {
      if (lanes[lane].state == State::RUNS) resume(lanes[lane]);
      if (!machine.error.empty()) return false;
      waiting += lanes[lane].state == State::AT_COLLECTIVE;
    }
    if (waiting == 0) return true;
    const bool together =
        waiting == 32 && std::all_of(lanes, lanes + 32, [&](const Fiber& lane) { return lane.collective == lanes[0].collective; });
    if (!together) {
      machine.error = "the lanes of a warp are at different collectives";
      return false;
    }
    carry_out(lanes);
    for (int lane = 0; lane < 32; ++lane) lanes[lane].state = State::RUNS;
  }
}

inline bool run_block() {
  const unsigned threads = machine.block_size.x, warps = threads / 32;
  const bool backwards = (machine.block.x + machine.block.y + machine.block.z) % 2;
  for (unsigned thread = 0; thread < threads; ++thread) start(machine.fibers[thread], thread);
  for (;;) {
    for (unsigned i = 0; i < warps; ++i)
      if (!run_warp(&machine.fibers[32 * (backwards ? warps - 1 - i : i)])) return false;
    const auto at_barrier = std::count_if(machine.fibers.begin(), machine.fibers.begin() + threads, [](const Fiber& f) { return f.state == State::AT_BARRIER; });
    if (at_barrier == 0) return true;
    if (at_barrier != threads) {
      machine.error = "some threads wait at a barrier that others have left for good";
      return false;
    }
    for (unsigned thread = 0; thread < threads; ++thread) machine.fibers[thread].state = State::RUNS;
  }
}

// Runs `kernel` over a grid; returns what went wrong, empty when nothing did.
inline std::string launch(Index3 grid, unsigned threads, size_t shared_bytes, std::function<void()> kernel) {
  machine.error.clear();
  if (threads == 0 || threads % 32 || threads > 1024) return "a block must have whole warps, at most 1024 threads";
  if (shared_bytes > 99 * 1024) return "more dynamic shared memory than an RTX 3090 gives a block (99 KB)";
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) return "an empty grid, or one above 65535 in y or z";
  machine.kernel = std::move(kernel);
  machine.grid = grid;
  machine.block_size = {threads, 1, 1};
  machine.shared_bytes = shared_bytes;
  if (machine.fibers.size() < threads) machine.fibers.resize(threads);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        machine.block = {x, y, z};
        const std::unique_ptr<void, void (*)(void*)> memory(std::aligned_alloc(128, std::max<size_t>((shared_bytes + 127) / 128 * 128, 128)), std::free);
        machine.shared = static_cast<unsigned char*>(std::memset(memory.get(), 0xA5, (shared_bytes + 127) / 128 * 128));
        machine.fixed_bytes = 0;
        const bool done = run_block();
        std::free(machine.fixed);
        machine.fixed = nullptr;
        if (!done) return machine.error;
      }
  return "";
}

}  // namespace emulated

// ---- the twins of device.cuh and of CUDA's built-ins -------------------------------------------------------------------------------------------------

#define threadIdx (emulated::machine.current->thread)
#define blockIdx (emulated::machine.block)
#define blockDim (emulated::machine.block_size)
#define gridDim (emulated::machine.grid)

inline void __syncthreads() { emulated::yield(emulated::State::AT_BARRIER); }
inline void __syncwarp() { emulated::collective(emulated::Collective::SYNCWARP, nullptr, nullptr); }
inline float __shfl_xor_sync(unsigned, float value, int distance) {
  const emulated::ShuffleIn in{value, distance};
  float out;
  emulated::collective(emulated::Collective::SHUFFLE, &in, &out);
  return out;
}

using std::max;
using std::min;
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __int2float_rn(int a) { return static_cast<float>(a); }
inline int __clz(int a) { return a ? __builtin_clz(static_cast<unsigned>(a)) : 32; }
inline int __float_as_int(float a) { return same_bits<int>(a); }
inline float __int_as_float(int a) { return same_bits<float>(a); }

inline byte_t* dynamic_shared() { return emulated::machine.shared; }
template <int BYTES>
byte_t* fixed_shared() {
  auto& machine = emulated::machine;
  if (machine.fixed_bytes == 0) {
    machine.fixed_bytes = BYTES;
    machine.fixed = static_cast<unsigned char*>(std::memset(std::malloc(BYTES), 0xA5, BYTES));
  }
  emulated::require(machine.fixed_bytes == BYTES, "fixed_shared is called with two sizes in one kernel");
  return machine.fixed;
}
inline unsigned shared_address(const void* pointer) { return static_cast<unsigned>(static_cast<const byte_t*>(pointer) - emulated::machine.shared); }

inline void copy_async(unsigned to, const void* from, bool valid) {
  emulated::Copy copy{to, {}};
  emulated::at_shared(to, 16);
  emulated::require(reinterpret_cast<uintptr_t>(from) % 16 == 0, "misaligned address in global memory");
  if (valid) std::memcpy(copy.bytes, from, 16);
  std::memset(emulated::machine.shared + to, 0xEE, 16);
  emulated::machine.current->open.push_back(copy);
}
inline void commit_copies() {
  auto& fiber = *emulated::machine.current;
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}
template <int PENDING>
void wait_copies() {
  auto& groups = emulated::machine.current->groups;
  for (; groups.size() > PENDING; groups.pop_front())
    for (const auto& copy : groups.front()) std::memcpy(emulated::machine.shared + copy.to, copy.bytes, 16);
}

inline void load_matrices(unsigned (&r)[4], unsigned address) {
  emulated::at_shared(address, 16);
  emulated::collective(emulated::Collective::LOAD_MATRICES, &address, r);
}
inline void load_matrices_transposed(unsigned (&r)[4], unsigned address) {
  emulated::at_shared(address, 16);
  emulated::collective(emulated::Collective::LOAD_TRANSPOSED, &address, r);
}
template <class T>
void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  const emulated::MultiplyIn in{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  emulated::collective(std::is_same_v<T, f16> ? emulated::Collective::MULTIPLY_F16 : emulated::Collective::MULTIPLY_BF16, &in, c);
}
template <Kind KIND>
void multiply_add(int (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  using emulated::Collective;
  const emulated::MultiplyIn in{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  emulated::collective(KIND == S4 ? Collective::MULTIPLY_S4 : KIND == U4 ? Collective::MULTIPLY_U4 : Collective::MULTIPLY_S8, &in, c);
}

inline unsigned short rounded(float f, f16) { return same_bits<unsigned short>(static_cast<_Float16>(f)); }
inline unsigned short rounded(float f, bf16) {  // half to even; a NaN stays one
  const unsigned bits = same_bits<unsigned>(f);
  return static_cast<unsigned short>(std::isnan(f) ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
template <class T>
unsigned to_pair(float low, float high) {
  return rounded(low, T{}) | static_cast<unsigned>(rounded(high, T{})) << 16;
}
inline float exp2_approx(float x) { return std::exp2(x); }
inline float reciprocal_approx(float x) { return 1.0f / x; }
