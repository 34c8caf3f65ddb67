// A stand-in for libcuda.so.1 with the few functions that driver.py calls: it keeps what it is given and prints each launch. The tests load it through
// the real cuda.bindings, so that names, argument order and pointers are those of the true interface; there is no GPU behind it.
#include <cstdio>
#include <cstring>
#include <dlfcn.h>

#include "params.h"

extern "C" {
static void* current = nullptr;

int cuInit(unsigned) { return 0; }
int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal + 40, 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) { return *context = reinterpret_cast<void*>(long(device)), 0; }
int cuCtxGetCurrent(void** context) { return *context = current, 0; }
int cuCtxPushCurrent(void* context) { return current = context, 0; }
int cuCtxPopCurrent(void** context) { return *context = current, current = nullptr, 0; }
int cuModuleLoadData(void** module, const void* image) {
  if (std::memcmp(image, "\x7f" "ELF", 4) != 0 || current == nullptr) return 200;  // CUDA_ERROR_INVALID_IMAGE
  return *module = current, 0;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  if (module != current || std::strncmp(name, "group_stats_", 12) != 0) return 500;  // CUDA_ERROR_NOT_FOUND
  return *function = strdup(name), 0;
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
  return std::printf("%s attribute %d = %d\n", static_cast<char*>(function), attribute, value), 0;
}
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void* stream, void** arguments, void** extra) {
  const StatsParams& p = *static_cast<const StatsParams*>(arguments[0]);
  std::printf("%s grid %u %u %u block %u %u %u shared %u stream %p extra %p: N %d groups %d eps %g\n", static_cast<char*>(function), gx, gy, gz, bx, by, bz, shared, stream,
              static_cast<void*>(extra), p.N, p.groups, p.eps);
  return std::fflush(stdout), gx == 7 ? 701 : 0;  // CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES
}
int cuGetErrorName(int error, const char** name) { return *name = error == 701 ? "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES" : "CUDA_ERROR_NOT_FOUND", 0; }
int cuGetErrorString(int, const char** words) { return *words = "as CUDA explains it", 0; }
int cuGetProcAddress_v2(const char* symbol, void** function, int, unsigned long, int* status) {
  *function = dlsym(RTLD_DEFAULT, symbol);
  if (*function == nullptr) *function = dlsym(RTLD_NEXT, symbol);
  if (status) *status = *function ? 0 : 1;
  return *function ? 0 : 500;
}
int cuGetProcAddress(const char* symbol, void** function, int version, unsigned long flags) { return cuGetProcAddress_v2(symbol, function, version, flags, nullptr); }
}
