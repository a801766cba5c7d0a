// CUDA's words for g++: what stands before a kernel's text, which is then the text that NVRTC compiles.
//
// HOST_LAUNCH runs the threads of a block one after the other, which is enough where none waits for another.
// HOST_LAUNCH_FIBERS runs them side by side.

#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#if defined(__SANITIZE_ADDRESS__)  // which guards the ends of a global only, so that only one block may run at a time
#define __shared__ static
#else
#define __shared__ static thread_local  // a block runs in one thread of the operating system
#endif

struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) double2 {
    double x, y;
};
struct Index {
    unsigned x;
};
static thread_local Index threadIdx, blockIdx;

// Blocks first .. end of a grid.
#define HOST_LAUNCH(KERNEL)                                                                                            \
    extern "C" void launch(unsigned first, unsigned end, unsigned threads, const Arguments* arguments) {               \
        for (blockIdx.x = first; blockIdx.x < end; ++blockIdx.x)                                                       \
            for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) KERNEL(*arguments);                            \
    }

#define HOST_LAUNCH_FIBERS(KERNEL)                                                                                     \
    static void run_thread(const void* arguments) { KERNEL(*static_cast<const Arguments*>(arguments)); }               \
    extern "C" void launch(unsigned first, unsigned end, unsigned threads, const Arguments* arguments) {               \
        host::launch(first, end, threads, run_thread, arguments);                                                      \
    }

template <class X>
inline X __ldg(const X* a) {
    return *a;
}

template <class To, class From>
inline To host_bits(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}
inline double __longlong_as_double(long long x) { return host_bits<double>(x); }
inline long long __double_as_longlong(double x) { return host_bits<long long>(x); }
inline float __uint_as_float(unsigned x) { return host_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return host_bits<unsigned>(x); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const unsigned long long bytes = x | static_cast<unsigned long long>(y) << 32;
    unsigned z = 0;
    for (int k = 0; k < 4; ++k) z |= (bytes >> 8 * (selector >> 4 * k & 7) & 0xff) << 8 * k;
    return z;
}
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }

typedef unsigned long long HostWord;
inline HostWord atomicAdd(HostWord* a, HostWord x) { return __atomic_fetch_add(a, x, __ATOMIC_RELAXED); }
inline HostWord atomicOr(HostWord* a, HostWord x) { return __atomic_fetch_or(a, x, __ATOMIC_RELAXED); }

// --- threads that wait for each other ---------------------------------------------------------------------------------
//
// Each is a fiber, which runs up to the next barrier; then it is the next one's turn. ThreadSanitizer takes each for a
// thread, and sees of what is below only the order that barriers promise: a shuffle promises none.

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#else
inline void __tsan_acquire(void*) {}
inline void __tsan_release(void*) {}
const unsigned __tsan_switch_to_fiber_no_sync = 1;
inline void* __tsan_get_current_fiber() { return nullptr; }
inline void* __tsan_create_fiber(unsigned) { return nullptr; }
inline void __tsan_destroy_fiber(void*) {}
inline void __tsan_switch_to_fiber(void*, unsigned) {}
#endif
#define UNSEEN __attribute__((no_sanitize("thread"), noinline))

namespace host {

constexpr unsigned MOST_THREADS = 256, WARP = 32, STACK = 1 << 16;

struct Barrier {
    unsigned arrived = 0, round = 0;
    char clocks[2];  // whose addresses say who comes after whom; used in turns, as some arrive again before all left
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    void* seen = nullptr;  // ThreadSanitizer's
    bool running = false;
    ~Fiber() {
        if (stack) __tsan_destroy_fiber(seen);
    }
};

struct Block {
    Fiber fibers[MOST_THREADS];
    Barrier all, warps[MOST_THREADS / WARP];
    HostWord slots[2][MOST_THREADS];  // what shuffles hand over, in turns
    unsigned threads;
    unsigned idle;  // turns since anybody got further
    void (*run)(const void*);
    const void* arguments;
    char begin, end;  // clocks
    Fiber outside;    // who launches
};
static thread_local Block block;

UNSEEN inline void change(Fiber& from, Fiber& to) {
    __tsan_switch_to_fiber(to.seen, __tsan_switch_to_fiber_no_sync);
    swapcontext(&from.context, &to.context);
}

// The next thread's turn; behind the last, the launch's.
UNSEEN inline void leave() {
    Fiber& me = block.fibers[threadIdx.x];
    if (++block.idle > block.threads) {
        std::fputs("a barrier that not all threads reach\n", stderr);
        std::abort();
    }
    for (unsigned k = 0; k < block.threads; ++k) {
        threadIdx.x = (threadIdx.x + 1) % block.threads;
        Fiber& next = block.fibers[threadIdx.x];
        if (next.running) return &next != &me ? change(me, next) : void();
    }
    change(me, block.outside);
}

UNSEEN inline void live() {
    for (;;) {
        __tsan_acquire(&block.begin);
        block.run(block.arguments);
        __tsan_release(&block.end);
        block.fibers[threadIdx.x].running = false;
        block.idle = 0;
        leave();
    }
}

UNSEEN inline void launch(
    unsigned first, unsigned end, unsigned threads, void (*run)(const void*), const void* arguments
) {
    block.threads = threads;
    block.run = run;
    block.arguments = arguments;
    block.outside.seen = __tsan_get_current_fiber();
    for (unsigned k = 0; k < threads; ++k) {
        Fiber& fiber = block.fibers[k];
        if (fiber.stack) continue;
        fiber.stack.reset(new char[STACK]);
        fiber.seen = __tsan_create_fiber(0);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = STACK;
        makecontext(&fiber.context, live, 0);
    }
    for (blockIdx.x = first; blockIdx.x < end; ++blockIdx.x) {
        __tsan_release(&block.begin);
        for (unsigned k = 0; k < threads; ++k) block.fibers[k].running = true;
        threadIdx.x = block.idle = 0;
        change(block.outside, block.fibers[0]);
        __tsan_acquire(&block.end);
    }
}

UNSEEN inline void wait(Barrier& barrier, unsigned count, bool orders) {
    const unsigned round = barrier.round;
    if (orders) __tsan_release(&barrier.clocks[round % 2]);
    if (++barrier.arrived == count) {
        barrier.arrived = 0;
        ++barrier.round;
        block.idle = 0;
    }
    while (barrier.round == round) leave();
    if (orders) __tsan_acquire(&barrier.clocks[round % 2]);
}

}  // namespace host

inline void __syncthreads() { host::wait(host::block.all, host::block.threads, true); }

UNSEEN inline void __syncwarp() { host::wait(host::block.warps[threadIdx.x / host::WARP], host::WARP, true); }

template <class X>
UNSEEN X __shfl_xor_sync(unsigned mask, X x, int stride) {
    if (mask != 0xffffffff) std::abort();
    host::Barrier& warp = host::block.warps[threadIdx.x / host::WARP];
    HostWord* slots = host::block.slots[warp.round % 2];
    std::memcpy(&slots[threadIdx.x], &x, sizeof x);
    host::wait(warp, host::WARP, false);
    std::memcpy(&x, &slots[threadIdx.x ^ stride], sizeof x);
    return x;
}
