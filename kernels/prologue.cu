// One block before a step: whether it is skipped, how gradients are clipped, t, and the coefficients of each group.

constexpr int THREADS = 256;
constexpr int MOST_ARGUMENTS = 6, MOST_RESULTS = 7, MOST = 24;  // of a formula, and coefficients of a rule
enum { UNSCALING = -1, CLIPPING = -2 };  // sources of a coefficient that are neither a result nor a constant

// A group's hyperparameters, and where its rule's coefficients go.
struct Group {
    int64 formula;
    f64 arguments[MOST_ARGUMENTS];
    int64 wide;   // whether the coefficients are float64
    int64 count;  // of the coefficients
    void* coefficients;
    int64 source[MOST];   // of each: the number of a result; MOST_RESULTS and more: of a constant
    f64 constants[MOST];
};

struct Arguments {
    Control* control;
    const Group* groups;
    int64 count;
    int64 narrow, wide;  // whether there are gradients of float32, of float64
    Digit* sums;         // of norm.cu; null: the norm does not matter
    double max_norm;     // inf if there is none
    int64 skip_nonfinite;
    Scalar scale;  // by which gradients are divided
    Scalar found;  // not 0: the step is skipped
};

struct Decision {
    int64 t;
    f64 clipping;
    bool skips;
};

// What one thread decides, from the sum of the gradients' squares and its flags.
__device__ inline Decision decide(const Arguments& a, Digit* digits, Digit flags) {
    Decision d = {a.control->t + 1, {1.0}, false};
    if (a.sums) {
        f64 sum = rounded(digits);
        if (flags & (INFINITE | NOT_A_NUMBER)) sum = flags & NOT_A_NUMBER ? not_a_number() : infinity();
        const f64 norm = sqrt(sum), most = {a.max_norm};
        if (norm > most || norm != norm) d.clipping = most / norm;
        d.skips = a.skip_nonfinite && flags & NOT_FINITE;
        a.control->norm = norm.x;
    }
    const f32 narrow = unscaling_of<f32>(a.scale);
    const f64 wide = unscaling_of<f64>(a.scale);
    d.skips = d.skips || (a.narrow && narrow != narrow) || (a.wide && wide != wide) || read(a.found) != f64{0.0};
    a.control->factor = d.clipping.x;
    a.control->skips = d.skips;
    a.control->skipped += d.skips;
    a.control->t += !d.skips;
    a.control->unmoved = 0;
    return d;
}

__device__ inline void write(const Group& g, const Decision& d, const Scalar& scale) {
    f64 results[MOST_RESULTS];
    evaluate(g.formula, d.t, g.arguments, results);
    const f32 narrow_unscaling = unscaling_of<f32>(scale);
    const f64 wide_unscaling = unscaling_of<f64>(scale);
    for (int k = 0; k < g.count; ++k) {
        const int64 from = g.source[k];
        f64 x = d.clipping;
        if (from == UNSCALING)
            x = g.wide ? wide_unscaling : widen(narrow_unscaling);
        else if (from != CLIPPING)
            x = from < MOST_RESULTS ? results[from] : g.constants[from - MOST_RESULTS];
        if (g.wide)
            static_cast<double*>(g.coefficients)[k] = x.x;
        else
            static_cast<float*>(g.coefficients)[k] = narrow<f32>(x).x;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) NAME(const __grid_constant__ Arguments a) {
    __shared__ Digit sums[SET];
    __shared__ Decision decision;
    if (a.sums && threadIdx.x < SET) {
        Digit sum = 0;
        for (int copy = 0; copy < COPIES; ++copy) {
            Digit& one = a.sums[copy * SET + threadIdx.x];
            sum = threadIdx.x < LIMBS ? sum + one : sum | one;
            one = 0;  // for the next step
        }
        sums[threadIdx.x] = sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) decision = decide(a, sums, a.sums ? sums[LIMBS] : 0);
    __syncthreads();
    for (int64 k = threadIdx.x; k < a.count; k += THREADS) write(a.groups[k], decision, a.scale);
}
