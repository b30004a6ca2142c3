/* The layout on disk, checked; the layout to compute from; and back to dense. */
#include "kernel.h"

#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#define ROW4(n) n, n + 1, n + 1, n + 2
#define ROW16(n) ROW4(n), ROW4(n + 1), ROW4(n + 1), ROW4(n + 2)
#define ROW64(n) ROW16(n), ROW16(n + 1), ROW16(n + 1), ROW16(n + 2)
const uint8_t bits_set[256] = {ROW64(0), ROW64(1), ROW64(1), ROW64(2)};

/* Fill `row_starts` (rows + 1). Returns -1, or the first row in which a bit of the padding is set. */
EXPORT int64_t secateur_row_starts(const uint8_t *bitmask, int64_t rows, int64_t columns, int64_t *row_starts) {
    int64_t bytes = divide_up(columns, 8), total = 0;
    unsigned padding = columns % 8 ? (0xffu << (columns % 8)) & 0xffu : 0;
    for (int64_t row = 0; row < rows; row++) {
        const uint8_t *mask = bitmask + row * bytes;
        row_starts[row] = total;
        if (bytes && (mask[bytes - 1] & padding)) return row;
        int64_t i = 0;
        for (; i + 8 <= bytes; i += 8) {
            uint64_t word;
            memcpy(&word, mask + i, 8);
            word -= (word >> 1) & 0x5555555555555555u;
            word = (word & 0x3333333333333333u) + ((word >> 2) & 0x3333333333333333u);
            word = (word + (word >> 4)) & 0x0f0f0f0f0f0f0f0fu;
            total += (int64_t)((word * 0x0101010101010101u) >> 56);
        }
        for (; i < bytes; i++) total += bits_set[mask[i]];
    }
    row_starts[rows] = total;
    return -1;
}

/* From dense rows to the layout on disk: a bit for each entry that has a bit, and those entries one after the other. Returns their
   number, or -1 if there are more than `capacity`. A store for each entry, which the next one overwrites unless it was kept, needs
   no branch; near the end of the room it would write behind it. */
#define COMPACT(type)                                                                                                             \
    static int64_t compact_##type(const type *dense, int64_t rows, int64_t columns, uint8_t *bitmask, type *out, int64_t capacity) { \
        int64_t next = 0;                                                                                                         \
        for (int64_t row = 0; row < rows; row++, dense += columns)                                                                \
            for (int64_t column = 0; column < columns; column += 8) {                                                             \
                const type *from = dense + column;                                                                                \
                int64_t width = least(8, columns - column);                                                                       \
                unsigned mask = 0;                                                                                                \
                if (width == 8 && next + 8 <= capacity)                                                                           \
                    for (int bit = 0; bit < 8; bit++) {                                                                           \
                        unsigned kept = from[bit] != 0;                                                                           \
                        out[next] = from[bit];                                                                                    \
                        next += kept;                                                                                             \
                        mask |= kept << bit;                                                                                      \
                    }                                                                                                             \
                else                                                                                                              \
                    for (int64_t bit = 0; bit < width; bit++)                                                                     \
                        if (from[bit]) {                                                                                          \
                            if (next == capacity) return -1;                                                                      \
                            out[next++] = from[bit];                                                                              \
                            mask |= 1u << bit;                                                                                    \
                        }                                                                                                         \
                *bitmask++ = (uint8_t)mask;                                                                                       \
            }                                                                                                                     \
        return next;                                                                                                              \
    }
COMPACT(uint8_t)
COMPACT(uint16_t)
COMPACT(uint32_t)
COMPACT(uint64_t)

EXPORT int64_t secateur_compact(const void *dense, int64_t rows, int64_t columns, int64_t size, uint8_t *bitmask, void *out,
                                int64_t capacity) {
    switch (size) {
    case 1: return compact_uint8_t(dense, rows, columns, bitmask, out, capacity);
    case 2: return compact_uint16_t(dense, rows, columns, bitmask, out, capacity);
    case 4: return compact_uint32_t(dense, rows, columns, bitmask, out, capacity);
    default: return compact_uint64_t(dense, rows, columns, bitmask, out, capacity);
    }
}

