// What pictures with the channels last want, [H, W, C]: the neighbours of each pixel side by side, and group norms.
#include "common.cuh"

enum Walk { SAME, HALF, DOUBLE };

// The pixel under place `offset` of a kernel of `size` for the result's pixel `at`, or -1: Walk::source of
// ops/convolution.rs.
__device__ __forceinline__ int source(int walk, int at, int offset, int size, int side) {
    int i = walk == HALF ? 2 * at + offset : at + offset - size / 2;
    if (walk == DOUBLE) side *= 2;
    if (i < 0 || i >= side) return -1;
    return walk == DOUBLE ? i / 2 : i;
}

// Rows of neighbours [n, size, size, C] of the result's pixels from `first` on, of one picture; zeros beyond it. `packs`: of a
// pixel. A thread copies packs, whatever they hold.
extern "C" __global__ void gather(const uint4 *x, uint4 *out, u64 n, u64 first, u64 packs, int height, int width,
                                  int out_width, int size, int walk) {
    EACH(i, n * size * size * packs) {
        u64 place = i / packs, pixel = place / (size * size) + first;
        int offset = (int)(place % (size * size));
        int row = source(walk, (int)(pixel / out_width), offset / size, size, height);
        int column = source(walk, (int)(pixel % out_width), offset % size, size, width);
        bool there = row >= 0 && column >= 0;
        out[i] = there ? x[((u64)row * width + column) * packs + i % packs] : make_uint4(0, 0, 0, 0);
    }
}

// Of each channel (a thread each) and each piece of a picture's pixels: mean, and sum of squares about it. partial
// [samples, pieces, C, 2]; blocks [pieces, samples].
template <typename T>
__device__ __forceinline__ void channel_sums(const T *x, float *partial, u64 pixels, u64 channels, u64 piece) {
    u64 first = blockIdx.x * piece, count = first + piece < pixels ? piece : pixels - first;
    partial += ((u64)blockIdx.y * gridDim.x + blockIdx.x) * channels * 2;
    x += ((u64)blockIdx.y * pixels + first) * channels;
    for (u64 channel = threadIdx.x; channel < channels; channel += blockDim.x) {
        float sum = 0.f, square = 0.f;
        for (u64 i = 0; i < count; i++) sum += widen(x[i * channels + channel]);
        float mean = sum / (float)count;
        for (u64 i = 0; i < count; i++) {
            float off = widen(x[i * channels + channel]) - mean;
            square += off * off;
        }
        partial[channel * 2] = mean, partial[channel * 2 + 1] = square;
    }
}

#define THREADS 256

// The sum over a block of THREADS, on each of them.
__device__ __forceinline__ float block_sum(float x) {
    __shared__ float sums[THREADS / WARP];
    x = group_sum<WARP>(x);
    __syncthreads(); // an earlier sum has been read
    if (threadIdx.x % WARP == 0) sums[threadIdx.x / WARP] = x;
    __syncthreads();
    float sum = 0.f;
    for (int warp = 0; warp < THREADS / WARP; warp++) sum += sums[warp];
    return sum;
}

// Factor and offset of each channel of each sample, [samples, C, 2], that normalise its group: blocks [groups, samples].
template <typename T>
__device__ __forceinline__ void group_affine(const float *partial, const T *weight, const T *bias, float *affine,
                                             u64 pixels, u64 channels, u64 pieces, u64 piece, float eps) {
    u64 size = channels / gridDim.x, start = blockIdx.x * size, n = pieces * size;
    partial += (u64)blockIdx.y * pieces * channels * 2;
    float total = (float)(pixels * size), sum = 0.f, square = 0.f;
    auto at = [&](u64 i) { return partial + (i / size * channels + start + i % size) * 2; };
    auto count = [&](u64 i) { return (float)(i / size + 1 < pieces ? piece : pixels - i / size * piece); };
    for (u64 i = threadIdx.x; i < n; i += THREADS) sum += at(i)[0] * (count(i) / total);
    float mean = block_sum(sum);
    for (u64 i = threadIdx.x; i < n; i += THREADS) {
        float off = at(i)[0] - mean;
        square += at(i)[1] + count(i) * off * off;
    }
    float rstd = 1.f / sqrtf(block_sum(square) / total + eps);
    for (u64 i = threadIdx.x; i < size; i += THREADS) {
        float factor = rstd * widen(weight[start + i]), *to = affine + ((u64)blockIdx.y * channels + start + i) * 2;
        to[0] = factor, to[1] = widen(bias[start + i]) - mean * factor;
    }
}

// x factor + offset, and SiLU of that where `silu`: n packs in all, `packs` of a pixel, `sample` of a sample.
template <typename T>
__device__ __forceinline__ void apply_affine(const T *x, const float *affine, T *out, u64 n, u64 sample, u64 packs, int silu) {
    const int SIZE = Pack<T>::SIZE;
    EACH(i, n) {
        Pack<T> given = reinterpret_cast<const Pack<T> *>(x)[i], result;
        const float *of = affine + (i / sample * packs + i % packs) * SIZE * 2;
#pragma unroll
        for (int j = 0; j < SIZE; j++) {
            float y = widen(given.at[j]) * of[2 * j] + of[2 * j + 1];
            result.at[j] = narrow<T>(silu ? y / (1.f + expf(-y)) : y);
        }
        reinterpret_cast<Pack<T> *>(out)[i] = result;
    }
}

#define KERNELS(T)                                                                                                     \
    extern "C" __global__ void channel_sums_##T(const T *x, float *partial, u64 pixels, u64 channels, u64 piece) {     \
        channel_sums(x, partial, pixels, channels, piece);                                                             \
    }                                                                                                                  \
    extern "C" __global__ void group_affine_##T(const float *partial, const T *weight, const T *bias, float *affine,   \
                                                u64 pixels, u64 channels, u64 pieces, u64 piece, float eps) {          \
        group_affine(partial, weight, bias, affine, pixels, channels, pieces, piece, eps);                             \
    }                                                                                                                  \
    extern "C" __global__ void apply_affine_##T(const T *x, const float *affine, T *out, u64 n, u64 sample, u64 packs, \
                                                int silu) {                                                            \
        apply_affine(x, affine, out, n, sample, packs, silu);                                                          \
    }
KERNELS(float)
KERNELS(bf16)
