// The kernels as a TensorRT plugin calls them: pointers and integers instead of a struct, in TensorRT's order, inputs, extra integers, outputs. The kernels are
// those of kernels.cu; only the entry point differs. TensorRT stores the compiled code with every node, so one kernel is compiled at a time: tensorrt_plugin.py defines
//
//   PLUGIN_ENTRY    name of the entry point
//   PLUGIN_KERNEL   the device function behind it, such as  quantize_first<f16, 4, false>  or  convolve<U4, Tile<64, 64, 32, 4>, f16>
//   PLUGIN_BOUNDS   threads a block, and for a convolution the blocks that must fit on a multiprocessor
//   PLUGIN_UNSIGNED for quantize only: 1 to store n - qmin[row]
//
// edm_deploy/export/plugin_schema.py defines the order of the inputs.
#include "convolution.cuh"
#include "quantize.cuh"

#ifdef PLUGIN_UNSIGNED
extern "C" __global__ void __launch_bounds__(PLUGIN_BOUNDS)
    PLUGIN_ENTRY(const void* x, const int* row, const float* inv_scale, const int* qmin, const int* qmax, int N, int HW, int C, int Cb, byte_t* codes) {
  PLUGIN_KERNEL(QuantizeParams{x, codes, row, inv_scale, qmin, qmax, nullptr, nullptr, nullptr, nullptr, N, HW, C, Cb, 0, PLUGIN_UNSIGNED});
}
#else
// The sum is never split: that takes a second kernel, and a plugin has one.
extern "C" __global__ void __launch_bounds__(PLUGIN_BOUNDS)
    PLUGIN_ENTRY(const byte_t* codes, const byte_t* weight, const byte_t* zero, const int* row, const float* act_scale, const int* qmin, const float* weight_scale,
                 const int* weight_sum, const float* bias, int N, int H, int W, int Cb, int K, int R, int S, int P, int Q, int padding, int stride, void* out) {
  PLUGIN_KERNEL(ConvParams{codes, weight, zero, row, act_scale, qmin, weight_scale, weight_sum, bias, nullptr, nullptr, nullptr, nullptr, nullptr, out, nullptr,
                           N, H, W, Cb, K, R, S, P, Q, padding, stride, 1, 0, 0, 0, 0, 0});
}
#endif
