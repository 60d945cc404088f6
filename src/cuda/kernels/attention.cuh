// What the kernels of attention on the matrix units share: heads of 64 features in bf16, tensors [B, T, H, 64].
#pragma once
#include "tensor_core.cuh"

#define DIM 64
#define STEPS (DIM / 16) // of a product over features

#define INFINITE __int_as_float(0x7f800000)

// Where a head of a sample begins, and how far its rows are apart.
struct Head {
    u64 at, stride;
    __device__ __forceinline__ Head(int tokens, int heads)
        : at(((u64)blockIdx.z * tokens * heads + blockIdx.y) * DIM), stride((u64)heads * DIM) {}
    __device__ __forceinline__ u64 row(int token) const { return at + token * stride; }
};

// This warp's 16 rows from `first`, as operand A of a product over features.
__device__ __forceinline__ void load_rows(u32 (&a)[STEPS][4], const bf16 *from, const Head &head, int first,
                                          int tokens) {
    int lane = threadIdx.x % WARP, row = first + lane / 4, column = lane % 4 * 2;
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int r = row + i % 2 * 8;
            a[step][i] = r < tokens ? pair_at(from + head.row(r) + step * 16 + i / 2 * 8 + column) : 0;
        }
    }
}

// Writes this warp's 16 rows, each times a factor.
__device__ __forceinline__ void store_rows(bf16 *to, const Head &head, const float (&c)[DIM / 8][4], int first,
                                           int tokens, float upper, float lower) {
    int lane = threadIdx.x % WARP, row = first + lane / 4, column = lane % 4 * 2;
#pragma unroll
    for (int tile = 0; tile < DIM / 8; tile++) {
        bf16 *at = to + tile * 8 + column;
        if (row < tokens)
            *reinterpret_cast<u32 *>(at + head.row(row)) = pair(c[tile][0] * upper, c[tile][1] * upper);
        if (row + 8 < tokens)
            *reinterpret_cast<u32 *>(at + head.row(row + 8)) = pair(c[tile][2] * lower, c[tile][3] * lower);
    }
}

// No weight for keys past the end, in tiles of C that begin with key `start`.
template <int TILES> __device__ __forceinline__ void mask_keys(float (&logits)[TILES][4], int start, int tokens) {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (start + tile * 8 + (int)threadIdx.x % 4 * 2 + i % 2 >= tokens) logits[tile][i] = -INFINITE;
        }
    }
}

// Over the four lanes that share a row of C.
__device__ __forceinline__ float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(FULL, x, 1));
    return fmaxf(x, __shfl_xor_sync(FULL, x, 2));
}
__device__ __forceinline__ float row_sum(float x) {
    x += __shfl_xor_sync(FULL, x, 1);
    return x + __shfl_xor_sync(FULL, x, 2);
}
