/* A library for LD_PRELOAD that ends the process (SIGKILL) at a chosen call of the file system, or fails that call.

     FAULT_UNDER  only calls on paths below this folder count, in order, from 0, over all threads
     FAULT_LOG    append "number <tab> call <tab> path" for each of them to this file
     FAULT_AT     the number of the call at which something happens; none: nothing does
     FAULT_HOW    before | after | torn (half of a write) | the number of an errno, with which the call fails;
                  with a + behind it, all later ones fail, too | clock+SECONDS: from this call on, Python's
                  clock is that much ahead (that of other libraries is not: they would wait for the time to come)

   All of it is read when the process starts, and again by `kill_at_begin` (for a process that was forked).
   A child that is started inherits all of it and counts for itself. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { NOTHING, BEFORE, AFTER, TORN, FAIL, FAIL_FROM, CLOCK };

static atomic_long count;
static atomic_long ahead; // seconds
static long at = -1, jump;
static int how, error_number, log_file = -1;
static char under[PATH_MAX];

__attribute__((constructor)) void kill_at_begin(void) {
  const char *text = getenv("FAULT_UNDER");
  if (!text || !realpath(text, under)) {
    under[0] = 0;
    return;
  }
  if ((text = getenv("FAULT_AT"))) at = atol(text);
  if ((text = getenv("FAULT_HOW"))) {
    how = !strcmp(text, "before") ? BEFORE : !strcmp(text, "after") ? AFTER : !strcmp(text, "torn") ? TORN : FAIL;
    if (!strncmp(text, "clock", 5)) how = CLOCK, jump = atol(text + 5);
    if (how == FAIL) error_number = atoi(text);
    if (how == FAIL && text[strlen(text) - 1] == '+') how = FAIL_FROM;
  }
  if ((text = getenv("FAULT_LOG"))) log_file = syscall(SYS_openat, AT_FDCWD, text, O_WRONLY | O_CREAT | O_APPEND, 0644);
}

static void die(void) {
  syscall(SYS_kill, getpid(), SIGKILL);
  for (;;) pause();
}

/* The absolute path of a name below a folder descriptor, without links being followed in its last part. */
static int absolute(int folder, const char *path, char *out) {
  if (path[0] == '/') return snprintf(out, PATH_MAX, "%s", path) < PATH_MAX;
  char link[64], base[PATH_MAX];
  snprintf(link, sizeof link, folder == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", folder);
  ssize_t n = readlink(link, base, sizeof base - 1);
  if (n < 0) return 0;
  base[n] = 0;
  return snprintf(out, PATH_MAX, "%s/%s", base, path) < PATH_MAX;
}

static int of_descriptor(int descriptor, char *out) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t n = readlink(link, out, PATH_MAX - 1);
  if (n < 0) return 0;
  out[n] = 0;
  return out[0] == '/';
}

/* What happens at this call. `is_write`: it can be torn. */
static int meet(const char *call, const char *path) {
  size_t n = strlen(under);
  if (!n || strncmp(path, under, n) || (path[n] && path[n] != '/')) return NOTHING;
  long number = atomic_fetch_add(&count, 1);
  if (log_file >= 0) {
    char line[PATH_MAX + 64];
    int length = snprintf(line, sizeof line, "%ld\t%s\t%s\n", number, call, path);
    syscall(SYS_write, log_file, line, length);
  }
  int frees = !strcmp(call, "unlink") || !strcmp(call, "rmdir"); // which a full disk allows
  if (how == FAIL_FROM && at >= 0 && number >= at) return frees && error_number == ENOSPC ? NOTHING : FAIL;
  if (number != at) return NOTHING;
  if (how == BEFORE) die();
  if (how == CLOCK) ahead = jump;
  return how;
}

static int meet_name(const char *call, int folder, const char *path) {
  char full[PATH_MAX];
  return under[0] && absolute(folder, path, full) ? meet(call, full) : NOTHING;
}

static int meet_descriptor(const char *call, int descriptor) {
  char full[PATH_MAX];
  return under[0] && of_descriptor(descriptor, full) ? meet(call, full) : NOTHING;
}

