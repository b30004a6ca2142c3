/* A product from outside: x is brought into the form of the path, and the rows of the matrix are shared among threads. */
#include "kernel.h"

#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

/* Few rows of x are multiplied one by one, more side by side in the lanes of a vector. Measured for AVX2, on Zen 3, only. */
enum { TILES_FROM = 12, TILES_FROM_AVX512 = 6, AMX_FROM = 3, SMALL = 1 << 16, TILE_ROWS = 128 };

static inline float from_bits(uint32_t bits) {
    union { uint32_t bits; float value; } both = {bits};
    return both.value;
}
static inline uint32_t to_bits(float value) {
    union { float value; uint32_t bits; } both = {value};
    return both.bits;
}
static inline float from_bfloat16(uint16_t half) { return from_bits((uint32_t)half << 16); }
static inline uint16_t to_bfloat16(float value) {
    uint32_t bits = to_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits >> 16) | 0x40;
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
static inline float from_float16(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16, magnitude = half & 0x7fffu;
    if (magnitude >= 0x7c00u) return from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    /* Shifted into place the exponent is 112 too small, for subnormal numbers as well. */
    return from_bits(sign | to_bits(from_bits(magnitude << 13) * 0x1p112f));
}
static inline uint16_t to_float16(float value) {
    uint32_t bits = to_bits(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);  /* rounds to more than 65504 */
    if (magnitude < 0x38800000u) {                                   /* subnormal: the addition rounds to multiples of 2**-24 */
        float rounded = from_bits(magnitude) + 0.5f;
        return (uint16_t)(sign | (to_bits(rounded) - 0x3f000000u));
    }
    return (uint16_t)(sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13));
}

float to_float(int64_t kind, const void *items, int64_t index) {
    if (kind == BFLOAT16) return from_bfloat16(((const uint16_t *)items)[index]);
    if (kind == FLOAT16) return from_float16(((const uint16_t *)items)[index]);
    return ((const float *)items)[index];
}

void from_float(int64_t kind, void *items, int64_t index, float value) {
    if (kind == BFLOAT16)
        ((uint16_t *)items)[index] = to_bfloat16(value);
    else if (kind == FLOAT16)
        ((uint16_t *)items)[index] = to_float16(value);
    else
        ((float *)items)[index] = value;
}

void finish(const product *p, int64_t row, int64_t rows, int64_t first_batch, int64_t batch, const float *sums, int64_t row_step,
            int64_t batch_step) {
    int64_t all = p->matrix->rows;
    rows = least(rows, all - row);
    for (int64_t b = 0; b < batch; b++)
        for (int64_t r = 0; r < rows; r++) {
            float sum = sums[r * row_step + b * batch_step];
            if (p->bias) sum += to_float(p->bias_kind, p->bias, row + r);
            from_float(p->y_kind, p->y, (first_batch + b) * all + row + r, sum);
        }
}

/* Convert one row of x. Returns whether all of it is finite. */
static int widen(int64_t kind, const void *x, int64_t first, int64_t count, float *out) {
    if (kind == BFLOAT16)
        for (int64_t i = 0; i < count; i++) out[i] = from_bfloat16(((const uint16_t *)x)[first + i]);
    else if (kind == FLOAT16)
        for (int64_t i = 0; i < count; i++) out[i] = from_float16(((const uint16_t *)x)[first + i]);
    else
        memcpy(out, (const float *)x + first, count * sizeof(float));
    uint32_t greatest = 0;
    for (int64_t i = 0; i < count; i++) {
        uint32_t exponent = to_bits(out[i]) & 0x7f800000u;
        greatest = greatest > exponent ? greatest : exponent;
    }
    return greatest != 0x7f800000u;
}

static void pairs_apart(float *x, int64_t count) {
    for (int64_t block = 0; block < count; block += 32) {
        float copy[32];
        memcpy(copy, x + block, sizeof copy);
        for (int i = 0; i < 16; i++) {
            x[block + i] = copy[2 * i];
            x[block + 16 + i] = copy[2 * i + 1];
        }
    }
}

/* Blocks of 32 columns; of each, tiles of 16 rows of x; of each, 16 pairs of columns, and of each pair the two values of every row. */
#if defined(SECATEUR_AMX)
static void amx_order(const uint16_t *x, int64_t batch, int64_t columns, int64_t padded, uint16_t *out) {
    int64_t tiles = divide_up(batch, 16);
    memset(out, 0, (padded / 32) * tiles * 1024);
    for (int64_t b = 0; b < batch; b++)
        for (int64_t column = 0; column < columns; column++) {
            int64_t tile = column / 32 * tiles + b / 16;
            out[tile * 512 + column % 32 / 2 * 32 + b % 16 * 2 + column % 2] = x[b * columns + column];
        }
}
#endif

