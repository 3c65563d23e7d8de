/* Gradients of a depthwise convolution in channels_last memory, compiled for bf16 and for fp32; called by depthwise.py.
 *
 * x, dx: (n, h, w, c), g: (n, oh, ow, c), weights (k*k, c) fp32; c a multiple of 16, k 3 or 5, zero padding of top rows
 * and left columns. Sums are fp32 within two images and double beyond them, in an order that does not depend on threads.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__
enum { LANES = 16, TOGETHER = 2 }; /* channels of a register; images of a partial sum */
#else
enum { LANES = 8, TOGETHER = 2 };
#endif
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
#define INLINE static inline __attribute__((always_inline))

#ifdef FP32
#define NAME(function) function##_fp32
typedef float value;

INLINE floats load(const value *p) {
  floats f;
  memcpy(&f, p, sizeof f);
  return f;
}

INLINE void store(value *p, floats f) { memcpy(p, &f, sizeof f); }
#else
#define NAME(function) function##_bf16
typedef uint16_t value;

INLINE floats load(const value *p) {
  halves h;
  memcpy(&h, p, sizeof h);
  return (floats)(__builtin_convertvector(h, words) << 16);
}

INLINE void store(value *p, floats f) { /* to nearest, ties to even */
  words u = (words)f;
  words rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16, not_a_number = (words)(f != f);
  halves h = __builtin_convertvector((rounded & ~not_a_number) | (0x7fc0 & not_a_number), halves);
  memcpy(p, &h, sizeof h);
}
#endif

/* The last k rows of an image in fp32, each (c / 16, columns, 16), with zeros around it. */
typedef struct {
  const value *image;
  float *rows;
  long h, w, c, k, top, left, columns, next;
} Window;

static long window_columns(long w, long k) { return (w + 2 * k) | 1; } /* odd: no two rows on the same cache lines */

static float *window_memory(long w, long c, long k) {
  return aligned_alloc(64, sizeof(float) * k * window_columns(w, k) * c);
}

static Window window(const value *image, float *memory, long h, long w, long c, long k, long top, long left) {
  Window v = {image, memory, h, w, c, k, top, left, window_columns(w, k), 0};
  memset(memory, 0, sizeof(float) * k * v.columns * c);
  return v;
}

INLINE float *window_row(const Window *v, long row) { return v->rows + (row % v->k) * v->columns * v->c; }

/* Makes rows before ``end`` (counted from the first padded one) present. */
static void window_move(Window *v, long end) {
  for (; v->next < end; v->next++) {
    float *to = window_row(v, v->next);
    long at = v->next - v->top;
    for (long i = 0; i < v->w; i++)
      for (long b = 0; b < v->c / LANES; b++) {
        floats f = {0};
        if (at >= 0 && at < v->h) f = load(v->image + (at * v->w + i) * v->c + b * LANES);
        *(floats *)(to + (b * v->columns + v->left + i) * LANES) = f;
      }
  }
}

INLINE void image_weight_gradient(Window *v, const value *g, long oh, long ow, long stride, int k, float *out) {
  for (long row = 0; row < oh; row++) {
    window_move(v, row * stride + k);
    for (long b = 0; b < v->c / LANES; b++) {
      floats sum[25];
      const float *x[5];
#pragma GCC unroll 25
      for (int i = 0; i < k * k; i++) memcpy(&sum[i], out + i * v->c + b * LANES, sizeof(floats));
#pragma GCC unroll 5
      for (int i = 0; i < k; i++) x[i] = window_row(v, row * stride + i) + b * v->columns * LANES;
      for (long column = 0; column < ow; column++) {
        floats d = load(g + (row * ow + column) * v->c + b * LANES);
#pragma GCC unroll 5
        for (int i = 0; i < k; i++)
#pragma GCC unroll 5
          for (int j = 0; j < k; j++) sum[i * k + j] += d * *(const floats *)(x[i] + (column * stride + j) * LANES);
      }
#pragma GCC unroll 25
      for (int i = 0; i < k * k; i++) memcpy(out + i * v->c + b * LANES, &sum[i], sizeof(floats));
    }
  }
}

/* out (k*k, c) */
void NAME(depthwise_weight_gradient)(const value *x, const value *g, long n, long h, long w, long oh, long ow, long c, long k,
                               long stride, long top, long left, float *out) {
  long size = k * k * c, parts = (n + TOGETHER - 1) / TOGETHER;
  float *sums = calloc(parts * size, sizeof(float));
#pragma omp parallel
  {
    float *memory = window_memory(w, c, k);
#pragma omp for schedule(static)
    for (long part = 0; part < parts; part++)
      for (long i = part * TOGETHER; i < n && i < (part + 1) * TOGETHER; i++) {
        Window v = window(x + i * h * w * c, memory, h, w, c, k, top, left);
        const value *d = g + i * oh * ow * c;
        if (k == 3)
          image_weight_gradient(&v, d, oh, ow, stride, 3, sums + part * size);
        else
          image_weight_gradient(&v, d, oh, ow, stride, 5, sums + part * size);
      }
    free(memory);
  }
#pragma omp parallel for schedule(static)
  for (long i = 0; i < size; i++) {
    double sum = 0;
    for (long part = 0; part < parts; part++) sum += sums[part * size + i];
    out[i] = (float)sum;
  }
  free(sums);
}

