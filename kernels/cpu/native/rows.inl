// Work on one row at a time: normalising, activating, rotating. Included once per instruction
// set. Reads widen to float32, writes round once; rows shorter than a vector end in a scalar loop
// whose sums join last, so that a row's result depends on its own numbers alone.

// e^x within 2 units in the last place; 0 below -87, and for -infinity. Cody-Waite reduction to
// |r| <= log(2) / 2, then a Taylor polynomial of degree 7.
INLINE V exponential(V x) {
    V limit = set1(-87.0f);
    V bounded = minimum(maximum(x, limit), set1(88.0f));
    V n = nearest(mul(bounded, set1(1.44269504f)));
    V r = fma(n, set1(-0.693359375f), bounded);
    r = fma(n, set1(2.12194440e-4f), r);
    V p = set1(1.0f / 5040);
    p = fma(p, r, set1(1.0f / 720));
    p = fma(p, r, set1(1.0f / 120));
    p = fma(p, r, set1(1.0f / 24));
    p = fma(p, r, set1(1.0f / 6));
    p = fma(p, r, set1(0.5f));
    p = fma(p, r, set1(1.0f));
    p = fma(p, r, set1(1.0f));
    return keep_above(mul(p, power_of_two(n)), x, limit);
}
INLINE V hyperbolic_tangent(V x) {
    V e = exponential(add(x, x));
    return sub(set1(1.0f), divide(set1(2.0f), add(e, set1(1.0f))));
}
INLINE V silu(V x) { return divide(x, add(set1(1.0f), exponential(sub(zero(), x)))); }
// x times the normal distribution's weight below x; erf after Abramowitz and Stegun 1964, 7.1.26,
// within 1.5e-7.
INLINE V gelu(V x) {
    V z = mul(maximum(x, sub(zero(), x)), set1(0.70710678f));
    V t = divide(set1(1.0f), fma(z, set1(0.3275911f), set1(1.0f)));
    V p = set1(1.061405429f);
    p = fma(p, t, set1(-1.453152027f));
    p = fma(p, t, set1(1.421413741f));
    p = fma(p, t, set1(-0.284496736f));
    p = fma(p, t, set1(0.254829592f));
    V half = mul(exponential(sub(zero(), mul(z, z))), set1(0.5f));
    V beyond = mul(mul(p, t), half);  // of the tail behind |x|
    V below = add(keep_above(sub(set1(1.0f), add(beyond, beyond)), x, zero()), beyond);
    return mul(x, below);
}
// x / 2 (1 + tanh u) = x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3)
INLINE V gelu_tanh(V x) {
    V cube = mul(mul(x, x), x);
    V twice = mul(set1(-1.59576912f), fma(cube, set1(0.044715f), x));
    return divide(x, add(set1(1.0f), exponential(twice)));
}

// Applies `vector` to whole vectors and to a padded copy of the rest: the same arithmetic
// everywhere, so that a number's result does not depend on its place.
template <class Out, class Body>
INLINE void for_vectors(int64_t size, Out* out, Body body) {
    int64_t i = 0;
    for (; i + kWidth <= size; i += kWidth) store(out + i, body(i, kWidth));
    if (i < size) {
        Out rest[kWidth];
        store(rest, body(i, size - i));
        for (int64_t j = i; j < size; j++) out[j] = rest[j - i];
    }
}
template <class T>
INLINE V load_some(const T* p, int64_t count) {
    if (count == kWidth) return load(p);
    T rest[kWidth] = {};
    for (int64_t j = 0; j < count; j++) rest[j] = p[j];
    return load(rest);
}

// Calls body(typed pointer) for a pointer whose type is known at run time.
template <class Body>
INLINE void typed(void* p, int32_t type, Body body) {
    if (type == kFloat) body((float*)p); else body((bf16*)p);
}
template <class Body>
INLINE void typed(const void* p, int32_t type, Body body) {
    if (type == kFloat) body((const float*)p); else body((const bf16*)p);
}

