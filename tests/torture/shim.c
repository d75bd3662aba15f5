/* Loaded before the C library (LD_PRELOAD): counts the calls that change files under one folder, and at the
 * n-th of them kills the process, tears or shortens the write, or fails it; or records all of them.
 *
 * Python's os functions, its files and renameat2 through ctypes all come by here; what glibc does inside
 * itself (stdio of C) does not. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, KILL_BEFORE, KILL_AFTER, TORN, FAIL, FAIL_EVER, SHORT };
enum { WRITE = 1, SYNC = 2, NAME = 4, SIZE = 8 }; /* kinds of calls */
enum { T_WRITE = 1, T_SYNC, T_SYNC_FOLDER, T_CREATE, T_SIZE, T_RENAME, T_EXCHANGE, T_UNLINK, T_MKDIR, T_RMDIR,
       T_LINK, T_MARK };

static char folder[PATH_MAX];
static size_t folder_bytes;
static long at, calls;
static int mode, failure, kinds, trace = -1;

/* Starts over: counts calls of `which` kinds under `path`, and does `what` at call number `when` from 1. */
void torture_arm(const char *path, long when, int what, int error, int which) {
  snprintf(folder, sizeof folder, "%s", path);
  at = when, mode = what, failure = error, kinds = which, calls = 0;
  __atomic_store_n(&folder_bytes, strlen(folder), __ATOMIC_SEQ_CST);
}

long torture_calls(void) { return calls; }

static void put(const void *data, size_t bytes) {
  for (const char *next = data; bytes;) {
    long done = syscall(SYS_write, trace, next, bytes);
    if (done <= 0) abort();
    next += done, bytes -= done;
  }
}

/* One record: u8 kind | u64 number | u32 bytes | u32 bytes | first | second. */
static void note(uint8_t kind, uint64_t number, const char *first, const void *second, uint32_t second_bytes) {
  if (trace < 0) return;
  uint32_t first_bytes = strlen(first);
  put(&kind, 1), put(&number, 8), put(&first_bytes, 4), put(&second_bytes, 4);
  put(first, first_bytes), put(second, second_bytes);
}

void torture_trace(int file) { trace = file; }
void torture_mark(long number) { note(T_MARK, number, "", "", 0); }

static int of_file(int file, char *path) {
  if (!folder_bytes) return 0;
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  long bytes = syscall(SYS_readlink, link, path, PATH_MAX - 1);
  if (bytes < 0) return 0;
  path[bytes] = 0;
  return !strncmp(path, folder, folder_bytes);
}

static int of_name(int parent, const char *name, char *path) {
  if (!folder_bytes) return 0;
  path[0] = 0;
  if (name[0] != '/') {
    char link[64];
    if (parent == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
    else snprintf(link, sizeof link, "/proc/self/fd/%d", parent);
    long bytes = syscall(SYS_readlink, link, path, PATH_MAX - 1);
    if (bytes < 0) return 0;
    path[bytes] = 0;
    strncat(path, "/", PATH_MAX - 1 - bytes);
  }
  strncat(path, name, PATH_MAX - 1 - strlen(path));
  return !strncmp(path, folder, folder_bytes);
}

static void die(void) {
  syscall(SYS_kill, syscall(SYS_getpid), SIGKILL);
  for (;;) pause();
}

/* Returns what to do with this call. */
static int turn(int kind) {
  if (!(kind & kinds)) return COUNT;
  long number = __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST);
  if (mode == FAIL_EVER && number >= at) return FAIL;
  if (number != at) return COUNT;
  if (mode == KILL_BEFORE || (mode == TORN && kind != WRITE)) die();
  return mode;
}


/* Wraps a call: `known` fills path (and other); `call` is done; `noted` is recorded after success. */
#define WRAPPED(kind, known, call, noted) \
  do { \
    char path[PATH_MAX]; \
    if (!(known)) return call; \
    int todo = turn(kind); \
    if (todo == FAIL) { errno = failure; return -1; } \
    long result = call; \
    if (todo == KILL_AFTER) die(); \
    if (result >= 0) { noted; } \
    return result; \
  } while (0)