static long done(int what, long answer) {
  int kept = errno;
  if (what == AFTER || what == TORN) die();
  errno = kept;
  return answer;
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define FAILED(what) ((what) == FAIL && ((errno = error_number), 1))

/* Calls that open a file for writing. */
static int opened(const char *call, int folder, const char *path, int flags, mode_t mode) {
  int what = flags & (O_WRONLY | O_RDWR | O_CREAT) ? meet_name(call, folder, path) : NOTHING;
  if (FAILED(what)) return -1;
  return done(what, syscall(SYS_openat, folder, path, flags, mode));
}

#define MODE(flags, mode)                       \
  mode_t mode = 0;                              \
  if ((flags) & (O_CREAT | O_TMPFILE)) {        \
    va_list rest;                               \
    va_start(rest, flags);                      \
    mode = va_arg(rest, mode_t);                \
    va_end(rest);                               \
  }

int open(const char *path, int flags, ...) { MODE(flags, mode) return opened("open", AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags, mode) return opened("open", AT_FDCWD, path, flags, mode); }
int openat(int folder, const char *path, int flags, ...) { MODE(flags, mode) return opened("open", folder, path, flags, mode); }
int openat64(int folder, const char *path, int flags, ...) { MODE(flags, mode) return opened("open", folder, path, flags, mode); }

/* Calls that write. */
#define WRITES(name, declared, passed, halved)                                                    \
  ssize_t name declared {                                                                         \
    int what = meet_descriptor("write", file);                                                    \
    if (FAILED(what)) return -1;                                                                  \
    ssize_t answer = what == TORN ? NEXT(name) halved : NEXT(name) passed;                        \
    return done(what, answer);                                                                    \
  }
WRITES(write, (int file, const void *data, size_t n), (file, data, n), (file, data, n / 2))
WRITES(pwrite, (int file, const void *data, size_t n, off_t place), (file, data, n, place), (file, data, n / 2, place))
WRITES(pwrite64, (int file, const void *data, size_t n, off64_t place), (file, data, n, place), (file, data, n / 2, place))
WRITES(writev, (int file, const struct iovec *parts, int n), (file, parts, n), (file, parts, n / 2))
WRITES(pwritev, (int file, const struct iovec *parts, int n, off_t place), (file, parts, n, place), (file, parts, n / 2, place))

/* Calls that change names, lengths, or make things durable. */
#define NAMES(name, call, declared, passed, folder, path)                                         \
  int name declared {                                                                             \
    int what = meet_name(call, folder, path);                                                     \
    if (FAILED(what)) return -1;                                                                  \
    return done(what, NEXT(name) passed);                                                         \
  }
NAMES(rename, "rename", (const char *old, const char *path), (old, path), AT_FDCWD, path)
NAMES(renameat, "rename", (int from, const char *old, int to, const char *path), (from, old, to, path), to, path)
NAMES(renameat2, "rename", (int from, const char *old, int to, const char *path, unsigned flags), (from, old, to, path, flags), to, path)
NAMES(link, "link", (const char *old, const char *path), (old, path), AT_FDCWD, path)
NAMES(linkat, "link", (int from, const char *old, int to, const char *path, int flags), (from, old, to, path, flags), to, path)
NAMES(unlink, "unlink", (const char *path), (path), AT_FDCWD, path)
NAMES(unlinkat, "unlink", (int folder, const char *path, int flags), (folder, path, flags), folder, path)
NAMES(mkdir, "mkdir", (const char *path, mode_t mode), (path, mode), AT_FDCWD, path)
NAMES(mkdirat, "mkdir", (int folder, const char *path, mode_t mode), (folder, path, mode), folder, path)
NAMES(rmdir, "rmdir", (const char *path), (path), AT_FDCWD, path)
NAMES(truncate, "truncate", (const char *path, off_t n), (path, n), AT_FDCWD, path)
NAMES(truncate64, "truncate", (const char *path, off64_t n), (path, n), AT_FDCWD, path)

#define DESCRIPTORS(name, call, declared, passed)                                                 \
  int name declared {                                                                             \
    int what = meet_descriptor(call, file);                                                       \
    if (FAILED(what)) return -1;                                                                  \
    return done(what, NEXT(name) passed);                                                         \
  }
DESCRIPTORS(fsync, "fsync", (int file), (file))
DESCRIPTORS(fdatasync, "fsync", (int file), (file))
DESCRIPTORS(ftruncate, "truncate", (int file, off_t n), (file, n))
DESCRIPTORS(ftruncate64, "truncate", (int file, off64_t n), (file, n))

int clock_gettime(clockid_t clock, struct timespec *now) {
  int answer = syscall(SYS_clock_gettime, clock, now);
  Dl_info caller;
  if (ahead && clock == CLOCK_REALTIME && !answer && dladdr(__builtin_return_address(0), &caller)) {
    const char *name = strrchr(caller.dli_fname, '/');
    name = name ? name + 1 : caller.dli_fname;
    if (!strncmp(name, "python", 6) || !strncmp(name, "libpython", 9)) now->tv_sec += ahead;
  }
  return answer;
}
