/* What both paths with 512-bit vectors take from the processor, or, for tests, from C that does the same. */
#ifndef SECATEUR_AVX512_H
#define SECATEUR_AVX512_H

#include "kernel.h"

#include <immintrin.h>
#if defined(SECATEUR_EMULATED)
#include "emulated.h"
#endif

/* The form with a register is fast everywhere; the form that loads is microcode on Zen. */
inlined __m512i expand_words(const uint8_t *values, uint32_t mask) {
    return _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(values));
}
inlined __m256i expand_bytes(const uint8_t *values, uint32_t mask) {
    return _mm256_maskz_expand_epi8(mask, _mm256_loadu_si256((const __m256i *)values));
}
inlined __m512i sixteen(void) { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }

#endif