/* Large pages for what is about to be written: a product reads it once, and every small page costs a walk. Only a wish. */
EXPORT void secateur_large_pages(void *memory, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    const uintptr_t page = 1 << 21;
    uintptr_t begin = ((uintptr_t)memory + page - 1) / page * page, end = ((uintptr_t)memory + bytes) / page * page;
    if (end > begin) madvise((void *)begin, end - begin, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

typedef struct {
    const uint8_t *bitmask, *values;
    int64_t bytes, last; /* of a row of the bitmask; and the last place from which eight values can be read */
} stored;

/* `height` rows whose values begin at the places `from`. Returns where the next panel begins. */
inlined uint8_t *arrange_panel(stored in, int64_t first, int64_t blocks, int64_t *from, uint8_t *masks, uint8_t *out, const int64_t size,
                               const int64_t panel_rows, const int64_t width, const int64_t height) {
    for (int64_t block = 0; block < blocks; block++) {
        int64_t valid = width == 1 ? 1 : least(width, in.bytes - block * width);
        for (int64_t r = 0; r < height; r++) {
            const uint8_t *mask = in.bitmask + (first + r) * in.bytes + block * width;
            for (int64_t i = 0; i < valid; i++) {
                int64_t n = bits_set[mask[i]] * size;
                masks[r * width + i] = mask[i];
                if (from[r] <= in.last)
                    memcpy(out, in.values + from[r], 8 * size); /* the padding at the end takes what is too much */
                else if (n)
                    memcpy(out, in.values + from[r], n);
                out += n;
                from[r] += n;
            }
            memset(masks + r * width + valid, 0, width - valid);
        }
        memset(masks + height * width, 0, (panel_rows - height) * width);
        masks += panel_rows * width;
    }
    return out;
}

/* Always inlined, with constants where that is quick: copies of eight values are then single moves, and whole panels need no loops. */
inlined void arrange(const packed *to, stored in, const int64_t *row_starts, uint8_t *masks, uint8_t *out, int64_t *starts,
                     const int64_t size, const int64_t panel_rows, const int64_t width) {
    int64_t blocks = blocks_of(to), panels = panels_of(to);
    const uint8_t *begin = out;
    in.last = (row_starts[to->rows] - 8) * size;
    for (int64_t panel = 0; panel < panels; panel++) {
        int64_t first = panel * panel_rows, height = least(panel_rows, to->rows - first), from[64];
        starts[panel] = (out - begin) / size;
        for (int64_t r = 0; r < height; r++) from[r] = row_starts[first + r] * size;
        if (height == panel_rows)
            out = arrange_panel(in, first, blocks, from, masks, out, size, panel_rows, width, panel_rows);
        else
            out = arrange_panel(in, first, blocks, from, masks, out, size, panel_rows, width, height);
        masks += blocks * panel_rows * width;
    }
    starts[panels] = (out - begin) / size;
}

/* From the layout on disk to that of `numbers`, whose masks, values (with room for 8 values more) and starts are given apart. */
EXPORT void secateur_arrange(const int64_t *numbers, const uint8_t *bitmask, const uint8_t *values, const int64_t *row_starts, uint8_t *masks,
                      uint8_t *out, int64_t *starts) {
    packed matrix = with_parts(numbers, masks, out, starts, 0), *to = &matrix;
    stored in = {bitmask, values, divide_up(to->columns, 8), 0};
    int64_t width = to->block_columns / 8;
    int avx2 = to->panel_rows == 4 && width == 1;
#define ARRANGE(size)                                                                                                             \
    if (avx2)                                                                                                                     \
        arrange(to, in, row_starts, masks, out, starts, size, 4, 1);                                                              \
    else                                                                                                                          \
        arrange(to, in, row_starts, masks, out, starts, size, to->panel_rows, width)
    switch (item_size(to->kind)) {
    case 1: ARRANGE(1); break;
    case 2: ARRANGE(2); break;
    default: ARRANGE(4);
    }
}

#define EXPAND(type)                                                                                                              \
    static void expand_##type(const packed *m, type *dense) {                                                                     \
        int64_t width = m->block_columns / 8, blocks = blocks_of(m), panels = panels_of(m);                                       \
        const type *values = (const type *)m->values;                                                                             \
        const uint8_t *masks = m->masks;                                                                                          \
        for (int64_t panel = 0; panel < panels; panel++) {                                                                        \
            int64_t next = m->starts[panel];                                                                                      \
            for (int64_t block = 0; block < blocks; block++)                                                                      \
                for (int64_t r = 0; r < m->panel_rows; r++)                                                                       \
                    for (int64_t i = 0; i < width; i++) {                                                                         \
                        unsigned mask = *masks++;                                                                                 \
                        int64_t row = panel * m->panel_rows + r, column = (block * width + i) * 8;                                \
                        if (row >= m->rows || column >= m->columns) continue;                                                     \
                        type *out = dense + row * m->columns + column;                                                            \
                        if (column + 8 <= m->columns && next + 8 <= m->capacity) {                                                \
                            const type *value = values + next;                                                                    \
                            for (int bit = 0; bit < 8; bit++) {                                                                   \
                                unsigned kept = mask >> bit & 1;                                                                  \
                                out[bit] = *value & (type) - (type)kept;                                                          \
                                value += kept;                                                                                    \
                            }                                                                                                     \
                            next += bits_set[mask];                                                                               \
                        } else                                                                                                    \
                            for (int64_t bit = 0; bit < least(8, m->columns - column); bit++)                                     \
                                out[bit] = mask >> bit & 1 ? values[next++] : 0;                                                  \
                    }                                                                                                             \
        }                                                                                                                         \
    }
EXPAND(uint8_t)
EXPAND(uint16_t)
EXPAND(uint32_t)

#if defined(SECATEUR_AVX2)
static void expand_rows(const packed *m, uint8_t *dense) {
    int64_t size = item_size(m->kind), groups = m->columns / 8, bytes = divide_up(m->columns, 8);
    for (int64_t row = 0; row < m->rows; row++) {
        const uint8_t *masks = m->masks + row * bytes;
        int64_t next = m->starts[row];
        uint8_t *out = dense + row * m->columns * size;
        int64_t done = avx2_expand(masks, groups, size, m->values + next * size, m->capacity - next, out);
        for (int64_t i = 0; i < done; i++) next += bits_set[masks[i]];
        for (int64_t column = done * 8; column < m->columns; column++)
            if (masks[column / 8] >> (column % 8) & 1)
                memcpy(out + column * size, m->values + next++ * size, size);
            else
                memset(out + column * size, 0, size);
    }
}
#endif

/* The dense matrix, (rows, columns) in the type of the values, bit for bit. */
EXPORT void secateur_expand(const int64_t *numbers, const void *masks, const void *values, const int64_t *starts, void *dense) {
    packed matrix = with_parts(numbers, masks, values, starts, 0), *m = &matrix;
    secateur_large_pages(dense, m->rows * m->columns * item_size(m->kind));
#if defined(SECATEUR_AVX2)
    if (m->panel_rows == 1 && m->block_columns == 8 && secateur_supported() >> AVX2 & 1) {
        expand_rows(m, dense);
        return;
    }
#endif
    switch (item_size(m->kind)) {
    case 1: expand_uint8_t(m, dense); break;
    case 2: expand_uint16_t(m, dense); break;
    default: expand_uint32_t(m, dense);
    }
}