static long write_at(int file, const void *data, size_t bytes, off_t offset) {
  return offset < 0 ? syscall(SYS_write, file, data, bytes) : syscall(SYS_pwrite64, file, data, bytes, offset);
}

static long whole(int file, const char *path, const void *data, size_t bytes, off_t offset) {
  int todo = turn(WRITE);
  if (todo == FAIL) { errno = failure; return -1; }
  if (todo == TORN) { write_at(file, data, bytes / 2, offset); die(); }
  long start = offset;
  if (offset < 0) {
    struct stat state;
    start = fcntl(file, F_GETFL) & O_APPEND && !fstat(file, &state) ? state.st_size : lseek(file, 0, SEEK_CUR);
  }
  long done = write_at(file, data, todo == SHORT && bytes > 1 ? bytes / 2 : bytes, offset);
  if (todo == KILL_AFTER) die();
  if (done > 0) note(T_WRITE, start, path, data, done);
  return done;
}

static long gathered(int file, const char *path, const struct iovec *parts, int count, off_t offset) {
  size_t bytes = 0;
  for (int i = 0; i < count; i++) bytes += parts[i].iov_len;
  char *flat = malloc(bytes + 1), *next = flat;
  for (int i = 0; i < count; next += parts[i++].iov_len) memcpy(next, parts[i].iov_base, parts[i].iov_len);
  long done = whole(file, path, flat, bytes, offset);
  int error = errno;
  free(flat);
  errno = error;
  return done;
}

ssize_t write(int file, const void *data, size_t bytes) {
  char path[PATH_MAX];
  if (!of_file(file, path)) return syscall(SYS_write, file, data, bytes);
  return whole(file, path, data, bytes, -1);
}
ssize_t pwrite(int file, const void *data, size_t bytes, off_t offset) {
  char path[PATH_MAX];
  if (!of_file(file, path)) return syscall(SYS_pwrite64, file, data, bytes, offset);
  return whole(file, path, data, bytes, offset);
}
ssize_t pwrite64(int file, const void *data, size_t bytes, off64_t offset) { return pwrite(file, data, bytes, offset); }
ssize_t writev(int file, const struct iovec *parts, int count) {
  char path[PATH_MAX];
  if (!of_file(file, path)) return syscall(SYS_writev, file, parts, count);
  return gathered(file, path, parts, count, -1);
}
ssize_t pwritev(int file, const struct iovec *parts, int count, off_t offset) {
  char path[PATH_MAX];
  if (!of_file(file, path)) return syscall(SYS_pwritev, file, parts, count, offset, 0);
  return gathered(file, path, parts, count, offset);
}
ssize_t pwritev64(int file, const struct iovec *parts, int count, off64_t offset) {
  return pwritev(file, parts, count, offset);
}
ssize_t pwritev2(int file, const struct iovec *parts, int count, off_t offset, int flags) {
  char path[PATH_MAX];
  if (!of_file(file, path)) return syscall(SYS_pwritev2, file, parts, count, offset, 0, flags);
  return gathered(file, path, parts, count, offset);
}
ssize_t pwritev64v2(int file, const struct iovec *parts, int count, off64_t offset, int flags) {
  return pwritev2(file, parts, count, offset, flags);
}
/* Python copies files with it, and without it by read and write. */
ssize_t sendfile(int out, int in, off_t *offset, size_t bytes) {
  if (folder_bytes) { errno = ENOTSOCK; return -1; }
  return syscall(SYS_sendfile, out, in, offset, bytes);
}
ssize_t sendfile64(int out, int in, off64_t *offset, size_t bytes) { return sendfile(out, in, offset, bytes); }

