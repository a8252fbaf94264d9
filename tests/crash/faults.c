/* Faults at system calls, for tests. This library is preloaded into a process (LD_PRELOAD). It counts every call that
   changes a file under one folder. At the call with a given number, it kills or stops the process, or makes the call
   fail. For power cuts, it also keeps a journal of these calls, with the bytes that fsync has made durable.

   Nothing happens until fault_arm() is called. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum mode { OFF = 0, COUNT = 1, KILL = 2, STOP = 3, FAIL_ONCE = 4, FAIL_ON = 5 };

#define MAX_FD 1024
static char root[PATH_MAX], shadow[PATH_MAX];
static size_t root_length;
static enum mode mode = OFF;
static long at = -1, count = 0, copies = 0;
static int error_number = EIO, journal = -1, calls = -1;
static char unsynced[64] = "";
static char *path_of[MAX_FD];

static long raw_copy(const char *from) {
    /* Copies a file's present bytes to shadow/NUMBER and returns NUMBER. Uses raw system calls, which are not counted. */
    char to[PATH_MAX + 32], buffer[65536];
    long number = ++copies, size;
    snprintf(to, sizeof to, "%s/%ld", shadow, number);
    int source = syscall(SYS_openat, AT_FDCWD, from, O_RDONLY | O_CLOEXEC, 0);
    if (source < 0) return -1;
    int target = syscall(SYS_openat, AT_FDCWD, to, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    while ((size = syscall(SYS_read, source, buffer, sizeof buffer)) > 0) syscall(SYS_write, target, buffer, size);
    syscall(SYS_close, source);
    syscall(SYS_close, target);
    return number;
}

static unsigned long inode(const char *path) {
    struct stat found;
    return syscall(SYS_newfstatat, AT_FDCWD, path, &found, 0) == 0 ? (unsigned long)found.st_ino : 0;
}

static void note(const char *format, ...) {
    /* Appends one line to the journal, with a single write. */
    if (journal < 0) return;
    char line[3 * PATH_MAX];
    va_list values;
    va_start(values, format);
    int size = vsnprintf(line, sizeof line, format, values);
    va_end(values);
    syscall(SYS_write, journal, line, size);
}

static int ours(const char *path) {
    return mode != OFF && path != NULL && strncmp(path, root, root_length) == 0 && path[root_length] == '/';
}

static int ours_fd(int fd) { return mode != OFF && fd >= 0 && fd < MAX_FD && path_of[fd] != NULL; }

/* Called before each call that changes a file. Returns 1, with errno set, if that call must fail. */
static int fault(const char *call, const char *path) {
    if (mode == OFF) return 0;
    count++;
    if (calls >= 0) {
        char line[PATH_MAX + 64];
        syscall(SYS_write, calls, line, snprintf(line, sizeof line, "%ld %s %s\n", count, call, path + root_length + 1));
    }
    if (mode == COUNT || count < at || (count > at && mode != FAIL_ON)) return 0;
    if (mode == KILL) syscall(SYS_kill, getpid(), SIGKILL);
    if (mode == STOP) { syscall(SYS_kill, getpid(), SIGSTOP); return 0; }
    errno = error_number;
    return 1;
}

/* Starts counting. calls_file: gets a line for each counted call (NULL: none). shadow_folder: where to keep a journal
   (NULL: none). */
void fault_arm(const char *folder, int how, long number, int with_errno, const char *calls_file, const char *shadow_folder) {
    snprintf(root, sizeof root, "%s", folder);
    root_length = strlen(root);
    at = number, count = 0, error_number = with_errno;
    if (calls_file) calls = syscall(SYS_openat, AT_FDCWD, calls_file, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (shadow_folder) {
        char name[PATH_MAX + 16];
        snprintf(shadow, sizeof shadow, "%s", shadow_folder);
        snprintf(name, sizeof name, "%s/journal", shadow_folder);
        journal = syscall(SYS_openat, AT_FDCWD, name, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    }
    mode = how;
}

/* From now on, fsync of files whose names have this ending makes nothing durable. */
void fault_ignore_sync(const char *ending) { snprintf(unsynced, sizeof unsynced, "%s", ending); }

long fault_count(void) { return count; }
void fault_disarm(void) { mode = OFF; }

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static void opened(int fd, const char *path, int created) {
    if (fd < 0 || fd >= MAX_FD) return;
    free(path_of[fd]);
    path_of[fd] = strdup(path);
    if (created) note("create\t%lu\t%s\n", inode(path), path);
}

static int before_open(const char *path, int flags, int *created) {
    *created = 0;
    if (!ours(path)) return 0;
    int there = inode(path) != 0;
    *created = (flags & O_CREAT) && !there;
    if (*created) return fault("create", path);
    if (there && (flags & O_TRUNC)) return fault("open-truncate", path);
    if ((flags & O_ACCMODE) != O_RDONLY) return fault("open", path);
    return 0;
}

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name); \
        mode_t rights = 0; int created; \
        if (flags & (O_CREAT | O_TMPFILE)) { va_list v; va_start(v, flags); rights = va_arg(v, int); va_end(v); } \
        if (before_open(path, flags, &created)) return -1; \
        int fd = real(path, flags, rights); \
        if (fd >= 0 && fd < MAX_FD && path_of[fd]) { free(path_of[fd]); path_of[fd] = NULL; } \
        if (fd >= 0 && ours(path)) opened(fd, path, created); \
        return fd; \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        REAL(name); \
        mode_t rights = 0; int created; \
        if (flags & (O_CREAT | O_TMPFILE)) { va_list v; va_start(v, flags); rights = va_arg(v, int); va_end(v); } \
        if (before_open(path, flags, &created)) return -1; \
        int fd = real(folder, path, flags, rights); \
        if (fd >= 0 && fd < MAX_FD && path_of[fd]) { free(path_of[fd]); path_of[fd] = NULL; } \
        if (fd >= 0 && ours(path)) opened(fd, path, created); \
        return fd; \
    }
