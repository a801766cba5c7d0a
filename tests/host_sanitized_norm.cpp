// Norms for the sanitizers, after the kernel's text: as host_sanitized.cpp.

#include <deque>
#include <vector>

HOST_LAUNCH_FIBERS(NAME)

// One launch over segments of these sizes. late: they start off a multiple of 16 bytes. Without a table there is one.
struct Norm {
    std::vector<std::unique_ptr<Number[]>> memory;
    std::vector<Segment> segments;
    std::vector<const Number*> gradients;
    std::vector<int> segment_of_chunk;
    std::unique_ptr<float> scale{new float(2)};
    std::unique_ptr<Digit[]> sums{new Digit[COPIES * SET]()};
    Arguments a = {};

    Norm(const std::vector<int64>& sizes, int64 chunk, bool late, bool table, Number number) {
        for (const int64 n : sizes) {
            const int64 k = segments.size(), chunks = (n + chunk - 1) / chunk;
            memory.emplace_back(new Number[n + late]);
            for (int64 i = 0; i < n + late; ++i) memory.back()[i] = number;
            segments.push_back({n, static_cast<int64>(segment_of_chunk.size())});
            gradients.push_back(memory.back().get() + late);
            segment_of_chunk.insert(segment_of_chunk.end(), chunks, k);
        }
        a.chunk = chunk;
        a.scale = {FLOAT, scale.get(), 0};
        a.sums = sums.get();
        if (table) {
            a.segments = segments.data();
            a.gradients = gradients.data();
            a.segment_of_chunk = segment_of_chunk.data();
        } else {
            a.segment = segments[0];
            a.gradient = gradients[0];
        }
    }
};

int main() {
    const std::vector<int64> sizes = {0, 1, 2, 3, 4, 5, 7, 8, 9, 0, 127, 128, 129, 255, 257, 1025, 2047, 2049, 4097, 0};
    std::deque<Norm> norms;
    for (const int64 n : sizes) norms.emplace_back(std::vector<int64>{n}, 2048, n % 2, false, Number(1));
    for (const bool late : {false, true}) norms.emplace_back(sizes, 2048, late, true, Number(1));
    // In chunks so small that several add to the same copy: sums, and flags.
    for (const Number number : {Number(1), Number(HUGE_VAL)}) norms.emplace_back(sizes, 128, false, true, number);
    run_all(norms);
}
