// Operations on each number by itself, one pass each way.
#include "common.cuh"

// x sigmoid(s(x)) is SiLU with s = x, and GELU's tanh approximation with s = 2 sqrt(2/pi) (x + 0.044715 x^3).
struct Silu {
    static __device__ __forceinline__ float gate(float x) { return x; }
    static __device__ __forceinline__ float slope(float) { return 1.f; }
};
struct Gelu {
    static __device__ __forceinline__ float gate(float x) {
        return 2.f * 0.7978845608028654f * x * (1.f + 0.044715f * x * x);
    }
    static __device__ __forceinline__ float slope(float x) {
        return 2.f * 0.7978845608028654f * (1.f + 3.f * 0.044715f * x * x);
    }
};

__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

template <typename G, typename T> __device__ __forceinline__ void activation(const T *x, T *y, u64 n) {
    map({x}, y, n, FIRST, STEP, [](const float(&v)[1]) { return v[0] * sigmoid(G::gate(v[0])); });
}

template <typename G, typename T>
__device__ __forceinline__ void activation_backward(const T *x, const T *dy, T *dx, u64 n) {
    map({x, dy}, dx, n, FIRST, STEP, [](const float(&v)[2]) {
        float s = sigmoid(G::gate(v[0]));
        return v[1] * (s + v[0] * s * (1.f - s) * G::slope(v[0]));
    });
}

// The kernels below have a block a row, so that nothing is divided by the width.

// y + bias, in place: y [rows, width].
template <typename T> __device__ __forceinline__ void bias(T *y, const T *b, u64 width) {
    y += blockIdx.x * width;
    map({y, b}, y, width, threadIdx.x, blockDim.x, [](const float(&v)[2]) { return v[0] + v[1]; });
}

// x + gate y: x and y [B, .., width] with `tokens` rows a sample, gate [B, width].
template <typename T>
__device__ __forceinline__ void gated_residual(const T *x, const T *gate, const T *y, T *out, u64 tokens, u64 width) {
    u64 at = blockIdx.x * width, sample = blockIdx.x / tokens * width;
    map({x + at, gate + sample, y + at}, out + at, width, threadIdx.x, blockDim.x,
        [](const float(&v)[3]) { return v[0] + v[1] * v[2]; });
}

// gate d: the gradient of y; the gate's own is a sum over columns (reduce.cu).
template <typename T>
__device__ __forceinline__ void gated_residual_backward(const T *gate, const T *d, T *dy, u64 tokens, u64 width) {
    u64 at = blockIdx.x * width, sample = blockIdx.x / tokens * width;
    map({gate + sample, d + at}, dy + at, width, threadIdx.x, blockDim.x,
        [](const float(&v)[2]) { return v[0] * v[1]; });
}

// destination += source, in f32.
template <typename T>
__device__ __forceinline__ void add_to(float *__restrict__ destination, const T *__restrict__ source, u64 n) {
    constexpr int SIZE = Pack<T>::SIZE, PARTS = SIZE / 4;
    u64 whole = ((u64)destination | (u64)source) % 16 == 0 ? n / SIZE : 0;
    EACH(i, whole) {
        Pack<T> given = reinterpret_cast<const Pack<T> *>(source)[i];
        Pack<float> sums[PARTS], *place = reinterpret_cast<Pack<float> *>(destination) + i * PARTS;
        for (int part = 0; part < PARTS; part++) sums[part] = place[part];
        for (int j = 0; j < SIZE; j++) sums[j / 4].at[j % 4] += widen(given.at[j]);
        for (int part = 0; part < PARTS; part++) place[part] = sums[part];
    }
    for (u64 i = whole * SIZE + FIRST; i < n; i += STEP) destination[i] += widen(source[i]);
}

template <typename T> __device__ __forceinline__ void add(const T *a, const T *b, T *out, u64 n) {
    map({a, b}, out, n, FIRST, STEP, [](const float(&v)[2]) { return v[0] + v[1]; });
}

// x [rows, width] in f32 as three numbers of bf16 each, [rows, 3, width]: high half, low half, and the high half again. The
// low half stands in place `low`, 1 or 2.
extern "C" __global__ void bf16x3(const float *x, bf16 *y, u64 n, u64 width, u64 low) {
    EACH(i, n) {
        u64 at = i + i / width * 2 * width;
        bf16 high = narrow<bf16>(x[i]), rest = narrow<bf16>(x[i] - widen(high));
        y[at] = high;
        y[at + low * width] = rest;
        y[at + (3 - low) * width] = high;
    }
}

