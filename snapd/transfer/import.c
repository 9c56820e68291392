/* SPDX-License-Identifier: MIT */
/*
 * import: import_job(), a stream into the store; transfer.h has the format.  On a job
 * thread.
 *
 * An import builds an epoch on a new timeline.  Whatever is wrong with it, and
 * whenever it is cut off, nothing becomes visible: the epoch is committed only
 * after the end marker's hash agreed.
 */
#include "snapd/transfer/transfer.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "snapd/core/contents.h"
#include "snapd/core/daemon.h"
#include "snapd/core/name.h"
#include "snapd/util/cleanup.h"
#include "snapd/vm/vm.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "streams are little-endian");

struct importer {
	struct job *job;
	struct stream *stream;
	struct store *store;
	/* header */
	json_t *header; /* owned; texts below are its */
	const char *vm, *arch, *name, *note, *tags;
	uint32_t page_size;
	uint64_t state_bytes, taken_ns;
	/* state */
	void *state; /* owned */
	struct snapd_state_reader reader;
	struct contents c; /* only pieces, nr_pieces, nr_pages: for the walk */
	/* pages */
	struct pagemap *live;
	struct epoch *epoch;
	uint64_t timeline; /* 0: none made yet */
	uint8_t *bytes;	   /* XFER_EXTENT_MAX */
	uint8_t *zero;
	struct epoch_page *batch;
	uint32_t nr, batch_max; /* in the batch */
	uint32_t nr_bytes;	/* pages of `bytes` in use */
	size_t piece;		/* the next frame expected: */
	uint64_t page;
	XXH3_state_t *hash;
};

static void importer_deinit(struct importer *m)
{
	epoch_abort(m->epoch);
	if (m->timeline) /* one that has its epoch stays */
		store_timeline_drop(m->store, m->timeline, NULL);
	if (m->live)
		pagemap_destroy(m->live);
	json_decref(m->header);
	free(m->state);
	free(m->bytes);
	free(m->zero);
	free(m->batch);
	XXH3_freeState(m->hash);
}

static int receive(struct importer *m, void *dst, size_t len, struct err *e)
{
	int rc = stream_job_read(m->stream, m->job, dst, len);

	atomic_fetch_add(&m->job->done, len);
	return rc ? transfer_failed(rc, e) : 0;
}

static int receive_line(struct importer *m, struct err *e)
{
	_cleanup_free_ char *line = malloc(XFER_HEADER_MAX);
	json_error_t je;
	size_t n = 0;
	int rc;

	if (!line)
		return err_errno(e, ENOMEM, "import");
	do {
		if (n == XFER_HEADER_MAX)
			return err_set(e, EINVAL, "import: no line of JSON in the first %u KiB",
				       XFER_HEADER_MAX >> 10);
		rc = receive(m, line + n, 1, e);
		if (rc)
			return rc;
	} while (line[n++] != '\n');
	m->header = json_loadb(line, n, JSON_REJECT_DUPLICATES, &je);
	if (!json_is_object(m->header))
		return err_set(e, EINVAL, "import: the first line is not a JSON object: %s",
			       m->header ? "" : je.text);
	return 0;
}

/* An optional text of at most `max` bytes; NULL when it is not there. */
static int header_text(struct importer *m, const char *key, size_t max, const char **ret,
		       struct err *e)
{
	json_t *v = json_object_get(m->header, key);

	*ret = json_string_value(v);
	if (v && !json_is_null(v) && (!*ret || json_string_length(v) > max))
		return err_set(e, EINVAL, "import: \"%s\" is a text of at most %zu bytes", key,
			       max);
	for (const char *p = *ret; p && *p; p++)
		if ((unsigned char)*p < ' ')
			return err_set(e, EINVAL, "import: \"%s\" has control characters", key);
	return 0;
}

static int header_number(struct importer *m, const char *key, uint64_t max, uint64_t *ret,
			 struct err *e)
{
	json_t *v = json_object_get(m->header, key);

	*ret = (uint64_t)json_integer_value(v);
	if (v && (!json_is_integer(v) || json_integer_value(v) < 0 || *ret > max))
		return err_set(e, EINVAL, "import: \"%s\" is a number up to %llu", key,
			       (unsigned long long)max);
	return 0;
}

static int parse_header(struct importer *m, struct err *e)
{
	uint64_t page_size = 0;
	int rc;

	rc = header_text(m, "vm", SNAPD_NAME_MAX - 1, &m->vm, e);
	if (!rc)
		rc = header_text(m, "arch", 15, &m->arch, e);
	if (!rc)
		rc = header_text(m, "name", SNAPD_NAME_MAX - 1, &m->name, e);
	if (!rc)
		rc = header_text(m, "note", 255, &m->note, e);
	if (!rc)
		rc = header_text(m, "tags", 255, &m->tags, e);
	if (!rc)
		rc = header_number(m, "page_size", 65536, &page_size, e);
	if (!rc)
		rc = header_number(m, "state_bytes", STATE_MAX_BYTES, &m->state_bytes, e);
	if (!rc)
		rc = header_number(m, "taken_ns", INT64_MAX, &m->taken_ns, e);
	if (rc)
		return rc;
	if (!m->vm || !m->arch || !m->state_bytes)
		return err_set(e, EINVAL,
			       "import: \"vm\", \"arch\" and \"state_bytes\" must be there");
	if (page_size != 4096 && page_size != 16384 && page_size != 65536)
		return err_set(e, EINVAL, "import: pages of %llu bytes",
			       (unsigned long long)page_size);
	m->page_size = (uint32_t)page_size;
	rc = name_check("vm", m->vm, e);
	return !rc && m->name ? name_check("name", m->name, e) : rc;
}

