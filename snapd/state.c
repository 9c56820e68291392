/* SPDX-License-Identifier: MIT */
/*
 * state: writes and reads the blob of records that state.h describes.  In: named
 * payloads; out: one blob with a hash over it, and back.  Pure, no threads.
 *
 * A blob comes from disk, from the wire or from an import file, so nothing in it
 * is believed: state_reader_init() checks every length once, and everything
 * after it may walk without looking again.  Two records of the same name and
 * instance are not an error; the first one counts.
 */
#include "snapd/state.h"

#include <stdbool.h>
#include <string.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "snapd/util/cleanup.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the format is little-endian");

#define RECORD_ALIGN	   8
#define WRITER_FIRST_BYTES 16384u

static uint64_t blob_hash(const uint8_t *buf, size_t len)
{
	return XXH3_64bits(buf + sizeof(struct state_header), len - sizeof(struct state_header));
}

int state_writer_init(struct snapd_state_writer *w)
{
	*w = (struct snapd_state_writer){
		.buf = calloc(1, WRITER_FIRST_BYTES),
		.len = sizeof(struct state_header),
		.cap = WRITER_FIRST_BYTES,
	};
	if (!w->buf)
		w->error = -ENOMEM;
	return w->error;
}

void state_writer_deinit(struct snapd_state_writer *w)
{
	free(w->buf);
	*w = (struct snapd_state_writer){.error = -ENOMEM};
}

static int writer_reserve(struct snapd_state_writer *w, size_t more)
{
	size_t cap = w->cap;
	uint8_t *buf;

	if (more > STATE_MAX_BYTES - w->len)
		return -E2BIG;
	while (cap - w->len < more)
		cap *= 2;
	if (cap == w->cap)
		return 0;
	buf = realloc(w->buf, cap);
	if (!buf)
		return -ENOMEM;
	w->buf = buf;
	w->cap = cap;
	return 0;
}

static int writer_append(struct snapd_state_writer *w, const struct state_record *rec,
			 const void *data)
{
	size_t padded, total;
	int r;

	if (rec->len_bytes > STATE_MAX_BYTES)
		return -E2BIG;
	padded = ALIGN_UP(rec->len_bytes, RECORD_ALIGN);
	total = sizeof(*rec) + padded;
	r = writer_reserve(w, total);
	if (r)
		return r;
	memcpy(w->buf + w->len, rec, sizeof(*rec));
	if (rec->len_bytes)
		memcpy(w->buf + w->len + sizeof(*rec), data, rec->len_bytes);
	memset(w->buf + w->len + sizeof(*rec) + rec->len_bytes, 0, padded - rec->len_bytes);
	w->len += total;
	w->nr_records++;
	return 0;
}

int state_put(struct snapd_state_writer *w, const char *name, uint32_t instance, uint16_t version,
	      const void *data, size_t len_bytes)
{
	struct state_record rec = {
		.instance = instance,
		.version = version,
		.len_bytes = len_bytes,
	};
	size_t name_len = strnlen(name, STATE_NAME_MAX);

	if (w->error)
		return w->error;
	if (name_len == 0 || name_len == STATE_NAME_MAX) {
		w->error = -EINVAL;
		return w->error;
	}
	memcpy(rec.name, name, name_len);
	w->error = writer_append(w, &rec, data);
	return w->error;
}

int state_writer_finish(struct snapd_state_writer *w, const void **ret, size_t *ret_len)
{
	struct state_header h = {
		.magic = STATE_MAGIC,
		.major = STATE_MAJOR,
		.nr_records = w->nr_records,
		.total_bytes = w->len,
	};

	if (w->error)
		return w->error;
	h.hash = blob_hash(w->buf, w->len);
	memcpy(w->buf, &h, sizeof(h));
	*ret = w->buf;
	*ret_len = w->len;
	return 0;
}

