/* A depthwise convolution with the moments of its output, and both gradients in one pass with the batch norms before and
 * after it; channels_last memory.
 *
 * Compiled for bf16 and for fp32; called by depthwise.py and norm.py. x, dx: (n, h, w, c), y, z, g: (n, oh, ow, c), weights
 * (k*k, c) fp32; c a multiple of 16, k 3 or 5, zero padding of top rows and left columns. Sums are fp32 within two images
 * and double beyond them, in an order that does not depend on threads.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__
enum { LANES = 16, TOGETHER = 2, TILE = 7 }; /* channels of a register; images of a partial sum; pixels at once */
#else
enum { LANES = 8, TOGETHER = 2, TILE = 7 };
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

typedef struct { /* a batch norm of each channel: clamp(a*v + b); a is null where there is none */
  const float *a, *b;
  float low, high;
  const float *e, *f, *near; /* its input gradient is a*d + e*v + f; a value near the mean */
} Norm;

INLINE floats at(const float *p) {
  floats f;
  memcpy(&f, p, sizeof f);
  return f;
}

INLINE floats chosen(words mask, floats a, floats b) { return (floats)((mask & (words)a) | (~mask & (words)b)); }

INLINE floats normed(const Norm *n, long i, floats v) { /* not a number stays one */
  floats y = at(n->a + i) * v + at(n->b + i), low = n->low - (floats){0}, high = n->high - (floats){0};
  y = chosen((words)(y < low), low, y);
  return chosen((words)(y > high), high, y);
}

/* The gradient of what came before the clamp. */
INLINE floats passed(const Norm *n, long i, floats v, floats g) {
  floats y = at(n->a + i) * v + at(n->b + i);
  return (floats)((words)g & ~((words)(y <= n->low) | (words)(y >= n->high)));
}

/* The last k rows of an image in fp32, each (c / LANES, columns, LANES), with k zeros left and right and k zero rows
 * above and below. With a norm it holds normed(image), or the norm's input gradient where g is given. */
typedef struct {
  const value *image, *g;
  const Norm *norm;
  float *rows;
  long h, w, c, k, columns, next;
} Window;

static long window_size(long w, long c, long k) { return k * ((w + 2 * k) | 1) * c; } /* odd: other cache lines */

static Window window(const value *image, const value *g, const Norm *norm, float *memory, long h, long w, long c, long k) {
  memset(memory, 0, sizeof(float) * window_size(w, c, k));
  return (Window){image, g, norm, memory, h, w, c, k, (w + 2 * k) | 1, -k};
}

INLINE float *window_row(const Window *v, long row, long b) { /* at its first column */
  return v->rows + (((row + v->k) % v->k) * v->columns * (v->c / LANES) + b * v->columns + v->k) * LANES;
}

INLINE void fill_row(const Window *v, int kind) {
  const Norm n = *v->norm;
  const value *image = v->image + v->next * v->w * v->c, *g = kind == 2 ? v->g + v->next * v->w * v->c : 0;
  long w = v->w, c = v->c, columns = v->columns;
  float *row = window_row(v, v->next, 0);
  for (long i = 0; i < w; i++)
    for (long j = 0; j < c; j += LANES, image += LANES) {
      floats f = load(image);
      if (kind == 1) f = normed(&n, j, f);
      if (kind == 2) f = at(n.a + j) * passed(&n, j, f, load(g + i * c + j)) + at(n.e + j) * f + at(n.f + j);
      *(floats *)(row + j * columns + i * LANES) = f;
    }
}

/* Makes rows before ``end`` present. */
static void window_move(Window *v, long end) {
  for (; v->next < end; v->next++) {
    if (v->next < 0 || v->next >= v->h)
      for (long b = 0; b < v->c / LANES; b++) memset(window_row(v, v->next, b), 0, sizeof(float) * v->w * LANES);
    else if (!v->norm->a)
      fill_row(v, 0);
    else
      fill_row(v, v->g ? 2 : 1);
  }
}

typedef struct { /* what all images share */
  long n, h, w, oh, ow, c, k, stride, top, left;
  const float *weights;
  Norm before;
} Layer;