static int receive_state(struct importer *m, struct err *e)
{
	struct err why = {0};
	int rc;

	m->state = malloc(m->state_bytes);
	if (!m->state)
		return err_errno(e, ENOMEM, "import");
	rc = receive(m, m->state, m->state_bytes, e);
	if (rc)
		return rc;
	rc = state_reader_init(&m->reader, m->state, m->state_bytes, &why);
	if (!rc)
		rc = contents_pieces(&m->reader, &m->c.pieces, &m->c.nr_pieces, &m->c.nr_pages,
				     &why);
	/* Wrong input, not a damaged store. */
	return rc ? err_set(e, EINVAL, "import: %s", why.text) : 0;
}

static int join_cmdline(struct importer *m, struct store_vm *vm, struct err *e)
{
	json_t *argv = json_object_get(m->header, "cmdline"), *arg;
	size_t i, at = 0;

	json_array_foreach(argv, i, arg)
	{
		if (!json_is_string(arg))
			return err_set(e, EINVAL, "import: \"cmdline\" is an array of texts");
		vm->cmdline_len += strlen(json_string_value(arg)) + 1;
	}
	vm->cmdline = malloc(vm->cmdline_len + 1);
	if (!vm->cmdline)
		return err_errno(e, ENOMEM, "import");
	json_array_foreach(argv, i, arg)
		at += (size_t)sprintf(vm->cmdline + at, "%s", json_string_value(arg)) + 1;
	return 0;
}

/* A VM that is attached now has a timeline, a page size and a command line of its
 * own: an import stays away from it. */
static int check_not_attached(struct importer *m, struct err *e)
{
	struct vm *vm = vm_find(m->job->daemon, m->vm, m->job->uid);

	if (!vm)
		return 0;
	vm_unref(vm);
	return err_set(e, EBUSY, "a VM named %s is attached: import under another --name", m->vm);
}

static int open_epoch(struct importer *m, struct err *e)
{
	struct store_vm vm = {.uid = m->job->uid, .page_size = m->page_size};
	int rc = check_not_attached(m, e);

	if (!rc)
		rc = join_cmdline(m, &vm, e);
	snprintf(vm.name, sizeof(vm.name), "%s", m->vm);
	snprintf(vm.arch, sizeof(vm.arch), "%s", m->arch);
	if (!rc)
		rc = store_vm_register(m->store, &vm, e);
	if (!rc)
		rc = store_timeline_create(m->store, vm.id, (struct snapd_point){0}, &m->timeline,
					   e);
	if (!rc && (rc = pagemap_create(true, &m->live)))
		err_errno(e, -rc, "import");
	if (!rc)
		rc = epoch_begin(m->store, vm.id, m->timeline, m->page_size, m->live, &m->epoch, e);
	store_vm_deinit(&vm);
	return rc;
}

static int prepare_pages(struct importer *m, struct err *e)
{
	assert(m->page_size); /* parse_header() */
	m->batch_max = 4 * XFER_EXTENT_MAX / m->page_size;
	m->bytes = aligned_alloc(4096, XFER_EXTENT_MAX);
	m->zero = aligned_alloc(4096, m->page_size);
	m->batch = calloc(m->batch_max, sizeof(*m->batch));
	m->hash = XXH3_createState();
	if (!m->bytes || !m->zero || !m->batch || !m->hash)
		return err_errno(e, ENOMEM, "import");
	memset(m->zero, 0, m->page_size);
	XXH3_128bits_reset(m->hash);
	return 0;
}

static int flush(struct importer *m, struct err *e)
{
	int rc = m->nr ? epoch_put(m->epoch, m->batch, m->nr, e) : 0;

	m->nr = 0;
	m->nr_bytes = 0;
	return rc;
}

static uint64_t expected_gfn(const struct importer *m)
{
	return m->piece < m->c.nr_pieces ? m->c.pieces[m->piece].home_gfn + m->page : UINT64_MAX;
}

/* The next frame's page; bytes stay until flush(). */
static int add_page(struct importer *m, const void *bytes, struct pageid id, struct err *e)
{
	m->batch[m->nr++] = (struct epoch_page){.gfn = expected_gfn(m), .bytes = bytes, .id = id};
	if (++m->page == m->c.pieces[m->piece].nr_pages) {
		m->piece++;
		m->page = 0;
	}
	return m->nr == m->batch_max ? flush(m, e) : 0;
}

