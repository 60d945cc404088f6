// Normalisations over the last dimension, a warp a row.
#include "common.cuh"

// Mean (0 for RMS) and reciprocal deviation of a row; the variance in a second pass, as on the CPU.
template <bool CENTRED, typename T>
__device__ __forceinline__ void statistics_of(const T *x, u64 width, float eps, float &mean, float &rstd) {
    mean = CENTRED ? total({x}, width, [](const float(&v)[1]) { return v[0]; }) / (float)width : 0.f;
    float centre = mean;
    float square = total({x}, width, [=](const float(&v)[1]) { return (v[0] - centre) * (v[0] - centre); });
    rstd = 1.f / sqrtf(square / (float)width + eps);
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
    map({x, shift, scale}, out, width, threadIdx.x % WARP, WARP,
        [=](const float(&v)[3]) { return (v[0] - mean) * rstd * (1.f + v[2]) + v[1]; });
}

// dx, and (mean, reciprocal deviation) of each row for the sums over rows: statistics [rows, 2].
template <typename T>
__device__ __forceinline__ void layer_norm_modulate_backward(const T *x, const T *scale, const T *dy, T *dx,
                                                             float *statistics, u64 rows, u64 tokens, u64 width,
                                                             float eps) {
    u64 row = warp_number(), sample = row / tokens;
    if (row >= rows) return;
    x += row * width, dy += row * width, dx += row * width, scale += sample * width;
    float mean, rstd;
    statistics_of<true>(x, width, eps, mean, rstd);
    float sum = total({dy, scale}, width, [](const float(&v)[2]) { return v[0] * (1.f + v[1]); }) / (float)width;
    float product = total({dy, scale, x}, width, [=](const float(&v)[3]) {
        return v[0] * (1.f + v[1]) * (v[2] - mean) * rstd;
    }) / (float)width;
    map({dy, scale, x}, dx, width, threadIdx.x % WARP, WARP, [=](const float(&v)[3]) {
        return rstd * (v[0] * (1.f + v[1]) - sum - (v[2] - mean) * rstd * product);
    });
    if (threadIdx.x % WARP == 0) statistics[2 * row] = mean, statistics[2 * row + 1] = rstd;
}

// x / rms(x) weight: x [rows, width], weight [width].
template <typename T>
__device__ __forceinline__ void rms_norm(const T *x, const T *weight, T *out, u64 rows, u64 width, float eps) {
    u64 row = warp_number();
    if (row >= rows) return;
    x += row * width, out += row * width;
    float mean, rstd;
    statistics_of<false>(x, width, eps, mean, rstd);
    map({x, weight}, out, width, threadIdx.x % WARP, WARP, [=](const float(&v)[2]) { return v[0] * rstd * v[1]; });
}

template <typename T>
__device__ __forceinline__ void rms_norm_backward(const T *x, const T *weight, const T *dy, T *dx, float *statistics,
                                                  u64 rows, u64 width, float eps) {
    u64 row = warp_number();
    if (row >= rows) return;
    x += row * width, dy += row * width, dx += row * width;
    float mean, rstd;
    statistics_of<false>(x, width, eps, mean, rstd);
    float product = total({dy, weight, x}, width, [](const float(&v)[3]) { return v[0] * v[1] * v[2]; });
    product *= rstd / (float)width;
    map({dy, weight, x}, dx, width, threadIdx.x % WARP, WARP, [=](const float(&v)[3]) {
        return rstd * (v[0] * v[1] - v[2] * rstd * product);
    });
    if (threadIdx.x % WARP == 0) statistics[2 * row] = 0.f, statistics[2 * row + 1] = rstd;
}

// Where row `row` of a stream lies, which has `rows` of the `all` rows of a sample there, from `first` on.
__device__ __forceinline__ u64 place(u64 row, u64 rows, u64 all, u64 first) { return row / rows * all + first + row % rows; }