template <class Delta, class Residual>
static float add_and_square(const Delta* delta, Residual* residual, int64_t size) {
    V squares = zero();
    for (int64_t i = 0; i < size; i += kWidth) {
        int64_t count = least(kWidth, size - i);
        V x = load_some(residual + i, count);
        if (delta && count == kWidth) {
            store(residual + i, add(x, load(delta + i)));
            x = load(residual + i);  // what was rounded is what is normalised
        } else if (delta) {
            Residual stored[kWidth];
            store(stored, add(x, load_some(delta + i, count)));
            for (int64_t j = 0; j < count; j++) residual[i + j] = stored[j];
            for (int64_t j = count; j < kWidth; j++) stored[j] = Residual{};
            x = load(stored);
        }
        squares = fma(x, x, squares);
    }
    return sum(squares);
}

static void rms_norm(const void* delta, int32_t delta_type, void* residual, int32_t residual_type,
                     const void* weight, int32_t weight_type, float offset, float eps,
                     int64_t size, void* out, int32_t out_type) {
    typed(residual, residual_type, [&](auto* r) {
        float squares = 0.0f;
        typed(delta, delta_type, [&](auto* d) { squares = add_and_square(d, r, size); });
        V scale = set1(1.0f / __builtin_sqrtf(squares / (float)size + eps)), base = set1(offset);
        typed(weight, weight_type, [&](auto* w) {
            typed(out, out_type, [&](auto* o) {
                for_vectors(size, o, [&](int64_t i, int64_t n) {
                    V factor = add(load_some(w + i, n), base);
                    return mul(mul(load_some(r + i, n), scale), factor);
                });
            });
        });
    });
}

static void layer_norm(const float* x, const float* weight, const float* bias, float eps,
                       int64_t size, void* out, int32_t out_type) {
    V total = zero(), squares = zero();
    for (int64_t i = 0; i < size; i += kWidth) {
        total = add(total, load_some(x + i, least(kWidth, size - i)));
    }
    V mean = set1(sum(total) / (float)size);
    for (int64_t i = 0; i < size; i += kWidth) {
        float apart[kWidth];
        store(apart, sub(load_some(x + i, least(kWidth, size - i)), mean));
        V d = load_some(apart, least(kWidth, size - i));
        squares = fma(d, d, squares);
    }
    V scale = set1(1.0f / __builtin_sqrtf(sum(squares) / (float)size + eps));
    typed(out, out_type, [&](auto* o) {
        for_vectors(size, o, [&](int64_t i, int64_t n) {
            V normed = mul(sub(load_some(x + i, n), mean), scale);
            V base = bias ? load_some(bias + i, n) : zero();
            return fma(normed, load_some(weight + i, n), base);
        });
    });
}

INLINE V activated(V x, int32_t activation) {
    switch (activation) {
        case kGelu: return gelu(x);
        case kGeluTanh: return gelu_tanh(x);
        case kGeluQuick: return divide(x, add(set1(1.0f), exponential(mul(set1(-1.702f), x))));
        case kRelu: return maximum(zero(), x);
        case kRelu2: {
            V positive = maximum(zero(), x);
            return mul(positive, positive);
        }
        default: return silu(x);
    }
}

static void activate(const void* x, const void* up, int32_t activation, int32_t in_type,
                     int64_t size, void* out, int32_t out_type) {
    typed(x, in_type, [&](auto* g) {
        auto* u = (decltype(g))up;
        typed(out, out_type, [&](auto* o) {
            for_vectors(size, o, [&](int64_t i, int64_t n) {
                V value = activated(load_some(g + i, n), activation);
                return u ? mul(value, load_some(u + i, n)) : value;
            });
        });
    });
}

static void convert(const void* in, int32_t in_type, int64_t size, void* out, int32_t out_type) {
    typed(in, in_type, [&](auto* x) {
        typed(out, out_type, [&](auto* o) {
            for_vectors(size, o, [&](int64_t i, int64_t n) { return load_some(x + i, n); });
        });
    });
}

