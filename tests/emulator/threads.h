// Runs a GPU's kernels on the CPU: what their sources, compiled as C++, expect of CUDA.
//
// The threads of a block take turns, one at a time, each up to its next meeting with the others: those of its block at
// __syncthreads, those of its warp where lanes exchange values, those of its warpgroup where they multiply together. So
// indices, barriers, shuffles, the fragments of the matrix instructions and the places of tiles in shared memory are
// put to the test; races within a block, the waiting for copies and products, occupancy and speed are not.
#pragma once
#include <cmath>
#include <math.h>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <tuple>
#include <ucontext.h>
#include <utility>
#include <vector>

#ifndef __global__ // the compiler may be told a word for it, to list kernels
#define __global__
#endif
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// One block at a time.
#define __shared__ static

struct Index {
    unsigned x, y, z;
};
struct uint4 {
    unsigned x, y, z, w;
};
struct float2 {
    float x, y;
};
struct float4 {
    float x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

namespace host {

// What is shared here is never destroyed: streams are still at work when the process ends.

// A place in a computation. Going there saves and restores little: no signals, no unwinding.
struct Place {
    void *saved[5];
};
// 0, and 1 after go_to.
#define HERE(place) __builtin_setjmp((place).saved)
[[noreturn]] __attribute__((noinline)) inline void go_to(Place &place) { __builtin_longjmp(place.saved, 1); }

// Threads that wait for each other.
struct Meeting {
    int members = 0, arrived = 0, rounds = 0;
};

// What the lanes of a warp lay out for each other.
struct Warp {
    Meeting meeting;
    double values[2][32]; // of one exchange and the next
    unsigned a[32][4], b[32][2];
    const uint16_t *rows[32];
};

// Warps that multiply together, and what is not registers of theirs.
const int GROUP = 128;
inline std::vector<Meeting> &groups = *new std::vector<Meeting>;
alignas(1024) inline char shared[96 << 10];

struct Thread {
    Index index;
    Place place; // where it waits
    bool done;
};

// A stack on which threads run one after the other, up to the first that has to wait; it is free again when that one
// has ended. So a kernel without meetings runs on one. Switched by jumps, which unlike swapcontext ask nothing of the
// system.
struct Fibre {
    ucontext_t beginning;
    Place place;
    std::vector<char> stack;
};

inline std::vector<Thread> &threads = *new std::vector<Thread>;
inline std::vector<Warp> &warps = *new std::vector<Warp>;
inline Meeting block;
inline std::vector<Fibre *> &idle = *new std::vector<Fibre *>;
inline Place scheduler;
inline int current, next;

// A kernel with its arguments.
typedef std::function<void()> Call;
inline const Call *body;

inline Warp &warp() { return warps[current / 32]; }
inline int lane() { return current % 32; }

__attribute__((noinline)) inline void leave() {
    if (!HERE(threads[current].place)) go_to(scheduler);
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
#define threadIdx (host::threads[host::current].index)

inline void __syncthreads() { host::meet(host::block); }

template <typename T> T __shfl_xor_sync(unsigned, T value, int mask, int = 32) {
    host::Warp &warp = host::warp();
    // Nobody writes here again before all have met once more, and so have read.
    double (&values)[32] = warp.values[warp.meeting.rounds % 2];
    values[host::lane()] = value;
    host::meet(warp.meeting);
    return values[host::lane() ^ mask];
}

inline bool __any_sync(unsigned, bool value) {
    float most = value;
    for (int distance = 16; distance > 0; distance /= 2) most = fmaxf(most, __shfl_xor_sync(0, most, distance));
    return most != 0.f;
}

inline float __int_as_float(int bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

namespace host {

inline Fibre *starting;

inline void enter() {
    Fibre *fibre = starting;
    for (;;) {
        while (next < (int)threads.size()) {
            current = next++;
            (*body)();
            threads[current].done = true;
        }
        idle.push_back(fibre);
        if (!HERE(fibre->place)) go_to(scheduler);
    }
}

// Begins threads until one waits or all have begun.
__attribute__((noinline)) inline void begin() {
    if (HERE(scheduler)) return;
    if (!idle.empty()) {
        Fibre *fibre = idle.back();
        idle.pop_back();
        go_to(fibre->place);
    }
    starting = new Fibre; // for good
    starting->stack.resize(1 << 16);
    getcontext(&starting->beginning);
    starting->beginning.uc_stack.ss_sp = starting->stack.data();
    starting->beginning.uc_stack.ss_size = starting->stack.size();
    starting->beginning.uc_link = nullptr;
    makecontext(&starting->beginning, enter, 0);
    setcontext(&starting->beginning);
}

// Lets a waiting thread go on to its next meeting.
__attribute__((noinline)) inline void go_on() {
    if (!HERE(scheduler)) go_to(threads[current].place);
}

// Runs a kernel, block after block.
inline void run(const Call &kernel, const unsigned grid[3], const unsigned size[3]) {
    body = &kernel;
    gridDim = {grid[0], grid[1], grid[2]}, blockDim = {size[0], size[1], size[2]};
    int count = size[0] * size[1] * size[2];
    threads.resize(count);
    for (size_t at = 0; at < (size_t)grid[0] * grid[1] * grid[2]; at++) {
        blockIdx = {unsigned(at % grid[0]), unsigned(at / grid[0] % grid[1]), unsigned(at / grid[0] / grid[1])};
        block = {count, 0, 0};
        warps.resize((count + 31) / 32);
        for (Warp &warp : warps) warp.meeting = {};
        groups.assign((count + GROUP - 1) / GROUP, {});
        for (int i = 0; i < count; i++) {
            warps[i / 32].meeting.members++;
            groups[i / GROUP].members++;
            threads[i].index = {i % size[0], i / size[0] % size[1], i / size[0] / size[1]};
            threads[i].done = false;
        }
        for (next = 0; next < count;) begin();
        for (bool busy = true; busy;) {
            busy = false;
            for (current = 0; current < count; current++) {
                if (threads[current].done) continue;
                busy = true;
                go_on();
            }
        }
    }
}

// A kernel by its name: `bind` takes the values that its argument points to, as the driver does.
struct Kernel {
    const char *name;
    Call (*bind)(void **);
};

template <auto kernel> struct Entry;
template <typename... A, void (*kernel)(A...)> struct Entry<kernel> {
    static Call bind(void **args) { return bind(args, std::index_sequence_for<A...>{}); }
    template <size_t... I> static Call bind(void **args, std::index_sequence<I...>) {
        return [values = std::tuple<A...>(*static_cast<std::remove_const_t<A> *>(args[I])...)] {
            std::apply(kernel, values);
        };
    }
};

// All kernels of this library.
inline std::vector<Kernel> &kernels() {
    static std::vector<Kernel> &all = *new std::vector<Kernel>;
    return all;
}
struct Listed {
    Listed(std::initializer_list<Kernel> some) { kernels().insert(kernels().end(), some); }
};
inline const Kernel *find(const char *name) {
    for (const Kernel &kernel : kernels())
        if (!std::strcmp(kernel.name, name)) return &kernel;
    return nullptr;
}

} // namespace host
