// Attention for any type and any head of up to 512 features, on the ordinary units: a warp a row, one row of the other
// side after the other. For f32, small models and autoencoders; heads of 64 features in bf16 have attention.cu. Tensors
// [B, T, H, d]. MOST: features a lane, 4 for d <= 128 and 16 for wider heads.
#include "common.cuh"

// The row of this warp, among `rows` of [B, T, H].
struct Row {
    u64 at, stride, line;
    int token;
    // `at`: the row's first feature; `line`: the first of its head in [B, H, T].
    __device__ __forceinline__ Row(u64 number, int tokens, int heads, int dim)
        : at(number * dim), stride((u64)heads * dim),
          line((number / heads / tokens * heads + number % heads) * tokens), token(number / heads % tokens) {}
    __device__ __forceinline__ u64 first() const { return at - token * stride; }
};

template <int MOST, typename T> __device__ __forceinline__ void load(float (&x)[MOST], const T *from, int dim) {
    for (int i = 0; i < MOST; i++) {
        int feature = i * WARP + threadIdx.x % WARP;
        x[i] = feature < dim ? widen(from[feature]) : 0.f;
    }
}
template <int MOST, typename T> __device__ __forceinline__ void store(T *to, const float (&x)[MOST], int dim, float factor) {
    for (int i = 0; i < MOST; i++) {
        int feature = i * WARP + threadIdx.x % WARP;
        if (feature < dim) to[feature] = narrow<T>(x[i] * factor);
    }
}
template <int MOST> __device__ __forceinline__ float dot(const float (&a)[MOST], const float (&b)[MOST]) {
    float sum = 0.f;
    for (int i = 0; i < MOST; i++) sum += a[i] * b[i];
    return group_sum<WARP>(sum);
}
template <int MOST> __device__ __forceinline__ void add(float (&sum)[MOST], float factor, const float (&x)[MOST]) {
    for (int i = 0; i < MOST; i++) sum[i] += factor * x[i];
}

template <int MOST, typename T>
__device__ __forceinline__ void forward(const T *q, const T *k, const T *v, T *o, float *lse, u64 rows, int tokens,
                                        int heads, int dim, float scale) {
    if (warp_number() >= rows) return;
    const Row row(warp_number(), tokens, heads, dim);
    float query[MOST], out[MOST] = {}, largest = -__int_as_float(0x7f800000), sum = 0.f;
    load(query, q + row.at, dim);
    for (int key = 0; key < tokens; key++) {
        float other[MOST];
        load(other, k + row.first() + key * row.stride, dim);
        float logit = dot(query, other) * scale, most = fmaxf(largest, logit);
        float keep = exp2f(largest - most), weight = exp2f(logit - most);
        largest = most;
        sum = sum * keep + weight;
        load(other, v + row.first() + key * row.stride, dim);
        for (int i = 0; i < MOST; i++) out[i] = out[i] * keep + weight * other[i];
    }
    store(o + row.at, out, dim, 1.f / sum);
    if (threadIdx.x % WARP == 0) lse[row.line + row.token] = largest + log2f(sum);
}

// delta [B, H, T]: sum over features of o do.
template <int MOST, typename T>
__device__ __forceinline__ void output_products(const T *o, const T *d_o, float *delta, u64 rows, int tokens, int heads,
                                                int dim) {
    if (warp_number() >= rows) return;
    const Row row(warp_number(), tokens, heads, dim);
    float a[MOST], b[MOST];
    load(a, o + row.at, dim);
    load(b, d_o + row.at, dim);
    float product = dot(a, b);
    if (threadIdx.x % WARP == 0) delta[row.line + row.token] = product;
}

template <int MOST, typename T>
__device__ __forceinline__ void backward_keys(const T *q, const T *k, const T *v, const T *d_o, const float *lse,
                                              const float *delta, T *dk, T *dv, u64 rows, int tokens, int heads, int dim,
                                              float scale, float factor) {
    if (warp_number() >= rows) return;
    const Row row(warp_number(), tokens, heads, dim);
    float key[MOST], value[MOST], key_gradient[MOST] = {}, value_gradient[MOST] = {};
    load(key, k + row.at, dim);
    load(value, v + row.at, dim);
    for (int query = 0; query < tokens; query++) {
        float other[MOST], gradient[MOST];
        load(other, q + row.first() + query * row.stride, dim);
        load(gradient, d_o + row.first() + query * row.stride, dim);
        float weight = exp2f(dot(key, other) * scale - lse[row.line + query]);
        float slope = weight * (dot(value, gradient) - delta[row.line + query]);
        add(value_gradient, weight, gradient);
        add(key_gradient, slope, other);
    }
    store(dk + row.at, key_gradient, dim, factor);
    store(dv + row.at, value_gradient, dim, 1.f);
}

template <int MOST, typename T>
__device__ __forceinline__ void backward_queries(const T *q, const T *k, const T *v, const T *d_o, const float *lse,
                                                 const float *delta, T *dq, u64 rows, int tokens, int heads, int dim,
                                                 float scale, float factor) {
    if (warp_number() >= rows) return;
    const Row row(warp_number(), tokens, heads, dim);
    float query[MOST], gradient[MOST], out[MOST] = {};
    load(query, q + row.at, dim);
    load(gradient, d_o + row.at, dim);
    for (int key = 0; key < tokens; key++) {
        float other[MOST], value[MOST];
        load(other, k + row.first() + key * row.stride, dim);
        load(value, v + row.first() + key * row.stride, dim);
        float weight = exp2f(dot(query, other) * scale - lse[row.line + row.token]);
        add(out, weight * (dot(gradient, value) - delta[row.line + row.token]), other);
    }
    store(dq + row.at, out, dim, factor);
}

#define KERNELS(name, MOST, T)                                                                                         \
    extern "C" __global__ void attention_##name##_##T(const T *q, const T *k, const T *v, T *o, float *lse, u64 rows,  \
                                                      int tokens, int heads, int dim, float scale) {                   \
        forward<MOST>(q, k, v, o, lse, rows, tokens, heads, dim, scale);                                               \
    }                                                                                                                  \
    extern "C" __global__ void attention_##name##_delta_##T(const T *o, const T *d_o, float *delta, u64 rows,          \
                                                            int tokens, int heads, int dim) {                          \
        output_products<MOST>(o, d_o, delta, rows, tokens, heads, dim);                                                \
    }                                                                                                                  \
    extern "C" __global__ void attention_##name##_backward_keys_##T(                                                   \
        const T *q, const T *k, const T *v, const T *d_o, const float *lse, const float *delta, T *dk, T *dv, u64 rows, \
        int tokens, int heads, int dim, float scale, float factor) {                                                   \
        backward_keys<MOST>(q, k, v, d_o, lse, delta, dk, dv, rows, tokens, heads, dim, scale, factor);                \
    }                                                                                                                  \
    extern "C" __global__ void attention_##name##_backward_queries_##T(                                                \
        const T *q, const T *k, const T *v, const T *d_o, const float *lse, const float *delta, T *dq, u64 rows,        \
        int tokens, int heads, int dim, float scale, float factor) {                                                   \
        backward_queries<MOST>(q, k, v, d_o, lse, delta, dq, rows, tokens, heads, dim, scale, factor);                 \
    }
KERNELS(any, 4, float)
KERNELS(any, 4, bf16)
KERNELS(wide, 16, float)
KERNELS(wide, 16, bf16)
