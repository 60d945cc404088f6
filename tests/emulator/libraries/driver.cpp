// libcuda: memory is the host's, streams are threads, kernels are functions of this library (../threads.h).
//
// Streams wait for each other only where events say so, and EMULATED_GPU_DELAY lets each of them hesitate before all it
// does, for up to so many microseconds: what is not ordered by events comes out wrong. Memory holds NaN when it is
// allocated and when it has been freed. What the real driver refuses (threads, shared memory, grids) is refused.
//
//   EMULATED_GPU_CAPABILITY  90 by default      EMULATED_GPU_COUNT  1 by default
#include "../threads.h"
#include "stream.h"
#include <chrono>
#include <map>
#include <random>
#include <string>
#include <thread>

namespace {

const int SUCCESS = 0, INVALID_VALUE = 1, NO_BINARY = 209, NOT_FOUND = 500, NOT_READY = 600;
const size_t MEMORY = (size_t)16 << 30;

struct Function {
    const host::Kernel *kernel;
    unsigned shared = 48 << 10;
};

struct Event {
    std::shared_ptr<host::Mark> mark;
    std::chrono::steady_clock::time_point at;
};

struct Pool {
    std::mutex mutex;
    std::map<void *, size_t> sizes;
    size_t used = 0;
};
// Never destroyed, like all that streams use: they are still at work when the process ends.
Pool &pool = *new Pool;

std::mutex &one_kernel = *new std::mutex;
std::mutex &streams_mutex = *new std::mutex;
std::vector<host::Stream *> &streams = *new std::vector<host::Stream *>;

void *allocate(size_t bytes) {
    void *memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    std::memset(memory, 0xff, bytes);
    std::lock_guard lock(pool.mutex);
    pool.sizes[memory] = bytes;
    pool.used += bytes;
    return memory;
}

void release(void *memory) {
    {
        std::lock_guard lock(pool.mutex);
        auto found = pool.sizes.find(memory);
        if (found == pool.sizes.end())
            std::fprintf(stderr, "emulated GPU: memory is freed that is none\n"), std::abort();
        std::memset(memory, 0xff, found->second);
        pool.used -= found->second;
        pool.sizes.erase(found);
    }
    std::free(memory);
}

// One of a fat binary's parts, as nvcc writes them.
struct Part {
    uint16_t kind, flags; // 1 PTX, 2 machine code
    uint32_t header;
    uint64_t size;
    uint32_t compressed, unused;
    uint16_t minor, major;
    uint32_t capability;
};

// Whether a fat binary holds machine code for this GPU: PTX does not count, so that nothing of ours is compiled at start.
bool has_machine_code(const char *image) {
    uint16_t header;
    uint64_t size;
    std::memcpy(&header, image + 6, sizeof header);
    std::memcpy(&size, image + 8, sizeof size);
    const uint32_t capability = host::setting("EMULATED_GPU_CAPABILITY", 90);
    for (const char *at = image + header, *end = at + size; at < end;) {
        Part part;
        std::memcpy(&part, at, sizeof part);
        if (part.kind == 2 && part.capability / 10 == capability / 10 && part.capability <= capability) return true;
        at += part.header + part.size;
    }
    return false;
}

} // namespace

namespace host {

void Mark::pass() {
    std::lock_guard lock(mutex);
    is_passed = true;
    changed.notify_all();
}
void Mark::wait() {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return is_passed; });
}
bool Mark::passed() {
    std::lock_guard lock(mutex);
    return is_passed;
}

Stream::Stream() {
    std::thread([this] { run(); }).detach();
}

void Stream::run() {
    const int delay = host::setting("EMULATED_GPU_DELAY", 0);
    std::mt19937 chance((uintptr_t)this / 64);
    for (;;) {
        std::function<void()> task;
        {
            std::unique_lock lock(mutex);
            changed.wait(lock, [&] { return !work.empty(); });
            task = std::move(work.front());
            work.pop_front();
        }
        if (delay > 0) std::this_thread::sleep_for(std::chrono::microseconds(chance() % (delay + 1)));
        task();
    }
}

void Stream::give(std::function<void()> task) {
    std::lock_guard lock(mutex);
    work.push_back(std::move(task));
    changed.notify_one();
}

std::shared_ptr<Mark> Stream::mark() {
    auto mark = std::make_shared<Mark>();
    give([mark] { mark->pass(); });
    return mark;
}

Stream &stream_of(void *handle) {
    static Stream *standard = new Stream; // like all of them: until the process ends
    return handle ? *static_cast<Stream *>(handle) : *standard;
}

} // namespace host

using host::setting;
using host::stream_of;
typedef unsigned long long Pointer;

