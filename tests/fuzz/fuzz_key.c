/* SPDX-License-Identifier: MIT */
/*
 * Any bytes as STORE/key.  First byte: 1: its hash is put right.  Nobody can make one that
 * opens without the user's key: each is refused, with a reason.
 */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "snapd/store/seal.h"
#include "snapd/util/cleanup.h"
#include "tests/fuzz/fuzz.h"

#define KEY_HASHED 120u

static char dir[] = "/tmp/fuzz-key-XXXXXX", user[64];
static int dir_fd = -1;

static void clean_up(void)
{
	unlinkat(dir_fd, "key", 0);
	unlinkat(dir_fd, "user", 0);
	close(dir_fd);
	rmdir(dir);
}

static void put(const char *name, const void *bytes, size_t len)
{
	int fd = openat(dir_fd, name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

	PROMISE(fd >= 0 && write(fd, bytes, len) == (ssize_t)len && !close(fd));
}

static void make_user(void)
{
	uint8_t key[48];

	memset(key, 7, sizeof(key));
	PROMISE(mkdtemp(dir));
	dir_fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	PROMISE(dir_fd >= 0);
	atexit(clean_up);
	put("user", key, sizeof(key));
	snprintf(user, sizeof(user), "%s/user", dir);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
	_cleanup_free_ uint8_t *key = NULL;
	struct seal *seal = NULL;
	struct err e = {0};
	uint64_t hash;
	int r;

	if (dir_fd < 0)
		make_user();
	if (!len)
		return 0;
	len--;
	key = malloc(len + 1);
	PROMISE(key);
	memcpy(key, data + 1, len);
	if (data[0] & 1 && len >= KEY_HASHED + sizeof(hash)) {
		hash = XXH3_64bits(key, KEY_HASHED);
		memcpy(key + KEY_HASHED, &hash, sizeof(hash));
	}
	put("key", key, len);
	r = seal_open(dir_fd, dir, user, false, &seal, &e);
	PROMISE(r < 0 && !seal && e.text[0]);
	return 0;
}
