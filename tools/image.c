/* SPDX-License-Identifier: MIT */
/* The files of an exported snapshot; see image.h. */
#include "tools/image.h"

#include <stdlib.h>
#include <string.h>

#include "snapd/state.h"
#include "snapd/util/cleanup.h"
#include "tools/out.h"
#include "tools/snapctl.h"

/* Runs above this address go behind the others: ext4 ends at 16 TiB. */
#define GPA_OFFSET_MAX (8ull << 40)
#define GPA_MAX	       (1ull << 62)

static int base64_value(char c)
{
	if (c >= 'A' && c <= 'Z')
		return c - 'A';
	if (c >= 'a' && c <= 'z')
		return c - 'a' + 26;
	if (c >= '0' && c <= '9')
		return c - '0' + 52;
	return c == '+' ? 62 : c == '/' ? 63 : -1;
}

void *image_payload(json_t *record, size_t *len)
{
	json_t *text = json_object_get(record, "payload");
	const char *s = json_string_value(text);
	size_t n = json_string_length(text);
	uint8_t *out = s ? malloc(n / 4 * 3 + 3) : NULL, *o = out;
	uint32_t bits = 0;

	while (n && s && s[n - 1] == '=')
		n--;
	for (size_t i = 0; out && i < n; i++) {
		int v = base64_value(s[i]);

		if (v < 0) {
			free(out);
			return NULL;
		}
		bits = bits << 6 | (uint32_t)v;
		if (i % 4)
			*o++ = (uint8_t)(bits >> (6 - i % 4 * 2));
	}
	*len = out ? (size_t)(o - out) : 0;
	return out;
}

json_t *image_record(json_t *state, const char *name)
{
	json_t *rec;
	size_t i;

	json_array_foreach(json_object_get(state, "records"), i,
			   rec) if (!strcmp(get_text(rec, "name"), name)) return rec;
	return NULL;
}

void image_map_deinit(struct image_map *m)
{
	free(m->runs);
}

static int page_size_of(json_t *state, uint64_t *ret)
{
	*ret = get_u64(json_object_get(state, "snapshot"), "page_size");
	if (*ret < 4096 || *ret > 65536 || *ret & (*ret - 1))
		return fail(EXIT_FAILED, "the description has no proper page size");
	return 0;
}

static int add_run(struct image_map *m, uint64_t gpa, uint64_t len)
{
	struct image_run *last = m->nr ? &m->runs[m->nr - 1] : NULL;

	if (last && last->gpa + last->len == gpa && gpa != GPA_OFFSET_MAX) {
		last->len += len;
	} else {
		last = &m->runs[m->nr++];
		last->gpa = gpa;
		last->len = len;
		last->offset = gpa < GPA_OFFSET_MAX ? gpa : m->file_bytes;
	}
	m->file_bytes = last->offset + last->len;
	return 0;
}

static json_t *map_json(const struct image_map *m)
{
	json_t *rows = json_array();

	for (size_t i = 0; i < m->nr; i++)
		json_array_append_new(rows, json_pack("[III]", (json_int_t)m->runs[i].gpa,
						      (json_int_t)m->runs[i].len,
						      (json_int_t)m->runs[i].offset));
	return rows;
}

int image_map_make(json_t *state, const char *file, struct image_map *ret)
{
	const char *base = strrchr(file, '/');
	_cleanup_free_ struct state_piece *p = NULL;
	size_t len = 0;
	int rc = page_size_of(state, &ret->page_size);

	if (rc)
		return rc;
	p = image_payload(image_record(state, "pieces"), &len);
	ret->runs = calloc(len / sizeof(*p) + 1, sizeof(*ret->runs));
	if (!p || !ret->runs)
		return fail(EXIT_CORRUPT, "the snapshot does not say what its memory consists of");
	for (size_t i = 0; i < len / sizeof(*p); i++)
		add_run(ret, p[i].home_gfn * ret->page_size, p[i].nr_pages * ret->page_size);
	json_object_set_new(state, "memory",
			    json_pack("{ss sI so}", "file", base ? base + 1 : file, "bytes",
				      (json_int_t)ret->file_bytes, "map", map_json(ret)));
	return 0;
}

