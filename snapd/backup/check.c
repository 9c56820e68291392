/* SPDX-License-Identifier: MIT */
/* Is a repository whole?  See check.h. */
#include "snapd/backup/check.h"

#include <errno.h>
#include <sodium.h>
#include <stdlib.h>
#include <string.h>

#include "snapd/backup/pack.h"
#include "snapd/core/contents.h"
#include "snapd/core/job.h"
#include "snapd/util/cleanup.h"

#define TABLE_READ (320u << 10)
#define TOLD_MAX   16 /* snapshots that a damage names */

/* What the maps say of a pack. */
struct wanted {
	uint32_t entries; /* one more than the last that is referred to */
	uint32_t page_size;
};

/* Packs that a map refers to, read once. */
struct seen_map {
	uint32_t *packs; /* owned */
	uint32_t nr;
	bool bad;
};

struct check {
	struct job *job;
	struct repo *r;
	struct check_result *ret;
	struct repo_list list;
	struct packset packs;  /* that maps name */
	struct wanted *wanted; /* owned; by number */
	uint32_t cap_wanted;
	struct packset maps;   /* that were read */
	struct seen_map *seen; /* owned; by number */
	uint32_t cap_seen;
	bool *bad;	 /* owned; packs, by number */
	struct err *why; /* owned; of them */
};

static void check_deinit(struct check *c)
{
	for (uint32_t i = 0; i < MIN(c->maps.nr, c->cap_seen); i++)
		free(c->seen[i].packs);
	repo_list_deinit(&c->list);
	packset_deinit(&c->packs);
	packset_deinit(&c->maps);
	free(c->wanted);
	free(c->seen);
	free(c->bad);
	free(c->why);
}

static int cancelled(const struct check *c, struct err *e)
{
	return atomic_load(&c->job->cancel) ? err_set(e, ECANCELED, "the check was cancelled") : 0;
}

/* What is wrong with an object is no reason to stop; what is wrong on the way to it is. */
static bool is_damage(int rc)
{
	return rc == -E_CORRUPT || rc == -EPROTO;
}

static char *snapshot_label(const struct manifest *m)
{
	char hex[BK_HEX_BYTES], *text;

	name_hex(&m->name, hex);
	if (asprintf(&text, "%s@%.12s", m->m.vm, hex) < 0)
		return NULL;
	return text;
}

static void tell(struct check *c, enum repo_room room, const struct bk_name *name,
		 json_t *snapshots, const struct err *why)
{
	char key[REPO_KEY_BYTES];
	const char *text = why->code ? why->text : "damaged";
	size_t len = strlen(text);
	bool missing = len >= 7 && !strcmp(text + len - 7, "missing");

	json_array_append_new(c->ret->damages,
			      json_pack("{ss ss so ss}", "kind", missing ? "missing" : "corrupt",
					"object", repo_key(room, name, key), "snapshots", snapshots,
					"text", text));
}

static json_t *one_snapshot(const struct manifest *m)
{
	char *label = snapshot_label(m);
	json_t *list = json_array();

	if (label)
		json_array_append_new(list, json_string(label));
	free(label);
	return list;
}

/* ---- manifests and maps ---- */

struct mapping {
	struct check *c;
	uint32_t page_size;
};

static int on_run(void *arg, const struct layer_run *run, struct err *e)
{
	struct mapping *x = arg;
	struct check *c = x->c;
	uint32_t cap = c->cap_wanted ? c->cap_wanted : 256;
	struct wanted *w;

	if (run->kind != LAYER_PAGES)
		return 0;
	if (run->pack >= c->cap_wanted) {
		while (cap <= run->pack)
			cap *= 2;
		w = realloc(c->wanted, cap * sizeof(*w));
		if (!w)
			return err_errno(e, ENOMEM, "verify");
		memset(w + c->cap_wanted, 0, (cap - c->cap_wanted) * sizeof(*w));
		c->wanted = w;
		c->cap_wanted = cap;
	}
	w = &c->wanted[run->pack];
	if (w->page_size && w->page_size != x->page_size)
		return err_set(e, E_CORRUPT, "pages of one pack are of two sizes");
	w->page_size = x->page_size;
	w->entries = MAX(w->entries, run->entry + (uint32_t)run->nr);
	return 0;
}

/* The packs of a map, as numbers of c->packs. */
static int note_packs(struct check *c, const uint8_t *payload, struct seen_map *ret, struct err *e)
{
	struct bk_map head;

	memcpy(&head, payload, sizeof(head));
	ret->packs = calloc(head.nr_packs + 1, sizeof(*ret->packs));
	if (!ret->packs)
		return err_errno(e, ENOMEM, "verify");
	for (; ret->nr < head.nr_packs; ret->nr++) {
		struct bk_name name;

		memcpy(&name, payload + sizeof(head) + (size_t)ret->nr * sizeof(name),
		       sizeof(name));
		ret->packs[ret->nr] = (uint32_t)packset_find(&c->packs, &name);
	}
	return 0;
}

