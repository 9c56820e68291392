/* SPDX-License-Identifier: MIT */
/*
 * verb_import: FILE and FILE.json (image.h) into a new snapshot.  The state blob is
 * built anew from the records in FILE.json; memory is sent extent by extent, holes
 * left out.  The service checks everything again.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "snapd/state.h"
#include "snapd/transfer/transfer.h"
#include "snapd/util/cleanup.h"
#include "tools/client.h"
#include "tools/image.h"
#include "tools/out.h"
#include "tools/snapctl.h"

enum step { STEP_HEADER, STEP_STATE, STEP_EXTENTS, STEP_DONE };

struct importing {
	const char *path;
	char *json_path; /* owned */
	json_t *state;	 /* owned */
	int fd;
	struct image_map map;
	struct snapd_state_writer blob;
	char *header; /* owned */
	/* what is being sent */
	enum step step;
	const uint8_t *at;
	size_t len;
	size_t run;    /* of the map */
	uint64_t done; /* bytes of the run */
	uint8_t *buf;  /* an extent, owned */
	XXH3_state_t *hash;
};

static void cleanup_importing(struct importing *m)
{
	cleanup_fd(&m->fd);
	json_decref(m->state);
	image_map_deinit(&m->map);
	state_writer_deinit(&m->blob);
	free(m->json_path);
	free(m->header);
	free(m->buf);
	XXH3_freeState(m->hash);
}

static int open_files(struct importing *m)
{
	json_error_t je;
	struct stat st;
	int rc;

	if (asprintf(&m->json_path, "%s.json", m->path) < 0)
		abort();
	if (access(m->json_path, R_OK))
		return fail(errno == ENOENT ? EXIT_NOT_FOUND : EXIT_FAILED, "%s: %s", m->json_path,
			    strerror(errno));
	m->state = json_load_file(m->json_path, JSON_REJECT_DUPLICATES, &je);
	if (!m->state)
		return fail(EXIT_CORRUPT, "%s: line %d: %s", m->json_path, je.line, je.text);
	if (strcmp(get_text(m->state, "format"), "snapd-state-1") != 0)
		return fail(EXIT_CORRUPT, "%s is not what snapctl export writes", m->json_path);
	m->fd = open(m->path, O_RDONLY | O_CLOEXEC);
	if (m->fd < 0 || fstat(m->fd, &st))
		return fail(errno == ENOENT ? EXIT_NOT_FOUND : EXIT_FAILED, "%s: %s", m->path,
			    strerror(errno));
	rc = image_map_read(m->state, m->json_path, &m->map);
	if (!rc && (uint64_t)st.st_size < m->map.file_bytes)
		rc = fail(EXIT_CORRUPT, "%s has %lld bytes, not the %llu of its description",
			  m->path, (long long)st.st_size, (unsigned long long)m->map.file_bytes);
	return rc;
}

static const char *either(const char *a, const char *b)
{
	return a ? a : b;
}

static int build_header(struct importing *m, const struct args *a, size_t state_bytes)
{
	json_t *snap = json_object_get(m->state, "snapshot");
	_cleanup_free_ char *vm_name = NULL;

	if (asprintf(&vm_name, "%s-imported", get_text(snap, "vm")) < 0)
		abort();
	return image_header(m->state, m->json_path, either(opt(a, "name"), vm_name),
			    opt(a, "snapshot-name"), either(opt(a, "note"), get_text(snap, "note")),
			    either(opt(a, "tag"), get_text(snap, "tags")), state_bytes, &m->header);
}

/* ---- sending ---- */

/* The next run of data in the file at or behind `done` of the run at hand, in whole
 * pages; 0: none is left in it. */
static uint64_t next_data(struct importing *m, const struct image_run *r)
{
	uint64_t page = m->map.page_size, from, to;
	off_t data, hole;

	data = lseek(m->fd, (off_t)(r->offset + m->done), SEEK_DATA);
	if (data < 0 || (uint64_t)data >= r->offset + r->len)
		return 0;
	hole = lseek(m->fd, data, SEEK_HOLE);
	from = MAX((uint64_t)data - r->offset, m->done) / page * page;
	to = hole < 0 ? r->len : MIN(ALIGN_UP((uint64_t)hole - r->offset, page), r->len);
	m->done = from;
	return MIN(to - from, XFER_EXTENT_MAX);
}

