// What the objectives measure: sums over a sample of squares and magnitudes of deviations, weighted sums of differences of
// velocities.
#include "common.cuh"

#define THREADS 256
#define MOST 4 // deviations, and differences in each

// A sample's deviations r_m = factors[m, 0] (v - others[0]) + sum_k factors[m, k] (others[k - 1] - others[k]): v [B, n],
// others [B, links, n], factors [B, count, links].
struct Deviations {
    const float *v, *others, *factors;
    u64 n, links, count;
    __device__ __forceinline__ Deviations(const float *v, const float *others, const float *factors, u64 n, u64 links,
                                          u64 count, u64 sample)
        : v(v + sample * n), others(others + sample * links * n), factors(factors + sample * count * links), n(n), links(links),
          count(count) {}
    // The differences.
    __device__ __forceinline__ void load(u64 i, float (&x)[MOST]) const {
        float before = v[i];
        for (u64 k = 0; k < links; k++) {
            float other = others[k * n + i];
            x[k] = before - other;
            before = other;
        }
    }
    __device__ __forceinline__ float at(u64 m, const float (&x)[MOST]) const {
        float r = 0.f;
        for (u64 k = 0; k < links; k++) r += factors[m * links + k] * x[k];
        return r;
    }
};

// Sums over `piece` elements of each sample: partial [B, pieces, count, 2]. Blocks [pieces, B].
extern "C" __global__ void deviation_sums(const float *v, const float *others, const float *factors, float *partial,
                                          u64 n, u64 links, u64 count, u64 piece) {
    __shared__ float sums[THREADS / WARP][2 * MOST];
    Deviations deviations(v, others, factors, n, links, count, blockIdx.y);
    u64 first = blockIdx.x * piece, last = first + piece < n ? first + piece : n;
    float x[MOST], sum[2 * MOST] = {};
    for (u64 i = first + threadIdx.x; i < last; i += THREADS) {
        deviations.load(i, x);
        for (u64 m = 0; m < count; m++) {
            float r = deviations.at(m, x);
            sum[2 * m] += r * r;
            sum[2 * m + 1] += fabsf(r);
        }
    }
    for (u64 s = 0; s < 2 * count; s++) {
        float whole = group_sum<WARP>(sum[s]);
        if (threadIdx.x % WARP == 0) sums[threadIdx.x / WARP][s] = whole;
    }
    __syncthreads();
    if (threadIdx.x < 2 * count) {
        float whole = 0.f;
        for (int warp = 0; warp < THREADS / WARP; warp++) whole += sums[warp][threadIdx.x];
        partial[((u64)blockIdx.y * gridDim.x + blockIdx.x) * 2 * count + threadIdx.x] = whole;
    }
}

// The gradient of v, given those of the sums, d [B, count, 2]. Blocks [any, B].
extern "C" __global__ void deviation_backward(const float *v, const float *others, const float *factors, const float *d,
                                              float *dv, u64 n, u64 links, u64 count) {
    Deviations deviations(v, others, factors, n, links, count, blockIdx.y);
    d += blockIdx.y * count * 2;
    dv += blockIdx.y * n;
    float x[MOST];
    EACH(i, n) {
        deviations.load(i, x);
        float sum = 0.f;
        for (u64 m = 0; m < count; m++) {
            float r = deviations.at(m, x), sign = (float)((r > 0.f) - (r < 0.f));
            sum += deviations.factors[m * links] * (2.f * d[2 * m] * r + d[2 * m + 1] * sign);
        }
        dv[i] = sum;
    }
}
