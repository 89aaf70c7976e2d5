/* Fails one call of the C library, counted over all threads once `fault_arm` has been called. For LD_PRELOAD, x86-64
 * and aarch64: integer and pointer arguments are passed on in registers, whatever their types are. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdatomic.h>
#include <stddef.h>

extern int *__errno_location(void);

static atomic_long count, target = -1;
static atomic_int armed;
static const char *volatile failed;

void fault_arm(long which) { count = 0, failed = NULL, target = which, armed = 1; }
void fault_disarm(void) { armed = 0; }
long fault_count(void) { return count; }
const char *fault_name(void) { return failed ? failed : ""; }

static int fails(const char *name, int error) {
    if (!armed || atomic_fetch_add(&count, 1) != target) return 0;
    failed = name;
    *__errno_location() = error;
    return 1;
}

#define CALL(name, error, value)                                                                   \
    long name(long a, long b, long c, long d, long e, long f) {                                    \
        static long (*real)(long, long, long, long, long, long);                                   \
        if (!real) real = dlsym(RTLD_NEXT, #name);                                                 \
        return fails(#name, error) ? (value) : real(a, b, c, d, e, f);                             \
    }

enum { EIO = 5, EAGAIN = 11, ENOMEM = 12, EACCES = 13, EMFILE = 24, ENOSPC = 28, ECONNRESET = 104, ECONNREFUSED = 111 };
enum { EAI_AGAIN = -3 };

CALL(open, EMFILE, -1) CALL(open64, EMFILE, -1) CALL(openat, EMFILE, -1) CALL(openat64, EMFILE, -1)
CALL(fopen, EMFILE, 0) CALL(fopen64, EMFILE, 0) CALL(opendir, EMFILE, 0) CALL(fdopendir, ENOMEM, 0)
CALL(readdir, EIO, 0) CALL(readdir64, EIO, 0)
CALL(read, EIO, -1) CALL(pread, EIO, -1) CALL(pread64, EIO, -1) CALL(readv, EIO, -1)
CALL(preadv, EIO, -1) CALL(preadv64, EIO, -1) CALL(preadv2, EIO, -1) CALL(preadv64v2, EIO, -1)
CALL(write, EIO, -1) CALL(pwrite, ENOSPC, -1) CALL(pwrite64, ENOSPC, -1) CALL(copy_file_range, EIO, -1)
CALL(fsync, EIO, -1) CALL(ftruncate, EIO, -1) CALL(ftruncate64, EIO, -1) CALL(lseek, EIO, -1) CALL(lseek64, EIO, -1)
CALL(stat, EIO, -1) CALL(stat64, EIO, -1) CALL(lstat, EIO, -1) CALL(lstat64, EIO, -1)
CALL(fstat, EIO, -1) CALL(fstat64, EIO, -1) CALL(fstatat, EIO, -1) CALL(fstatat64, EIO, -1)
CALL(statvfs, EIO, -1) CALL(statvfs64, EIO, -1) CALL(access, EIO, -1) CALL(readlink, EIO, -1) CALL(getcwd, EACCES, 0)
CALL(mkdir, ENOSPC, -1) CALL(rename, EIO, -1) CALL(renameat2, EIO, -1) CALL(link, EIO, -1) CALL(symlink, EIO, -1)
CALL(unlink, EIO, -1) CALL(unlinkat, EIO, -1) CALL(rmdir, EIO, -1) CALL(chmod, EIO, -1) CALL(fchmod, EIO, -1)
CALL(utimensat, EIO, -1) CALL(flock, EIO, -1) CALL(ioctl, EIO, -1) CALL(dup2, EMFILE, -1) CALL(pipe2, EMFILE, -1)
CALL(socket, EMFILE, -1) CALL(socketpair, EMFILE, -1) CALL(connect, ECONNREFUSED, -1) CALL(poll, ENOMEM, -1)
CALL(send, ECONNRESET, -1) CALL(sendto, ECONNRESET, -1) CALL(recv, ECONNRESET, -1) CALL(recvfrom, ECONNRESET, -1)
CALL(setsockopt, EIO, -1) CALL(getaddrinfo, EIO, EAI_AGAIN) CALL(pthread_create, EAGAIN, EAGAIN)
