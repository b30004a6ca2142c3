/* Rows of x side by side in the lanes of vectors: each kept weight is multiplied by all of them, each removed one by none. Included
   by the paths, which say how wide a vector is (LANES) and how kept values and their places come out of a panel (`explode_kind`, defined after this). */
#include <string.h>

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

enum { MOST_TILE_ROWS = 128, MOST_WIDTH = 512, LIST = MOST_WIDTH + 24 };

/* Kept values of some columns of one row, and where in x the column of each begins, in bytes. */
typedef struct {
    int64_t count;
    float values[LIST];
    uint32_t places[LIST];
} row_list;

/* The lists of one panel over some blocks of columns; returns where its next values begin. Lists have room for 16 values more. */
static inline __attribute__((always_inline)) const uint8_t *explode_kind(const int kind, const packed *m, int64_t panel, int64_t block,
                                                                         int64_t blocks, const uint8_t *masks, const uint8_t *next,
                                                                         uint32_t column_bytes, row_list *lists);

static const uint8_t *explode(const packed *m, int64_t panel, int64_t block, int64_t blocks, const uint8_t *masks,
                              const uint8_t *next, uint32_t column_bytes, row_list *lists) {
    switch (m->kind) {
    case BFLOAT16: return explode_kind(BFLOAT16, m, panel, block, blocks, masks, next, column_bytes, lists);
    case FLOAT16: return explode_kind(FLOAT16, m, panel, block, blocks, masks, next, column_bytes, lists);
    case FLOAT32: return explode_kind(FLOAT32, m, panel, block, blocks, masks, next, column_bytes, lists);
    default: return explode_kind(INT8, m, panel, block, blocks, masks, next, column_bytes, lists);
    }
}

/* acc += the products of a list, with `wide` vectors for each column of x and `apart` sums for each, which hide the latency. */
static inline __attribute__((always_inline)) void multiply_list(row_list *list, const float *x, float *acc, const int wide,
                                                                const int apart) {
    lanes sums[8];
    for (int i = 0; i < wide; i++) sums[i] = *(const lanes *)(acc + i * LANES);
    for (int i = wide; i < wide * apart; i++) sums[i] = (lanes){0};
    for (int i = 0; i < apart; i++) { /* what is left of the last round is multiplied by zero */
        list->values[list->count + i] = 0;
        list->places[list->count + i] = 0;
    }
    for (int64_t n = 0; n < list->count; n += apart)
        for (int j = 0; j < apart; j++) {
            const lanes *column = (const lanes *)((const char *)x + list->places[n + j]);
            float value = list->values[n + j];
            for (int i = 0; i < wide; i++) sums[j * wide + i] += value * column[i];
        }
    for (int i = wide; i < wide * apart; i++) sums[i % wide] += sums[i];
    for (int i = 0; i < wide; i++) *(lanes *)(acc + i * LANES) = sums[i];
}

static inline __attribute__((always_inline)) void tiles(const product *p, int64_t unit, const int wide, const int apart) {
    const packed *m = p->matrix;
    const int64_t batch_width = wide * LANES, block_bytes = m->panel_rows * m->block_columns / 8, blocks = blocks_of(m);
    /* Columns of x that stay in the first cache while all rows of the unit are multiplied by them. */
    const int64_t step = least(MOST_WIDTH, 4096 / batch_width) / m->block_columns;
    float acc[MOST_TILE_ROWS * MOST_BATCH] __attribute__((aligned(64)));
    const uint8_t *values[MOST_TILE_ROWS];
    row_list lists[PANEL_ROWS];
    int64_t first = unit * p->panels_per_unit, panels = least(p->panels_per_unit, panels_of(m) - first);
    for (int64_t i = 0; i < panels; i++) values[i] = m->values + m->starts[first + i] * item_size(m->kind);
    memset(acc, 0, panels * PANEL_ROWS * batch_width * sizeof(float));
    for (int64_t block = 0; block < blocks; block += step) {
        const float *x = (const float *)p->x + block * m->block_columns * batch_width;
        for (int64_t i = 0; i < panels; i++) {
            const uint8_t *masks = m->masks + ((first + i) * blocks + block) * block_bytes;
            const uint8_t *after = explode(m, first + i, block, least(step, blocks - block), masks, values[i],
                                           batch_width * sizeof(float), lists);
            for (int64_t ahead = 0; ahead < after - values[i]; ahead += 64) __builtin_prefetch(after + ahead);
            values[i] = after;
            for (int r = 0; r < PANEL_ROWS; r++) multiply_list(&lists[r], x, acc + (i * PANEL_ROWS + r) * batch_width, wide, apart);
        }
    }
    finish(p, first * PANEL_ROWS, panels * PANEL_ROWS, 0, p->batch, acc, batch_width, 1);
}

/* x_stride is a multiple of 8 up to 16, of 16 above. */
static void any_tiles(const void *context, int64_t unit) {
    const product *p = context;
    switch (p->x_stride / LANES) {
    case 1: tiles(p, unit, 1, 4); break;
    case 2: tiles(p, unit, 2, 2); break;
#if LANES == 16
    case 3: tiles(p, unit, 3, 2); break;
    case 4: tiles(p, unit, 4, 1); break;
#else
    case 4: tiles(p, unit, 4, 1); break;
    case 6: tiles(p, unit, 6, 1); break;
    case 8: tiles(p, unit, 8, 1); break;
#endif
    }
}