static int zeroes_until(struct importer *m, uint64_t gfn, struct err *e)
{
	int rc = 0;

	while (!rc && expected_gfn(m) < gfn) {
		if (!(m->page & 0xffff) && atomic_load(&m->job->cancel))
			return transfer_failed(-ECANCELED, e);
		rc = add_page(m, m->zero, (struct pageid){0}, e);
	}
	return rc;
}

/* One page of an extent.  Its place was checked to be the next frame. */
static int import_page(struct importer *m, struct err *e)
{
	uint8_t *bytes;
	int rc = 0;

	if ((m->nr_bytes + 1) * m->page_size > XFER_EXTENT_MAX)
		rc = flush(m, e);
	if (rc)
		return rc;
	bytes = m->bytes + (size_t)m->nr_bytes++ * m->page_size;
	rc = receive(m, bytes, m->page_size, e);
	if (rc)
		return rc;
	XXH3_128bits_update(m->hash, bytes, m->page_size);
	return add_page(m, bytes, pageid_of(store_secret(m->store), bytes, m->page_size), e);
}

static int import_extent(struct importer *m, const struct xfer_extent *x, struct err *e)
{
	uint64_t gfn = x->gpa / m->page_size, n = x->len / m->page_size;
	int rc;

	if (x->gpa % m->page_size || x->len % m->page_size || !n)
		return err_set(e, EINVAL, "import: extent 0x%llx + 0x%llx is not of whole pages",
			       (unsigned long long)x->gpa, (unsigned long long)x->len);
	rc = zeroes_until(m, gfn, e);
	for (; !rc && n; gfn++, n--) {
		if (expected_gfn(m) != gfn)
			return err_set(e, EINVAL,
				       "import: the page at 0x%llx comes out of order or is not "
				       "in the RAM that the state describes",
				       (unsigned long long)gfn * m->page_size);
		rc = import_page(m, e);
	}
	return rc;
}

static int check_end(struct importer *m, const struct xfer_extent *x, struct err *e)
{
	XXH128_hash_t h = XXH3_128bits_digest(m->hash);
	uint64_t theirs[2];
	char more;
	int rc;

	if (x->len != sizeof(theirs))
		return err_set(e, EINVAL, "import: malformed end marker");
	rc = receive(m, theirs, sizeof(theirs), e);
	if (rc)
		return rc;
	if (theirs[0] != h.low64 || theirs[1] != h.high64)
		return err_set(e, EINVAL, "import: the memory's hash differs: damaged on the way");
	rc = stream_job_read(m->stream, m->job, &more, 1);
	if (!rc)
		return err_set(e, EINVAL, "import: something follows the end marker");
	return rc == -ENODATA ? 0 : transfer_failed(rc, e);
}

static int import_memory(struct importer *m, struct err *e)
{
	struct xfer_extent x;
	int rc;

	while (!(rc = receive(m, &x, sizeof(x), e)) && x.gpa != XFER_END) {
		XXH3_128bits_update(m->hash, &x, sizeof(x));
		rc = import_extent(m, &x, e);
		if (rc)
			break;
	}
	if (!rc)
		rc = check_end(m, &x, e);
	if (!rc)
		rc = zeroes_until(m, UINT64_MAX, e);
	return rc ? rc : flush(m, e);
}

static int commit(struct importer *m, struct err *e)
{
	struct snapshot_meta meta = {
		.name = m->name && *m->name ? m->name : NULL,
		.note = m->note,
		.tags = m->tags,
		.taken_ns = m->taken_ns,
		.post_mortem = contents_postmortem(&m->reader),
	};
	struct snapd_point point;
	struct epoch_stats stats;
	uint64_t snapshot;
	int rc;

	atomic_store(&m->job->phase, "committing");
	rc = epoch_commit(m->epoch, m->state, m->state_bytes, &meta, &point, &snapshot, &stats, e);
	if (rc)
		return rc;
	m->epoch = NULL;
	m->job->result = json_pack("{sI ss sI sI sI}", "snapshot", (json_int_t)snapshot, "vm",
				   m->vm, "pages", (json_int_t)m->c.nr_pages, "zero",
				   (json_int_t)stats.zero, "stored", (json_int_t)stats.stored);
	return 0;
}

int import_job(struct job *job, struct err *e)
{
	struct transfer *t = job->ctx;
	_cleanup_(importer_deinit) struct importer m = {
		.job = job,
		.stream = t->stream,
		.store = job->daemon->store,
	};
	int rc;

	job->unit = "bytes";
	atomic_store(&job->phase, "receiving");
	rc = receive_line(&m, e);
	if (!rc)
		rc = parse_header(&m, e);
	if (!rc)
		rc = receive_state(&m, e);
	if (!rc)
		rc = prepare_pages(&m, e);
	if (!rc)
		rc = open_epoch(&m, e);
	if (!rc)
		rc = import_memory(&m, e);
	return rc ? rc : commit(&m, e);
}
