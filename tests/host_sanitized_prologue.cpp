// What goes before a step, for the sanitizers, after the kernel's text: as host_sanitized.cpp.

#include <initializer_list>

HOST_LAUNCH_FIBERS(NAME)

int main() {
    const std::unique_ptr<Control> control(new Control{});
    const std::unique_ptr<bool> found(new bool(false));
    const std::unique_ptr<double> scale(new double(3));
    const int64 most = 300;
    for (const int64 count : {int64{0}, int64{1}, most})
        for (const bool sums : {false, true})
            for (const Digit digit : {Digit(0), Digit(1), Digit(1) << 56}) {
                const std::unique_ptr<Group[]> groups(new Group[count]);
                std::unique_ptr<double[]> coefficients[most];
                for (int64 k = 0; k < count; ++k) {
                    const int64 n = k % (MOST + 1), wide = k / 11 % 2;
                    coefficients[k].reset(new double[(n + 1) / (wide ? 1 : 2)]);
                    groups[k] = {k % (LION + 1), {{0.1}, {0.9}, {0.99}, {1e-8}, {0.01}, {0}}, wide, n,
                                 coefficients[k].get(), {}, {}};
                    const int64 first = k % (LION + 1) == CONSTANTS ? MOST_RESULTS : -2;
                    for (int64 j = 0; j < n; ++j) {
                        groups[k].source[j] = first + (k + j) % (first == -2 ? 4 : MOST);
                        groups[k].constants[j] = {0.5};
                    }
                }
                const std::unique_ptr<Digit[]> memory(new Digit[COPIES * SET]);
                for (int k = 0; k < COPIES * SET; ++k) memory[k] = k % SET < LIMBS ? digit : digit & 7;
                Arguments a = {};
                a.control = control.get();
                a.groups = groups.get();
                a.count = count;
                a.narrow = a.wide = 1;
                a.sums = sums ? memory.get() : nullptr;
                a.max_norm = 1;
                a.skip_nonfinite = 1;
                a.scale = {DOUBLE, scale.get(), 0};
                a.found = {BYTE, found.get(), 0};
                launch(0, 1, THREADS, &a);
            }
}
