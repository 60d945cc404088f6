// Sums whose order does not depend on the GPU: first of pieces, then of the pieces' sums.
#include "common.cuh"

#define COLUMNS 32 // columns of a block
#define LANES 8    // rows that a block reads at once

// What is summed over the rows of a matrix.
template <typename T> struct Plain {
    const T *a;
    __device__ __forceinline__ float at(u64 row, u64 width, u64 column) const { return widen(a[row * width + column]); }
};
template <typename T> struct Product {
    const T *a, *b;
    __device__ __forceinline__ float at(u64 row, u64 width, u64 column) const {
        return widen(a[row * width + column]) * widen(b[row * width + column]);
    }
};
// b times the normalised a, whose rows have (mean, reciprocal deviation) in `statistics` [rows, 2].
template <typename T> struct Normalised {
    const T *a, *b;
    const float *statistics;
    __device__ __forceinline__ float at(u64 row, u64 width, u64 column) const {
        float normal = (widen(a[row * width + column]) - statistics[2 * row]) * statistics[2 * row + 1];
        return widen(b[row * width + column]) * normal;
    }
};

// Sums over pieces of `piece` rows of each of the gridDim.z samples: partial [samples, pieces, width]. Threads
// [COLUMNS, LANES]; blocks [ceil(width / COLUMNS), pieces, samples].
template <typename F> __device__ __forceinline__ void column_sums(F f, float *partial, u64 rows, u64 width, u64 piece) {
    __shared__ float sums[LANES][COLUMNS + 1];
    u64 column = (u64)blockIdx.x * COLUMNS + threadIdx.x;
    u64 first = blockIdx.y * piece, last = first + piece < rows ? first + piece : rows;
    float sum = 0.f;
    if (column < width) {
        for (u64 row = first + threadIdx.y; row < last; row += LANES) sum += f.at(blockIdx.z * rows + row, width, column);
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && column < width) {
        for (int lane = 1; lane < LANES; lane++) sum += sums[lane][threadIdx.x];
        partial[((u64)blockIdx.z * gridDim.y + blockIdx.y) * width + column] = sum;
    }
}

// The pieces' sums: partial [samples, pieces, width] to out [samples, width].
template <typename T> __device__ __forceinline__ void join_sums(const float *partial, T *out, u64 n, u64 pieces, u64 width) {
    EACH(i, n) {
        const float *p = partial + i / width * pieces * width + i % width;
        float sum = 0.f;
        for (u64 piece = 0; piece < pieces; piece++) sum += p[piece * width];
        out[i] = narrow<T>(sum);
    }
}

#define KERNELS(T)                                                                                                     \
    extern "C" __global__ void sum_##T(const T *a, float *partial, u64 rows, u64 width, u64 piece) {                   \
        column_sums(Plain<T>{a}, partial, rows, width, piece);                                                         \
    }                                                                                                                  \
    extern "C" __global__ void sum_product_##T(const T *a, const T *b, float *partial, u64 rows, u64 width,            \
                                               u64 piece) {                                                            \
        column_sums(Product<T>{a, b}, partial, rows, width, piece);                                                    \
    }                                                                                                                  \
    extern "C" __global__ void sum_normalised_##T(const T *a, const T *b, const float *statistics, float *partial,     \
                                                  u64 rows, u64 width, u64 piece) {                                    \
        column_sums(Normalised<T>{a, b, statistics}, partial, rows, width, piece);                                     \
    }                                                                                                                  \
    extern "C" __global__ void join_sums_##T(const float *partial, T *out, u64 n, u64 pieces, u64 width) {             \
        join_sums(partial, out, n, pieces, width);                                                                     \
    }
KERNELS(float)
KERNELS(bf16)

#define THREADS 256

// Sum of squares in f64, of a block: partial [gridDim.x]. Each block takes `piece` elements.
extern "C" __global__ void square_sum(const float *x, double *partial, u64 n, u64 piece) {
    __shared__ double sums[THREADS];
    u64 first = blockIdx.x * piece, last = first + piece < n ? first + piece : n;
    double sum = 0.0;
    for (u64 i = first + threadIdx.x; i < last; i += THREADS) sum += (double)x[i] * (double)x[i];
    sums[threadIdx.x] = sum;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (threadIdx.x == 0) partial[blockIdx.x] = sums[0];
}
