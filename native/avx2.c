/* AVX2: panels of 4 rows, blocks of 8 columns. A table says for each byte of a mask where in eight columns its values go, so that one
   shuffle moves 16-bit values and makes them float32. */
#include "kernel.h"

#include <immintrin.h>

#define LANES 8
enum { PANEL_ROWS = 4, BLOCK = 8, AHEAD = 3072 /* bytes */ };

/* Shuffles of bytes: a value becomes the upper half (bfloat16) or the uppermost byte (int8) of four bytes, a gap becomes zero. */
static uint8_t spread16[256][32] __attribute__((aligned(64))), spread8[256][32] __attribute__((aligned(64)));
static uint8_t ranks[256][8];      /* for each column, the place of its value */
static uint8_t positions[256][8];  /* the columns that are kept */
static uint32_t whole[256][8] __attribute__((aligned(64))); /* all bits where a column is kept */

__attribute__((constructor)) static void make_tables(void) {
    for (int mask = 0; mask < 256; mask++) {
        int rank = 0;
        for (int column = 0; column < 8; column++) {
            int kept = mask >> column & 1;
            for (int byte = 0; byte < 4; byte++) {
                spread16[mask][column * 4 + byte] = kept && byte >= 2 ? rank * 2 + byte - 2 : 0x80;
                spread8[mask][column * 4 + byte] = kept && byte == 3 ? rank : 0x80;
            }
            ranks[mask][column] = rank;
            whole[mask][column] = kept ? 0xffffffffu : 0;
            if (kept) positions[mask][rank++] = column;
        }
    }
}

/* Eight columns of one row: their kept values begin at `values`, and `offset` is 32 times the mask. int8 comes out 2**24 times as
   great. */
inlined __m256 spread(const int kind, const uint8_t *values, uint64_t offset) {
    if (kind == BFLOAT16) {
        __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)values));
        return _mm256_castsi256_ps(_mm256_shuffle_epi8(both, *(const __m256i *)(spread16[0] + offset)));
    }
    if (kind == INT8) {
        __m256i both = _mm256_broadcastq_epi64(_mm_loadl_epi64((const __m128i *)values));
        return _mm256_cvtepi32_ps(_mm256_shuffle_epi8(both, *(const __m256i *)(spread8[0] + offset)));
    }
    __m256 wide = kind == FLOAT32 ? _mm256_loadu_ps((const float *)values)
                                  : _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)values));
    __m256i order = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)ranks[offset / 32]));
    return _mm256_and_ps(_mm256_permutevar8x32_ps(wide, order), *(const __m256 *)whole[offset / 32]);
}

