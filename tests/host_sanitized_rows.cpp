// Steps over rows for the sanitizers, after a kernel's text: as host_sanitized.cpp.

#include <memory>
#include <thread>
#include <vector>

HOST_LAUNCH(NAME)

// Arrays of exactly the size that may be touched, and what points into them.
struct Step {
    std::vector<std::unique_ptr<Number[]>> numbers;
    std::vector<std::unique_ptr<int64[]>> indices;
    std::vector<Gathered> table;
    std::vector<int> of_block;

    Number* array(int64 n) {
        numbers.emplace_back(new Number[n]());
        return numbers.back().get();
    }

    template <class F>
    const int64* each(int64 n, F f) {
        indices.emplace_back(new int64[n]);
        for (int64 k = 0; k < n; ++k) indices.back()[k] = f(k);
        return indices.back().get();
    }

    // Of n rows every `apart`-th is given `times` gradients. every: the others move too. own: each with its variant.
    void add(int64 n, int64 width, int64 apart, int64 times, bool every, bool own, int64 chunk) {
        const int64 given = (n + apart - 1) / apart, count = every ? n : given;
        Gathered s = {};
        s.first = of_block.size();
        s.count = count;
        s.width = width;
        s.each = chunk / width > 1 ? chunk / width : 1;
        s.pieces = (width + chunk - 1) / chunk;
        const int64 elements = (every ? n : (given - 1) * apart + 1) * width;
        s.p = array(elements);
        for (int state = 0; state < STATES; ++state) s.states[state] = array(elements);
        s.values = array(given * times * width);
        const int64 groups = (count + s.each - 1) / s.each;
        if (apart > 1) {
            s.rows = each(given, [=](int64 k) { return k * apart; });
            if (every)
                s.met = each(groups + 1, [=](int64 k) {
                    const int64 row = k * s.each < n ? k * s.each : n;
                    return (row + apart - 1) / apart;
                });
        }
        if (times > 1) {
            s.starts = each(given + 1, [=](int64 k) { return k * times; });
            s.order = each(given * times, [=](int64 k) { return given * times - 1 - k; });
        }
        const int64 variants = own ? 3 : 1;
        if (own) s.variant = each(count, [=](int64 k) { return k % variants; });
        s.coefficients = array(variants * COEFFICIENTS);
        of_block.insert(of_block.end(), groups * s.pieces, table.size());
        table.push_back(s);
    }

    void run(int64 chunk) {
        const Arguments a = {table.data(), of_block.data(), chunk};
        std::vector<std::thread> workers;
        const unsigned blocks = of_block.size(), count = 3;
        for (unsigned worker = 0; worker < count; ++worker)
            workers.emplace_back([=, &a] {
                for (unsigned block = worker; block < blocks; block += count) launch(block, block + 1, THREADS, &a);
            });
        for (std::thread& worker : workers) worker.join();
    }
};

int main() {
    for (const int64 chunk : {128, 2048}) {
        Step step;
        for (const int64 width : {1, 2, 59, 127, 128, 129, 2049})
            for (const int64 apart : {1, 2, 7})
                for (const int64 times : {1, 3})
                    for (const bool every : {false, true})
                        for (const bool own : {false, true})
                            step.add(1 + 300 / width, width, apart, times, every, own, chunk);
        step.run(chunk);
    }
}
