// libnccl: ranks are processes of one host and meet in shared memory. A call is work of a stream, like a kernel, and
// waits there for all ranks; one that is gone is waited for until the communicator is aborted.
//
// As in the real one a call that does not block is given to the stream by a thread of its own, the group job, which
// ncclCommGetAsyncError joins and frees when it finds the call through. The real one has no lock there, and what two
// threads do to it at once shows rarely; here each call hesitates like a stream (EMULATED_GPU_DELAY), and two threads in
// one communicator, or a job that is completed twice, end the process with a word.
//
//   EMULATED_NCCL_WRONG_RANK   the rank whose first reduction comes out wrong; none by default
#include "stream.h"
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <random>
#include <string>
#include <sys/mman.h>
#include <thread>
#include <unistd.h>

namespace {

const int SUCCESS = 0, SYSTEM_ERROR = 2, INVALID_ARGUMENT = 4, IN_PROGRESS = 7;
enum Type { UINT8 = 1, UINT32 = 3, FLOAT32 = 7, FLOAT64 = 8, BFLOAT16 = 9 };
enum Operation { SUM = 0, MAX = 2 };

const int MOST_RANKS = 16;
const size_t PIECE = 1 << 20; // bytes that each rank lays out at a time

struct Shared {
    std::atomic<int> joined, arrived, round;
    alignas(4096) char pieces[MOST_RANKS][PIECE];
};

[[noreturn]] void fail(const char *what) {
    std::fprintf(stderr, "emulated NCCL: %s\n", what);
    std::abort();
}

void hesitate() {
    static const int delay = host::setting("EMULATED_GPU_DELAY", 0);
    if (delay > 0) usleep(rand() % (delay + 1));
}

// What NCCL does for one call; never freed, so that a second completion is seen.
struct Job {
    std::thread thread;
    std::atomic<bool> completed{false};

    void complete() {
        if (completed.exchange(true)) fail("a group job is completed twice");
        thread.join();
    }
};

struct Comm {
    std::string name;
    int rank, ranks;
    Shared *shared;
    std::atomic<bool> is_aborted{false};
    std::atomic<bool> is_entered{false};
    std::atomic<int> state{SUCCESS};
    Job *job = nullptr;

    void complete() {
        if (Job *ended = job) {
            ended->complete();
            job = nullptr;
        }
    }

    // Whether a call may begin, as ncclCommEnsureReady finds it.
    bool is_ready() {
        if (state != SUCCESS) return false;
        complete();
        return true;
    }

    // Has a thread do what is asked, while the caller asks for the state.
    template <typename F> int begin(F work) {
        if (!is_ready()) return INVALID_ARGUMENT;
        state = IN_PROGRESS;
        job = new Job;
        job->thread = std::thread([=, this] {
            hesitate();
            work();
            state = SUCCESS;
            hesitate();
        });
        return IN_PROGRESS;
    }

    // Waits for all ranks; false where nobody waits any more.
    bool meet() {
        int round = shared->round;
        if (++shared->arrived == ranks) {
            shared->arrived = 0;
            shared->round++;
            return true;
        }
        while (shared->round == round) {
            if (is_aborted) return false;
            usleep(20);
        }
        return true;
    }
};

// A thread within a call, the only one.
class Entered {
    Comm &comm;

  public:
    explicit Entered(Comm &comm) : comm(comm) {
        if (comm.is_entered.exchange(true)) fail("two threads are in one communicator");
        hesitate();
    }
    ~Entered() { comm.is_entered = false; }
};

size_t size_of(int type) {
    switch (type) {
    case UINT8: return 1;
    case BFLOAT16: return 2;
    case UINT32:
    case FLOAT32: return 4;
    case FLOAT64: return 8;
    }
    return 0;
}

template <typename T> void reduce(T *to, const T *from, size_t n, int operation) {
    for (size_t i = 0; i < n; i++) to[i] = operation == SUM ? to[i] + from[i] : to[i] < from[i] ? from[i] : to[i];
}

float widen(uint16_t bits) {
    uint32_t all = (uint32_t)bits << 16;
    float value;
    return std::memcpy(&value, &all, 4), value;
}

void reduce_bf16(uint16_t *to, const uint16_t *from, size_t n, int operation) {
    for (size_t i = 0; i < n; i++) {
        float value = widen(to[i]);
        reduce(&value, std::initializer_list<float>{widen(from[i])}.begin(), 1, operation);
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        to[i] = value != value ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    }
}

// Once, on the rank that is to be wrong.
void spoil(const Comm &comm, void *sum, size_t bytes) {
    static std::atomic<int> wrong{host::setting("EMULATED_NCCL_WRONG_RANK", -1)};
    if (wrong != comm.rank) return;
    wrong = -1;
    static_cast<char *>(sum)[bytes - 1] ^= 1;
}

// The pieces of all ranks, in the order of ranks.
void reduce_pieces(const Comm &comm, void *to, size_t bytes, int type, int operation) {
    std::memcpy(to, comm.shared->pieces[0], bytes);
    for (int rank = 1; rank < comm.ranks; rank++) {
        const char *from = comm.shared->pieces[rank];
        switch (type) {
        case UINT8: reduce((uint8_t *)to, (const uint8_t *)from, bytes, operation); break;
        case UINT32: reduce((uint32_t *)to, (const uint32_t *)from, bytes / 4, operation); break;
        case FLOAT32: reduce((float *)to, (const float *)from, bytes / 4, operation); break;
        case FLOAT64: reduce((double *)to, (const double *)from, bytes / 8, operation); break;
        case BFLOAT16: reduce_bf16((uint16_t *)to, (const uint16_t *)from, bytes / 2, operation); break;
        }
    }
    spoil(comm, to, bytes);
}

// Gives a call to its stream.
template <typename F> int enqueue(Comm &comm, void *stream, F work) {
    Entered entered(comm);
    return comm.begin([=] { host::stream_of(stream).give(work); });
}

// Piece by piece of `bytes`: the ranks lay out what begins at `send`, and take(offset, length) is called when all have.
template <typename F> bool in_pieces(Comm &comm, const void *send, size_t bytes, F take) {
    for (size_t at = 0; at < bytes; at += PIECE) {
        size_t length = std::min(PIECE, bytes - at);
        if (send) std::memcpy(comm.shared->pieces[comm.rank], (const char *)send + at, length);
        if (!comm.meet()) return false;
        take(at, length);
        if (!comm.meet()) return false;
    }
    return true;
}

} // namespace