extern "C" {

int cuInit(unsigned) { return SUCCESS; }
int cuDriverGetVersion(int *version) { return *version = 99000, SUCCESS; }
int cuDeviceGetCount(int *count) { return *count = setting("EMULATED_GPU_COUNT", 1), SUCCESS; }
int cuDeviceGet(int *device, int ordinal) {
    return *device = ordinal, ordinal < setting("EMULATED_GPU_COUNT", 1) ? SUCCESS : 101;
}
int cuDeviceGetName(char *name, int length, int) { return std::snprintf(name, length, "emulated on the CPU"), SUCCESS; }
int cuDeviceGetUuid(char *uuid, int device) { return std::memset(uuid, device, 16), SUCCESS; }
int cuDeviceGetUuid_v2(char *uuid, int device) { return cuDeviceGetUuid(uuid, device); }
int cuDeviceTotalMem_v2(size_t *bytes, int) { return *bytes = MEMORY, SUCCESS; }
int cuDeviceGetAttribute(int *value, int attribute, int) {
    int capability = setting("EMULATED_GPU_CAPABILITY", 90);
    switch (attribute) {
    case 1: *value = 1024; break;             // threads of a block
    case 10: *value = 32; break;              // of a warp
    case 16: *value = 2; break;               // multiprocessors
    case 75: *value = capability / 10; break; // compute capability
    case 76: *value = capability % 10; break;
    case 115: *value = 1; break; // memory pools
    default: *value = 0;
    }
    return SUCCESS;
}
int cuDeviceGetDefaultMemPool(void **found, int) { return *found = &pool, SUCCESS; }
int cuMemPoolSetAttribute(void *, int, void *) { return SUCCESS; }

int cuDevicePrimaryCtxRetain(void **context, int) { return *context = &pool, SUCCESS; }
int cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
static thread_local void *current_context;
int cuCtxGetCurrent(void **context) { return *context = current_context, SUCCESS; }
int cuCtxSetCurrent(void *context) { return current_context = context, SUCCESS; }
int cuGetErrorName(int, const char **text) { return *text = "EMULATED_GPU_ERROR", SUCCESS; }
int cuGetErrorString(int code, const char **text) {
    *text = code == NOT_FOUND       ? "no such kernel"
            : code == INVALID_VALUE ? "invalid value"
            : code == NO_BINARY     ? "no machine code for this GPU"
                                    : "not ready";
    return SUCCESS;
}

int cuCtxSynchronize() {
    std::vector<host::Stream *> all;
    {
        std::lock_guard lock(streams_mutex);
        all = streams;
    }
    for (host::Stream *stream : all) stream->wait();
    return stream_of(nullptr).wait(), SUCCESS;
}
int cuStreamCreate(void **stream, unsigned) {
    auto *it = new host::Stream;
    std::lock_guard lock(streams_mutex);
    streams.push_back(it);
    return *stream = it, SUCCESS;
}
int cuStreamDestroy_v2(void *) { return SUCCESS; }
int cuStreamSynchronize(void *stream) { return stream_of(stream).wait(), SUCCESS; }
int cuStreamIsCapturing(void *, int *status) { return *status = 0, SUCCESS; }

int cuEventCreate(void **event, unsigned) { return *event = new Event, SUCCESS; }
int cuEventDestroy_v2(void *event) { return delete static_cast<Event *>(event), SUCCESS; }
int cuEventRecord(void *event, void *stream) {
    auto *it = static_cast<Event *>(event);
    it->mark = stream_of(stream).mark();
    it->at = std::chrono::steady_clock::now();
    return SUCCESS;
}
int cuEventQuery(void *event) {
    auto *it = static_cast<Event *>(event);
    return !it->mark || it->mark->passed() ? SUCCESS : NOT_READY;
}
int cuEventSynchronize(void *event) {
    auto mark = static_cast<Event *>(event)->mark;
    if (mark) mark->wait();
    return SUCCESS;
}
int cuEventElapsedTime_v2(float *milliseconds, void *begin, void *end) {
    auto span = static_cast<Event *>(end)->at - static_cast<Event *>(begin)->at;
    *milliseconds = std::chrono::duration<float, std::milli>(span).count();
    return SUCCESS;
}
int cuEventElapsedTime(float *milliseconds, void *begin, void *end) {
    return cuEventElapsedTime_v2(milliseconds, begin, end);
}
int cuStreamWaitEvent(void *stream, void *event, unsigned) {
    auto mark = static_cast<Event *>(event)->mark;
    if (mark) stream_of(stream).give([mark] { mark->wait(); });
    return SUCCESS;
}

int cuMemGetInfo_v2(size_t *left, size_t *total) {
    std::lock_guard lock(pool.mutex);
    *total = MEMORY, *left = MEMORY - std::min(pool.used, MEMORY);
    return SUCCESS;
}
int cuMemAllocAsync(Pointer *memory, size_t bytes, void *) {
    if (!bytes) return INVALID_VALUE;
    return *memory = (Pointer)allocate(bytes), SUCCESS;
}
int cuMemAlloc_v2(Pointer *memory, size_t bytes) { return cuMemAllocAsync(memory, bytes, nullptr); }
int cuMemFreeAsync(Pointer memory, void *stream) {
    stream_of(stream).give([memory] { release((void *)memory); });
    return SUCCESS;
}
int cuMemFree_v2(Pointer memory) { return release((void *)memory), SUCCESS; }
int cuMemAllocHost_v2(void **memory, size_t bytes) { return *memory = std::malloc(bytes), SUCCESS; }
int cuMemHostAlloc(void **memory, size_t bytes, unsigned) { return *memory = std::malloc(bytes), SUCCESS; }
int cuMemFreeHost(void *memory) { return std::free(memory), SUCCESS; }

int cuMemcpyHtoDAsync_v2(Pointer to, const void *from, size_t bytes, void *stream) {
    std::vector<char> copy((const char *)from, (const char *)from + bytes);
    stream_of(stream).give([to, copy = std::move(copy)] { std::memcpy((void *)to, copy.data(), copy.size()); });
    return SUCCESS;
}
int cuMemcpyDtoHAsync_v2(void *to, Pointer from, size_t bytes, void *stream) {
    stream_of(stream).give([=] { std::memcpy(to, (void *)from, bytes); });
    return cuStreamSynchronize(stream); // as from memory that is not pinned
}
int cuMemcpyDtoDAsync_v2(Pointer to, Pointer from, size_t bytes, void *stream) {
    stream_of(stream).give([=] { std::memmove((void *)to, (void *)from, bytes); });
    return SUCCESS;
}
int cuMemcpyHtoD_v2(Pointer to, const void *from, size_t bytes) {
    return std::memcpy((void *)to, from, bytes), SUCCESS;
}
int cuMemcpyDtoH_v2(void *to, Pointer from, size_t bytes) { return std::memcpy(to, (void *)from, bytes), SUCCESS; }
int cuMemsetD8Async(Pointer memory, unsigned char value, size_t bytes, void *stream) {
    stream_of(stream).give([=] { std::memset((void *)memory, value, bytes); });
    return SUCCESS;
}
int cuMemsetD8_v2(Pointer memory, unsigned char value, size_t bytes) {
    return std::memset((void *)memory, value, bytes), SUCCESS;
}

int cuModuleLoadData(void **module, const void *image) {
    // The kernels themselves are functions of this library, whatever the image holds.
    const unsigned fat_binary = 0xba55ed50;
    if (!std::strncmp((const char *)image, (const char *)&fat_binary, sizeof fat_binary) &&
        !has_machine_code(static_cast<const char *>(image)))
        return NO_BINARY;
    return *module = &pool, SUCCESS;
}
int cuModuleUnload(void *) { return SUCCESS; }
int cuModuleGetFunction(void **function, void *, const char *name) {
    const host::Kernel *kernel = host::find(name);
    if (!kernel) return std::fprintf(stderr, "emulated GPU: there is no kernel %s\n", name), NOT_FOUND;
    return *function = new Function{kernel}, SUCCESS;
}
int cuFuncSetAttribute(void *function, int attribute, int value) {
    // What is left of an SM's memory on GPUs of 8.6 is the least of all.
    if (attribute == 8 && value > 99 << 10) return INVALID_VALUE;
    if (attribute == 8) static_cast<Function *>(function)->shared = value;
    return SUCCESS;
}
int cuFuncGetAttribute(int *value, int, void *) { return *value = 0, SUCCESS; }
int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned threads_x, unsigned threads_y,
                   unsigned threads_z, unsigned shared, void *stream, void **arguments, void **) {
    auto *it = static_cast<Function *>(function);
    size_t threads = (size_t)threads_x * threads_y * threads_z, blocks = (size_t)x * y * z;
    if (!blocks || !threads || threads > 1024 || threads_z > 64 || x > 0x7fffffff || y > 0xffff || z > 0xffff ||
        shared > it->shared || shared > sizeof host::shared)
        return INVALID_VALUE;
    stream_of(stream).give([=, call = it->kernel->bind(arguments)] {
        const unsigned grid[3] = {x, y, z}, block[3] = {threads_x, threads_y, threads_z};
        std::lock_guard lock(one_kernel);
        host::run(call, grid, block);
    });
    return SUCCESS;
}

// libcurand: candle makes a generator for every device, and asks it only for noise of its own, which we do not use.
int curandCreateGenerator(void **generator, int) { return *generator = &pool, 0; }
int curandDestroyGenerator(void *) { return 0; }
int curandSetStream(void *, void *) { return 0; }
int curandSetPseudoRandomGeneratorSeed(void *, unsigned long long) { return 0; }

} // extern "C"
