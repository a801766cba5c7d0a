// What an optimizer keeps on the device so that no step waits for the host: t, what the last step met, and scalars.

typedef long long int64;

struct Control {
    int64 t;        // steps done
    int64 skipped;  // steps that were skipped
    int64 skips;    // whether the last one was
    double norm;    // of its gradients, unscaled
    double factor;  // by which they were clipped
    unsigned long long unmoved;  // elements of p that kept their value although their gradient was not 0
};

// A number of the caller's: here, or in device memory.
struct Scalar {
    int64 kind;
    const void* at;
    double value;
};
enum { VALUE, FLOAT, DOUBLE, BYTE };  // its kinds

__device__ __forceinline__ f64 read(const Scalar& s) {
    if (s.kind == FLOAT) return widen(f32{load(static_cast<const float*>(s.at))});
    if (s.kind == DOUBLE) return {load(static_cast<const double*>(s.at))};
    if (s.kind == BYTE) return {*static_cast<const volatile unsigned char*>(s.at) ? 1.0 : 0.0};
    return {s.value};
}

__device__ __forceinline__ f64 not_a_number() { return {__longlong_as_double(0x7ff8000000000000)}; }

__device__ __forceinline__ f64 infinity() { return {__longlong_as_double(0x7ff0000000000000)}; }

__device__ __forceinline__ bool positive(f64 x) { return x > f64{0.0} && infinity() > x; }

// 1 / scale as T has it; NaN for a scale by which nothing can be divided.
template <class T>
__device__ __forceinline__ T unscaling_of(const Scalar& scale) {
    const f64 x = read(scale);
    const T inverse = narrow<T>(f64{1.0} / x);
    return positive(x) && positive(widen(inverse)) ? inverse : narrow<T>(not_a_number());
}
