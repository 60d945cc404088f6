// Normalisations over the last dimension, a warp a row.
#include "common.cuh"

// Mean (0 for RMS) and reciprocal deviation of a row; the variance in a second pass, as on the CPU.
template <bool CENTRED, typename T>
__device__ __forceinline__ void statistics_of(const T *x, u64 width, float eps, float &mean, float &rstd) {
    u32 lane = threadIdx.x % WARP;
    mean = 0.f;
    if (CENTRED) {
        float sum = 0.f;
        for (u64 i = lane; i < width; i += WARP) sum += widen(x[i]);
        mean = warp_sum(sum) / (float)width;
    }
    float square = 0.f;
    for (u64 i = lane; i < width; i += WARP) {
        float d = widen(x[i]) - mean;
        square += d * d;
    }
    rstd = 1.f / sqrtf(warp_sum(square) / (float)width + eps);
}

// LayerNorm without affine parameters, then x (1 + scale) + shift: x [B, .., width] with `tokens` rows a sample, shift
// and scale [B, width].
template <typename T>
__device__ __forceinline__ void layer_norm_modulate(const T *x, const T *shift, const T *scale, T *out, u64 rows,
                                                    u64 tokens, u64 width, float eps) {
    u64 row = warp_number(), sample = row / tokens;
    if (row >= rows) return;
    x += row * width, out += row * width, shift += sample * width, scale += sample * width;
    float mean, rstd;
    statistics_of<true>(x, width, eps, mean, rstd);
    for (u64 i = threadIdx.x % WARP; i < width; i += WARP)
        out[i] = narrow<T>((widen(x[i]) - mean) * rstd * (1.f + widen(scale[i])) + widen(shift[i]));
}

// dx, and (mean, reciprocal deviation) of each row for the sums over rows: statistics [rows, 2].
template <typename T>
__device__ __forceinline__ void layer_norm_modulate_backward(const T *x, const T *scale, const T *dy, T *dx,
                                                             float *statistics, u64 rows, u64 tokens, u64 width,
                                                             float eps) {
    u64 row = warp_number(), sample = row / tokens;
    if (row >= rows) return;
    u32 lane = threadIdx.x % WARP;
    x += row * width, dy += row * width, dx += row * width, scale += sample * width;
    float mean, rstd;
    statistics_of<true>(x, width, eps, mean, rstd);
    float sum = 0.f, product = 0.f;
    for (u64 i = lane; i < width; i += WARP) {
        float inner = widen(dy[i]) * (1.f + widen(scale[i]));
        sum += inner;
        product += inner * (widen(x[i]) - mean) * rstd;
    }
    sum = warp_sum(sum) / (float)width, product = warp_sum(product) / (float)width;
    for (u64 i = lane; i < width; i += WARP) {
        float inner = widen(dy[i]) * (1.f + widen(scale[i]));
        dx[i] = narrow<T>(rstd * (inner - sum - (widen(x[i]) - mean) * rstd * product));
    }
    if (lane == 0) statistics[2 * row] = mean, statistics[2 * row + 1] = rstd;
}

// x / rms(x) weight: x [rows, width], weight [width].
template <typename T>
__device__ __forceinline__ void rms_norm(const T *x, const T *weight, T *out, u64 rows, u64 width, float eps) {
    u64 row = warp_number();
    if (row >= rows) return;
    x += row * width, out += row * width;
    float mean, rstd;
    statistics_of<false>(x, width, eps, mean, rstd);
    for (u64 i = threadIdx.x % WARP; i < width; i += WARP) out[i] = narrow<T>(widen(x[i]) * rstd * widen(weight[i]));
}

template <typename T>
__device__ __forceinline__ void rms_norm_backward(const T *x, const T *weight, const T *dy, T *dx, float *statistics,
                                                  u64 rows, u64 width, float eps) {
    u64 row = warp_number();
    if (row >= rows) return;
    u32 lane = threadIdx.x % WARP;
    x += row * width, dy += row * width, dx += row * width;
    float mean, rstd;
    statistics_of<false>(x, width, eps, mean, rstd);
    float product = 0.f;
    for (u64 i = lane; i < width; i += WARP) product += widen(dy[i]) * widen(weight[i]) * widen(x[i]);
    product = warp_sum(product) * rstd / (float)width;
    for (u64 i = lane; i < width; i += WARP)
        dx[i] = narrow<T>(rstd * (widen(dy[i]) * widen(weight[i]) - widen(x[i]) * rstd * product));
    if (lane == 0) statistics[2 * row] = 0.f, statistics[2 * row + 1] = rstd;
}

#define KERNELS(T)                                                                                                     \
    extern "C" __global__ void layer_norm_modulate_##T(const T *x, const T *shift, const T *scale, T *out, u64 rows,   \
                                                       u64 tokens, u64 width, float eps) {                             \
        layer_norm_modulate(x, shift, scale, out, rows, tokens, width, eps);                                           \
    }                                                                                                                  \
    extern "C" __global__ void layer_norm_modulate_backward_##T(const T *x, const T *scale, const T *dy, T *dx,        \
                                                                float *statistics, u64 rows, u64 tokens, u64 width,    \
                                                                float eps) {                                           \
        layer_norm_modulate_backward(x, scale, dy, dx, statistics, rows, tokens, width, eps);                          \
    }                                                                                                                  \
    extern "C" __global__ void rms_norm_##T(const T *x, const T *weight, T *out, u64 rows, u64 width, float eps) {     \
        rms_norm(x, weight, out, rows, width, eps);                                                                    \
    }                                                                                                                  \
    extern "C" __global__ void rms_norm_backward_##T(const T *x, const T *weight, const T *dy, T *dx,                  \
                                                     float *statistics, u64 rows, u64 width, float eps) {              \
        rms_norm_backward(x, weight, dy, dx, statistics, rows, width, eps);                                            \
    }
KERNELS(float)
KERNELS(bf16)
