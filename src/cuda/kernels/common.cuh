// What all kernels share: the two types of storage, arithmetic in f32, sums over a warp.
//
// Compiled to PTX for compute capability 8.0 (Ampere, the first with bf16 matrix instructions); the driver translates it
// for the GPU that is there. tests/kernels compiles the same sources for the CPU and runs their threads in lock-step.
#pragma once
#include <cuda_bf16.h>

typedef __nv_bfloat16 bf16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define WARP 32
#define FULL 0xffffffffu

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __bfloat162float(x); }

template <typename T> __device__ __forceinline__ T narrow(float x);
template <> __device__ __forceinline__ float narrow<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 narrow<bf16>(float x) { return __float2bfloat16(x); }

// The same value on every lane. The order of the additions is fixed, as everywhere in these kernels: no atomics.
__device__ __forceinline__ float warp_sum(float x) {
    for (int distance = WARP / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(FULL, x, distance);
    return x;
}

// Kernels that go over n elements take any number of blocks.
#define EACH(i, n) \
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < (n); i += (u64)gridDim.x * blockDim.x)

// The number of this warp among all, in kernels with one warp a row.
__device__ __forceinline__ u64 warp_number() {
    return (u64)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
}
