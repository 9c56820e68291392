/* SPDX-License-Identifier: MIT */
/*
 * verb_export: a snapshot into FILE and FILE.json (image.h).  Both are written
 * beside their places and renamed when they are whole and on disk, FILE.json last:
 * where it is, FILE is complete.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "snapd/transfer/transfer.h"
#include "snapd/util/cleanup.h"
#include "tools/client.h"
#include "tools/human.h"
#include "tools/image.h"
#include "tools/out.h"
#include "tools/snapctl.h"

struct exporting {
	const char *path;
	char *part, *json_path, *json_part; /* owned */
	int fd;
	struct image_map map;
	/* parsing the stream */
	union {
		struct xfer_extent extent;
		struct xfer_end end;
		uint8_t bytes[sizeof(struct xfer_end)];
	} head;
	size_t head_len;
	uint64_t gpa, left; /* of the extent at hand */
	bool whole;	    /* the end marker agreed */
	uint64_t written;
	XXH3_state_t *hash;
};

static void cleanup_exporting(struct exporting *x)
{
	cleanup_fd(&x->fd);
	if (x->part)
		unlink(x->part);
	if (x->json_part)
		unlink(x->json_part);
	free(x->part);
	free(x->json_path);
	free(x->json_part);
	image_map_deinit(&x->map);
	XXH3_freeState(x->hash);
}

static int open_files(struct exporting *x, bool force)
{
	if (asprintf(&x->json_path, "%s.json", x->path) < 0 ||
	    asprintf(&x->json_part, "%s.json.part", x->path) < 0 ||
	    asprintf(&x->part, "%s.part", x->path) < 0)
		abort();
	if (!force && (!access(x->path, F_OK) || !access(x->json_path, F_OK)))
		return fail(EXIT_CONFLICT, "%s or its .json is there already: --force replaces it",
			    x->path);
	/* Memory of a guest: nobody else's to read. */
	x->fd = open(x->part, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	if (x->fd < 0)
		return fail(EXIT_FAILED, "%s: %s", x->part, strerror(errno));
	if (ftruncate(x->fd, (off_t)x->map.file_bytes))
		return fail(EXIT_FAILED, "%s: %s", x->part, strerror(errno));
	return 0;
}

static int bad_stream(void)
{
	return fail(EXIT_FAILED, "the service sent a malformed stream");
}

/* Bytes of the extent at hand. */
static int put(struct exporting *x, const uint8_t *data, size_t len)
{
	uint64_t run;
	int64_t at;
	ssize_t n;

	while (len) {
		at = image_offset(&x->map, x->gpa, &run);
		if (at < 0)
			return bad_stream();
		n = pwrite(x->fd, data, MIN(len, run), at);
		if (n <= 0)
			return fail(EXIT_FAILED, "%s: %s", x->part, strerror(errno));
		data += n;
		len -= (size_t)n;
		x->gpa += (uint64_t)n;
		x->left -= (uint64_t)n;
		x->written += (uint64_t)n;
	}
	return 0;
}

static int at_end(struct exporting *x)
{
	XXH128_hash_t h = XXH3_128bits_digest(x->hash);

	if (x->head.end.hash_lo != h.low64 || x->head.end.hash_hi != h.high64)
		return fail(EXIT_CORRUPT, "the memory's hash differs: damaged on the way");
	x->whole = true;
	return 0;
}

/* A header, or the end marker, is complete in x->head. */
static int take_head(struct exporting *x)
{
	if (x->head.extent.gpa == XFER_END)
		return x->head_len < sizeof(x->head.end) ? 0 : at_end(x);
	XXH3_128bits_update(x->hash, &x->head, x->head_len);
	x->gpa = x->head.extent.gpa;
	x->left = x->head.extent.len;
	x->head_len = 0;
	return x->left > XFER_EXTENT_MAX ? bad_stream() : 0;
}

static size_t head_want(const struct exporting *x)
{
	if (x->head_len >= sizeof(x->head.extent) && x->head.extent.gpa == XFER_END)
		return sizeof(x->head.end);
	return sizeof(x->head.extent);
}

static int on_data(void *opaque, const void *bytes, size_t len)
{
	struct exporting *x = opaque;
	const uint8_t *p = bytes;
	int rc = 0;

	while (!rc && len) {
		size_t n = x->left ? MIN(len, x->left) : MIN(len, head_want(x) - x->head_len);

		if (x->whole)
			return bad_stream();
		if (x->left) {
			XXH3_128bits_update(x->hash, p, n);
			rc = put(x, p, n);
		} else {
			memcpy(x->head.bytes + x->head_len, p, n);
			x->head_len += n;
			if (x->head_len == head_want(x))
				rc = take_head(x);
		}
		p += n;
		len -= n;
	}
	return rc;
}

static int finish_file(int fd, const char *part, const char *path)
{
	if (fdatasync(fd))
		return fail(EXIT_FAILED, "%s: %s", part, strerror(errno));
	if (rename(part, path))
		return fail(EXIT_FAILED, "%s: %s", path, strerror(errno));
	return 0;
}

static int write_json(struct exporting *x, json_t *state)
{
	_cleanup_fd_ int fd = open(x->json_part, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

	if (fd < 0 || json_dumpfd(state, fd, JSON_INDENT(1)) || write(fd, "\n", 1) != 1)
		return fail(EXIT_FAILED, "%s: %s", x->json_part, strerror(errno));
	return finish_file(fd, x->json_part, x->json_path);
}

static int receive(const struct args *a, struct exporting *x, const char *id)
{
	struct download d = {.write = on_data, .opaque = x, .what = "export"};
	int rc;

	x->hash = XXH3_createState();
	if (!x->hash)
		return fail(EXIT_FAILED, "out of memory");
	XXH3_128bits_reset(x->hash);
	rc = download(a, &d, "/v1/snapshots/%s/memory", id);
	return !rc && !x->whole ? bad_stream() : rc;
}

static int report(const struct args *a, const struct exporting *x, json_t *snap)
{
	char text[24];

	if (a->json) {
		_cleanup_(cleanup_json) json_t *o =
			json_pack("{sO ss ss sI sI}", "snapshot", snap, "memory", x->path, "state",
				  x->json_path, "bytes", (json_int_t)x->map.file_bytes, "written",
				  (json_int_t)x->written);

		return print_json(o);
	}
	printf("%s@%llu: %s of memory in %s, state in %s\n", get_text(snap, "vm"),
	       (unsigned long long)get_u64(snap, "id"), human_bytes(text, sizeof(text), x->written),
	       x->path, x->json_path);
	return EXIT_DONE;
}

int verb_export(const struct args *a)
{
	_cleanup_(cleanup_exporting) struct exporting x = {.path = a->pos[1], .fd = -1};
	_cleanup_(cleanup_json) json_t *state = NULL;
	json_t *snap;
	char id[24];
	int rc = call(a, "GET", NULL, &state, "/v1/snapshots/%s/state", a->pos[0], NULL);

	if (rc)
		return rc;
	/* By id from here on: "VM" alone may mean another snapshot a moment later. */
	snap = json_object_get(state, "snapshot");
	text_u64(id, sizeof(id), get_u64(snap, "id"));
	rc = image_map_make(state, x.path, &x.map);
	if (!rc)
		rc = open_files(&x, opt(a, "force"));
	if (!rc)
		rc = receive(a, &x, id);
	if (!rc)
		rc = finish_file(x.fd, x.part, x.path);
	if (!rc)
		rc = write_json(&x, state);
	return rc ? rc : report(a, &x, snap);
}
