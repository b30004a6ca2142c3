/* What the files of the kernel share: a packed matrix, one product with it, and the functions of each path. */
#ifndef SECATEUR_KERNEL_H
#define SECATEUR_KERNEL_H

#include <stdint.h>

#define inlined static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))

enum kind { BFLOAT16, FLOAT16, FLOAT32, INT8 };
enum path { PLAIN, AVX2, AVX512, AMX };
enum { MOST_BATCH = 64 }; /* rows of x in one product; more are several products */

/* A matrix as Python gives it: numbers first, then where its parts are.

   Panels of `panel_rows` rows, one after the other. In a panel, for each `block_columns` columns, the masks of its rows lie side by
   side, and the kept values follow in the same order in one stream of their own: a panel is read from front to back. Rows and
   columns are padded with zero bits up to a whole panel and block. With one row and eight columns that is the layout on disk. */
typedef struct {
    int64_t rows, columns;
    int64_t panel_rows, block_columns;
    int64_t kind;
    int64_t group_columns;  /* INT8: how many columns share a scale, a multiple of 8; 0 where a row has one */
    int64_t capacity;       /* how many values may be read, padding included */
    int64_t path;
    const uint8_t *masks;
    const uint8_t *values;
    const int64_t *starts;  /* the first value of each panel, and their number in all */
    const float *scales;    /* INT8: (rows, groups) */
} packed;

/* One product: y = x @ W.T + bias, for `batch` rows of x. */
typedef struct {
    const packed *matrix;
    const void *x;          /* prepared for the path: see `prepare` of each */
    int64_t x_stride;       /* elements from one row of it (or, transposed, one column) to the next */
    int64_t batch;
    const void *bias;       /* may be null */
    int64_t bias_kind;
    void *y;
    int64_t y_kind;
    int64_t panels_per_unit;
} product;

static inline packed with_parts(const int64_t *numbers, const void *masks, const void *values, const int64_t *starts,
                                const void *scales) {
    packed m = {numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], numbers[6], numbers[7], masks, values, starts, scales};
    return m;
}

extern const uint8_t bits_set[256];

static inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t blocks_of(const packed *m) { return divide_up(m->columns, m->block_columns); }
static inline int64_t panels_of(const packed *m) { return divide_up(m->rows, m->panel_rows); }
static inline int64_t groups_of(const packed *m) { return m->group_columns ? divide_up(m->columns, m->group_columns) : 1; }
static inline int64_t item_size(int64_t kind) { return kind == FLOAT32 ? 4 : kind == INT8 ? 1 : 2; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

float to_float(int64_t kind, const void *items, int64_t index);
void from_float(int64_t kind, void *items, int64_t index, float value);
/* Add the bias to sums[r * row_step + b * batch_step] and store them as y[first_batch + b, row + r]. */
void finish(const product *p, int64_t row, int64_t rows, int64_t first_batch, int64_t batch, const float *sums, int64_t row_step,
            int64_t batch_step);

/* Memory of this thread that later calls use again; null if there is none. */
int64_t secateur_supported(void);
void *scratch(int64_t bytes);
void run_units(int64_t threads, int64_t units, void (*work)(const void *, int64_t), const void *context);

/* A path multiplies by `vectors` (x as (batch, x_stride) float32) or by `tiles` (x transposed, (columns, x_stride) float32, only for
   finite x, because it leaves out what is multiplied by removed weights). A unit is `panels_per_unit` panels. */
void plain_vectors(const void *p, int64_t unit);
void avx2_vectors(const void *p, int64_t unit);
void avx2_tiles(const void *p, int64_t unit);
void avx512_vectors(const void *p, int64_t unit);
void avx512_tiles(const void *p, int64_t unit);
/* Groups of eight columns from the layout on disk to dense; returns how many, which are fewer near the end of the values. */
int64_t avx2_expand(const uint8_t *masks, int64_t groups, int64_t size, const uint8_t *values, int64_t readable, uint8_t *out);
/* x as bfloat16 in the order of the tile instructions. */
void amx_tiles(const void *p, int64_t unit);

#endif