/* ``count`` pixels of y; each value of the input, from column q on, goes to every pixel that it reaches. */
INLINE void output_tile(const floats *f, const float *const *in, long q, int k, int s, int count, floats *sum) {
#pragma GCC unroll 7
  for (int t = 0; t < count; t++) sum[t] = (floats){0};
#pragma GCC unroll 5
  for (int i = 0; i < k; i++)
#pragma GCC unroll 17
    for (int u = 0; u < (count - 1) * s + k; u++) {
      floats v = *(const floats *)(in[i] + (q + u) * LANES);
#pragma GCC unroll 5
      for (int j = u % s; j < k; j += s)
        if (u >= j && (u - j) / s < count) sum[(u - j) / s] += f[i * k + j] * v;
    }
}

/* One row of y; fp32 sums of y - near and of its square go to sums (2, c). The first row of a part sets near (c). */
INLINE void output_row(const Layer *l, const Window *x, long row, int k, int s, int first, float *near, double *sums,
                       value *y) {
  for (long b = 0, c = l->c; b < c / LANES; b++, y += LANES, sums += LANES, near += LANES) {
    floats f[25], s0 = {0}, s1 = {0}, shift = at(near);
    const float *in[5];
#pragma GCC unroll 25
    for (int i = 0; i < k * k; i++) f[i] = at(l->weights + i * c + b * LANES);
#pragma GCC unroll 5
    for (int i = 0; i < k; i++) in[i] = window_row(x, row * s + i - l->top, b) - l->left * LANES;
    for (long done = 0; done < l->ow;) {
      long many = l->ow < TILE ? 1 : TILE, begin = done + many <= l->ow ? done : l->ow - many;
      floats sum[TILE];
      if (many == 1)
        output_tile(f, in, begin * s, k, s, 1, sum);
      else
        output_tile(f, in, begin * s, k, s, TILE, sum);
      for (long t = 0; t < many; t++) store(y + (begin + t) * c, sum[t]);
      if (first && done == 0) shift = load(y);
      for (; done < begin + many; done++) {
        floats v = load(y + done * c) - shift;
        s0 += v;
        s1 += v * v;
      }
    }
    if (first) memcpy(near, &shift, sizeof shift);
    for (int i = 0; i < LANES; i++) {
      sums[i] += s0[i];
      sums[c + i] += s1[i];
    }
  }
}

INLINE void image_output(const Layer *l, Window *x, int k, int s, int first, float *near, double *sums, value *y) {
  for (long row = 0; row < l->oh; row++, y += l->ow * l->c) {
    window_move(x, row * s - l->top + k);
    output_row(l, x, row, k, s, first && row == 0, near, sums, y);
  }
}

/* y, and sums (2, c) over its rows of y - near and of its square; near (c) is a value of y. */
void NAME(depthwise_output)(const value *x, const float *weights, long n, long h, long w, long oh, long ow, long c, long k,
                            long stride, long top, long left, value *y, float *near, double *sums) {
  Layer l = {n, h, w, oh, ow, c, k, stride, top, left, weights, {0}};
  long parts = (n + TOGETHER - 1) / TOGETHER;
  float *nears = calloc(parts * c, sizeof(float));
  double *doubles = calloc(parts * 2 * c, sizeof(double));
#pragma omp parallel
  {
    float *memory = aligned_alloc(64, sizeof(float) * window_size(w, c, k));
#pragma omp for schedule(static)
    for (long part = 0; part < parts; part++)
      for (long i = part * TOGETHER; i < n && i < (part + 1) * TOGETHER; i++) {
        Window v = window(x + i * h * w * c, 0, &l.before, memory, h, w, c, k);
        float *shift = nears + part * c;
        double *own = doubles + part * 2 * c;
        value *to = y + i * oh * ow * c;
        int first = i == part * TOGETHER;
        if (k == 3 && stride == 1)
          image_output(&l, &v, 3, 1, first, shift, own, to);
        else if (k == 3)
          image_output(&l, &v, 3, 2, first, shift, own, to);
        else if (stride == 1)
          image_output(&l, &v, 5, 1, first, shift, own, to);
        else
          image_output(&l, &v, 5, 2, first, shift, own, to);
      }
    free(memory);
  }
  memcpy(near, nears, sizeof(float) * c);
  for (long i = 0; i < c; i++) {
    sums[i] = sums[c + i] = 0;
    for (long part = 0; part < parts; part++) { /* as if every part had the near of the first */
      double shift = (double)nears[part * c + i] - near[i], s = doubles[part * 2 * c + i];
      long images = n - part * TOGETHER < TOGETHER ? n - part * TOGETHER : TOGETHER;
      double rows = (double)(images * oh * ow);
      sums[i] += s + rows * shift;
      sums[c + i] += doubles[part * 2 * c + c + i] + shift * (2 * s + rows * shift);
    }
  }
  free(nears);
  free(doubles);
}

