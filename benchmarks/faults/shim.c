// Loaded before the C library (LD_PRELOAD): lets files below a folder fail as on a full disk, and shifts the clock.
// It does nothing until fault_arm or fault_clock is called. fwrite of C code that keeps a FILE open is not covered.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static char below[4096];
static long from, calls, full, shift;
static int once;

// From the n-th call on (or, with only_once, that one alone) what writes below the folder fails: ENOSPC. n < 0 counts.
void fault_arm(const char *folder, long n, int only_once) {
    snprintf(below, sizeof below, "%s", folder);
    from = n, once = only_once, calls = full = 0;
}

long fault_calls(void) { return calls; }

// How many calls below the folder found a full disk, one of this shim's or a real one.
long fault_full(void) { return full; }

void fault_clock(long seconds) { shift = seconds; }

static int fails(const char *path) {
    size_t length = strlen(below);
    if (!length || !path || strncmp(path, below, length) || (path[length] && path[length] != '/')) return 0;
    long n = __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST);
    if (from < 0 || (once ? n != from : n < from)) return 0;
    __atomic_add_fetch(&full, 1, __ATOMIC_SEQ_CST);
    errno = ENOSPC;
    return 1;
}

// The result of a real call; below is armed, so a real ENOSPC is counted as well.
static long real(long result) {
    if (result < 0 && errno == ENOSPC && below[0]) __atomic_add_fetch(&full, 1, __ATOMIC_SEQ_CST);
    return result;
}

static int fd_fails(int fd) {
    if (!below[0]) return 0;
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return fails(path);
}

#define OPENS(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT))
#define OPEN(name)                                             \
    int name(const char *path, int flags, ...) {               \
        va_list rest;                                          \
        va_start(rest, flags);                                 \
        mode_t mode = (mode_t)va_arg(rest, int);               \
        va_end(rest);                                          \
        if (OPENS(flags) && fails(path)) return -1;            \
        return (int)real(REAL(name)(path, flags, mode));                  \
    }
#define OPENAT(name)                                           \
    int name(int folder, const char *path, int flags, ...) {   \
        va_list rest;                                          \
        va_start(rest, flags);                                 \
        mode_t mode = (mode_t)va_arg(rest, int);               \
        va_end(rest);                                          \
        if (OPENS(flags) && fails(path)) return -1;            \
        return (int)real(REAL(name)(folder, path, flags, mode));          \
    }
#define FOPEN(name)                                            \
    FILE *name(const char *path, const char *mode) {           \
        if (strpbrk(mode, "wa+") && fails(path)) return NULL;  \
        return REAL(name)(path, mode);                         \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
FOPEN(fopen)
FOPEN(fopen64)

ssize_t write(int fd, const void *bytes, size_t count) { return fd_fails(fd) ? -1 : real(REAL(write)(fd, bytes, count)); }
ssize_t writev(int fd, const struct iovec *parts, int n) { return fd_fails(fd) ? -1 : real(REAL(writev)(fd, parts, n)); }
ssize_t pwrite(int fd, const void *b, size_t n, off_t at) { return fd_fails(fd) ? -1 : real(REAL(pwrite)(fd, b, n, at)); }
int fsync(int fd) { return fd_fails(fd) ? -1 : (int)real(REAL(fsync)(fd)); }
int rename(const char *a, const char *b) { return fails(b) ? -1 : (int)real(REAL(rename)(a, b)); }
int mkdir(const char *path, mode_t mode) { return fails(path) ? -1 : (int)real(REAL(mkdir)(path, mode)); }

int clock_gettime(clockid_t clock, struct timespec *now) {
    static __typeof__(&clock_gettime) real;
    if (!real) real = REAL(clock_gettime);
    int result = real(clock, now);
    if (!result && clock == CLOCK_REALTIME) now->tv_sec += shift;
    return result;
}

time_t time(time_t *now) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (now) *now = exact.tv_sec;
    return exact.tv_sec;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    static __typeof__(&gettimeofday) real;
    if (!real) real = REAL(gettimeofday);
    int result = real(now, zone);
    if (!result) now->tv_sec += shift;
    return result;
}