static int check_header(const struct state_header *h, const uint8_t *buf, size_t len, struct err *e)
{
	if (memcmp(h->magic, STATE_MAGIC, sizeof(h->magic)) != 0)
		return err_set(e, E_CORRUPT, "state: not a state blob (wrong magic)");
	if (h->major != STATE_MAJOR)
		return err_set(e, E_CORRUPT, "state: format %u.%u, this program reads %u.x",
			       h->major, h->minor, STATE_MAJOR);
	if (h->total_bytes != len)
		return err_set(e, E_CORRUPT, "state: says %llu bytes, has %zu",
			       (unsigned long long)h->total_bytes, len);
	if (h->hash != blob_hash(buf, len))
		return err_set(e, E_CORRUPT, "state: hash does not match its %zu bytes", len);
	return 0;
}

static bool all_zero(const void *p, size_t n)
{
	const uint8_t *b = p;

	for (size_t i = 0; i < n; i++)
		if (b[i])
			return false;
	return true;
}

static bool name_valid(const char name[STATE_NAME_MAX])
{
	size_t n = strnlen(name, STATE_NAME_MAX);

	return n > 0 && n < STATE_NAME_MAX && all_zero(name + n, STATE_NAME_MAX - n);
}

/* Bytes that the record at buf + off takes, or -E_CORRUPT.  `off` is aligned. */
static int64_t check_record(const uint8_t *buf, size_t len, size_t off, struct err *e)
{
	const struct state_record *rec = (const void *)(buf + off);
	size_t room;

	if (len - off < sizeof(*rec))
		return err_set(e, E_CORRUPT, "state: record at byte %zu is cut off", off);
	room = len - off - sizeof(*rec);
	if (!name_valid(rec->name) || rec->reserved)
		return err_set(e, E_CORRUPT, "state: malformed record at byte %zu", off);
	if (rec->len_bytes > room || ALIGN_UP(rec->len_bytes, RECORD_ALIGN) > room)
		return err_set(e, E_CORRUPT, "state: record %s at byte %zu overruns the blob",
			       rec->name, off);
	return sizeof(*rec) + ALIGN_UP(rec->len_bytes, RECORD_ALIGN);
}

static int check_records(const uint8_t *buf, size_t len, uint32_t nr_records, struct err *e)
{
	size_t off = sizeof(struct state_header);

	for (uint32_t i = 0; i < nr_records; i++) {
		int64_t n = check_record(buf, len, off, e);

		if (n < 0)
			return (int)n;
		off += n;
	}
	if (off != len)
		return err_set(e, E_CORRUPT, "state: %zu bytes behind the last record", len - off);
	return 0;
}

int state_reader_init(struct snapd_state_reader *r, const void *buf, size_t len, struct err *e)
{
	const struct state_header *h = buf;
	int ret;

	*r = (struct snapd_state_reader){0};
	if ((uintptr_t)buf % RECORD_ALIGN)
		return err_set(e, EINVAL, "state: blob is not 8-byte aligned in memory");
	if (len < sizeof(*h) || len > STATE_MAX_BYTES)
		return err_set(e, E_CORRUPT, "state: %zu bytes cannot be a state blob", len);
	ret = check_header(h, buf, len, e);
	if (!ret)
		ret = check_records(buf, len, h->nr_records, e);
	if (ret)
		return ret;
	*r = (struct snapd_state_reader){.buf = buf, .len = len, .nr_records = h->nr_records};
	return 0;
}

const struct state_record *state_next(const struct snapd_state_reader *r,
				      const struct state_record *prev)
{
	const uint8_t *next;

	if (!r->buf)
		return NULL;
	if (prev)
		next = (const uint8_t *)(prev + 1) + ALIGN_UP(prev->len_bytes, RECORD_ALIGN);
	else
		next = r->buf + sizeof(struct state_header);
	return next == r->buf + r->len ? NULL : (const void *)next;
}

int state_get(const struct snapd_state_reader *r, const char *name, uint32_t instance,
	      uint16_t *version, const void **data, size_t *len_bytes)
{
	const struct state_record *rec = NULL;

	while ((rec = state_next(r, rec))) {
		if (rec->instance != instance || strcmp(rec->name, name) != 0)
			continue;
		*version = rec->version;
		*data = rec + 1;
		*len_bytes = rec->len_bytes;
		return 0;
	}
	return -ENOENT;
}