static int read_map(struct check *c, const struct manifest *m, const struct bk_name *name,
		    struct seen_map *ret, struct err *e)
{
	struct mapping x = {.c = c, .page_size = m->m.page_size};
	_cleanup_free_ uint8_t *payload = NULL;
	struct err why = {0};
	size_t len;
	int rc = repo_get_blob(c->r, REPO_BLOBS, BK_MAP, name, &payload, &len, &why);

	if (!rc) {
		c->ret->bytes_read += len;
		rc = layer_decode(payload, len, &c->packs, on_run, &x, &why);
	}
	if (!rc)
		rc = note_packs(c, payload, ret, &why);
	if (!is_damage(rc))
		return rc ? err_set(e, -rc, "%s", why.text) : 0;
	ret->bad = true;
	tell(c, REPO_BLOBS, name, one_snapshot(m), &why);
	return 0;
}

static int check_map(struct check *c, const struct manifest *m, const struct bk_name *name,
		     struct err *e)
{
	uint32_t n, nr = c->maps.nr, cap = c->cap_seen ? 2 * c->cap_seen : 64;
	struct seen_map *seen;

	if (packset_add(&c->maps, name, &n))
		return err_errno(e, ENOMEM, "verify");
	if (n < nr)
		return 0;
	if (n >= c->cap_seen) {
		seen = realloc(c->seen, cap * sizeof(*seen));
		if (!seen)
			return err_errno(e, ENOMEM, "verify");
		memset(seen + c->cap_seen, 0, (cap - c->cap_seen) * sizeof(*seen));
		c->seen = seen;
		c->cap_seen = cap;
	}
	c->ret->blobs++;
	return read_map(c, m, name, &c->seen[n], e);
}

static int check_state(struct check *c, const struct manifest *m, struct err *e)
{
	_cleanup_free_ uint8_t *payload = NULL;
	struct snapd_state_reader reader;
	const struct state_piece *pieces;
	struct err why = {0};
	struct bk_name name;
	size_t len, nr;
	uint64_t nr_pages;
	int rc;

	memcpy(name.b, m->m.state, sizeof(name.b));
	rc = repo_get_blob(c->r, REPO_BLOBS, BK_STATE, &name, &payload, &len, &why);
	if (!rc && len != m->m.state_bytes)
		rc = err_set(&why, E_CORRUPT, "not as long as its manifest says");
	if (!rc)
		rc = state_reader_init(&reader, payload, len, &why);
	if (!rc)
		rc = contents_pieces(&reader, &pieces, &nr, &nr_pages, &why);
	c->ret->blobs++;
	if (!is_damage(rc))
		return rc ? err_set(e, -rc, "%s", why.text) : 0;
	tell(c, REPO_BLOBS, &name, one_snapshot(m), &why);
	return 0;
}

/* The list may have had it from the cache; what counts is what is in the repository. */
static int check_manifest(struct check *c, const struct manifest *m, struct err *e)
{
	_cleanup_free_ uint8_t *payload = NULL;
	struct err why = {0};
	size_t len;
	int rc = repo_get_blob(c->r, REPO_SNAPSHOTS, BK_MANIFEST, &m->name, &payload, &len, &why);

	if (!rc)
		c->ret->bytes_read += len;
	if (!is_damage(rc))
		return rc ? err_set(e, -rc, "%s", why.text) : 0;
	tell(c, REPO_SNAPSHOTS, &m->name, one_snapshot(m), &why);
	return 0;
}

static int check_snapshot(struct check *c, const struct manifest *m, struct err *e)
{
	int rc = check_manifest(c, m, e) ?: check_state(c, m, e);

	for (uint32_t i = 0; !rc && i < m->m.nr_maps; i++) {
		rc = cancelled(c, e);
		if (!rc)
			rc = check_map(c, m, &m->maps[i], e);
	}
	c->ret->snapshots++;
	return rc;
}

/* ---- packs ---- */

static int read_head(struct check *c, const struct bk_name *name, const char *key, uint8_t *buf,
		     struct pack_head *ret, struct err *e)
{
	struct objstore_info info;
	size_t len, want = 0;
	int rc = objstore_head(c->r->os, key, &info, e);

	if (!rc)
		rc = objstore_get(c->r->os, key, 0, buf, TABLE_READ, &len, e);
	if (!rc)
		rc = pack_head_bytes(&c->r->keys, buf, len, &want, e);
	if (!rc && want > len)
		rc = objstore_get(c->r->os, key, 0, buf, want, &len, e);
	if (!rc)
		rc = pack_head_decode(&c->r->keys, name, buf, len, ret, e);
	if (rc)
		return rc;
	c->ret->bytes_read += len;
	if (ret->offsets[ret->header.nr_runs] == info.size)
		return 0;
	rc = err_set(e, E_CORRUPT, "%llu bytes long, not %llu", (unsigned long long)info.size,
		     (unsigned long long)ret->offsets[ret->header.nr_runs]);
	pack_head_deinit(ret);
	return rc;
}

