// What all kernels share: the two types of storage, arithmetic in f32, sums over a warp.
//
// Compiled to PTX for compute capability 8.0 (Ampere, the first with bf16 matrix instructions); the driver translates
// it for the GPU that is there. Only attention_hopper.cu is for 9.0, and for no other. tests/cuda_kernels compiles the
// same sources for the CPU and runs their threads in lock-step.
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

// The sum over LANES neighbouring lanes, on each of them. The order of the additions is fixed, as everywhere in these
// kernels: no atomics.
template <int LANES> __device__ __forceinline__ float group_sum(float x) {
    for (int distance = LANES / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(FULL, x, distance);
    return x;
}

// Kernels that go over n elements take any number of blocks.
#define FIRST ((u64)blockIdx.x * blockDim.x + threadIdx.x)
#define STEP ((u64)gridDim.x * blockDim.x)
#define EACH(i, n) for (u64 i = FIRST; i < (n); i += STEP)

// What a thread reads at once, where the arrays begin at multiples of 16 bytes.
template <typename T> struct __align__(16) Pack {
    static constexpr u64 SIZE = 16 / sizeof(T);
    T at[SIZE];
};

template <typename T, int K> __device__ __forceinline__ u64 packs(const T *const (&in)[K], const T *out, u64 n) {
    u64 start = (u64)out;
    for (int k = 0; k < K; k++) start |= (u64)in[k];
    return start % 16 == 0 ? n / Pack<T>::SIZE : 0;
}

// out[i] = f of the K numbers in[.][i], for this thread's share of n.
template <typename T, int K, typename F>
__device__ __forceinline__ void map(const T *const (&in)[K], T *out, u64 n, u64 first, u64 step, F f) {
    u64 whole = packs(in, out, n);
    float x[K];
    for (u64 i = first; i < whole; i += step) {
        Pack<T> given[K], result;
        for (int k = 0; k < K; k++) given[k] = reinterpret_cast<const Pack<T> *>(in[k])[i];
#pragma unroll
        for (int j = 0; j < (int)Pack<T>::SIZE; j++) {
            for (int k = 0; k < K; k++) x[k] = widen(given[k].at[j]);
            result.at[j] = narrow<T>(f(x));
        }
        reinterpret_cast<Pack<T> *>(out)[i] = result;
    }
    for (u64 i = whole * Pack<T>::SIZE + first; i < n; i += step) {
        for (int k = 0; k < K; k++) x[k] = widen(in[k][i]);
        out[i] = narrow<T>(f(x));
    }
}

// The sum over n of f of the K numbers in[.][i], of a warp: the same on every lane.
template <typename T, int K, typename F> __device__ __forceinline__ float total(const T *const (&in)[K], u64 n, F f) {
    u64 whole = packs(in, in[0], n), lane = threadIdx.x % WARP;
    float x[K], sum = 0.f;
    for (u64 i = lane; i < whole; i += WARP) {
        Pack<T> given[K];
        for (int k = 0; k < K; k++) given[k] = reinterpret_cast<const Pack<T> *>(in[k])[i];
#pragma unroll
        for (int j = 0; j < (int)Pack<T>::SIZE; j++) {
            for (int k = 0; k < K; k++) x[k] = widen(given[k].at[j]);
            sum += f(x);
        }
    }
    for (u64 i = whole * Pack<T>::SIZE + lane; i < n; i += WARP) {
        for (int k = 0; k < K; k++) x[k] = widen(in[k][i]);
        sum += f(x);
    }
    return group_sum<WARP>(sum);
}

// The number of this warp among all, in kernels with one warp a row.
__device__ __forceinline__ u64 warp_number() {
    return (u64)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
}
