// Steps for the sanitizers, after a kernel's text: memory of exactly the size that may be touched, and blocks on
// several threads of the operating system.

#include <memory>
#include <thread>
#include <vector>

HOST_LAUNCH(NAME)

// One launch over segments of these sizes. `late` is the array, of p, g and the states, that starts off a multiple of
// 16 bytes, or -1. Without a table there is one segment.
static void step(const std::vector<int64>& sizes, int64 chunk, int late, bool table) {
    std::vector<std::unique_ptr<Number[]>> memory;
    const auto array = [&](int64 n, int k) {
        memory.emplace_back(new Number[n + (k == late)]());
        return memory.back().get() + (k == late);
    };
    std::vector<Segment> segments;
    std::vector<const Number*> gradients;
    std::vector<int> segment_of_chunk;
    for (const int64 n : sizes) {
        const int64 k = segments.size(), chunks = (n + chunk - 1) / chunk;
        segments.push_back({n, static_cast<int64>(segment_of_chunk.size()), k % GROUPS, array(n, 0), {}});
        gradients.push_back(array(n, 1));
        for (int state = 0; state < STATES; ++state) segments.back().states[state] = array(n, 2 + state);
        segment_of_chunk.insert(segment_of_chunk.end(), chunks, k);
    }

    Arguments a = {};
    a.chunk = chunk;
    if (table) {
        a.segments = segments.data();
        a.gradients = gradients.data();
        a.segment_of_chunk = segment_of_chunk.data();
    } else {
        a.segment = segments[0];
        a.gradient = gradients[0];
    }
    std::vector<std::thread> workers;
    const unsigned blocks = segment_of_chunk.size(), count = 3;
    for (unsigned worker = 0; worker < count; ++worker)
        workers.emplace_back([=, &a] {
            for (unsigned block = worker; block < blocks; block += count) launch(block, block + 1, THREADS, &a);
        });
    for (std::thread& worker : workers) worker.join();
}

int main() {
    const std::vector<int64> sizes = {0, 1, 2, 3, 4, 5, 7, 8, 9, 0, 127, 128, 129, 255, 257, 1025, 2047, 2049, 4097, 0};
    for (const int64 chunk : {128, 2048})
        for (int late = -1; late < 2 + STATES; ++late) {
            for (const int64 n : sizes) step({n}, chunk, late, false);
            step(sizes, chunk, late, true);
        }
}
