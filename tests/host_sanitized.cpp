// Steps for the sanitizers, after a kernel's text: memory of exactly the size that may be touched, and blocks on
// several threads of the operating system.

#include <algorithm>
#include <deque>
#include <vector>

#ifdef ON_DEVICE
HOST_LAUNCH_FIBERS(NAME)
constexpr bool SKIPS[] = {false, true};
constexpr int NEXT_LATE = 2;  // for these take longer
#else
HOST_LAUNCH(NAME)
constexpr bool SKIPS[] = {false};
constexpr int NEXT_LATE = 1;
#endif

// One launch over segments of these sizes. `late` is the array, of p, g and the states, that starts off a multiple of
// 16 bytes, or -1. Without a table there is one segment. skips: what prologue.cu would have decided.
#ifdef ON_DEVICE
constexpr int MANY = 3, ROOM = COEFFICIENT_BYTES / sizeof(Number);
#else
constexpr int MANY = GROUPS;
#endif

struct Step {
    std::vector<std::unique_ptr<Number[]>> memory;
    std::vector<Segment> segments;
    std::vector<Number*> gradients;
    std::vector<int> segment_of_chunk;
    Arguments a = {};
#ifdef ON_DEVICE
    std::unique_ptr<Control> control{new Control{}};
#endif

    Number* array(int64 n, bool late, Number number = 1) {
        memory.emplace_back(new Number[n + late]);
        std::fill_n(memory.back().get(), n + late, number);
        return memory.back().get() + late;
    }

    Step(const std::vector<int64>& sizes, int64 chunk, int late, bool table, [[maybe_unused]] bool skips) {
        for (const int64 n : sizes) {
            const int64 k = segments.size(), chunks = (n + chunk - 1) / chunk;
            segments.push_back({n, static_cast<int64>(segment_of_chunk.size()), k % MANY, array(n, late == 0), {}});
            gradients.push_back(array(n, late == 1));
            for (int state = 0; state < STATES; ++state) segments.back().states[state] = array(n, late == 2 + state);
            segment_of_chunk.insert(segment_of_chunk.end(), chunks, k);
        }
        a.chunk = chunk;
#ifdef ON_DEVICE
        control->skips = skips;
        a.control = control.get();
        // by which nothing moves; the last group has room for its own only
        a.coefficients = reinterpret_cast<char*>(array((MANY - 1) * ROOM + COEFFICIENTS, false, 1e-30));
#endif
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
    std::deque<Step> steps;
    for (const int64 chunk : {128, 2048})
        for (int late = -1; late < 2 + STATES; late += NEXT_LATE)
            for (const bool skips : SKIPS) {
                for (const int64 n : sizes) steps.emplace_back(std::vector<int64>{n}, chunk, late, false, skips);
                steps.emplace_back(sizes, chunk, late, true, skips);
            }
    run_all(steps);
}
