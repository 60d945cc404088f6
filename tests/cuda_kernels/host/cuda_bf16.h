// Runs the GPU's kernels on the CPU: stands in for the header of that name when their sources are compiled as C++.
//
// The threads of a block are fibres that take turns, one at a time, each up to its next meeting with the others: those of
// its block at __syncthreads, those of its warp where lanes exchange values, those of its warpgroup where they multiply
// together. So indices, barriers, shuffles, the fragments of the matrix instructions and the places of tiles in shared
// memory are put to the test; races, the waiting for copies and products, occupancy and speed are not.
#pragma once
#include <cmath>
#include <math.h>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <csetjmp>
#include <cstring>
#include <ucontext.h>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// One block at a time.
#define __shared__ static

struct Index { unsigned x, y, z; };
struct uint4 { unsigned x, y, z, w; };
struct float4 { float x, y, z, w; };
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

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
inline float __int_as_float(int bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

namespace host {

// Threads that wait for each other.
struct Meeting {
    int members = 0, arrived = 0, rounds = 0;
};

// What the lanes of a warp lay out for each other.
struct Warp {
    Meeting meeting;
    float values[32];
    unsigned a[32][4], b[32][2];
    const uint16_t *rows[32];
};

// Warps that multiply together, and what is not registers of theirs.
const int GROUP = 128;
inline std::vector<Meeting> groups;
alignas(1024) inline char shared[96 << 10];

// Switched by jumps, which unlike swapcontext ask nothing of the system.
struct Fibre {
    ucontext_t beginning;
    jmp_buf place;
    std::vector<char> stack;
    Index thread;
    bool begun, done;
};

inline std::vector<Fibre> fibres;
inline std::vector<Warp> warps;
inline Meeting block;
inline jmp_buf scheduler;
inline int current;
inline void (*body)(void **);
inline void **arguments;

inline Warp &warp() { return warps[current / 32]; }
inline int lane() { return current % 32; }

inline void leave() {
    if (!_setjmp(fibres[current].place)) _longjmp(scheduler, 1);
}

inline void meet(Meeting &meeting) {
    int round = meeting.rounds;
    if (++meeting.arrived == meeting.members) {
        meeting.arrived = 0;
        meeting.rounds++;
        return;
    }
    while (meeting.rounds == round) leave();
}

} // namespace host

inline Index blockIdx, blockDim, gridDim;
#define threadIdx (host::fibres[host::current].thread)

inline void __syncthreads() { host::meet(host::block); }

inline float __shfl_xor_sync(unsigned, float value, int mask) {
    host::Warp &warp = host::warp();
    warp.values[host::lane()] = value;
    host::meet(warp.meeting);
    float other = warp.values[host::lane() ^ mask];
    host::meet(warp.meeting);
    return other;
}

inline bool __any_sync(unsigned, bool value) {
    float most = value;
    for (int distance = 16; distance > 0; distance /= 2) most = fmaxf(most, __shfl_xor_sync(0, most, distance));
    return most != 0.f;
}

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

namespace host {

inline void enter() {
    body(arguments);
    fibres[current].done = true;
    leave();
}

// Runs a kernel, block after block.
inline void run(void (*kernel)(void **), void **args, const unsigned grid[3], const unsigned threads[3]) {
    body = kernel, arguments = args;
    gridDim = {grid[0], grid[1], grid[2]}, blockDim = {threads[0], threads[1], threads[2]};
    int count = threads[0] * threads[1] * threads[2];
    fibres.resize(count);
    for (unsigned at = 0; at < grid[0] * grid[1] * grid[2]; at++) {
        blockIdx = {at % grid[0], at / grid[0] % grid[1], at / grid[0] / grid[1]};
        block = {count, 0, 0};
        warps.assign((count + 31) / 32, {});
        groups.assign((count + GROUP - 1) / GROUP, {});
        for (int i = 0; i < count; i++) {
            warps[i / 32].meeting.members++;
            groups[i / GROUP].members++;
            Fibre &fibre = fibres[i];
            fibre.thread = {i % threads[0], i / threads[0] % threads[1], i / threads[0] / threads[1]};
            fibre.begun = fibre.done = false;
            fibre.stack.resize(1 << 16);
            getcontext(&fibre.beginning);
            fibre.beginning.uc_stack.ss_sp = fibre.stack.data();
            fibre.beginning.uc_stack.ss_size = fibre.stack.size();
            fibre.beginning.uc_link = nullptr;
            makecontext(&fibre.beginning, enter, 0);
        }
        for (bool busy = true; busy;) {
            busy = false;
            for (current = 0; current < count; current++) {
                if (fibres[current].done) continue;
                busy = true;
                if (_setjmp(scheduler)) continue;
                if (fibres[current].begun) _longjmp(fibres[current].place, 1);
                fibres[current].begun = true;
                setcontext(&fibres[current].beginning);
            }
        }
    }
}

// Calls a kernel with the values that `args` points to, as the driver does.
template <typename... A> struct Caller {
    template <void (*kernel)(A...), size_t... I> static void call(void **args, std::index_sequence<I...>) {
        kernel(*static_cast<A *>(args[I])...);
    }
};

template <auto kernel> struct Entry;
template <typename... A, void (*kernel)(A...)> struct Entry<kernel> {
    static void call(void **args) { Caller<A...>::template call<kernel>(args, std::index_sequence_for<A...>{}); }
};

} // namespace host