static int read_extent(struct importing *m, const struct image_run *r, uint64_t len)
{
	struct xfer_extent x = {.gpa = r->gpa + m->done, .len = len};
	size_t got = 0;

	memcpy(m->buf, &x, sizeof(x));
	while (got < len) {
		ssize_t n = pread(m->fd, m->buf + sizeof(x) + got, len - got,
				  (off_t)(r->offset + m->done + got));

		if (n <= 0)
			return fail(EXIT_FAILED, "%s: %s", m->path,
				    n ? strerror(errno) : "it became shorter");
		got += (size_t)n;
	}
	m->done += len;
	m->at = m->buf;
	m->len = sizeof(x) + len;
	XXH3_128bits_update(m->hash, m->at, m->len);
	return 0;
}

static void make_end(struct importing *m)
{
	XXH128_hash_t h = XXH3_128bits_digest(m->hash);
	struct xfer_end end = {
		.extent = {.gpa = XFER_END, .len = sizeof(end) - sizeof(end.extent)},
		.hash_lo = h.low64,
		.hash_hi = h.high64,
	};

	memcpy(m->buf, &end, sizeof(end));
	m->at = m->buf;
	m->len = sizeof(end);
	m->step = STEP_DONE;
}

static int next_extent(struct importing *m)
{
	for (; m->run < m->map.nr; m->run++, m->done = 0) {
		const struct image_run *r = &m->map.runs[m->run];
		uint64_t len = m->done < r->len ? next_data(m, r) : 0;

		if (len)
			return read_extent(m, r, len);
	}
	make_end(m);
	return 0;
}

static long on_read(void *opaque, void *dst, size_t len)
{
	struct importing *m = opaque;
	int rc;

	if (!m->len && m->step == STEP_HEADER) {
		m->step = STEP_STATE;
		m->at = (const uint8_t *)m->header;
		m->len = strlen(m->header);
	} else if (!m->len && m->step == STEP_STATE) {
		m->step = STEP_EXTENTS;
		m->at = m->blob.buf;
		m->len = m->blob.len;
	} else if (!m->len && m->step == STEP_EXTENTS) {
		rc = next_extent(m);
		if (rc)
			return -rc;
	}
	len = MIN(len, m->len);
	memcpy(dst, m->at, len);
	m->at += len;
	m->len -= len;
	return (long)len;
}

static int send_all(const struct args *a, struct importing *m, json_t **ret)
{
	struct upload u = {
		.read = on_read, .opaque = m, .what = "import", .type = XFER_IMPORT_TYPE};
	struct stat st;

	if (!fstat(m->fd, &st))
		u.total_bytes = (uint64_t)st.st_blocks * 512;
	m->buf = malloc(sizeof(struct xfer_extent) + XFER_EXTENT_MAX);
	m->hash = XXH3_createState();
	if (!m->buf || !m->hash)
		return fail(EXIT_FAILED, "out of memory");
	XXH3_128bits_reset(m->hash);
	return upload(a, &u, "/v1/import", ret);
}

int verb_import(const struct args *a)
{
	_cleanup_(cleanup_importing) struct importing m = {.path = a->pos[0], .fd = -1};
	_cleanup_(cleanup_json) json_t *answer = NULL;
	const void *blob = NULL;
	json_t *result;
	size_t len = 0;
	int rc;

	if (state_writer_init(&m.blob))
		return fail(EXIT_FAILED, "out of memory");
	rc = open_files(&m);
	if (!rc)
		rc = image_blob(m.state, m.json_path, &m.blob, &blob, &len);
	if (!rc)
		rc = build_header(&m, a, len);
	if (!rc)
		rc = send_all(a, &m, &answer);
	if (rc)
		return rc;
	result = json_object_get(json_object_get(answer, "job"), "result");
	if (a->json)
		return print_json(result);
	printf("%s@%llu imported: %llu pages\n", get_text(result, "vm"),
	       (unsigned long long)get_u64(result, "snapshot"),
	       (unsigned long long)get_u64(result, "pages"));
	return EXIT_DONE;
}
