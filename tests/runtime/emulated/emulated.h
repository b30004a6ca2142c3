/* The instructions of AVX-512 and AMX that the kernel uses, in plain C, from their description: for tests on other processors. */
#include <string.h>

typedef struct { float lane[16]; } emulated_floats;
typedef union { uint32_t lane[16]; uint16_t word[32]; uint8_t byte[64]; } emulated_integers;
#define __m512 emulated_floats
#define __m512i emulated_integers
#define EACH(i, n) for (int i = 0; i < n; i++)
#define EMULATE static inline __attribute__((unused))

#define _mm512_setzero_ps emulated_zero
#define _mm512_set1_ps emulated_set1_ps
#define _mm512_set1_epi32 emulated_set1_epi32
#undef _mm512_setr_epi32
#define _mm512_setr_epi32 emulated_setr
#define _mm512_mask_mov_ps emulated_mask_mov
#define _mm512_castsi512_ps emulated_cast_ps
#define _mm512_castps_si512 emulated_cast_si
#define _mm512_slli_epi32 emulated_slli
#define _mm512_srli_epi32 emulated_srli
#define _mm512_and_si512 emulated_and
#define _mm512_cvtph_ps emulated_cvtph
#define _mm512_cvtepi32_ps emulated_cvt_ps
#define _mm512_cvtepi8_epi32 emulated_cvt8
#define _mm512_cvtepu16_epi32 emulated_cvt16
#define _mm512_cvtepi32_epi16 emulated_narrow
#define _mm512_castsi512_si256 emulated_low
#define _mm512_extracti64x4_epi64 emulated_extract
#define _mm512_maskz_expand_ps emulated_expand_ps
#define _mm512_maskz_expand_epi16 emulated_expand_epi16
#define _mm256_maskz_expand_epi8 emulated_expand_epi8
#define _mm512_maskz_compress_ps emulated_compress_ps
#define _mm512_maskz_compress_epi32 emulated_compress_epi32
#define _mm512_loadu_ps emulated_loadu_ps
#define _mm512_loadu_si512 emulated_loadu_si
#define _mm512_storeu_ps emulated_storeu_ps
#define _mm512_storeu_si512 emulated_storeu_si
#define _mm512_add_epi32 emulated_add
#define _mm512_mullo_epi32 emulated_mullo
#define _mm512_mul_ps emulated_mul
#define _mm512_fmadd_ps emulated_fmadd
#define _mm512_reduce_add_ps emulated_reduce

EMULATE __m512 emulated_zero(void) { return (__m512){{0}}; }
EMULATE __m512 emulated_set1_ps(float a) { __m512 v; EACH(i, 16) v.lane[i] = a; return v; }
EMULATE __m512i emulated_set1_epi32(int a) { __m512i v; EACH(i, 16) v.lane[i] = (uint32_t)a; return v; }
EMULATE __m512i emulated_setr(int a, int b, int c, int d, int e, int f, int g, int h, int k, int l, int m, int n, int o, int p, int q, int r) {
    return (__m512i){{a, b, c, d, e, f, g, h, k, l, m, n, o, p, q, r}};
}
EMULATE __m512 emulated_mask_mov(__m512 a, __mmask16 mask, __m512 b) { EACH(i, 16) if (mask >> i & 1) a.lane[i] = b.lane[i]; return a; }
EMULATE __m512 emulated_cast_ps(__m512i a) { __m512 v; memcpy(&v, &a, 64); return v; }
EMULATE __m512i emulated_cast_si(__m512 a) { __m512i v; memcpy(&v, &a, 64); return v; }
EMULATE __m512i emulated_slli(__m512i a, unsigned n) { EACH(i, 16) a.lane[i] <<= n; return a; }
EMULATE __m512i emulated_srli(__m512i a, unsigned n) { EACH(i, 16) a.lane[i] >>= n; return a; }
EMULATE __m512i emulated_and(__m512i a, __m512i b) { EACH(i, 16) a.lane[i] &= b.lane[i]; return a; }
EMULATE __m512 emulated_cvtph(__m256i a) {
    __m512 v;
    _mm256_storeu_ps(v.lane, _mm256_cvtph_ps(_mm256_castsi256_si128(a)));
    _mm256_storeu_ps(v.lane + 8, _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1)));
    return v;
}
EMULATE __m512 emulated_cvt_ps(__m512i a) { __m512 v; EACH(i, 16) v.lane[i] = (float)(int32_t)a.lane[i]; return v; }
EMULATE __m512i emulated_cvt8(__m128i a) {
    int8_t bytes[16];
    __m512i v;
    memcpy(bytes, &a, 16);
    EACH(i, 16) v.lane[i] = (uint32_t)(int32_t)bytes[i];
    return v;
}
EMULATE __m512i emulated_cvt16(__m256i a) {
    uint16_t words[16];
    __m512i v;
    memcpy(words, &a, 32);
    EACH(i, 16) v.lane[i] = words[i];
    return v;
}
EMULATE __m256i emulated_narrow(__m512i a) {
    uint16_t words[16];
    __m256i v;
    EACH(i, 16) words[i] = (uint16_t)a.lane[i];
    memcpy(&v, words, 32);
    return v;
}
EMULATE __m256i emulated_low(__m512i a) { __m256i v; memcpy(&v, &a, 32); return v; }
EMULATE __m256i emulated_extract(__m512i a, int half) { __m256i v; memcpy(&v, a.byte + 32 * half, 32); return v; }
EMULATE __m512 emulated_expand_ps(__mmask16 mask, __m512 a) {
    __m512 v = {{0}};
    int next = 0;
    EACH(i, 16) if (mask >> i & 1) v.lane[i] = a.lane[next++];
    return v;
}
EMULATE __m512i emulated_expand_epi16(__mmask32 mask, __m512i a) {
    __m512i v = {{0}};
    int next = 0;
    EACH(i, 32) if (mask >> i & 1) v.word[i] = a.word[next++];
    return v;
}
EMULATE __m256i emulated_expand_epi8(__mmask32 mask, __m256i a) {
    uint8_t from[32], to[32] = {0};
    int next = 0;
    memcpy(from, &a, 32);
    EACH(i, 32) if (mask >> i & 1) to[i] = from[next++];
    memcpy(&a, to, 32);
    return a;
}
EMULATE __m512 emulated_compress_ps(__mmask16 mask, __m512 a) {
    __m512 v = {{0}};
    int next = 0;
    EACH(i, 16) if (mask >> i & 1) v.lane[next++] = a.lane[i];
    return v;
}
EMULATE __m512i emulated_compress_epi32(__mmask16 mask, __m512i a) {
    __m512i v = {{0}};
    int next = 0;
    EACH(i, 16) if (mask >> i & 1) v.lane[next++] = a.lane[i];
    return v;
}
EMULATE __m512 emulated_loadu_ps(const void *from) { __m512 v; memcpy(&v, from, 64); return v; }
EMULATE __m512i emulated_loadu_si(const void *from) { __m512i v; memcpy(&v, from, 64); return v; }
EMULATE void emulated_storeu_ps(void *to, __m512 a) { memcpy(to, &a, 64); }
EMULATE void emulated_storeu_si(void *to, __m512i a) { memcpy(to, &a, 64); }
EMULATE __m512i emulated_add(__m512i a, __m512i b) { EACH(i, 16) a.lane[i] += b.lane[i]; return a; }
EMULATE __m512i emulated_mullo(__m512i a, __m512i b) { EACH(i, 16) a.lane[i] *= b.lane[i]; return a; }
EMULATE __m512 emulated_mul(__m512 a, __m512 b) { EACH(i, 16) a.lane[i] *= b.lane[i]; return a; }
EMULATE __m512 emulated_fmadd(__m512 a, __m512 b, __m512 c) {
    EACH(i, 16) c.lane[i] = __builtin_fmaf(a.lane[i], b.lane[i], c.lane[i]);
    return c;
}
EMULATE float emulated_reduce(__m512 a) {
    for (int width = 8; width; width /= 2) EACH(i, width) a.lane[i] += a.lane[i + width];
    return a.lane[0];
}

