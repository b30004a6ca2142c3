/* AVX-512 with VBMI2: panels of 16 rows, blocks of 32 columns, whose kept values one instruction moves to their columns. */
#include "avx512.h"

#define LANES 16
enum { PANEL_ROWS = 16, BLOCK = 32, AHEAD = 3072 /* bytes */ };

/* The scales of 16 columns of a row; a multiple of 8 of them share one. */
inlined __m512 scales_of(const packed *m, int64_t row, int64_t column) {
    if (row >= m->rows) return _mm512_setzero_ps();
    const float *scales = m->scales + row * groups_of(m);
    int64_t last = groups_of(m) - 1;
    if (!m->group_columns) return _mm512_set1_ps(scales[0]);
    float first = scales[least(last, column / m->group_columns)], second = scales[least(last, (column + 8) / m->group_columns)];
    return _mm512_mask_mov_ps(_mm512_set1_ps(first), 0xff00, _mm512_set1_ps(second));
}

/* 32 columns of a row: of bfloat16 the even ones and the odd ones, of other kinds the first 16 and the last. */
inlined void spread(const int kind, const uint8_t *values, uint32_t mask, __m512 *first, __m512 *second) {
    if (kind == BFLOAT16) {
        __m512i both = expand_words(values, mask);
        *first = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
        *second = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000)));
    } else if (kind == FLOAT16) {
        __m512i both = expand_words(values, mask);
        *first = _mm512_cvtph_ps(_mm512_castsi512_si256(both));
        *second = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(both, 1));
    } else if (kind == INT8) {
        __m256i both = expand_bytes(values, mask);
        *first = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(both)));
        *second = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(both, 1)));
    } else {
        const float *floats = (const float *)values;
        *first = _mm512_maskz_expand_ps((__mmask16)mask, _mm512_loadu_ps(floats));
        *second = _mm512_maskz_expand_ps((__mmask16)(mask >> 16), _mm512_loadu_ps(floats + _mm_popcnt_u32(mask & 0xffff)));
    }
}

inlined void vectors(const int kind, const int grouped, const product *p, int64_t unit) {
    const packed *m = p->matrix;
    const int64_t size = kind == FLOAT32 ? 4 : kind == INT8 ? 1 : 2, blocks = blocks_of(m);
    int64_t end = least(panels_of(m), (unit + 1) * p->panels_per_unit);
    float sums[PANEL_ROWS];
    for (int64_t panel = unit * p->panels_per_unit; panel < end; panel++)
        for (int64_t b = 0; b < p->batch; b++) {
            const float *x = (const float *)p->x + b * p->x_stride;
            const uint32_t *masks = (const uint32_t *)m->masks + panel * blocks * PANEL_ROWS;
            const uint8_t *values = m->values + m->starts[panel] * size;
            int64_t next = 0;
            __m512 acc[PANEL_ROWS];
            for (int r = 0; r < PANEL_ROWS; r++) acc[r] = _mm512_setzero_ps();
            for (int64_t block = 0; block < blocks; block++) {
                __m512 x_first = _mm512_loadu_ps(x + block * BLOCK), x_second = _mm512_loadu_ps(x + block * BLOCK + 16);
                /* As many lines as a block takes where half of the weights are kept. */
                for (int64_t line = 0; line < 4 * size; line++) _mm_prefetch((const char *)values + next * size + AHEAD + line * 64, _MM_HINT_T0);
                for (int r = 0; r < PANEL_ROWS; r++) {
                    uint32_t mask = masks[block * PANEL_ROWS + r];
                    __m512 first, second;
                    spread(kind, values + next * size, mask, &first, &second);
                    next += _mm_popcnt_u32(mask);
                    if (grouped) {
                        first = _mm512_mul_ps(first, scales_of(m, panel * PANEL_ROWS + r, block * BLOCK));
                        second = _mm512_mul_ps(second, scales_of(m, panel * PANEL_ROWS + r, block * BLOCK + 16));
                    }
                    acc[r] = _mm512_fmadd_ps(first, x_first, acc[r]);
                    acc[r] = _mm512_fmadd_ps(second, x_second, acc[r]);
                }
            }
            for (int r = 0; r < PANEL_ROWS; r++) {
                int64_t row = panel * PANEL_ROWS + r;
                sums[r] = _mm512_reduce_add_ps(acc[r]);
                if (kind == INT8 && !grouped) sums[r] *= row < m->rows ? m->scales[row] : 0;
            }
            finish(p, panel * PANEL_ROWS, PANEL_ROWS, b, 1, sums, 1, 1);
        }
}

void avx512_vectors(const void *context, int64_t unit) {
    const product *p = context;
    switch (p->matrix->kind) {
    case BFLOAT16: vectors(BFLOAT16, 0, p, unit); break;
    case FLOAT16: vectors(FLOAT16, 0, p, unit); break;
    case FLOAT32: vectors(FLOAT32, 0, p, unit); break;
    default:
        if (p->matrix->group_columns)
            vectors(INT8, 1, p, unit);
        else
            vectors(INT8, 0, p, unit);
    }
}

#include "batch.h"

inlined const uint8_t *explode_kind(const int kind, const packed *m, int64_t panel, int64_t block, int64_t blocks,
                                    const uint8_t *masks, const uint8_t *next, uint32_t column_bytes, row_list *lists) {
    const int64_t size = kind == FLOAT32 ? 4 : kind == INT8 ? 1 : 2;
    const __m512i step = _mm512_set1_epi32((int)column_bytes);
    for (int r = 0; r < PANEL_ROWS; r++) lists[r].count = 0;
    for (int64_t i = 0; i < blocks; i++)
        for (int r = 0; r < PANEL_ROWS; r++)
            for (int half = 0; half < 2; half++) {
                __mmask16 mask = ((const uint16_t *)masks)[(i * PANEL_ROWS + r) * 2 + half];
                row_list *list = &lists[r];
                int64_t column = i * BLOCK + half * 16;
                __m512i columns = _mm512_add_epi32(_mm512_set1_epi32((int)column), sixteen());
                __m512 values;
                if (kind == BFLOAT16)
                    values = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)next)), 16));
                else if (kind == FLOAT16)
                    values = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)next));
                else if (kind == FLOAT32)
                    values = _mm512_loadu_ps((const float *)next);
                else {
                    __m512 scales = scales_of(m, panel * PANEL_ROWS + r, block * BLOCK + column);
                    values = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)next)));
                    values = _mm512_mul_ps(values, _mm512_maskz_compress_ps(mask, scales));
                }
                _mm512_storeu_ps(list->values + list->count, values);
                _mm512_storeu_si512(list->places + list->count, _mm512_mullo_epi32(_mm512_maskz_compress_epi32(mask, columns), step));
                list->count += _mm_popcnt_u32(mask);
                next += size * _mm_popcnt_u32(mask);
            }
    return next;
}

void avx512_tiles(const void *context, int64_t unit) { any_tiles(context, unit); }
