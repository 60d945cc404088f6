// Stands in for CUDA's headers of small numbers when candle's kernels are compiled for the CPU (../threads.h).
// Arithmetic is that of float, rounded after each operation. Numbers of 8 bits are there to be compiled, not to be
// used.
#pragma once
#include "../threads.h"
#include <algorithm>
#include <cassert>
#include <cfloat>
#include <limits>
#include <type_traits>

#define __device__ inline
#define __host__
#define __forceinline__
using std::max;
using std::min;

// Numbers with an exponent of E bits and a fraction of F, stored in U.
template <typename U, int E, int F> struct Small {
    U bits;

    Small() = default;
    template <typename T, typename = std::enable_if_t<std::is_arithmetic_v<T>>> Small(T value)
        : bits(round((float)value)) {}
    operator float() const {
        const int bias = (1 << (E - 1)) - 1;
        int exponent = bits >> F & ((1 << E) - 1), fraction = bits & ((1 << F) - 1);
        float size = exponent == (1 << E) - 1 ? (fraction ? NAN : INFINITY)
                     : exponent               ? std::ldexp(1.f + std::ldexp((float)fraction, -F), exponent - bias)
                                              : std::ldexp((float)fraction, 1 - bias - F);
        return bits >> (E + F) ? -size : size;
    }
    Small &operator+=(Small other) { return *this = (float)*this + (float)other; }
    Small &operator*=(Small other) { return *this = (float)*this * (float)other; }

    static U round(float value) {
        const int bias = (1 << (E - 1)) - 1, most = (1 << E) - 1;
        U sign = (U)((U)std::signbit(value) << (E + F));
        if (std::isnan(value)) return sign | (U)((most << F) | (1 << (F - 1)));
        int exponent;
        float size = std::fabs(value);
        std::frexp(size, &exponent);
        // Units of the last place, ties to even, as the current rounding mode has it.
        int place = std::max(exponent - 1, 1 - bias) - F;
        float units = size == 0.f || std::isinf(size) ? 0.f : std::nearbyint(std::ldexp(size, -place));
        long whole = ((long)(place + F + bias - 1) << F) + (long)units;
        if (size == 0.f) whole = 0;
        if (std::isinf(size) || whole >= (long)most << F) whole = (long)most << F;
        return sign | (U)whole;
    }
};

typedef Small<uint16_t, 8, 7> __nv_bfloat16;
typedef Small<uint16_t, 5, 10> __half;
struct __nv_fp8_e4m3 {
    uint8_t __x;
    __nv_fp8_e4m3() = default;
    __nv_fp8_e4m3(float) { std::abort(); }
};
#define __NV_E4M3 0
inline __half __nv_cvt_fp8_to_halfraw(uint8_t, int) { std::abort(); }

inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __nv_bfloat16 __float2bfloat16(float x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline float __half2float(__half x) { return x; }
inline __half __float2half(float x) { return x; }

// Two side by side.
struct __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
inline __nv_bfloat162 __hadd2(__nv_bfloat162 a, __nv_bfloat162 b) { return {a.x + b.x, a.y + b.y}; }
inline __nv_bfloat162 __hsub2(__nv_bfloat162 a, __nv_bfloat162 b) { return {a.x - b.x, a.y - b.y}; }
inline __nv_bfloat162 __hmul2(__nv_bfloat162 a, __nv_bfloat162 b) { return {a.x * b.x, a.y * b.y}; }
inline __nv_bfloat162 __h2div(__nv_bfloat162 a, __nv_bfloat162 b) { return {a.x / b.x, a.y / b.y}; }

#define FOR(Number)                                                                                                    \
    inline bool __hisnan(Number x) { return std::isnan((float)x); }                                                    \
    inline bool isnan(Number x) { return std::isnan((float)x); }                                                       \
    inline Number hsqrt(Number x) { return sqrtf(x); }                                                                 \
    inline Number hcos(Number x) { return cosf(x); }                                                                   \
    inline Number hsin(Number x) { return sinf(x); }                                                                   \
    inline Number hlog(Number x) { return logf(x); }                                                                   \
    inline Number hexp(Number x) { return expf(x); }                                                                   \
    inline Number __habs(Number x) { return fabsf(x); }                                                                \
    inline Number __hmax_nan(Number a, Number b) { return __hisnan(a) || (float)a > (float)b ? a : b; }                \
    inline Number __hmin_nan(Number a, Number b) { return __hisnan(a) || (float)a < (float)b ? a : b; }
FOR(__nv_bfloat16)
FOR(__half)
#undef FOR

inline float normcdff(float x) { return 0.5f * erfcf(-x * (float)M_SQRT1_2); }
inline double normcdf(double x) { return 0.5 * erfc(-x * M_SQRT1_2); }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline double rsqrt(double x) { return 1. / sqrt(x); }
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float a, float b) { return a / b; }

#define BITS(name, From, To)                                                                                           \
    inline To name(From from) {                                                                                        \
        To to;                                                                                                         \
        std::memcpy(&to, &from, sizeof to);                                                                            \
        return to;                                                                                                     \
    }
BITS(__float_as_int, float, int)
BITS(__float_as_uint, float, unsigned)
BITS(__uint_as_float, unsigned, float)
BITS(__double_as_longlong, double, long long)
BITS(__longlong_as_double, long long, double)
BITS(__half_as_ushort, __half, unsigned short)
BITS(__ushort_as_half, unsigned short, __half)
#undef BITS

// Fibres take turns where they meet, and nowhere else.
template <typename T, typename V> T atomicAdd(T *place, V value) {
    T before = *place;
    *place = before + (T)value;
    return before;
}
template <typename T, typename V> T atomicMax(T *place, V value) {
    T before = *place;
    *place = std::max(before, (T)value);
    return before;
}
template <typename T, typename V> T atomicMin(T *place, V value) {
    T before = *place;
    *place = std::min(before, (T)value);
    return before;
}
template <typename T> T atomicCAS(T *place, T expected, T value) {
    T before = *place;
    if (before == expected) *place = value;
    return before;
}
