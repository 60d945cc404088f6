// Sums whose order does not depend on the GPU: first of pieces, then of the pieces' sums.
#include "common.cuh"

#define LANES 8         // rows that a block reads at once
#define MOST_THREADS 32 // of a row, each with COLUMNS neighbouring columns

// What is summed over the rows of a matrix: COLUMNS numbers from `place` on, a multiple of COLUMNS, are added to `sums`.
template <typename T, int COLUMNS> struct __align__(sizeof(T) * COLUMNS) Columns { T at[COLUMNS]; };
template <int COLUMNS, typename T> __device__ __forceinline__ Columns<T, COLUMNS> columns(const T *a, u64 place) {
    return *reinterpret_cast<const Columns<T, COLUMNS> *>(a + place);
}
template <typename T> struct Plain {
    const T *a;
    template <int COLUMNS> __device__ __forceinline__ void add(float (&sums)[COLUMNS], u64, u64 place) const {
        auto given = columns<COLUMNS>(a, place);
        for (int i = 0; i < COLUMNS; i++) sums[i] += widen(given.at[i]);
    }
};
template <typename T> struct Product {
    const T *a, *b;
    template <int COLUMNS> __device__ __forceinline__ void add(float (&sums)[COLUMNS], u64, u64 place) const {
        auto left = columns<COLUMNS>(a, place), right = columns<COLUMNS>(b, place);
        for (int i = 0; i < COLUMNS; i++) sums[i] += widen(left.at[i]) * widen(right.at[i]);
    }
};
// b times the normalised a, whose rows have (mean, reciprocal deviation) in `statistics` [rows, 2].
template <typename T> struct Normalised {
    const T *a, *b;
    const float *statistics;
    template <int COLUMNS> __device__ __forceinline__ void add(float (&sums)[COLUMNS], u64 row, u64 place) const {
        float mean = statistics[2 * row], factor = statistics[2 * row + 1];
        auto left = columns<COLUMNS>(a, place), right = columns<COLUMNS>(b, place);
        for (int i = 0; i < COLUMNS; i++) sums[i] += widen(right.at[i]) * ((widen(left.at[i]) - mean) * factor);
    }
};

// Sums over pieces of `piece` rows of each of the gridDim.z samples: partial [samples, pieces, width]. Threads
// [up to MOST_THREADS, LANES]; blocks [what the width takes, pieces, samples]. The order of a column's sum does not
// depend on COLUMNS.
template <int COLUMNS, typename F>
__device__ __forceinline__ void column_sums(F f, float *partial, u64 rows, u64 width, u64 piece) {
    __shared__ float shared[LANES][MOST_THREADS * COLUMNS];
    u64 column = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * COLUMNS;
    u64 first = blockIdx.y * piece, last = first + piece < rows ? first + piece : rows;
    float sums[COLUMNS] = {};
    if (column < width) {
#pragma unroll 4
        for (u64 row = first + threadIdx.y; row < last; row += LANES) {
            u64 at = blockIdx.z * rows + row;
            f.add(sums, at, at * width + column);
        }
    }
    for (int i = 0; i < COLUMNS; i++) shared[threadIdx.y][threadIdx.x * COLUMNS + i] = sums[i];
    __syncthreads();
    if (threadIdx.y == 0 && column < width) {
        float *out = partial + ((u64)blockIdx.z * gridDim.y + blockIdx.y) * width + column;
        for (int i = 0; i < COLUMNS; i++) {
            float sum = sums[i];
            for (int lane = 1; lane < LANES; lane++) sum += shared[lane][threadIdx.x * COLUMNS + i];
            out[i] = sum;
        }
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

// With one column a thread, and with as many as 16 bytes hold, for widths and arrays of whole packs.
#define SUMS(T, SUFFIX, COLUMNS)                                                                                       \
    extern "C" __global__ void sum_plain_##SUFFIX(const T *a, float *partial, u64 rows, u64 width, u64 piece) {        \
        column_sums<COLUMNS>(Plain<T>{a}, partial, rows, width, piece);                                                \
    }                                                                                                                  \
    extern "C" __global__ void sum_product_##SUFFIX(const T *a, const T *b, float *partial, u64 rows, u64 width,       \
                                                    u64 piece) {                                                       \
        column_sums<COLUMNS>(Product<T>{a, b}, partial, rows, width, piece);                                           \
    }                                                                                                                  \
    extern "C" __global__ void sum_normalised_##SUFFIX(const T *a, const T *b, const float *statistics,                \
                                                       float *partial, u64 rows, u64 width, u64 piece) {               \
        column_sums<COLUMNS>(Normalised<T>{a, b, statistics}, partial, rows, width, piece);                            \
    }
#define KERNELS(T)                                                                                                     \
    SUMS(T, T, 1)                                                                                                      \
    SUMS(T, packs_##T, 16 / sizeof(T))                                                                                 \
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
