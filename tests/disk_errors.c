// A disk with bad sectors: whoever loads this library (LD_PRELOAD) gets EIO for what lies behind the
// middle of any file of BAD_FILE_SIZE bytes. The tests of loading build it with `cc`.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static int is_bad(int file, off_t end) {
  struct stat about;
  off_t size = atol(getenv("BAD_FILE_SIZE"));
  return fstat(file, &about) == 0 && about.st_size == size && end > size / 2;
}

ssize_t pread(int file, void *into, size_t count, off_t offset) {
  if (is_bad(file, offset + count)) return errno = EIO, -1;
  ssize_t (*own)(int, void *, size_t, off_t) = dlsym(RTLD_NEXT, "pread");
  return own(file, into, count, offset);
}

ssize_t pread64(int file, void *into, size_t count, off_t offset) {
  return pread(file, into, count, offset);
}

ssize_t preadv(int file, const struct iovec *into, int parts, off_t offset) {
  off_t end = offset;
  for (int part = 0; part < parts; ++part) end += into[part].iov_len;
  if (is_bad(file, end)) return errno = EIO, -1;
  ssize_t (*own)(int, const struct iovec *, int, off_t) = dlsym(RTLD_NEXT, "preadv");
  return own(file, into, parts, offset);
}

ssize_t preadv64(int file, const struct iovec *into, int parts, off_t offset) {
  return preadv(file, into, parts, offset);
}