inlined float sum_lanes(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

/* sums[row][n]: one panel times `batch` rows of x. */
inlined void multiply_panel(const int kind, const int batch, const packed *m, int64_t panel, const float *x, int64_t stride,
                            float sums[4][3]) {
    const int64_t size = kind == FLOAT32 ? 4 : kind == INT8 ? 1 : 2, blocks = blocks_of(m), groups = groups_of(m);
    const int64_t group_blocks = kind == INT8 && m->group_columns ? m->group_columns / BLOCK : blocks;
    const uint32_t *masks = (const uint32_t *)m->masks + panel * blocks;
    const uint8_t *values = m->values + m->starts[panel] * size;
    int64_t next = 0; /* a count: added to in one step, and multiplied by the size in the address */
    for (int r = 0; r < 4; r++)
        for (int n = 0; n < batch; n++) sums[r][n] = 0;
    for (int64_t group = 0; group < groups; group++) {
        __m256 acc[4][3];
        for (int r = 0; r < 4; r++)
            for (int n = 0; n < batch; n++) acc[r][n] = _mm256_setzero_ps();
        int64_t end = least(blocks, (group + 1) * group_blocks);
        for (int64_t block = group * group_blocks; block < end; block++) {
            _mm_prefetch((const char *)values + next * size + AHEAD, _MM_HINT_T0);
            uint32_t mask = masks[block];
            for (int r = 0; r < 4; r++) {
                /* Each byte in turn where it is the offset of its entry in a table of 32 bytes each. */
                uint32_t offset = (r ? mask >> (8 * r - 5) : mask << 5) & 0x1fe0;
                __m256 weights = spread(kind, values + next * size, offset);
                next += _mm_popcnt_u32(offset);
                for (int n = 0; n < batch; n++)
                    acc[r][n] = _mm256_fmadd_ps(weights, _mm256_loadu_ps(x + n * stride + block * BLOCK), acc[r][n]);
            }
        }
        for (int r = 0; r < 4; r++) {
            float scale = 1;
            if (kind == INT8) scale = panel * 4 + r < m->rows ? m->scales[(panel * 4 + r) * groups + group] * 0x1p-24f : 0;
            for (int n = 0; n < batch; n++) sums[r][n] += scale * sum_lanes(acc[r][n]);
        }
    }
}

inlined void vectors(const int kind, const product *p, int64_t unit) {
    int64_t end = least(panels_of(p->matrix), (unit + 1) * p->panels_per_unit);
    float sums[4][3];
    for (int64_t panel = unit * p->panels_per_unit; panel < end; panel++)
        for (int64_t b = 0, count; b < p->batch; b += count) {
            const float *x = (const float *)p->x + b * p->x_stride;
            count = p->batch - b == 4 ? 2 : least(3, p->batch - b);
            if (count == 1)
                multiply_panel(kind, 1, p->matrix, panel, x, p->x_stride, sums);
            else if (count == 2)
                multiply_panel(kind, 2, p->matrix, panel, x, p->x_stride, sums);
            else
                multiply_panel(kind, 3, p->matrix, panel, x, p->x_stride, sums);
            finish(p, panel * 4, 4, b, count, sums[0], 3, 1);
        }
}

void avx2_vectors(const void *context, int64_t unit) {
    const product *p = context;
    switch (p->matrix->kind) {
    case BFLOAT16: vectors(BFLOAT16, p, unit); break;
    case FLOAT16: vectors(FLOAT16, p, unit); break;
    case FLOAT32: vectors(FLOAT32, p, unit); break;
    default: vectors(INT8, p, unit);
    }
}

static uint8_t spread_words[256][16] __attribute__((aligned(64))), spread_bytes[256][8];

__attribute__((constructor)) static void make_tables_of_items(void) {
    for (int mask = 0; mask < 256; mask++)
        for (int column = 0, rank = 0; column < 8; column++) {
            int kept = mask >> column & 1;
            spread_bytes[mask][column] = kept ? rank : 0x80;
            spread_words[mask][2 * column] = kept ? 2 * rank : 0x80;
            spread_words[mask][2 * column + 1] = kept ? 2 * rank + 1 : 0x80;
            rank += kept;
        }
}

int64_t avx2_expand(const uint8_t *masks, int64_t groups, int64_t size, const uint8_t *values, int64_t readable, uint8_t *out) {
    int64_t i = 0, next = 0;
    for (; i < groups && next + 8 <= readable; i++) {
        unsigned mask = masks[i];
        const uint8_t *from = values + next * size;
        if (size == 2)
            _mm_storeu_si128((__m128i *)out, _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)from), *(const __m128i *)spread_words[mask]));
        else if (size == 1)
            _mm_storel_epi64((__m128i *)out, _mm_shuffle_epi8(_mm_loadl_epi64((const __m128i *)from), _mm_loadl_epi64((const __m128i *)spread_bytes[mask])));
        else {
            __m256i order = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)ranks[mask]));
            __m256i moved = _mm256_permutevar8x32_epi32(_mm256_loadu_si256((const __m256i *)from), order);
            _mm256_storeu_si256((__m256i *)out, _mm256_and_si256(moved, *(const __m256i *)whole[mask]));
        }
        out += 8 * size;
        next += _mm_popcnt_u32(mask);
    }
    return i;
}

#include "batch.h"

inlined const uint8_t *explode_kind(const int kind, const packed *m, int64_t panel, int64_t block, int64_t blocks,
                                    const uint8_t *masks, const uint8_t *next, uint32_t column_bytes, row_list *lists) {
    const int64_t size = kind == FLOAT32 ? 4 : kind == INT8 ? 1 : 2, groups = groups_of(m);
    const __m256i step = _mm256_set1_epi32(column_bytes);
    const int64_t group_blocks = m->group_columns ? m->group_columns / BLOCK : INT64_MAX, rows_left = m->rows - panel * PANEL_ROWS;
    for (int r = 0; r < PANEL_ROWS; r++) lists[r].count = 0;
    for (int64_t i = 0; i < blocks; i++)
        for (int r = 0; r < PANEL_ROWS; r++) {
            unsigned mask = masks[i * PANEL_ROWS + r];
            row_list *list = &lists[r];
            __m256i column = _mm256_add_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)positions[mask])),
                                              _mm256_set1_epi32(i * BLOCK));
            __m256 values;
            if (kind == BFLOAT16)
                values = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)next)), 16));
            else if (kind == FLOAT16)
                values = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)next));
            else if (kind == FLOAT32)
                values = _mm256_loadu_ps((const float *)next);
            else {
                float scale = r < rows_left ? m->scales[(panel * PANEL_ROWS + r) * groups + (block + i) / group_blocks] : 0;
                values = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)next)));
                values = _mm256_mul_ps(values, _mm256_set1_ps(scale));
            }
            _mm256_storeu_ps(list->values + list->count, values);
            _mm256_storeu_si256((__m256i *)(list->places + list->count), _mm256_mullo_epi32(column, step));
            list->count += _mm_popcnt_u32(mask);
            next += size * _mm_popcnt_u32(mask);
        }
    return next;
}

void avx2_tiles(const void *context, int64_t unit) { any_tiles(context, unit); }