extern "C" {

struct Id {
    char internal[128];
};

int ncclGetVersion(int *version) { return *version = 22809, SUCCESS; }
const char *ncclGetErrorString(int) { return "an error of the emulated NCCL"; }
const char *ncclGetLastError(void *) { return ""; }
int ncclGetUniqueId(Id *id) {
    std::random_device chance;
    std::memset(id, 0, sizeof *id);
    std::snprintf(id->internal, sizeof id->internal, "/emulated-nccl-%08x%08x", chance(), chance());
    return SUCCESS;
}
int ncclCommInitRankConfig(void **out, int ranks, Id id, int rank, void *) {
    if (ranks > MOST_RANKS || rank < 0 || rank >= ranks) return INVALID_ARGUMENT;
    int file = shm_open(id.internal, O_CREAT | O_RDWR, 0600);
    if (file < 0 || ftruncate(file, sizeof(Shared))) return SYSTEM_ERROR;
    void *memory = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (memory == MAP_FAILED) return SYSTEM_ERROR;
    auto *comm = new Comm{id.internal, rank, ranks, static_cast<Shared *>(memory)};
    *out = comm;
    return comm->begin([=] {
        // Whoever comes last takes the name away.
        if (++comm->shared->joined == ranks) shm_unlink(id.internal);
        while (comm->shared->joined < ranks && !comm->is_aborted) usleep(200);
    });
}
int ncclCommGetAsyncError(void *it, int *code) {
    auto *comm = static_cast<Comm *>(it);
    Entered entered(*comm);
    *code = comm->state;
    if (*code == SUCCESS) comm->complete();
    return SUCCESS;
}
int ncclCommFinalize(void *it) {
    auto *comm = static_cast<Comm *>(it);
    Entered entered(*comm);
    return comm->begin([] {});
}
int ncclCommDestroy(void *it) {
    auto *comm = static_cast<Comm *>(it);
    Entered entered(*comm);
    if (!comm->is_ready()) return INVALID_ARGUMENT;
    return munmap(comm->shared, sizeof(Shared)), SUCCESS;
}
int ncclCommAbort(void *it) {
    auto *comm = static_cast<Comm *>(it);
    Entered entered(*comm);
    // A stream may still be at work on it.
    comm->is_aborted = true;
    comm->complete();
    shm_unlink(comm->name.c_str());
    return SUCCESS;
}
int ncclGroupStart() { return SUCCESS; }
int ncclGroupEnd() { return SUCCESS; }

int ncclAllReduce(const void *send, void *receive, size_t count, int type, int operation, void *it, void *stream) {
    auto *comm = static_cast<Comm *>(it);
    return enqueue(*comm, stream, [=] {
        in_pieces(*comm, send, count * size_of(type), [&](size_t at, size_t length) {
            reduce_pieces(*comm, (char *)receive + at, length, type, operation);
        });
    });
}
int ncclAllGather(const void *send, void *receive, size_t count, int type, void *it, void *stream) {
    auto *comm = static_cast<Comm *>(it);
    size_t bytes = count * size_of(type);
    return enqueue(*comm, stream, [=] {
        in_pieces(*comm, send, bytes, [&](size_t at, size_t length) {
            for (int rank = 0; rank < comm->ranks; rank++)
                std::memcpy((char *)receive + rank * bytes + at, comm->shared->pieces[rank], length);
        });
    });
}
int ncclReduceScatter(const void *send, void *receive, size_t count, int type, int operation, void *it, void *stream) {
    auto *comm = static_cast<Comm *>(it);
    size_t bytes = count * size_of(type);
    return enqueue(*comm, stream, [=] {
        for (int rank = 0; rank < comm->ranks; rank++) {
            bool met = in_pieces(*comm, (const char *)send + rank * bytes, bytes, [&](size_t at, size_t length) {
                if (rank == comm->rank) reduce_pieces(*comm, (char *)receive + at, length, type, operation);
            });
            if (!met) return;
        }
    });
}
int ncclBroadcast(const void *send, void *receive, size_t count, int type, int root, void *it, void *stream) {
    auto *comm = static_cast<Comm *>(it);
    return enqueue(*comm, stream, [=] {
        in_pieces(*comm, comm->rank == root ? send : nullptr, count * size_of(type), [&](size_t at, size_t length) {
            std::memcpy((char *)receive + at, comm->shared->pieces[root], length);
        });
    });
}

} // extern "C"