/* Adds one row of d times the rows of y that it saw to filter rows from ... to - 1 of out (k*k, c). */
INLINE void add_filter_rows(const Layer *l, const Window *y, const float *d, long row, long b, int k, int from, int to,
                            float *out) {
  floats sum[25];
  const float *x[5];
#pragma GCC unroll 25
  for (int i = from * k; i < to * k; i++) sum[i] = at(out + i * l->c);
#pragma GCC unroll 5
  for (int i = from; i < to; i++) x[i] = window_row(y, row * l->stride + i - l->top, b) - l->left * LANES;
  for (long column = 0; column < l->ow; column++) {
    floats f = *(const floats *)(d + column * LANES);
#pragma GCC unroll 5
    for (int i = from; i < to; i++)
#pragma GCC unroll 5
      for (int j = 0; j < k; j++) sum[i * k + j] += f * *(const floats *)(x[i] + (column * l->stride + j) * LANES);
  }
#pragma GCC unroll 25
  for (int i = from * k; i < to * k; i++) memcpy(out + i * l->c, &sum[i], sizeof(floats));
}

INLINE void add_filter(const Layer *l, const Window *y, const Window *d, long row, int k, float *out) {
  for (long b = 0; b < l->c / LANES; b++, out += LANES) {
    const float *f = window_row(d, row, b);
    if (k == 3 || LANES == 16) { /* all sums fit into the registers */
      add_filter_rows(l, y, f, row, b, k, 0, k, out);
    } else {
      add_filter_rows(l, y, f, row, b, k, 0, 2, out);
      add_filter_rows(l, y, f, row, b, k, 2, 4, out);
      add_filter_rows(l, y, f, row, b, k, 4, 5, out);
    }
  }
}

/* ``count`` pixels of dx, s apart, from the filter's rows i0, i0 + s ... and columns j0, j0 + s ...; from pixel ``fresh``
 * on, the sums of d and of d*(x - near) of the norm before are added to sums (2, LANES). */
INLINE void tile(const Layer *l, const floats *f, const float *const *g, long q, int k, int s, int i0, int j0, int count,
                 long fresh, const value *x, long b, floats *sums, value *dx) {
  floats sum[TILE], s0 = {0}, s1 = {0};
  const int taps = (k - j0 + s - 1) / s;
#pragma GCC unroll 7
  for (int t = 0; t < count; t++) sum[t] = (floats){0};
#pragma GCC unroll 5
  for (int i = i0; i < k; i += s)
#pragma GCC unroll 11
    for (int u = 1 - taps; u < count; u++) { /* each value of g goes to every pixel that it reaches */
      floats v = *(const floats *)(g[i] + (q + u) * LANES);
#pragma GCC unroll 5
      for (int m = 0; m < taps; m++)
        if (u + m >= 0 && u + m < count) sum[u + m] += f[i * k + j0 + m * s] * v;
    }
#pragma GCC unroll 7
  for (int t = 0; t < count; t++) store(dx + t * s * l->c, sum[t]);
  if (!x) return;
  const Norm n = l->before;
  for (long t = fresh; t < count; t++) {
    floats v = load(x + t * s * l->c), d = passed(&n, b * LANES, v, load(dx + t * s * l->c));
    s0 += d;
    s1 += d * (v - at(n.near + b * LANES));
  }
  sums[0] += s0;
  sums[1] += s1;
}

/* One row of dx, for filter rows of the parity i0 (stride s = 2) or all of them (s = 1). */
INLINE void input_row(const Layer *l, const Window *d, long row, int k, int s, int i0, const value *x, double *sums,
                      value *dx) {
  for (long b = 0; b < l->c / LANES; b++) {
    floats f[25], s1[2] = {{0}, {0}};
    const float *g[5];
#pragma GCC unroll 25
    for (int i = 0; i < k * k; i++) f[i] = at(l->weights + i * l->c + b * LANES);
#pragma GCC unroll 5
    for (int i = i0; i < k; i += s) g[i] = window_row(d, (row + l->top - i) / s, b);
#pragma GCC unroll 2
    for (int j0 = 0; j0 < s; j0++)
      for (long first = (j0 + l->left) % s, count = (l->w - first + s - 1) / s, done = 0; done < count;) {
        long begin = count < TILE || done + TILE <= count ? done : count - TILE, column = first + begin * s;
        long q = (column + l->left - j0) / s, at = column * l->c + b * LANES;
        if (count < TILE)
          tile(l, f, g, q, k, s, i0, j0, 1, 0, x ? x + at : 0, b, s1, dx + at);
        else
          tile(l, f, g, q, k, s, i0, j0, TILE, done - begin, x ? x + at : 0, b, s1, dx + at);
        done = begin + (count < TILE ? 1 : TILE);
      }
    if (x)
      for (int i = 0; i < LANES; i++) {
        sums[b * LANES + i] += s1[0][i];
        sums[l->c + b * LANES + i] += s1[1][i];
      }
  }
}