template <class In, class Angle, class Out>
static void rope_typed(const In* in, const Angle* cos, const Angle* sin, int64_t half, int64_t dim,
                       Out* out) {
    for_vectors(half, out, [&](int64_t i, int64_t n) {
        V a = load_some(in + i, n), b = load_some(in + half + i, n);
        return sub(mul(a, load_some(cos + i, n)), mul(b, load_some(sin + i, n)));
    });
    for_vectors(half, out + half, [&](int64_t i, int64_t n) {
        V a = load_some(in + i, n), b = load_some(in + half + i, n);
        return add(mul(b, load_some(cos + i, n)), mul(a, load_some(sin + i, n)));
    });
    int64_t rest = 2 * half;
    for_vectors(dim - rest, out + rest, [&](int64_t i, int64_t n) {
        return load_some(in + rest + i, n);
    });
}

static void rope(const void* in, int32_t in_type, const void* cos, const void* sin,
                 int32_t angle_type, int64_t half, int64_t dim, void* out, int32_t out_type) {
    typed(in, in_type, [&](auto* x) {
        typed(cos, angle_type, [&](auto* c) {
            typed(out, out_type, [&](auto* o) {
                rope_typed(x, c, (decltype(c))sin, half, dim, o);
            });
        });
    });
}

template <class T>
static float quantize_typed(const T* x, int64_t size, int64_t padded, int32_t zero_point,
                            uint8_t* out) {
    V peaks = zero(), broken = zero();
    for (int64_t i = 0; i < size; i += kWidth) {
        V v = load_some(x + i, least(kWidth, size - i));
        peaks = maximum(peaks, maximum(v, sub(zero(), v)));
        broken = fma(v, zero(), broken);  // 0, unless a number is not finite
    }
    float peak = largest(peaks), flaw = sum(broken);
    V inverse = set1(flaw == 0.0f && peak > 1e-30f ? 127.0f / peak : 0.0f);
    for (int64_t i = 0; i < size; i += kWidth) {
        int64_t count = least(kWidth, size - i);
        V v = flaw == 0.0f ? mul(load_some(x + i, count), inverse) : zero();
        if (count == kWidth) {
            store_levels(out + i, v, zero_point);
        } else {
            uint8_t rest[kWidth];
            store_levels(rest, v, zero_point);
            std::memcpy(out + i, rest, count);
        }
    }
    std::memset(out + size, zero_point, padded - size);
    return peak / 127.0f + flaw;
}

static float quantize(const void* x, int32_t type, int64_t size, int64_t padded,
                      int32_t zero_point, uint8_t* out) {
    if (type == kFloat) return quantize_typed((const float*)x, size, padded, zero_point, out);
    return quantize_typed((const bf16*)x, size, padded, zero_point, out);
}

template <class Out>
static void widen_levels(const int8_t* in, int64_t size, Out* out) {
    for_vectors(size, out, [&](int64_t i, int64_t n) { return load_some(in + i, n); });
}

static void add_parts(const float* const* parts, int64_t count, int64_t size, float* total) {
    for_vectors(size, total, [&](int64_t i, int64_t n) {
        V x = load_some(parts[0] + i, n);
        for (int64_t part = 1; part < count; part++) x = add(x, load_some(parts[part] + i, n));
        return x;
    });
}

static void add_scaled(const float* x, float scale, int64_t size, float* total) {
    V factor = set1(scale);
    for_vectors(size, total, [&](int64_t i, int64_t n) {
        return fma(load_some(x + i, n), factor, load_some(total + i, n));
    });
}

static float squares(const float* x, int64_t size) {
    V total = zero();
    for (int64_t i = 0; i < size; i += kWidth) {
        V v = load_some(x + i, least(kWidth, size - i));
        total = fma(v, v, total);
    }
    return sum(total);
}

static int64_t argmax(const float* x, int64_t size) {
    V best = set1(-__builtin_inff());
    for (int64_t i = 0; i + kWidth <= size; i += kWidth) best = maximum(best, load(x + i));
    float peak = largest(best);
    for (int64_t i = size / kWidth * kWidth; i < size; i++) peak = x[i] > peak ? x[i] : peak;
    for (int64_t i = 0; i < size; i++) {
        if (x[i] == peak) return i;
    }
    return 0;
}

static float flaw(const float* x, int64_t size) {
    V broken = zero();
    for (int64_t i = 0; i < size; i += kWidth) {
        broken = fma(load_some(x + i, least(kWidth, size - i)), zero(), broken);
    }
    return sum(broken);
}
