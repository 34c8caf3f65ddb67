// The kernels, compiled for the CPU, behind one function. Built by __init__.py, which finds the entry points by their names.
#define EDM_EMULATED
#include "kernels.cu"
#if __has_include("rotated.cu")
#include "rotated.cu"
#endif
#if __has_include("branch.cu")
#include "branch.cu"
#endif
#if __has_include("down.cu")
#include "down.cu"
#endif
#if __has_include("attention.cu")
#include "attention.cu"
#endif

// Runs an entry point on CPU pointers. Returns what went wrong, or null. `params` is the struct that the entry point's name calls for.
extern "C" __attribute__((visibility("default"))) const char* emulate(const char* name, const void* entry, unsigned x, unsigned y, unsigned z, unsigned threads,
                                                                      size_t shared_bytes, const void* params) {
  static thread_local std::string error;
  std::function<void()> kernel;
  const auto bind = [&](auto copy) {
    std::memcpy(&copy, params, sizeof copy);
    kernel = [=] { reinterpret_cast<void (*)(decltype(copy))>(const_cast<void*>(entry))(copy); };
  };
  const std::string called = name;
  if (called.rfind("quantize_rows_", 0) == 0) bind(RowNormParams{});
  else if (called.rfind("rotary_", 0) == 0) bind(RotaryParams{});
  else if (called.rfind("quantize_branch_", 0) == 0) bind(BranchParams{});
  else if (called.rfind("quantize_", 0) == 0) bind(QuantizeParams{});
  else if (called.rfind("group_stats_", 0) == 0) bind(StatsParams{});
  else if (called.rfind("attention_", 0) == 0) bind(AttentionParams{});
  else bind(ConvParams{});
  error = emulated::launch({x, y, z}, threads, shared_bytes, kernel);
  return error.empty() ? nullptr : error.c_str();
}