/* One image: filter (k*k, c) and sums (2, c) are added to; dx and filter may be null. */
INLINE void image_gradients(const Layer *l, Window *y, Window *d, int k, int s, const value *x, float *filter,
                            double *sums, value *dx) {
  for (long row = 0, next = dx ? 0 : l->h; row < l->oh || next < l->h; row++) {
    window_move(d, row + 1);
    if (filter && row < l->oh) {
      window_move(y, row * s - l->top + k);
      add_filter(l, y, d, row, k, filter);
    }
    for (; next < l->h && (next + l->top) / s <= row; next++) {
      const value *v = l->before.a ? x + next * l->w * l->c : 0;
      value *to = dx + next * l->w * l->c;
      if (s == 1 || (next + l->top) % 2 == 0)
        input_row(l, d, next, k, s, 0, v, sums, to);
      else
        input_row(l, d, next, k, s, 1, v, sums, to);
    }
  }
}

/* x is the input of the norm before (a1 ...) or of the convolution (a1 null); g is the gradient of the output z of the
 * convolution (a2 null, z unused), or of the norm after it (a2 ...). dx (n, h, w, c) is the gradient of the convolution's
 * input, filter (k*k, c) that of its weights; either may be null. sums (2, c) are those of the norm before, of d and of
 * d*(x - near1), where d is dx before the clamp; only with dx. */
void NAME(depthwise_gradients)(const value *x, const value *z, const value *g, const float *weights, long n, long h, long w,
                               long oh, long ow, long c, long k, long stride, long top, long left, const float *a1,
                               const float *b1, float low1, float high1, const float *near1, const float *a2,
                               const float *b2, float low2, float high2, const float *e2, const float *f2, value *dx,
                               float *filter, double *sums) {
  Layer l = {n, h, w, oh, ow, c, k, stride, top, left, weights, {a1, b1, low1, high1, 0, 0, near1}};
  Norm after = {a2, b2, low2, high2, e2, f2, 0};
  long size = k * k * c, parts = (n + TOGETHER - 1) / TOGETHER;
  float *filters = calloc(parts * size, sizeof(float));
  double *doubles = calloc(parts * 2 * c, sizeof(double));
#pragma omp parallel
  {
    float *memory = aligned_alloc(64, sizeof(float) * (window_size(w, c, k) + window_size(ow, c, k)));
#pragma omp for schedule(static)
    for (long part = 0; part < parts; part++)
      for (long i = part * TOGETHER; i < n && i < (part + 1) * TOGETHER; i++) {
        const value *from = x + i * h * w * c, *to = g + i * oh * ow * c;
        Window y = window(from, 0, &l.before, memory, h, w, c, k);
        Window d = window(a2 ? z + i * oh * ow * c : to, to, &after, memory + window_size(w, c, k), oh, ow, c, k);
        float *own = filter ? filters + part * size : 0;
        double *own_sums = doubles + part * 2 * c;
        value *out = dx ? dx + i * h * w * c : 0;
        if (k == 3 && stride == 1)
          image_gradients(&l, &y, &d, 3, 1, from, own, own_sums, out);
        else if (k == 3)
          image_gradients(&l, &y, &d, 3, 2, from, own, own_sums, out);
        else if (stride == 1)
          image_gradients(&l, &y, &d, 5, 1, from, own, own_sums, out);
        else
          image_gradients(&l, &y, &d, 5, 2, from, own, own_sums, out);
      }
    free(memory);
  }
  for (long i = 0; filter && i < size; i++) {
    double sum = 0;
    for (long part = 0; part < parts; part++) sum += filters[part * size + i];
    filter[i] = (float)sum;
  }
  for (long i = 0; a1 && dx && i < 2 * c; i++) {
    sums[i] = 0;
    for (long part = 0; part < parts; part++) sums[i] += doubles[part * 2 * c + i];
  }
  free(filters);
  free(doubles);
}
