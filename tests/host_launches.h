// Launches for the sanitizers, between a kernel's text and a program's.

#include <thread>
#include <vector>

// Every launch, its blocks in turns in several threads of the operating system; under AddressSanitizer, which has one
// block run at a time, in one.
template <class Launches>
static void run_all(const Launches& launches) {
#if defined(__SANITIZE_ADDRESS__)
    const unsigned count = 1;
#else
    const unsigned count = 3;
#endif
    std::vector<std::thread> workers;
    for (unsigned worker = 0; worker < count; ++worker)
        workers.emplace_back([&launches, worker] {
            for (const auto& one : launches)
                for (unsigned block = worker; block < one.segment_of_chunk.size(); block += count)
                    launch(block, block + 1, THREADS, &one.a);
        });
    for (std::thread& worker : workers) worker.join();
}