static void note_sync(int file, const char *path) {
  struct stat state;
  note(!fstat(file, &state) && S_ISDIR(state.st_mode) ? T_SYNC_FOLDER : T_SYNC, 0, path, "", 0);
}
int fsync(int file) { WRAPPED(SYNC, of_file(file, path), syscall(SYS_fsync, file), note_sync(file, path)); }
int fdatasync(int file) { WRAPPED(SYNC, of_file(file, path), syscall(SYS_fdatasync, file), note_sync(file, path)); }
int ftruncate(int file, off_t size) {
  WRAPPED(SIZE, of_file(file, path), syscall(SYS_ftruncate, file, size), note(T_SIZE, size, path, "", 0));
}
int ftruncate64(int file, off64_t size) { return ftruncate(file, size); }
int truncate(const char *name, off_t size) {
  WRAPPED(SIZE, of_name(AT_FDCWD, name, path), syscall(SYS_truncate, name, size), note(T_SIZE, size, path, "", 0));
}
int truncate64(const char *name, off64_t size) { return truncate(name, size); }

static int renamed(int from, const char *old, int to, const char *new, unsigned flags) {
  char other[PATH_MAX];
  WRAPPED(NAME, of_name(from, old, path) & of_name(to, new, other),
          syscall(SYS_renameat2, from, old, to, new, flags),
          note(flags & 2 ? T_EXCHANGE : T_RENAME, 0, path, other, strlen(other)));
}
int rename(const char *old, const char *new) { return renamed(AT_FDCWD, old, AT_FDCWD, new, 0); }
int renameat(int from, const char *old, int to, const char *new) { return renamed(from, old, to, new, 0); }
int renameat2(int from, const char *old, int to, const char *new, unsigned flags) {
  return renamed(from, old, to, new, flags);
}
int linkat(int from, const char *old, int to, const char *new, int flags) {
  char other[PATH_MAX];
  WRAPPED(NAME, of_name(from, old, path) & of_name(to, new, other),
          syscall(SYS_linkat, from, old, to, new, flags), note(T_LINK, 0, path, other, strlen(other)));
}
int link(const char *old, const char *new) { return linkat(AT_FDCWD, old, AT_FDCWD, new, 0); }
int unlinkat(int parent, const char *name, int flags) {
  WRAPPED(NAME, of_name(parent, name, path), syscall(SYS_unlinkat, parent, name, flags),
          note(flags & AT_REMOVEDIR ? T_RMDIR : T_UNLINK, 0, path, "", 0));
}
int unlink(const char *name) { return unlinkat(AT_FDCWD, name, 0); }
int rmdir(const char *name) { return unlinkat(AT_FDCWD, name, AT_REMOVEDIR); }
int mkdirat(int parent, const char *name, mode_t rights) {
  WRAPPED(NAME, of_name(parent, name, path), syscall(SYS_mkdirat, parent, name, rights),
          note(T_MKDIR, 0, path, "", 0));
}
int mkdir(const char *name, mode_t rights) { return mkdirat(AT_FDCWD, name, rights); }

static int opened(int parent, const char *name, int flags, mode_t rights) {
  struct stat state;
  char known[PATH_MAX];
  int making = 0, cutting = 0;
  if (flags & (O_CREAT | O_TRUNC) && of_name(parent, name, known)) {
    making = flags & O_CREAT && stat(known, &state) != 0;
    cutting = flags & O_TRUNC && !making;
  }
  if (!making && !cutting) return syscall(SYS_openat, parent, name, flags, rights);
  WRAPPED(NAME, of_name(parent, name, path), syscall(SYS_openat, parent, name, flags, rights),
          note(making ? T_CREATE : T_SIZE, 0, path, "", 0));
}
#define RIGHTS(flags) \
  mode_t rights = 0; \
  if ((flags) & (O_CREAT | __O_TMPFILE)) { va_list more; va_start(more, flags); rights = va_arg(more, int); va_end(more); }
int open(const char *name, int flags, ...) { RIGHTS(flags) return opened(AT_FDCWD, name, flags, rights); }
int open64(const char *name, int flags, ...) { RIGHTS(flags) return opened(AT_FDCWD, name, flags | O_LARGEFILE, rights); }
int openat(int parent, const char *name, int flags, ...) { RIGHTS(flags) return opened(parent, name, flags, rights); }
int openat64(int parent, const char *name, int flags, ...) { RIGHTS(flags) return opened(parent, name, flags | O_LARGEFILE, rights); }
