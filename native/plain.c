/* The path that is correct on every processor: a stretch of a row becomes float32, and is multiplied by every row of x. */
#include "kernel.h"

enum { STRETCH = 512, LANES = 8 };

static inline __attribute__((always_inline)) int64_t decode(int64_t kind, const packed *m, const uint8_t *masks, int64_t bytes,
                                                            int64_t next, float *out) {
    for (int64_t i = 0; i < bytes; i++) {
        unsigned mask = masks[i];
        for (int bit = 0; bit < 8; bit++) {
            int64_t kept = mask >> bit & 1;
            /* The last value again where none is left: it is multiplied away. */
            int64_t at = next < m->capacity ? next : m->capacity - 1;
            float value;
            if (kind == BFLOAT16) {
                union { uint32_t bits; float value; } wide = {(uint32_t)((const uint16_t *)m->values)[at] << 16};
                value = wide.value;
            } else if (kind == FLOAT32)
                value = ((const float *)m->values)[at];
            else if (kind == INT8)
                value = ((const int8_t *)m->values)[at];
            else
                value = to_float(FLOAT16, m->values, at);
            *out++ = kept ? value : 0;
            next += kept;
        }
    }
    return next;
}

void plain_vectors(const void *context, int64_t unit) {
    const product *p = context;
    const packed *m = p->matrix;
    int64_t bytes = divide_up(m->columns, 8), end = least(m->rows, (unit + 1) * p->panels_per_unit);
    float weights[STRETCH], sums[MOST_BATCH];
    for (int64_t row = unit * p->panels_per_unit; row < end; row++) {
        int64_t next = m->starts[row], stretch;
        for (int64_t b = 0; b < p->batch; b++) sums[b] = 0;
        for (int64_t column = 0; column < m->columns; column += stretch) {
            stretch = least(STRETCH, bytes * 8 - column);
            float scale = 1;
            if (m->kind == INT8) {
                int64_t group = m->group_columns ? m->group_columns : m->columns;
                scale = m->scales[row * groups_of(m) + column / group];
                stretch = least(stretch, divide_up((column / group + 1) * group, 8) * 8 - column);
            }
            if (m->starts[row + 1] > m->starts[row]) {
                const uint8_t *masks = m->masks + row * bytes + column / 8;
                switch (m->kind) {
                case BFLOAT16: next = decode(BFLOAT16, m, masks, stretch / 8, next, weights); break;
                case FLOAT32: next = decode(FLOAT32, m, masks, stretch / 8, next, weights); break;
                case INT8: next = decode(INT8, m, masks, stretch / 8, next, weights); break;
                default: next = decode(FLOAT16, m, masks, stretch / 8, next, weights);
                }
            } else
                for (int64_t i = 0; i < stretch; i++) weights[i] = 0;
            for (int64_t b = 0; b < p->batch; b++) {
                const float *x = (const float *)p->x + b * p->x_stride + column;
                float lanes[LANES] = {0}, sum = 0;
                for (int64_t i = 0; i < stretch; i += LANES)
                    for (int lane = 0; lane < LANES; lane++) lanes[lane] += weights[i + lane] * x[i + lane];
                for (int lane = 0; lane < LANES; lane++) sum += lanes[lane];
                sums[b] += scale * sum;
            }
        }
        finish(p, row, 1, 0, p->batch, sums, 1, 1);
    }
}
