// Steps over numbers of 16 and 8 bits for the sanitizers, after a kernel's text: as host_sanitized.cpp.

#include <algorithm>
#include <deque>
#include <memory>
#include <vector>

HOST_LAUNCH_FIBERS(NAME)

// One launch over segments of these sizes. `late` is the array, of p, g, the master and the states, that starts an
// element off a multiple of 16 bytes, or -1.
struct Step {
    std::vector<std::unique_ptr<char[]>> memory;
    std::vector<Segment> segments;
    std::vector<char*> gradients;
    std::vector<int> segment_of_chunk;
    Arguments a = {};

    char* array(int64 nbytes, int64 late = 0) {
        memory.emplace_back(new char[nbytes + late]());
        return memory.back().get() + late;
    }

    Step(const std::vector<int64>& sizes, int64 chunk, int late, bool table) {
        for (const int64 n : sizes) {
            const int64 k = segments.size(), chunks = (n + chunk - 1) / chunk;
            Segment s = {};
            s.n = n;
            s.first = segment_of_chunk.size();
            s.group = k % GROUPS;
            s.index = 128 * k;
            s.p = array(n * bytes(P), (late == 0) * bytes(P));
            gradients.push_back(array(n * bytes(G), (late == 1) * bytes(G)));
            if (MASTER != NONE) s.master = array(n * bytes(MASTER), (late == 2) * bytes(MASTER));
            for (int state = 0; state < STATES; ++state)
                s.states[state] = array(n * bytes(STATE), (late == 3 + state) * bytes(STATE));
            if (STATE == INT8) s.scales = array((n + 63) / 64 * 4);
            segments.push_back(s);
            segment_of_chunk.insert(segment_of_chunk.end(), chunks, k);
        }
        a.chunk = chunk;
        a.seed = a.t = 1;
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
    const std::vector<int64> sizes = {0, 1, 2, 3, 7, 8, 9, 63, 64, 65, 0, 127, 129, 257, 1025, 2047, 2049, 4097, 0};
    std::deque<Step> steps;
    for (const int64 chunk : {128, 2048})
        for (int late = -1; late < 3 + STATES; ++late) {
            for (const int64 n : {1, 65, 129, 2049}) steps.emplace_back(std::vector<int64>{n}, chunk, late, false);
            steps.emplace_back(sizes, chunk, late, true);
        }
    run_all(steps);
}