/* Stride 1: a forward pass over g with the filter turned round. */
INLINE void image_input_gradient(Window *v, const float *weights, long h, long w, int k, value *dx) {
  for (long row = 0; row < h; row++) {
    window_move(v, row + k);
    for (long b = 0; b < v->c / LANES; b++) {
      floats f[25];
      const float *g[5];
#pragma GCC unroll 25
      for (int i = 0; i < k * k; i++) memcpy(&f[i], weights + (k * k - 1 - i) * v->c + b * LANES, sizeof(floats));
#pragma GCC unroll 5
      for (int i = 0; i < k; i++) g[i] = window_row(v, row + i) + b * v->columns * LANES;
      for (long column = 0; column < w; column++) {
        floats sum[2] = {{0}, {0}}; /* two chains of additions, so that one does not wait for itself */
#pragma GCC unroll 5
        for (int i = 0; i < k; i++)
#pragma GCC unroll 5
          for (int j = 0; j < k; j++) sum[(i * k + j) % 2] += f[i * k + j] * *(const floats *)(g[i] + (column + j) * LANES);
        store(dx + (row * w + column) * v->c + b * LANES, sum[0] + sum[1]);
      }
    }
  }
}

/* One row of dx at stride 2, in the columns that filter columns of parity j0 reach; filter rows are of parity i0. */
INLINE void halved_row(const Window *v, const float *weights, long r, long b, long w, long left, int k, int i0, int j0,
                       value *dx) {
  floats f[9];
  const float *g[3];
#pragma GCC unroll 3
  for (int i = i0; i < k; i += 2) {
    g[i / 2] = window_row(v, r + v->top - i / 2) + b * v->columns * LANES;
#pragma GCC unroll 3
    for (int j = j0; j < k; j += 2) memcpy(&f[i / 2 * 3 + j / 2], weights + (i * k + j) * v->c + b * LANES, sizeof(floats));
  }
  for (long column = (j0 + left) % 2; column < w; column += 2) {
    long q = (column + left - j0) / 2 + v->left;
    floats sum = {0};
#pragma GCC unroll 3
    for (int i = i0; i < k; i += 2)
#pragma GCC unroll 3
      for (int j = j0; j < k; j += 2) sum += f[i / 2 * 3 + j / 2] * *(const floats *)(g[i / 2] + (q - j / 2) * LANES);
    store(dx + column * v->c + b * LANES, sum);
  }
}

/* Stride 2: every pixel from the outputs that it went into; the filter's even and odd rows and columns take turns. */
INLINE void image_input_gradient_halved(Window *v, const float *weights, long h, long w, long top, long left, int k,
                                        value *dx) {
  for (long row = 0; row < h; row++, dx += w * v->c) {
    long i0 = (row + top) % 2, r = (row + top - i0) / 2;
    window_move(v, r + v->top + 1);
    for (long b = 0; b < v->c / LANES; b++) {
      if (i0) {
        halved_row(v, weights, r, b, w, left, k, 1, 0, dx);
        halved_row(v, weights, r, b, w, left, k, 1, 1, dx);
      } else {
        halved_row(v, weights, r, b, w, left, k, 0, 0, dx);
        halved_row(v, weights, r, b, w, left, k, 0, 1, dx);
      }
    }
  }
}

/* dx (n, h, w, c) at stride 1 or 2. */
void NAME(depthwise_input_gradient)(const value *g, const float *weights, long n, long h, long w, long oh, long ow, long c,
                              long k, long stride, long top, long left, value *dx) {
#pragma omp parallel
  {
    float *memory = window_memory(ow, c, k);
#pragma omp for schedule(static)
    for (long i = 0; i < n; i++) {
      const value *d = g + i * oh * ow * c;
      value *to = dx + i * h * w * c;
      long around = stride == 2 ? k / 2 : k - 1;
      Window v = window(d, memory, oh, ow, c, k, around - (2 - stride) * top, around - (2 - stride) * left);
      if (stride == 2 && k == 3)
        image_input_gradient_halved(&v, weights, h, w, top, left, 3, to);
      else if (stride == 2)
        image_input_gradient_halved(&v, weights, h, w, top, left, 5, to);
      else if (k == 3)
        image_input_gradient(&v, weights, h, w, 3, to);
      else
        image_input_gradient(&v, weights, h, w, 5, to);
    }
    free(memory);
  }
}
