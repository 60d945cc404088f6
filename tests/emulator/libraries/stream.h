// Streams: each a thread that does what it is given in order, beside the others, as late as it likes.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>

namespace host {

// A place in a stream's work, which it passes once.
class Mark {
    std::mutex mutex;
    std::condition_variable changed;
    bool is_passed = false;

  public:
    void pass();
    void wait();
    bool passed();
};

class Stream {
    std::mutex mutex;
    std::condition_variable changed;
    std::deque<std::function<void()>> work;

    [[noreturn]] void run();

  public:
    Stream();
    void give(std::function<void()> task);
    // A mark behind all that was given so far.
    std::shared_ptr<Mark> mark();
    void wait() { mark()->wait(); }
};

// A whole number out of the environment.
inline int setting(const char *name, int otherwise) {
    const char *value = std::getenv(name);
    return value ? std::atoi(value) : otherwise;
}

// The driver's handle of a stream; null is a stream, too.
Stream &stream_of(void *handle);

} // namespace host
