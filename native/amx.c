/* AMX: the weights are the rows of a tile, 16 rows of x its columns. Exact products of bfloat16, sums in float32. */
#include "avx512.h"

#include <string.h>

enum { PANEL_ROWS = 16, BLOCK = 32, TOGETHER = 8 };

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_shapes;

/* A block of a panel as bfloat16, 16 rows of 32 columns. Integers of 8 bits are exact in it. */
inlined int64_t expand_block(const int kind, const uint8_t *values, int64_t next, const uint32_t *masks, uint16_t *out) {
    for (int r = 0; r < PANEL_ROWS; r++) {
        if (kind == BFLOAT16)
            _mm512_storeu_si512(out + r * BLOCK, expand_words(values + next * 2, masks[r]));
        else {
            __m256i both = expand_bytes(values + next, masks[r]);
            __m512i first = _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(both))));
            __m512i second = _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(both, 1))));
            _mm256_storeu_si256((__m256i *)(out + r * BLOCK), _mm512_cvtepi32_epi16(_mm512_srli_epi32(first, 16)));
            _mm256_storeu_si256((__m256i *)(out + r * BLOCK + 16), _mm512_cvtepi32_epi16(_mm512_srli_epi32(second, 16)));
        }
        next += _mm_popcnt_u32(masks[r]);
    }
    return next;
}

/* Tiles 0 to 3 are sums, 4 the weights, 5 is x. Their numbers are part of the instructions. */
inlined void multiply_panels(const int kind, const int tiles, const product *p, int64_t unit) {
    const packed *m = p->matrix;
    const int64_t size = kind == INT8 ? 1 : 2, blocks = blocks_of(m);
    int64_t end = least(panels_of(m), (unit + 1) * p->panels_per_unit);
    uint16_t weights[TOGETHER][PANEL_ROWS * BLOCK] __attribute__((aligned(64)));
    float sums[PANEL_ROWS * 16] __attribute__((aligned(64)));
    for (int64_t panel = unit * p->panels_per_unit; panel < end; panel++) {
        const uint32_t *masks = (const uint32_t *)m->masks + panel * blocks * PANEL_ROWS;
        const uint8_t *values = m->values + m->starts[panel] * size;
        int64_t next = 0;
        _tile_zero(0);
        if (tiles > 1) _tile_zero(1);
        if (tiles > 2) _tile_zero(2);
        if (tiles > 3) _tile_zero(3);
        for (int64_t first = 0; first < blocks; first += TOGETHER) {
            int64_t count = least(TOGETHER, blocks - first);
            for (int64_t i = 0; i < count; i++) {
                for (int64_t line = 0; line < 4 * size; line++) _mm_prefetch((const char *)values + next * size + 3072 + line * 64, _MM_HINT_T0);
                next = expand_block(kind, values, next, masks + (first + i) * PANEL_ROWS, weights[i]);
            }
            for (int64_t i = 0; i < count; i++) {
                const uint8_t *x = (const uint8_t *)p->x + (first + i) * tiles * 1024;
                _tile_loadd(4, weights[i], 64);
                _tile_loadd(5, x, 64);
                _tile_dpbf16ps(0, 4, 5);
                if (tiles > 1) {
                    _tile_loadd(5, x + 1024, 64);
                    _tile_dpbf16ps(1, 4, 5);
                }
                if (tiles > 2) {
                    _tile_loadd(5, x + 2048, 64);
                    _tile_dpbf16ps(2, 4, 5);
                }
                if (tiles > 3) {
                    _tile_loadd(5, x + 3072, 64);
                    _tile_dpbf16ps(3, 4, 5);
                }
            }
        }
        for (int tile = 0; tile < tiles; tile++) {
            switch (tile) {
            case 0: _tile_stored(0, sums, 64); break;
            case 1: _tile_stored(1, sums, 64); break;
            case 2: _tile_stored(2, sums, 64); break;
            default: _tile_stored(3, sums, 64);
            }
            if (kind == INT8)
                for (int64_t r = 0; r < least(PANEL_ROWS, m->rows - panel * PANEL_ROWS); r++)
                    for (int b = 0; b < 16; b++) sums[r * 16 + b] *= m->scales[panel * PANEL_ROWS + r];
            finish(p, panel * PANEL_ROWS, PANEL_ROWS, tile * 16, least(16, p->batch - tile * 16), sums, 16, 1);
        }
    }
}

inlined void any_batch(const int kind, const product *p, int64_t unit) {
    switch (divide_up(p->batch, 16)) {
    case 1: multiply_panels(kind, 1, p, unit); break;
    case 2: multiply_panels(kind, 2, p, unit); break;
    case 3: multiply_panels(kind, 3, p, unit); break;
    default: multiply_panels(kind, 4, p, unit);
    }
}

void amx_tiles(const void *context, int64_t unit) {
    const product *p = context;
    tile_shapes shapes = {.palette = 1};
    for (int tile = 0; tile < 6; tile++) {
        shapes.row_bytes[tile] = 64;
        shapes.rows[tile] = 16;
    }
    _tile_loadconfig(&shapes);
    if (p->matrix->kind == INT8)
        any_batch(INT8, p, unit);
    else
        any_batch(BFLOAT16, p, unit);
    _tile_release();
}
