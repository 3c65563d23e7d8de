/* Batch norm with a clamp (ReLU, ReLU6 or none) in one pass, forward and backward, compiled for bf16 and fp32.
 *
 * x, g, y, dx: (rows, c), rows = N*H*W of a channels_last batch. All sums are fp32 within a block and double
 * beyond it, in an order that does not depend on the number of threads. Built and called by norm.py.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { CHUNK = 2048, BLOCK = 128, LANES = 32 }; /* rows of a partial sum; rows summed in fp32; elements of a register pair */

#ifdef FP32
#define NAME(function) function##_fp32
typedef float value;
static inline float wide(value f) { return f; }
static inline value narrow(float f) { return f; }
#else
#define NAME(function) function##_bf16
typedef uint16_t value;

static inline float wide(value h) {
  union { uint32_t u; float f; } v = {(uint32_t)h << 16};
  return v.f;
}

static inline value narrow(float f) { /* to nearest, ties to even */
  union { float f; uint32_t u; } v = {f};
  return f != f ? 0x7fc0 : (value)((v.u + 0x7fff + ((v.u >> 16) & 1)) >> 16);
}
#endif

/* Narrow channels leave registers half empty: k rows are taken as one row of k*c channels. */
static long rows_together(long c) {
  long k = 1;
  while (k * c % LANES && k < LANES) k++;
  return k;
}

static float *repeated(const float *v, long c, long k) {
  float *out = malloc(sizeof(float) * c * k);
  for (long j = 0; j < k; j++) memcpy(out + j * c, v, sizeof(float) * c);
  return out;
}

/* The gradient of what came before the clamp. */
static inline float passed(float v, float a, float b, float low, float high, float g) {
  float y = v * a + b;
  return y <= low || y >= high ? 0.f : g;
}

static void add_moments(const value *restrict x, long rows, long w, const float *restrict m, float *restrict s,
                        float *restrict q) {
  for (long r = 0; r < rows; r++, x += w)
    for (long i = 0; i < w; i++) {
      float v = wide(x[i]) - m[i];
      s[i] += v;
      q[i] += v * v;
    }
}

static void add_gradients(const value *restrict x, const value *restrict g, long rows, long w, const float *restrict a,
                          const float *restrict b, float low, float high, const float *restrict m, float *restrict s,
                          float *restrict q) {
  for (long r = 0; r < rows; r++, x += w, g += w)
    for (long i = 0; i < w; i++) {
      float v = wide(x[i]), d = passed(v, a[i], b[i], low, high, wide(g[i]));
      s[i] += d;
      q[i] += d * (v - m[i]);
    }
}

static void sums(const value *x, const value *g, long rows, long c, const float *a, const float *b, float low, float high,
                 const float *m, double *out) {
  long k = rows_together(c), chunks = (rows + CHUNK - 1) / CHUNK;
  double *parts = calloc(chunks * 2 * c, sizeof(double));
#pragma omp parallel
  {
    float *s = malloc(sizeof(float) * 2 * k * c), *q = s + k * c;
#pragma omp for schedule(static)
    for (long n = 0; n < chunks; n++) {
      double *part = parts + n * 2 * c;
      long row = n * CHUNK, end = row + CHUNK < rows ? row + CHUNK : rows;
      while (row < end) {
        long left = end - row, together = left >= k ? k : 1, w = together * c;
        long many = left / together < BLOCK ? left / together : BLOCK;
        memset(s, 0, sizeof(float) * w);
        memset(q, 0, sizeof(float) * w);
        if (g)
          add_gradients(x + row * c, g + row * c, many, w, a, b, low, high, m, s, q);
        else
          add_moments(x + row * c, many, w, m, s, q);
        for (long j = 0; j < w; j += c)
          for (long i = 0; i < c; i++) {
            part[i] += s[j + i];
            part[c + i] += q[j + i];
          }
        row += many * together;
      }
    }
    free(s);
  }
  memset(out, 0, sizeof(double) * 2 * c);
  for (long n = 0; n < chunks; n++)
    for (long i = 0; i < 2 * c; i++) out[i] += parts[n * 2 * c + i];
  free(parts);
}

/* out (2, c): sums over rows of x - m and of its square; m near the mean, or the squares leave no digits to x. */
void NAME(moments)(const value *x, long rows, long c, const float *m, double *out) {
  float *mm = repeated(m, c, rows_together(c));
  sums(x, 0, rows, c, 0, 0, 0, 0, mm, out);
  free(mm);
}

/* out (2, c): sums over rows of d and of d*(x - m), where d is the gradient g of y = clamp(a*x + b), zero where it clamps. */
void NAME(gradient_sums)(const value *x, const value *g, long rows, long c, const float *a, const float *b, float low,
                         float high, const float *m, double *out) {
  long k = rows_together(c);
  float *aa = repeated(a, c, k), *bb = repeated(b, c, k), *mm = repeated(m, c, k);
  sums(x, g, rows, c, aa, bb, low, high, mm, out);
  free(aa);
  free(bb);
  free(mm);
}

static void clamp_rows(const value *restrict x, long rows, long w, const float *restrict a, const float *restrict b,
                       float low, float high, value *restrict y) {
  for (long r = 0; r < rows; r++, x += w, y += w)
    for (long i = 0; i < w; i++) {
      float v = wide(x[i]) * a[i] + b[i];
      v = v < low ? low : v; /* not a number stays one */
      v = v > high ? high : v;
      y[i] = narrow(v);
    }
}

static void dx_rows(const value *restrict x, const value *restrict g, long rows, long w, const float *restrict a,
                    const float *restrict b, float low, float high, const float *restrict e, const float *restrict f,
                    value *restrict dx) {
  for (long r = 0; r < rows; r++, x += w, g += w, dx += w)
    for (long i = 0; i < w; i++) {
      float v = wide(x[i]);
      dx[i] = narrow(a[i] * passed(v, a[i], b[i], low, high, wide(g[i])) + e[i] * v + f[i]);
    }
}

/* y = clamp(a*x + b), or with a gradient g: dx = a*d + e*x + f. */
static void map(const value *x, const value *g, long rows, long c, const float *a, const float *b, float low, float high,
                const float *e, const float *f, value *out) {
  long k = rows_together(c), w = k * c, groups = rows / k, done = groups * k * c;
  float *aa = repeated(a, c, k), *bb = repeated(b, c, k), *ee = e ? repeated(e, c, k) : 0, *ff = f ? repeated(f, c, k) : 0;
#pragma omp parallel for schedule(static)
  for (long n = 0; n < groups; n += BLOCK) {
    long many = groups - n < BLOCK ? groups - n : BLOCK, at = n * w;
    if (g)
      dx_rows(x + at, g + at, many, w, aa, bb, low, high, ee, ff, out + at);
    else
      clamp_rows(x + at, many, w, aa, bb, low, high, out + at);
  }
  if (g)
    dx_rows(x + done, g + done, rows - groups * k, c, a, b, low, high, e, f, out + done);
  else
    clamp_rows(x + done, rows - groups * k, c, a, b, low, high, out + done);
  free(aa);
  free(bb);
  free(ee);
  free(ff);
}

void NAME(apply)(const value *x, long rows, long c, const float *a, const float *b, float low, float high, value *y) {
  map(x, 0, rows, c, a, b, low, high, 0, 0, y);
}

void NAME(input_gradient)(const value *x, const value *g, long rows, long c, const float *a, const float *b, float low,
                    float high, const float *e, const float *f, value *dx) {
  map(x, g, rows, c, a, b, low, high, e, f, dx);
}