/* Eight tiles of 16 rows of 64 bytes, as the kernel configures them; each thread has its own. */
static __thread uint8_t emulated_tiles[8][16][64];
static __thread int emulated_configured;

#define _tile_loadconfig emulated_loadconfig
#define _tile_release emulated_release
#undef _tile_zero
#define _tile_zero emulated_tile_zero
#undef _tile_loadd
#define _tile_loadd emulated_loadd
#undef _tile_stored
#define _tile_stored emulated_stored
#undef _tile_dpbf16ps
#define _tile_dpbf16ps emulated_dpbf16ps

EMULATE void emulated_loadconfig(const void *shapes) {
    const uint8_t *bytes = shapes;
    emulated_configured = bytes[0] == 1;
    EACH(tile, 6) if (bytes[16 + 2 * tile] != 64 || bytes[17 + 2 * tile] != 0 || bytes[48 + tile] != 16) __builtin_trap();
    for (int i = 1; i < 16; i++) if (bytes[i]) __builtin_trap();
}
EMULATE void emulated_release(void) { emulated_configured = 0; }
EMULATE void emulated_tile_zero(int tile) {
    if (!emulated_configured) __builtin_trap();
    memset(emulated_tiles[tile], 0, sizeof emulated_tiles[tile]);
}
EMULATE void emulated_loadd(int tile, const void *from, int64_t stride) {
    if (!emulated_configured) __builtin_trap();
    EACH(row, 16) memcpy(emulated_tiles[tile][row], (const uint8_t *)from + row * stride, 64);
}
EMULATE void emulated_stored(int tile, void *to, int64_t stride) {
    EACH(row, 16) memcpy((uint8_t *)to + row * stride, emulated_tiles[tile][row], 64);
}
EMULATE float emulated_bfloat16(const uint8_t *bytes) {
    uint32_t bits = (uint32_t)bytes[0] << 16 | (uint32_t)bytes[1] << 24;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
EMULATE void emulated_dpbf16ps(int sums, int a, int b) {
    EACH(row, 16)
        EACH(column, 16) {
            float sum;
            memcpy(&sum, emulated_tiles[sums][row] + 4 * column, 4);
            EACH(pair, 16)
                EACH(i, 2)
                    sum += emulated_bfloat16(emulated_tiles[a][row] + 4 * pair + 2 * i) * emulated_bfloat16(emulated_tiles[b][pair] + 4 * column + 2 * i);
            memcpy(emulated_tiles[sums][row] + 4 * column, &sum, 4);
        }
}
