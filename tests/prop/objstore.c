/* SPDX-License-Identifier: MIT */
/*
 * Goal: every kind of object store does the same, and what objstore.h says.  Method: random
 * calls, made of each store given and of a model in memory, whose results must agree: keys
 * with every character that a signature or a path could get wrong, ranges across and past
 * the end, lists from any point.
 *
 *   objstore [COUNT [URL…]]     without a URL: one store of files
 */
#include <string.h>

#include "snapd/backup/objstore.h"
#include "snapd/util/cleanup.h"
#include "tests/lib/check.h"
#include "tests/lib/rand.h"

#define NR_KEYS	   24
#define NR_STORES  4
#define OBJECT_MAX 9000u

static const char *const keys[NR_KEYS] = {
	/* in the order of their bytes */
	"a b/c d",
	"a+b",
	"a-1",
	"a/b/c",
	"a/b/d",
	"a0",
	"bucket%2Fx",
	"c&d=e?f#g",
	"c:d;e@f",
	"d!$'()*,",
	"d~d-_.d",
	"e\"<>&amp;",
	"e/0/1/2/3",
	"e/0/1/3",
	"e[]{}|^`",
	"list-type=2",
	"m/1",
	"m/10",
	"m/2",
	"x/\xc3\xa4",
	"x/\xe2\x82\xac",
	"x/\xef\xbb\xbf",
	"x/\xf0\x9f\x92\xbe",
	"z",
};

struct object {
	bool there;
	size_t len;
	uint8_t bytes[OBJECT_MAX];
};

static struct object model[NR_KEYS];
static struct objstore *stores[NR_STORES];
static int nr_stores;
static struct rand rng;
static struct err e;

static uint32_t below(uint32_t n)
{
	return (uint32_t)(rand_next(&rng) % n);
}

static void do_put(int k, bool only_if_absent)
{
	static uint8_t bytes[OBJECT_MAX];
	size_t len = below(4) ? below(OBJECT_MAX) : below(3), cut = len ? below((uint32_t)len) : 0;
	struct iovec iov[] = {{bytes, cut}, {NULL, 0}, {bytes + cut, len - cut}};
	int want = only_if_absent && model[k].there ? -EEXIST : 0;

	for (size_t i = 0; i < len; i++)
		bytes[i] = (uint8_t)below(256);
	for (int i = 0; i < nr_stores; i++) {
		int r = objstore_put(stores[i], keys[k], iov, 3,
				     only_if_absent ? OBJSTORE_ONLY_IF_ABSENT : 0, &e);

		check(r == want, "put %s: %d, not %d: %s", keys[k], r, want, e.text);
		err_clear(&e);
	}
	if (want)
		return;
	model[k].there = true;
	model[k].len = len;
	memcpy(model[k].bytes, bytes, len);
}

static void do_get(int k)
{
	const struct object *o = &model[k];
	uint64_t offset = below(3) ? 0 : below(OBJECT_MAX + 10);
	size_t len = below(OBJECT_MAX + 10), want;
	static uint8_t buf[OBJECT_MAX + 10];

	want = offset < o->len ? MIN(len, o->len - (size_t)offset) : 0;
	for (int i = 0; i < nr_stores; i++) {
		size_t got;
		int r = objstore_get(stores[i], keys[k], offset, buf, len, &got, &e);

		if (!o->there && len) {
			check(r == -ENOENT, "get %s: %d: %s", keys[k], r, e.text);
			err_clear(&e);
			continue;
		}
		check(!r, "get %s: %s", keys[k], e.text);
		check(got == want && !memcmp(buf, o->bytes + MIN((size_t)offset, o->len), got),
		      "get %s: %zu of %zu bytes at %llu", keys[k], got, want,
		      (unsigned long long)offset);
	}
}

static void do_head(int k)
{
	for (int i = 0; i < nr_stores; i++) {
		struct objstore_info info;
		int r = objstore_head(stores[i], keys[k], &info, &e);

		check(r == (model[k].there ? 0 : -ENOENT), "head %s: %d: %s", keys[k], r, e.text);
		err_clear(&e);
		if (!r)
			check(info.size == model[k].len &&
				      info.mtime_s <= objstore_clock(stores[i]) + 2,
			      "head %s: %llu bytes", keys[k], (unsigned long long)info.size);
	}
}