static int read_row(json_t *row, struct image_run *ret)
{
	json_int_t v[3];

	if (json_unpack(row, "[III]", &v[0], &v[1], &v[2]))
		return -1;
	for (int i = 0; i < 3; i++)
		if (v[i] < 0 || (uint64_t)v[i] > GPA_MAX)
			return -1;
	*ret = (struct image_run){(uint64_t)v[0], (uint64_t)v[1], (uint64_t)v[2]};
	return 0;
}

int image_map_read(json_t *state, const char *json_path, struct image_map *ret)
{
	json_t *memory = json_object_get(state, "memory"), *map = json_object_get(memory, "map");
	uint64_t end = 0;
	json_t *row;
	size_t i;
	int rc = page_size_of(state, &ret->page_size);

	if (rc)
		return rc;
	ret->runs = calloc(json_array_size(map) + 1, sizeof(*ret->runs));
	if (!ret->runs || !json_array_size(map))
		return fail(EXIT_FAILED, "%s: no \"memory\" with a \"map\"", json_path);
	json_array_foreach(map, i, row)
	{
		struct image_run *r = &ret->runs[i];
		uint64_t mask = ret->page_size - 1;

		if (read_row(row, r) || (r->gpa | r->len | r->offset) & mask || r->gpa < end)
			return fail(EXIT_FAILED, "%s: row %zu of the map is malformed", json_path,
				    i);
		end = r->gpa + r->len;
	}
	ret->nr = i;
	ret->file_bytes = get_u64(memory, "bytes");
	return 0;
}

int64_t image_offset(const struct image_map *m, uint64_t gpa, uint64_t *len)
{
	size_t lo = 0, hi = m->nr;

	while (lo < hi) {
		size_t mid = lo + (hi - lo) / 2;

		if (m->runs[mid].gpa + m->runs[mid].len <= gpa)
			lo = mid + 1;
		else
			hi = mid;
	}
	if (lo == m->nr || m->runs[lo].gpa > gpa)
		return -1;
	*len = m->runs[lo].gpa + m->runs[lo].len - gpa;
	return (int64_t)(m->runs[lo].offset + (gpa - m->runs[lo].gpa));
}

int image_blob(json_t *state, const char *json_path, struct snapd_state_writer *w, const void **ret,
	       size_t *len)
{
	json_t *rec;
	size_t i;

	json_array_foreach(json_object_get(state, "records"), i, rec)
	{
		size_t n = 0;
		_cleanup_free_ void *payload = image_payload(rec, &n);

		if (!payload || n != get_u64(rec, "bytes"))
			return fail(EXIT_CORRUPT, "%s: record %s has no proper payload", json_path,
				    get_text(rec, "name"));
		if (state_put(w, get_text(rec, "name"), (uint32_t)get_u64(rec, "instance"),
			      (uint16_t)get_u64(rec, "version"), payload, n))
			return fail(EXIT_CORRUPT, "%s: record %s: too much, or a name too long",
				    json_path, get_text(rec, "name"));
	}
	if (state_writer_finish(w, ret, len))
		return fail(EXIT_FAILED, "out of memory");
	return 0;
}

int image_header(json_t *state, const char *json_path, const char *vm, const char *name,
		 const char *note, const char *tags, size_t state_bytes, char **ret)
{
	json_t *snap = json_object_get(state, "snapshot"), *of = json_object_get(state, "vm");
	_cleanup_(cleanup_json) json_t *o = NULL;
	_cleanup_free_ char *line = NULL;
	uint64_t page_size;
	int rc = page_size_of(state, &page_size);

	if (rc)
		return rc;
	o = json_pack("{ss ss sI sI ss* ss ss sI sO*}", "vm", vm, "arch", get_text(of, "arch"),
		      "page_size", (json_int_t)page_size, "state_bytes", (json_int_t)state_bytes,
		      "name", name, "note", note, "tags", tags, "taken_ns",
		      json_integer_value(json_object_get(snap, "taken_ns")), "cmdline",
		      json_object_get(of, "cmdline"));
	line = o ? json_dumps(o, JSON_COMPACT) : NULL;
	if (!line || asprintf(ret, "%s\n", line) < 0)
		return fail(EXIT_FAILED, "%s: not usable as a description", json_path);
	return 0;
}