static int multiply(product p, int64_t threads, const void *x, int64_t x_kind) {
    const packed *m = p.matrix;
    int64_t path = m->path, columns = m->columns, padded = divide_up(columns, 32) * 32, panels = panels_of(m);
    int64_t tiles_from = path == AVX2 ? TILES_FROM : TILES_FROM_AVX512;
    int by_tiles = path != PLAIN && p.batch >= tiles_from;
    int64_t width = divide_up(p.batch, 16) * 16; /* of x transposed, and of the tiles of AMX */
    if (by_tiles && p.batch <= 8 && path == AVX2) width = 8;
    float *wide = scratch(padded * (p.batch + width) * (int64_t)sizeof(float)), *beside = wide + padded * p.batch;
    if (!wide) return 1;
    void (*work)(const void *, int64_t) = NULL;
#if defined(SECATEUR_AMX)
    /* Exact where both sides are bfloat16 or fit in it, as integers of 8 bits do. */
    if (path == AMX && p.batch >= AMX_FROM && x_kind == BFLOAT16 && (m->kind == BFLOAT16 || (m->kind == INT8 && !m->group_columns))) {
        amx_order(x, p.batch, columns, padded, (uint16_t *)wide);
        p.x = wide;
        by_tiles = 0;
        work = amx_tiles;
    }
#endif
    if (!work) {
        int finite = 1;
        for (int64_t b = 0; b < p.batch; b++) {
            finite &= widen(x_kind, x, b * columns, columns, wide + b * padded);
            memset(wide + b * padded + columns, 0, (padded - columns) * sizeof(float));
        }
        by_tiles = by_tiles && finite;
        p.x = by_tiles ? beside : wide;
        p.x_stride = by_tiles ? width : padded;
        if (by_tiles) /* Blocks of columns that lie close together in both. */
            for (int64_t block = 0; block < padded; block += 32)
                for (int64_t b = 0; b < width; b++)
                    for (int64_t column = block; column < block + 32; column++)
                        beside[column * width + b] = b < p.batch ? wide[b * padded + column] : 0;
        else if ((path == AVX512 || path == AMX) && m->kind == BFLOAT16)
            for (int64_t b = 0; b < p.batch; b++) pairs_apart(wide + b * padded, padded);
    }
    int64_t units;
    if (by_tiles)
        p.panels_per_unit = TILE_ROWS / m->panel_rows;
    else
        p.panels_per_unit = divide_up(panels, threads * 8);
    if (m->rows * columns * p.batch < SMALL) threads = 1;
    units = divide_up(panels, p.panels_per_unit);
    if (!work) switch (path) {
#if defined(SECATEUR_AVX2)
        case AVX2: work = by_tiles ? avx2_tiles : avx2_vectors; break;
#endif
#if defined(SECATEUR_AVX512)
        case AMX:
        case AVX512: work = by_tiles ? avx512_tiles : avx512_vectors; break;
#endif
        default: work = plain_vectors;
        }
    run_units(threads, units, work, &p);
    return 0;
}

/* Bits (1 << path) of the paths that were compiled. */
EXPORT int64_t secateur_compiled(void) {
    int64_t paths = 1 << PLAIN;
#if defined(SECATEUR_AVX2)
    paths |= 1 << AVX2;
#endif
#if defined(SECATEUR_AVX512)
    paths |= 1 << AVX512;
#if defined(SECATEUR_AMX)
    paths |= 1 << AMX;
#endif
#endif
    return paths;
}

/* Bits of the paths that this processor and its system have. */
EXPORT int64_t secateur_supported(void) {
    int64_t paths = 1 << PLAIN;
#if defined(SECATEUR_EMULATED)
    return secateur_compiled();
#elif defined(__x86_64__)
    unsigned a, b, c, d, b7, c7, d7;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return paths;
    int fma = c >> 12 & 1, popcnt = c >> 23 & 1, osxsave = c >> 27 & 1, f16c = c >> 29 & 1;
    if (!osxsave || !__get_cpuid_count(7, 0, &a, &b7, &c7, &d7)) return paths;
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0)); /* which registers the system saves */
    if ((low & 6) != 6 || !fma || !popcnt || !f16c || !(b7 >> 5 & 1) || !(b7 >> 8 & 1)) return paths;
    paths |= 1 << AVX2;
    int avx512 = (b7 >> 16 & 1) && (b7 >> 30 & 1) && (b7 >> 31 & 1) && (c7 >> 6 & 1); /* F, BW, VL, VBMI2 */
    if ((low & 0xe6) != 0xe6 || !avx512) return paths;
    paths |= 1 << AVX512;
#if defined(__linux__)
    enum { ASK_FOR_STATE = 0x1023, TILE_DATA = 18 };
    if ((d7 >> 22 & 1) && (d7 >> 24 & 1) && (low >> 17 & 3) == 3 && syscall(SYS_arch_prctl, ASK_FOR_STATE, TILE_DATA) == 0)
        paths |= 1 << AMX;
#endif
#endif
    return paths;
}

/* y (batch, rows) = x (batch, columns) @ W.T + bias, x and y of the same kind. Returns 1 if there is no memory, 2 if this
   processor has not got the path that the matrix is laid out for. */
EXPORT int secateur_linear(const int64_t *numbers, const void *masks, const void *values, const int64_t *starts, const void *scales,
                           int64_t threads, const void *x, int64_t kind, int64_t batch, const void *bias, int64_t bias_kind, void *y) {
    static int64_t supported;
    if (!supported) supported = secateur_supported() & secateur_compiled();
    packed m = with_parts(numbers, masks, values, starts, scales);
    if (!(supported >> m.path & 1)) return 2;
    for (int64_t first = 0; first < batch; first += MOST_BATCH) {
        product p = {.matrix = &m, .batch = least(MOST_BATCH, batch - first), .bias = bias, .bias_kind = bias_kind, .y_kind = kind};
        p.y = (char *)y + first * m.rows * item_size(kind);
        if (multiply(p, threads, (const char *)x + first * m.columns * item_size(kind), kind)) return 1;
    }
    return 0;
}
