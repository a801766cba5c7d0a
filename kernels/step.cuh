// The number types that the rules are written for.
//
// CuPy appends options such as -ftz=true after the caller's, and NVRTC contracts a * b + c to an FMA unless it is told
// otherwise. No option may change a bit of a step, so f32 and f64 are one-member structs whose operators are the PTX
// instructions themselves: rounded to nearest, never contracted, subnormals kept. The host build, which the tests hold
// against NumPy, uses plain operators under -ffp-contract=off.
#ifndef FUSED_ADAM_STEP_CUH
#define FUSED_ADAM_STEP_CUH

#if defined(__CUDA_ARCH__)
#define FUSED_ADAM_BINARY(operator_, plain, ptx, N, number, r)                                                         \
    __device__ __forceinline__ N operator_(N a, N b) {                                                                 \
        number c;                                                                                                      \
        asm(ptx " %0, %1, %2;" : "=" r(c) : r(a.x), r(b.x));                                                           \
        return {c};                                                                                                    \
    }
#define FUSED_ADAM_UNARY(name, plain, ptx, N, number, r)                                                               \
    __device__ __forceinline__ N name(N a) {                                                                           \
        number c;                                                                                                      \
        asm(ptx " %0, %1;" : "=" r(c) : r(a.x));                                                                       \
        return {c};                                                                                                    \
    }
// Comparisons too flush subnormals under -ftz=true.
#define FUSED_ADAM_COMPARE(operator_, plain, ptx, N, r)                                                                \
    __device__ __forceinline__ bool operator_(N a, N b) {                                                              \
        int c;                                                                                                         \
        asm("{ .reg .pred q; " ptx " q, %1, %2; selp.s32 %0, 1, 0, q; }" : "=r"(c) : r(a.x), r(b.x));                  \
        return c != 0;                                                                                                 \
    }
#else
#define FUSED_ADAM_BINARY(operator_, plain, ptx, N, number, r)                                                         \
    __device__ __forceinline__ N operator_(N a, N b) { return {a.x plain b.x}; }
#define FUSED_ADAM_UNARY(name, plain, ptx, N, number, r)                                                               \
    __device__ __forceinline__ N name(N a) { return {plain(a.x)}; }
#define FUSED_ADAM_COMPARE(operator_, plain, ptx, N, r)                                                                \
    __device__ __forceinline__ bool operator_(N a, N b) { return a.x plain b.x; }
#endif

#define FUSED_ADAM_NUMBER(N, number, type, r)                                                                          \
    struct N {                                                                                                         \
        number x;                                                                                                      \
    };                                                                                                                 \
    FUSED_ADAM_BINARY(operator+, +, "add.rn." type, N, number, r)                                                      \
    FUSED_ADAM_BINARY(operator-, -, "sub.rn." type, N, number, r)                                                      \
    FUSED_ADAM_BINARY(operator*, *, "mul.rn." type, N, number, r)                                                      \
    FUSED_ADAM_BINARY(operator/, /, "div.rn." type, N, number, r)                                                      \
    FUSED_ADAM_UNARY(sqrt, std::sqrt, "sqrt.rn." type, N, number, r)                                                   \
    FUSED_ADAM_UNARY(absolute, std::fabs, "abs." type, N, number, r)                                                   \
    FUSED_ADAM_COMPARE(operator>, >, "setp.gt." type, N, r)                                                            \
    FUSED_ADAM_COMPARE(operator!=, !=, "setp.neu." type, N, r)

FUSED_ADAM_NUMBER(f32, float, "f32", "f")
FUSED_ADAM_NUMBER(f64, double, "f64", "d")

#undef FUSED_ADAM_NUMBER
#undef FUSED_ADAM_BINARY
#undef FUSED_ADAM_UNARY
#undef FUSED_ADAM_COMPARE