// rms_norm of rows of as many packs as LANES, a lane a pack: a head has few features, and a warp takes several rows. x [n,
// width]; out has each row in its place in a longer sequence.
template <typename T, int LANES>
__device__ __forceinline__ void rms_norm_head(const T *x, const T *weight, T *out, u64 n, u64 rows, u64 all, u64 first,
                                              float eps) {
    const int SIZE = Pack<T>::SIZE;
    u64 row = FIRST / LANES, lane = threadIdx.x % LANES;
    Pack<T> given = {}, factor = reinterpret_cast<const Pack<T> *>(weight)[lane], result;
    if (row < n) given = reinterpret_cast<const Pack<T> *>(x)[row * LANES + lane];
    float square = 0.f;
#pragma unroll
    for (int j = 0; j < SIZE; j++) square += widen(given.at[j]) * widen(given.at[j]);
    float rstd = 1.f / sqrtf(group_sum<LANES>(square) / (float)(LANES * SIZE) + eps);
#pragma unroll
    for (int j = 0; j < SIZE; j++) result.at[j] = narrow<T>(widen(given.at[j]) * rstd * widen(factor.at[j]));
    if (row < n) reinterpret_cast<Pack<T> *>(out)[place(row, rows, all, first) * LANES + lane] = result;
}

// dy lies as out did, dx as x. statistics [n, 2] as of rms_norm_backward, if they are wanted.
template <typename T, int LANES>
__device__ __forceinline__ void rms_norm_head_backward(const T *x, const T *weight, const T *dy, T *dx,
                                                       float *statistics, u64 n, u64 rows, u64 all, u64 first, float eps) {
    const int SIZE = Pack<T>::SIZE;
    u64 row = FIRST / LANES, lane = threadIdx.x % LANES;
    Pack<T> given = {}, gradient = {}, factor = reinterpret_cast<const Pack<T> *>(weight)[lane], result;
    if (row < n) {
        given = reinterpret_cast<const Pack<T> *>(x)[row * LANES + lane];
        gradient = reinterpret_cast<const Pack<T> *>(dy)[place(row, rows, all, first) * LANES + lane];
    }
    float square = 0.f, product = 0.f;
#pragma unroll
    for (int j = 0; j < SIZE; j++) {
        float value = widen(given.at[j]);
        square += value * value;
        product += widen(gradient.at[j]) * widen(factor.at[j]) * value;
    }
    float rstd = 1.f / sqrtf(group_sum<LANES>(square) / (float)(LANES * SIZE) + eps);
    product = group_sum<LANES>(product) * rstd / (float)(LANES * SIZE);
#pragma unroll
    for (int j = 0; j < SIZE; j++)
        result.at[j] = narrow<T>(rstd * (widen(gradient.at[j]) * widen(factor.at[j]) - widen(given.at[j]) * rstd * product));
    if (row >= n) return;
    reinterpret_cast<Pack<T> *>(dx)[row * LANES + lane] = result;
    if (statistics && lane == 0) statistics[2 * row] = 0.f, statistics[2 * row + 1] = rstd;
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

// Heads of 64 features.
#define HEADS(T, LANES)                                                                                                \
    extern "C" __global__ void rms_norm_head_##T(const T *x, const T *weight, T *out, u64 n, u64 rows, u64 all,        \
                                                 u64 first, float eps) {                                               \
        rms_norm_head<T, LANES>(x, weight, out, n, rows, all, first, eps);                                             \
    }                                                                                                                  \
    extern "C" __global__ void rms_norm_head_backward_##T(const T *x, const T *weight, const T *dy, T *dx,             \
                                                          float *statistics, u64 n, u64 rows, u64 all, u64 first,      \
                                                          float eps) {                                                 \
        rms_norm_head_backward<T, LANES>(x, weight, dy, dx, statistics, n, rows, all, first, eps);                     \
    }
HEADS(float, 16)
HEADS(bf16, 8)
