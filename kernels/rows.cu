// The step over rows: of each parameter those that move, several to a block, or several blocks to one that is wide.
//
// Stands in the place of step.cu, after the same text. The gradient of a row is made here: the rows of gradients that
// were given for it are added from left to right, so the sum has the bits that it has on any other backend.

typedef long long int64;

constexpr int THREADS = 256;

// A parameter, its states, and the gradients of some of its rows. What it points to but for these is read only.
struct Gathered {
    int64 first;   // the block that takes the first of its rows
    int64 count;   // rows that move
    int64 width;   // elements of a row
    int64 each;    // rows that a block takes
    int64 pieces;  // blocks that a row takes; either this or `each` is 1
    Number* p;
    Number* states[STATES > 0 ? STATES : 1];  // C++ has no empty arrays
    const Number* values;        // rows of gradients
    const int64* rows;           // that have any, ascending, each once; null: all, row k is the k-th of them
    const int64* starts;         // the k-th has those numbered order[starts[k]] .. order[starts[k + 1]]; null: order[k]
    const int64* order;          // null: order[j] is j
    const int64* met;            // null: only `rows` move. Else the others do too, with a gradient of 0; of each block
                                 // it is the first of `rows` that is not before it, and at the end their number
    const int64* variant;        // of each row that moves; null: 0
    const Number* coefficients;  // of each variant
};

// Passed by value.
struct Arguments {
    const Gathered* table;
    const int* of_block;  // which of them each block works on
    int64 chunk;          // elements a block takes at most
};

// The number of a row among the given ones from lo to hi, or -1.
__device__ __forceinline__ int64 find(const int64* rows, int64 lo, int64 hi, int64 row) {
    const int64 end = hi;
#pragma unroll 1
    while (lo < hi) {
        const int64 middle = lo + (hi - lo) / 2;
        if (__ldg(rows + middle) < row)
            lo = middle + 1;
        else
            hi = middle;
    }
    return lo < end && __ldg(rows + lo) == row ? lo : -1;
}

__device__ __forceinline__ T given(const Gathered& s, int64 j, int64 column) {
    const int64 number = s.order ? __ldg(s.order + j) : j;
    return {load_once(s.values + number * s.width + column)};
}

__device__ __forceinline__ void read(const Gathered& s, int64 variant, T* c) {
#pragma unroll
    for (int k = 0; k < COEFFICIENTS; ++k) c[k].x = __ldg(s.coefficients + variant * COEFFICIENTS + k);
}

extern "C" __global__ void __launch_bounds__(THREADS, 4) NAME(const __grid_constant__ Arguments a) {
    // Not a copy: what is read again for each element comes from the cache, and its registers go to more blocks.
    const Gathered& s = a.table[__ldg(a.of_block + blockIdx.x)];
    const unsigned block = static_cast<unsigned>(blockIdx.x - s.first), pieces = static_cast<unsigned>(s.pieces);
    const int64 group = block / pieces, first = group * s.each, left = block % pieces * a.chunk;
    // A block has few elements, so 32 bits divide among its rows.
    const unsigned columns = static_cast<unsigned>(s.width - left < a.chunk ? s.width - left : a.chunk);
    const unsigned n = columns * static_cast<unsigned>(s.count - first < s.each ? s.count - first : s.each);
    T c[COEFFICIENTS];
    read(s, 0, c);
#pragma unroll 1
    for (unsigned i = threadIdx.x; i < n; i += THREADS) {
        const int64 k = first + i / columns, column = left + i % columns;
        const int64 row = s.rows && !s.met ? __ldg(s.rows + k) : k;
        const int64 at = s.met ? find(s.rows, __ldg(s.met + group), __ldg(s.met + group + 1), row) : k;
        T g = {0};
        if (at >= 0) {
            int64 j = s.starts ? __ldg(s.starts + at) : at;
            const int64 end = s.starts ? __ldg(s.starts + at + 1) : at + 1;
            g = given(s, j, column);
#pragma unroll 1
            while (++j < end) g = g + given(s, j, column);
        }
        if (s.variant) read(s, __ldg(s.variant + k), c);

        const int64 e = row * s.width + column;
        T p = {load(s.p + e)}, states[STATES > 0 ? STATES : 1];
#pragma unroll
        for (int state = 0; state < STATES; ++state) states[state].x = load_once(s.states[state] + e);
        update(p, g, states, c);
        store(s.p + e, p.x);
#pragma unroll
        for (int state = 0; state < STATES; ++state) store_once(s.states[state] + e, states[state].x);
    }
}
