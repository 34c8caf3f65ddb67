// The kernels' entry points. Each runs on a team of threads; results do not depend on their number.
#include <omp.h>

#include "fake_quant.h"
#include "group_norm.h"

template <typename Kernel>
static void on_team(int threads, Kernel kernel) {
#pragma omp parallel num_threads(threads)
  kernel(omp_get_thread_num(), omp_get_num_threads());
}

extern "C" void edm_fake_quantize(const FakeQuantParams* p, int threads) {
  on_team(threads, [&](int thread, int team) { p->type ? fake_quantize<Bf16>(*p, thread, team) : fake_quantize<float>(*p, thread, team); });
}

extern "C" void edm_fake_quantize_gradients(const FakeQuantParams* p, int threads) {
  on_team(threads, [&](int thread, int team) {
    p->type ? fake_quantize_gradients<Bf16>(*p, thread, team) : fake_quantize_gradients<float>(*p, thread, team);
  });
}

extern "C" void edm_group_norm(const GroupNormParams* p, int threads) {
  on_team(threads, [&](int thread, int team) { group_norm(*p, thread, team); });
}

extern "C" void edm_group_norm_gradients(const GroupNormParams* p, int threads) {
  on_team(threads, [&](int thread, int team) { group_norm_gradients(*p, thread, team); });
}