// The gradient of x: the sum of those of the high half, which meets both halves of the other factor.
extern "C" __global__ void bf16x3_backward(const bf16 *dy, float *dx, u64 n, u64 width, u64 low) {
    EACH(i, n) {
        u64 at = i + i / width * 2 * width;
        dx[i] = widen(dy[at]) + widen(dy[at + (3 - low) * width]);
    }
}

#define KERNELS(T)                                                                                                     \
    extern "C" __global__ void gelu_##T(const T *x, T *y, u64 n) { activation<Gelu>(x, y, n); }                        \
    extern "C" __global__ void silu_##T(const T *x, T *y, u64 n) { activation<Silu>(x, y, n); }                        \
    extern "C" __global__ void gelu_backward_##T(const T *x, const T *dy, T *dx, u64 n) {                              \
        activation_backward<Gelu>(x, dy, dx, n);                                                                       \
    }                                                                                                                  \
    extern "C" __global__ void silu_backward_##T(const T *x, const T *dy, T *dx, u64 n) {                              \
        activation_backward<Silu>(x, dy, dx, n);                                                                       \
    }                                                                                                                  \
    extern "C" __global__ void bias_##T(T *y, const T *b, u64 width) { bias(y, b, width); }                            \
    extern "C" __global__ void gated_residual_##T(const T *x, const T *gate, const T *y, T *out, u64 tokens,           \
                                                  u64 width) {                                                         \
        gated_residual(x, gate, y, out, tokens, width);                                                                \
    }                                                                                                                  \
    extern "C" __global__ void gated_residual_backward_##T(const T *gate, const T *d, T *dy, u64 tokens, u64 width) {  \
        gated_residual_backward(gate, d, dy, tokens, width);                                                           \
    }                                                                                                                  \
    extern "C" __global__ void add_##T(const T *a, const T *b, T *out, u64 n) { add(a, b, out, n); }                   \
    extern "C" __global__ void add_to_##T(float *destination, const T *source, u64 n) {                                \
        add_to(destination, source, n);                                                                                \
    }
KERNELS(float)
KERNELS(bf16)

// Copies rows of `rows` packs of 16 bytes, one a sample, between arrays whose rows have `from` and `to` packs.
extern "C" __global__ void copy_rows(const uint4 *source, uint4 *destination, u64 n, u64 rows, u64 from, u64 to) {
    EACH(i, n) destination[i / rows * to + i % rows] = source[i / rows * from + i % rows];
}

// AdamW in one pass: master [n], first moments [n] and second moments [n] stand one after the other (optim/adamw.rs).
extern "C" __global__ void adamw(float *state, const float *gradient, u64 n, float scale, float beta1, float beta2,
                                 float decay, float rate, float root, float eps) {
    float *master = state, *first = state + n, *second = state + 2 * n;
    EACH(i, n) {
        float g = gradient[i] * scale;
        float m = beta1 * first[i] + (1.f - beta1) * g;
        float v = beta2 * second[i] + (1.f - beta2) * g * g;
        first[i] = m;
        second[i] = v;
        master[i] = master[i] * decay - rate * m / (sqrtf(v) / root + eps);
    }
}

// destination = source - keep (source - destination): equal vectors stay equal to the bit, -0 included.
extern "C" __global__ void lerp(float *destination, const float *source, u64 n, float keep) {
    EACH(i, n) destination[i] = source[i] - keep * (source[i] - destination[i]);
}

// Cosines, then sines, of 1000 t times each frequency: t [batch], out [batch, 2 half]. Frequencies and angles are rounded
// to f32 where the CPU rounds them (model/time.rs).
extern "C" __global__ void time_features(const float *t, float *out, u64 batch, u64 half) {
    EACH(i, batch * half) {
        u64 sample = i / half, f = i % half;
        float exponent = -9.210340371976184f * (float)f / (float)half;
        float angle = (float)(1000.0 * (double)t[sample]) * (float)exp((double)exponent);
        out[sample * 2 * half + f] = (float)cos((double)angle);
        out[sample * 2 * half + half + f] = (float)sin((double)angle);
    }
}