static void do_delete(int k)
{
	for (int i = 0; i < nr_stores; i++)
		check(!objstore_delete(stores[i], keys[k], &e), "delete %s: %s", keys[k], e.text);
	model[k].there = false;
}

struct seen {
	const char *prefix, *after;
	int next, left;
};

static int see(void *arg, const char *key, const struct objstore_info *info)
{
	struct seen *seen = arg;

	for (;; seen->next++) {
		const char *k = seen->next < NR_KEYS ? keys[seen->next] : NULL;

		check(k, "%s is listed, and nothing was left", key);
		if (model[seen->next].there && strcmp(k, seen->after) > 0 &&
		    !strncmp(k, seen->prefix, strlen(seen->prefix)))
			break;
	}
	check(!strcmp(keys[seen->next], key), "%s is listed, not %s", key, keys[seen->next]);
	check(info->size == model[seen->next].len, "%s: size", key);
	seen->next++;
	return --seen->left ? 0 : 42;
}

static void do_list(void)
{
	const char *prefix = keys[below(NR_KEYS)], *after = below(2) ? keys[below(NR_KEYS)] : "";
	_cleanup_free_ char *begin = strndup(prefix, below(4));
	int limit = below(3) ? 99 : 1 + (int)below(4), nr = 0;

	if (begin[0] == 'x' && begin[1])
		begin[2] = '\0'; /* not within a character */
	for (int k = 0; k < NR_KEYS; k++)
		nr += model[k].there && strcmp(keys[k], after) > 0 &&
		      !strncmp(keys[k], begin, strlen(begin));
	for (int i = 0; i < nr_stores; i++) {
		struct seen seen = {.prefix = begin, .after = after, .left = limit};
		int r = objstore_list(stores[i], begin, after, see, &seen, &e);

		check(r == (nr >= limit ? 42 : 0), "list '%s' after '%s': %d: %s", begin, after, r,
		      e.text);
		check(limit - seen.left == MIN(nr, limit), "list '%s' after '%s': %d of %d", begin,
		      after, limit - seen.left, nr);
	}
}

static void step(void)
{
	int k = (int)below(NR_KEYS);

	switch (below(8)) {
	case 0:
	case 1:
		do_put(k, false);
		break;
	case 2:
		do_put(k, true);
		break;
	case 3:
	case 4:
		do_get(k);
		break;
	case 5:
		do_head(k);
		break;
	case 6:
		do_delete(k);
		break;
	default:
		do_list();
	}
}

static void open_store(const char *url)
{
	struct objstore_opts opts = {.create = true};
	int r = objstore_open(&stores[nr_stores], url, &opts, &e);

	check(!r, "%s: %s", url, e.text);
	nr_stores++;
}

int main(int argc, char **argv)
{
	char dir[] = "/tmp/snapd-objstores.XXXXXX", url[64], command[64];
	int count = argc > 1 ? atoi(argv[1]) : 500;

	rng = rand_of(rand_seed());
	for (int k = 1; k < NR_KEYS; k++)
		check(strcmp(keys[k - 1], keys[k]) < 0, "%s is out of order", keys[k]);
	check(mkdtemp(dir), "%s", dir);
	snprintf(url, sizeof(url), "file://%s/store", dir);
	open_store(url);
	for (int i = 2; i < argc && nr_stores < NR_STORES; i++)
		open_store(argv[i]);
	for (int k = 0; k < NR_KEYS; k++) /* what an earlier run left */
		do_delete(k);
	for (int i = 0; i < count; i++)
		step();
	for (int k = 0; k < NR_KEYS; k++)
		do_delete(k);
	for (int i = 0; i < nr_stores; i++)
		objstore_close(stores[i]);
	snprintf(command, sizeof(command), "rm -rf %s", dir);
	return system(command) ? 1 : 0;
}