/* Every run, against the names of its pages. */
static int read_runs(struct check *c, const char *key, const struct pack_head *h, struct err *e)
{
	uint64_t from = h->offsets[0], len = h->offsets[h->header.nr_runs] - from;
	_cleanup_free_ uint8_t *data = malloc(len + 1), *pages = malloc(BK_RUN_BYTES);
	size_t got;
	int rc;

	if (!data || !pages)
		return err_errno(e, ENOMEM, "verify");
	rc = objstore_get(c->r->os, key, from, data, len, &got, e);
	if (!rc && got < len)
		rc = err_set(e, E_CORRUPT, "cut off at byte %llu",
			     (unsigned long long)(from + got));
	for (uint32_t i = 0; !rc && i < h->header.nr_runs; i++)
		rc = pack_run_open(&c->r->keys, h, i, data + (h->offsets[i] - from), pages, e);
	c->ret->bytes_read += rc ? 0 : len;
	c->ret->packs_read++;
	return rc;
}

static int check_pack(struct check *c, uint32_t n, bool read_data, uint8_t *buf, struct err *why)
{
	const struct bk_name *name = &c->packs.names[n];
	struct wanted w = n < c->cap_wanted ? c->wanted[n] : (struct wanted){0};
	char key[REPO_KEY_BYTES];
	struct pack_head h;
	int rc = read_head(c, name, repo_key(REPO_PACKS, name, key), buf, &h, why);

	if (rc == -ENOENT) {
		*why = (struct err){0};
		return err_set(why, E_CORRUPT, "missing");
	}
	if (rc)
		return rc;
	if (w.entries > h.header.nr_pages || (w.page_size && w.page_size != pack_page_size(&h)))
		rc = err_set(why, E_CORRUPT, "has not the pages that maps refer to");
	if (!rc && read_data)
		rc = read_runs(c, key, &h, why);
	pack_head_deinit(&h);
	return rc;
}

static int check_packs(struct check *c, uint32_t percent, struct err *e)
{
	_cleanup_free_ uint8_t *buf =
		malloc(sizeof(struct bk_header) + BK_TAG_BYTES +
		       BK_PACK_PAGES * (sizeof(struct bk_run) + BK_NAME_BYTES));
	int rc = 0;

	c->bad = calloc(c->packs.nr + 1, sizeof(*c->bad));
	c->why = calloc(c->packs.nr + 1, sizeof(*c->why));
	if (!buf || !c->bad || !c->why)
		return err_errno(e, ENOMEM, "verify");
	atomic_store(&c->job->total, c->packs.nr);
	atomic_store(&c->job->phase, percent ? "reading packs" : "looking at packs");
	for (uint32_t i = 0; !rc && i < c->packs.nr; i++) {
		bool data = percent && randombytes_uniform(100) < percent;

		rc = check_pack(c, i, data, buf, &c->why[i]);
		c->bad[i] = is_damage(rc);
		if (c->bad[i])
			rc = 0;
		else if (rc)
			err_set(e, -rc, "%s", c->why[i].text);
		if (!rc)
			rc = cancelled(c, e);
		atomic_fetch_add(&c->job->done, 1);
	}
	c->ret->packs = c->packs.nr;
	return rc;
}

/* ---- whom it hits ---- */

static bool refers_to(const struct check *c, const struct manifest *m, uint32_t pack)
{
	for (uint32_t i = 0; i < m->m.nr_maps; i++) {
		const struct seen_map *s = &c->seen[packset_find(&c->maps, &m->maps[i])];

		for (uint32_t k = 0; k < s->nr; k++)
			if (s->packs[k] == pack)
				return true;
	}
	return false;
}

static void tell_pack(struct check *c, uint32_t pack)
{
	json_t *list = json_array();
	size_t more = 0;

	for (size_t i = 0; i < c->list.nr; i++) {
		char *label;

		if (!refers_to(c, &c->list.all[i], pack))
			continue;
		if (json_array_size(list) == TOLD_MAX) {
			more++;
			continue;
		}
		label = snapshot_label(&c->list.all[i]);
		if (label)
			json_array_append_new(list, json_string(label));
		free(label);
	}
	if (more)
		json_array_append_new(list, json_sprintf("and %zu more", more));
	tell(c, REPO_PACKS, &c->packs.names[pack], list, &c->why[pack]);
}

int repo_check(struct job *job, struct repo *r, uint32_t percent, struct check_result *ret,
	       struct err *e)
{
	_cleanup_(check_deinit) struct check c = {.job = job, .r = r, .ret = ret};
	int rc;

	*ret = (struct check_result){.damages = json_array()};
	job->unit = "objects";
	atomic_store(&job->phase, "reading maps");
	rc = repo_list(r, &c.list, e);
	for (size_t i = 0; !rc && i < c.list.nr_bad; i++)
		tell(&c, REPO_SNAPSHOTS, &c.list.bad[i].name, json_array(), &c.list.bad[i].why);
	for (size_t i = 0; !rc && i < c.list.nr; i++)
		rc = check_snapshot(&c, &c.list.all[i], e);
	if (!rc)
		rc = check_packs(&c, percent, e);
	for (uint32_t i = 0; !rc && i < c.packs.nr; i++)
		if (c.bad[i])
			tell_pack(&c, i);
	return rc;
}
