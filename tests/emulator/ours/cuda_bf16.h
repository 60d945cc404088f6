// Stands in for CUDA's header of that name when our kernels are compiled for the CPU (../threads.h).
#pragma once
#include "../threads.h"

#define __device__
#define __forceinline__ inline

// bf16: the upper half of a float, rounded to nearest, ties to even.
struct __nv_bfloat16 { uint16_t bits; };
inline float __bfloat162float(__nv_bfloat16 x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline __nv_bfloat16 __float2bfloat16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return {(uint16_t)(std::isnan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }

inline float power(float x) { return exp2f(x); }

// Two numbers in a register, the first in its lower half.
inline unsigned pair(float first, float second) {
    return __float2bfloat16(first).bits | (unsigned)__float2bfloat16(second).bits << 16;
}

// One number of a register that holds two.
inline float half_of(unsigned pair, int which) { return __bfloat162float({(uint16_t)(pair >> 16 * which)}); }

// Puts the fragments of all lanes together, multiplies, and takes this lane's part.
inline void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    host::Warp &warp = host::warp();
    int lane = host::lane();
    std::memcpy(warp.a[lane], a, sizeof a);
    warp.b[lane][0] = b0;
    warp.b[lane][1] = b1;
    host::meet(warp.meeting);
    for (int i = 0; i < 4; i++) {
        int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; k++) {
            int holder = k % 8 / 2;
            float left = half_of(warp.a[row % 8 * 4 + holder][row / 8 + k / 8 * 2], k % 2);
            float right = half_of(warp.b[column * 4 + holder][k / 8], k % 2);
            c[i] += left * right;
        }
    }
    host::meet(warp.meeting);
}

inline void load_transposed(unsigned (&r)[4], const __nv_bfloat16 *row) {
    host::Warp &warp = host::warp();
    int lane = host::lane();
    if ((uintptr_t)row % 16) std::fprintf(stderr, "a row of a matrix is not aligned\n"), std::abort();
    warp.rows[lane] = &row->bits;
    host::meet(warp.meeting);
    for (int tile = 0; tile < 4; tile++) {
        unsigned low = warp.rows[tile * 8 + lane % 4 * 2][lane / 4], high = warp.rows[tile * 8 + lane % 4 * 2 + 1][lane / 4];
        r[tile] = low | high << 16;
    }
    host::meet(warp.meeting);
}

// warpgroup.cuh: copies and products are done at once, so that there is nothing to wait for.
template <int BYTES> void copy(void *shared, const void *from, bool there) {
    if (((uintptr_t)shared | (uintptr_t)from) % BYTES) std::fprintf(stderr, "a copy is not aligned\n"), std::abort();
    there ? std::memcpy(shared, from, BYTES) : std::memset(shared, 0, BYTES);
}
inline void commit_copies() {}
template <int N> void wait_copies() {}
template <typename... Registers> void begin_products(Registers &...) {}
inline void commit_products() {}
template <typename Registers> void settle(Registers &) {}
template <int N, typename... Registers> void wait_products(Registers &...) {}

inline __nv_bfloat16 *shared_memory() { return reinterpret_cast<__nv_bfloat16 *>(host::shared); }

// As on the GPU in units of 16 bytes. The number that lies at `bytes` from its start, were the pieces of rows in order.
inline uint64_t operand(const __nv_bfloat16 *tile) {
    if ((uintptr_t)tile % 1024) std::fprintf(stderr, "a tile is not aligned\n"), std::abort();
    return (uintptr_t)tile >> 4;
}
inline float number_of(uint64_t operand, int bytes) {
    uint64_t address = (operand << 4) + bytes;
    return __bfloat162float(*reinterpret_cast<const __nv_bfloat16 *>(address ^ (address >> 7 & 7) << 4));
}

template <bool TOKENS, bool ADD> void start_product(float (&c)[8][4], const unsigned (&a)[4], uint64_t b) {
    host::Warp &warp = host::warp();
    host::Meeting &group = host::groups[host::current / host::GROUP];
    int lane = host::lane();
    std::memcpy(warp.a[lane], a, sizeof a);
    host::meet(group);
    for (int i = 0; i < 32; i++) {
        int row = lane / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        float sum = ADD ? c[i / 4][i % 4] : 0.f;
        for (int k = 0; k < 16; k++) {
            float left = half_of(warp.a[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k % 2);
            sum += left * (TOKENS ? number_of(b, k * 128 + column * 2) : number_of(b, column * 128 + k * 2));
        }
        c[i / 4][i % 4] = sum;
    }
    host::meet(group);
}