OPENAT(openat)
OPENAT(openat64)

int close(int fd) {
    REAL(close);
    if (fd >= 0 && fd < MAX_FD && path_of[fd]) { free(path_of[fd]); path_of[fd] = NULL; }
    return real(fd);
}

ssize_t write(int fd, const void *data, size_t size) {
    REAL(write);
    if (ours_fd(fd) && fault("write", path_of[fd])) return -1;
    return real(fd, data, size);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) {
    REAL(pwrite);
    if (ours_fd(fd) && fault("pwrite", path_of[fd])) return -1;
    return real(fd, data, size, offset);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) {
    REAL(pwrite64);
    if (ours_fd(fd) && fault("pwrite", path_of[fd])) return -1;
    return real(fd, data, size, offset);
}
int ftruncate(int fd, off_t size) {
    REAL(ftruncate);
    if (ours_fd(fd) && fault("truncate", path_of[fd])) return -1;
    return real(fd, size);
}
int ftruncate64(int fd, off64_t size) {
    REAL(ftruncate64);
    if (ours_fd(fd) && fault("truncate", path_of[fd])) return -1;
    return real(fd, size);
}

static void synced(const char *path) {
    size_t size = strlen(path), end = strlen(unsynced);
    if (end > 0 && size >= end && strcmp(path + size - end, unsynced) == 0) return;
    struct stat found;
    if (journal < 0 || syscall(SYS_newfstatat, AT_FDCWD, path, &found, 0) != 0) return;
    if (S_ISDIR(found.st_mode)) note("syncfolder\t%s\n", path);
    else note("sync\t%lu\t%ld\n", (unsigned long)found.st_ino, raw_copy(path));
}
int fsync(int fd) {
    REAL(fsync);
    if (ours_fd(fd) && fault("fsync", path_of[fd])) return -1;
    int done = real(fd);
    if (done == 0 && ours_fd(fd)) synced(path_of[fd]);
    return done;
}
int fdatasync(int fd) {
    REAL(fdatasync);
    if (ours_fd(fd) && fault("fsync", path_of[fd])) return -1;
    int done = real(fd);
    if (done == 0 && ours_fd(fd)) synced(path_of[fd]);
    return done;
}

int rename(const char *from, const char *to) {
    REAL(rename);
    if (ours(to) && fault("rename", to)) return -1;
    if (!ours(to)) return real(from, to);
    unsigned long replaced = inode(to), moved = inode(from);
    long kept = replaced && journal >= 0 ? raw_copy(to) : -1;
    int done = real(from, to);
    if (done == 0) note("rename\t%lu\t%s\t%s\t%lu\t%ld\n", moved, from, to, replaced, kept);
    return done;
}

static int remove_name(const char *path, int (*remove_it)(const char *)) {
    unsigned long gone = inode(path);
    long kept = gone && journal >= 0 ? raw_copy(path) : -1;
    int done = remove_it(path);
    if (done == 0) note("unlink\t%lu\t%s\t%ld\n", gone, path, kept);
    return done;
}
int unlink(const char *path) {
    REAL(unlink);
    if (ours(path) && inode(path) && fault("unlink", path)) return -1;
    return ours(path) ? remove_name(path, real) : real(path);
}
int mkdir(const char *path, mode_t rights) {
    REAL(mkdir);
    if (ours(path) && fault("mkdir", path)) return -1;
    return real(path, rights);
}