// Conversions too flush subnormals under -ftz=true.
#if defined(__CUDA_ARCH__)
__device__ __forceinline__ f64 widen(f32 a) {
    double x;
    asm("cvt.f64.f32 %0, %1;" : "=d"(x) : "f"(a.x));
    return {x};
}
__device__ __forceinline__ f32 narrowed(f64 a) {
    float x;
    asm("cvt.rn.f32.f64 %0, %1;" : "=f"(x) : "d"(a.x));
    return {x};
}
#else
__device__ __forceinline__ f64 widen(f32 a) { return {a.x}; }
__device__ __forceinline__ f32 narrowed(f64 a) { return {static_cast<float>(a.x)}; }
#endif
__device__ __forceinline__ f64 widen(f64 a) { return a; }
template <class T> __device__ __forceinline__ T narrow(f64 a);
template <> __device__ __forceinline__ f32 narrow<f32>(f64 a) { return narrowed(a); }
template <> __device__ __forceinline__ f64 narrow<f64>(f64 a) { return a; }

// Accesses of global memory; a pointer that comes out of a table would otherwise be taken for one of any memory. What
// is read or written `once` is not needed before the next step: its cache lines are the first to go (.cs).
#if defined(__CUDA_ARCH__)
#define FUSED_ADAM_ACCESS(suffix, hint)                                                                                \
    __device__ __forceinline__ float load##suffix(const float* a) {                                                    \
        float x;                                                                                                       \
        asm volatile("ld.global" hint ".f32 %0, [%1];" : "=f"(x) : "l"(a) : "memory");                                 \
        return x;                                                                                                      \
    }                                                                                                                  \
    __device__ __forceinline__ double load##suffix(const double* a) {                                                  \
        double x;                                                                                                      \
        asm volatile("ld.global" hint ".f64 %0, [%1];" : "=d"(x) : "l"(a) : "memory");                                 \
        return x;                                                                                                      \
    }                                                                                                                  \
    __device__ __forceinline__ float4 load##suffix(const float4* a) {                                                  \
        float4 v;                                                                                                      \
        asm volatile("ld.global" hint ".v4.f32 {%0, %1, %2, %3}, [%4];"                                                \
                     : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(a) : "memory");                                \
        return v;                                                                                                      \
    }                                                                                                                  \
    __device__ __forceinline__ double2 load##suffix(const double2* a) {                                                \
        double2 v;                                                                                                     \
        asm volatile("ld.global" hint ".v2.f64 {%0, %1}, [%2];" : "=d"(v.x), "=d"(v.y) : "l"(a) : "memory");           \
        return v;                                                                                                      \
    }                                                                                                                  \
    __device__ __forceinline__ void store##suffix(float* a, float x) {                                                 \
        asm volatile("st.global" hint ".f32 [%0], %1;" ::"l"(a), "f"(x) : "memory");                                   \
    }                                                                                                                  \
    __device__ __forceinline__ void store##suffix(double* a, double x) {                                               \
        asm volatile("st.global" hint ".f64 [%0], %1;" ::"l"(a), "d"(x) : "memory");                                   \
    }                                                                                                                  \
    __device__ __forceinline__ void store##suffix(float4* a, float4 v) {                                               \
        asm volatile("st.global" hint ".v4.f32 [%0], {%1, %2, %3, %4};"                                                \
                     ::"l"(a), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");                                     \
    }                                                                                                                  \
    __device__ __forceinline__ void store##suffix(double2* a, double2 v) {                                             \
        asm volatile("st.global" hint ".v2.f64 [%0], {%1, %2};" ::"l"(a), "d"(v.x), "d"(v.y) : "memory");              \
    }
#else
#define FUSED_ADAM_ACCESS(suffix, hint)                                                                                \
    template <class Access>                                                                                            \
    __device__ __forceinline__ Access load##suffix(const Access* a) { return *a; }                                     \
    template <class Access>                                                                                            \
    __device__ __forceinline__ void store##suffix(Access* a, Access x) { *a = x; }
#endif

FUSED_ADAM_ACCESS(, "")
FUSED_ADAM_ACCESS(_once, ".cs")

#undef FUSED_ADAM_ACCESS

// NaN from either side survives; of two equal numbers, such as -0 and +0, the second.
template <class T>
__device__ __forceinline__ T maximum(T a, T b) {
    return a > b || a != a ? a : b;
}

template <class T>
__device__ __forceinline__ T minimum(T a, T b) {
    return b > a || a != a ? a : b;
}

// 0 for NaN, and +0 for either zero.
template <class T>
__device__ __forceinline__ T sign(T a) {
    const T zero = {0};
    return a > zero ? T{1} : zero > a ? T{-1} : zero;
}

#endif
