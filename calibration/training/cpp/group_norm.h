// Group norm in bfloat16, channels last, with SiLU behind it where there is one, and its gradients. Each sample is computed by one thread.
#pragma once

#include "group_stats.h"
#include "params.h"
#include "simd.h"

// Of one sample: body(channel, number of channels) for each vector of channels.
template <typename Body>
inline void each_channel(int C, Body body) {
  int c = 0;
  for (; c + LANES <= C; c += LANES) body(c, LANES);
  if (c < C) body(c, C - c);
}

// Mean and rstd of one sample by channel, [C] each.
inline void spread_stats(const GroupNormParams& p, int n, float* mean, float* rstd) {
  for (int c = 0; c < p.C; c++) {
    const int64_t group = (int64_t)n * p.groups + c / (p.C / p.groups);
    mean[c] = p.mean[group], rstd[c] = p.rstd[group];
  }
}

inline void group_norm_sample(const GroupNormParams& p, int n) {
  const int chunks = (p.HW + STATS_CHUNK - 1) / STATS_CHUNK;
  float* partial = (float*)scratch(((size_t)chunks + 1) * 2 * p.C * sizeof(float));
  float *mean = partial + (size_t)chunks * 2 * p.C, *rstd = mean + p.C;
  const Bf16* x = (const Bf16*)p.x + (int64_t)n * p.HW * p.C;
  Bf16* out = (Bf16*)p.out + (int64_t)n * p.HW * p.C;
  for (int first = 0; first < p.HW; first += STATS_CHUNK)
    add_chunk(x, p.C, first, first + STATS_CHUNK < p.HW ? first + STATS_CHUNK : p.HW, partial + first / STATS_CHUNK * 2 * p.C);
  for (int group = 0; group < p.groups; group++) {
    const int64_t place = (int64_t)n * p.groups + group;
    merge_chunks(x, partial, p.HW, p.C, p.groups, group, p.eps, p.mean[place], p.rstd[place]);
  }
  spread_stats(p, n, mean, rstd);
  for (int i = 0; i < p.HW; i++)
    each_channel(p.C, [&](int c, int count) __attribute__((always_inline)) {
      const int64_t place = (int64_t)i * p.C + c;
      const Floats normed = (values(x + place, count) - values(mean + c, count)) * values(rstd + c, count);
      const Floats z = fused(normed, values(p.gamma + c, count), values(p.beta + c, count));
      put(out + place, p.silu ? over_one_plus(z, exponential(-z)) : z, count);
    });
}

// The gradient to the result of the norm itself is kept in bfloat16 in `out`, as torch keeps that of its two operators.
inline void group_norm_gradients_of_sample(const GroupNormParams& p, int n) {
  float* mean = (float*)scratch(5 * (size_t)p.C * sizeof(float));
  float *rstd = mean + p.C, *scaled_rstd = rstd + p.C, *first_term = scaled_rstd + p.C, *second_term = first_term + p.C;
  const int64_t start = (int64_t)n * p.HW * p.C;
  const Bf16 *x = (const Bf16*)p.x + start, *grad = (const Bf16*)p.grad + start;
  Bf16* out = (Bf16*)p.out + start;
  float *grad_gamma = p.grad_gamma + (int64_t)n * p.C, *grad_beta = p.grad_beta + (int64_t)n * p.C;
  spread_stats(p, n, mean, rstd);
  each_channel(p.C, [&](int c, int count) __attribute__((always_inline)) {
    const Floats m = values(mean + c, count), r = values(rstd + c, count), gamma = values(p.gamma + c, count), beta = values(p.beta + c, count);
    Floats to_gamma{}, to_beta{};
    for (int i = 0; i < p.HW; i++) {
      const int64_t place = (int64_t)i * p.C + c;
      const Floats normed = (values(x + place, count) - m) * r;
      Floats g = values(grad + place, count);
      if (p.silu) {  // silu'(z) = s (1 + z (1 - s)), s = 1 / (1 + exp(-z))
        const Floats z = fused(normed, gamma, beta), s = over_one_plus(all(1.0f), exponential(-z));
        g = g * (s * (1.0f + z * (1.0f - s)));
        put(out + place, g, count);
      }
      to_gamma = fused(g, normed, to_gamma), to_beta = to_beta + g;
    }
    put(grad_gamma + c, to_gamma, count), put(grad_beta + c, to_beta, count);
  });
  const int per = p.C / p.groups;
  for (int group = 0; group < p.groups; group++) {
    double of_gamma = 0, of_beta = 0;
    for (int c = group * per; c < (group + 1) * per; c++) of_gamma += (double)p.gamma[c] * grad_gamma[c], of_beta += (double)p.gamma[c] * grad_beta[c];
    const double size = (double)p.HW * per;
    for (int c = group * per; c < (group + 1) * per; c++) {
      scaled_rstd[c] = rstd[c] * p.gamma[c];
      first_term[c] = (float)(rstd[c] * of_beta / size), second_term[c] = (float)(rstd[c] * rstd[c] * of_gamma / size);
    }
  }
  const Bf16* inner = p.silu ? out : grad;
  for (int i = 0; i < p.HW; i++)
    each_channel(p.C, [&](int c, int count) __attribute__((always_inline)) {
      const int64_t place = (int64_t)i * p.C + c;
      const Floats centred = values(x + place, count) - values(mean + c, count);
      const Floats g = values(inner + place, count) * values(scaled_rstd + c, count);
      put(out + place, g - values(first_term + c, count) - centred * values(second_term + c, count), count);
    });
}

inline void group_norm(const GroupNormParams& p, int thread, int threads) {
  for (int n = p.N * thread / threads; n < p.N * (thread + 1) / threads; n++) group_norm_sample(p, n);
}

inline void group_norm_gradients(const GroupNormParams& p, int thread, int threads) {
  for (int n = p.N * thread / threads; n < p.N * (thread + 1) / threads; n++) group_norm_gradients_of_sample(p, n);
}
