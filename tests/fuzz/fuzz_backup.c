/* SPDX-License-Identifier: MIT */
/*
 * Any bytes as objects of a backup repository, under keys that everybody knows.  First byte:
 * what to do; second: bit 0: the repository is sealed, the rest: the object's type.  Names and
 * hashes are made to agree, and a table and its runs are sealed, as a hostile writer that has
 * the keys would: what lies behind them is to be reached.
 */
#include <errno.h>
#include <sodium.h>
#include <string.h>

#include "snapd/backup/blob.h"
#include "snapd/backup/layer.h"
#include "snapd/backup/manifest.h"
#include "snapd/backup/pack.h"
#include "snapd/util/cleanup.h"
#include "tests/fuzz/fuzz.h"

#define GFN_END (1ull << 52)

enum what { CONFIG, OBJECT, FORGED_OBJECT, MAP, MANIFEST, PACK, NR_WHATS };

static const struct repo_keys open_keys = {
	.repo = "repo", .grace_s = 60, .names = {1}, .pages = {2}};
static const struct repo_keys sealed_keys = {.repo = "repo",
					     .sealed = true,
					     .grace_s = 60,
					     .names = {1},
					     .pages = {2},
					     .bodies = {3},
					     .runs = {4}};

static void config(const uint8_t *data, size_t len)
{
	struct bk_config c = {0};
	struct repo_keys keys = {0};
	struct err e = {0};
	int rc;

	memcpy(&c, data, len < sizeof(c) ? len : sizeof(c));
	crypto_generichash_blake2b(c.hash, sizeof(c.hash), (const void *)&c,
				   offsetof(struct bk_config, hash), NULL, 0);
	rc = keys_open(&c, len, NULL, &keys, &e);
	PROMISE(!rc || rc == -E_CORRUPT || rc == -EPROTO || rc == -ENOKEY);
	PROMISE((rc == 0) == !e.text[0]);
	if (!rc)
		PROMISE(len == sizeof(c) && !keys.sealed && keys.grace_s >= BK_GRACE_MIN_S &&
			keys.grace_s <= BK_GRACE_MAX_S);
}

/* What does not hang on luck. */
static void forge_header(const struct repo_keys *k, struct bk_header *h, enum bk_type type)
{
	memcpy(h->magic, BK_OBJECT_MAGIC, sizeof(h->magic));
	h->major = BK_MAJOR;
	h->type = (uint8_t)type;
	h->flags = k->sealed ? BK_OBJECT_SEALED : 0;
	memcpy(h->repo, k->repo, sizeof(h->repo));
}

static void decode_object(const struct repo_keys *k, enum bk_type type, const uint8_t *bytes,
			  size_t len)
{
	_cleanup_free_ uint8_t *payload = NULL, *other = NULL;
	struct bk_name name;
	struct err e = {0};
	size_t n = 0;
	int rc;

	keys_object_name(k, bytes, len, NULL, 0, &name);
	rc = blob_decode(k, type, &name, bytes, len, &payload, &n, &e);
	PROMISE(!rc || rc == -E_CORRUPT || rc == -EPROTO || rc == -ENOMEM);
	PROMISE((rc == 0) == !e.text[0] && (rc == 0) == (payload != NULL));
	if (!rc) {
		_cleanup_free_ void *all = malloc(n + 1); /* of it is there */

		PROMISE(all && memcpy(all, payload, n));
	}
	name.b[0] ^= 1;
	PROMISE(blob_decode(k, type, &name, bytes, len, &other, &n, NULL) && !other);
}

static void forged_object(const struct repo_keys *k, enum bk_type type, const uint8_t *data,
			  size_t len)
{
	_cleanup_free_ uint8_t *bytes = calloc(1, len + sizeof(struct bk_header) + BK_TAG_BYTES);
	struct bk_header *h = (struct bk_header *)bytes;

	PROMISE(bytes);
	memcpy(bytes, data, len);
	len = len < sizeof(*h) ? sizeof(*h) : len;
	forge_header(k, h, type);
	h->body_bytes = len - sizeof(*h) + (k->sealed ? BK_TAG_BYTES : 0);
	if (k->sealed)
		keys_seal(k, h, 0, bytes + sizeof(*h), len - sizeof(*h));
	decode_object(k, type, bytes, sizeof(*h) + h->body_bytes);
}

/* There and back; then as what it says it is. */
static void round_trip(const struct repo_keys *k, enum bk_type type, const uint8_t *data,
		       size_t len)
{
	_cleanup_free_ uint8_t *payload = NULL;
	struct blob b = {0};
	size_t n;

	PROMISE(!blob_encode(k, type, data, len, &b, NULL));
	PROMISE(!blob_decode(k, type, &b.name, b.bytes, b.len, &payload, &n, NULL));
	PROMISE(n == len && !memcmp(payload, data, n));
	blob_deinit(&b);
}

struct seen {
	uint64_t next;
	const struct packset *packs;
};

static int see_run(void *arg, const struct layer_run *run, struct err *e)
{
	struct seen *s = arg;

	(void)e;
	PROMISE(run->nr && run->gfn >= s->next && run->gfn < GFN_END &&
		run->nr <= GFN_END - run->gfn);
	PROMISE(run->kind == LAYER_ZERO || run->kind == LAYER_PAGES || run->kind == LAYER_GONE);
	if (run->kind == LAYER_PAGES)
		PROMISE(run->pack < s->packs->nr && run->entry < BK_PACK_PAGES &&
			run->nr <= BK_PACK_PAGES - run->entry);
	s->next = run->gfn + run->nr;
	return 0;
}

static void map(const uint8_t *data, size_t len)
{
	_cleanup_(packset_deinit) struct packset packs = {0};
	struct seen seen = {.packs = &packs};
	struct err e = {0};
	int rc = layer_decode(data, len, &packs, see_run, &seen, &e);

	PROMISE(!rc || rc == -E_CORRUPT || rc == -ENOMEM);
	PROMISE((rc == 0) == !e.text[0]);
}

static void manifest(const uint8_t *data, size_t len)
{
	struct err e = {0};
	struct manifest m;
	uint8_t *again;
	size_t n;
	int rc = manifest_decode(data, len, &m, &e);

	PROMISE(!rc || rc == -E_CORRUPT || rc == -ENOMEM);
	PROMISE((rc == 0) == !e.text[0]);
	if (rc)
		return;
	PROMISE(m.m.nr_layers && m.m.nr_layers <= BK_LAYERS_MAX && strlen(m.m.vm) < sizeof(m.m.vm));
	PROMISE(!m.m.cmdline_bytes || !m.cmdline[m.m.cmdline_bytes - 1]);
	PROMISE(!manifest_encode(&m, &again, &n) && n == len && !memcmp(again, data, len));
	free(again);
	manifest_deinit(&m);
}

/* A run from the bytes that are left. */
static void open_run(const struct repo_keys *k, const struct pack_head *h, uint32_t run,
		     const uint8_t *data, size_t len)
{
	uint32_t stored = h->runs[run].stored_bytes, tag = k->sealed ? BK_TAG_BYTES : 0;
	_cleanup_free_ uint8_t *bytes = calloc(1, stored), *dst = malloc(BK_RUN_BYTES);
	struct err e = {0};
	int rc;

	PROMISE(bytes && dst && stored >= tag && stored <= BK_RUN_BYTES + tag);
	memcpy(bytes, data, len < stored - tag ? len : stored - tag);
	if (k->sealed)
		keys_seal(k, &h->header, run + 1, bytes, stored - tag);
	rc = pack_run_open(k, h, run, bytes, dst, &e);
	PROMISE(!rc || rc == -E_CORRUPT || rc == -ENOMEM);
	PROMISE((rc == 0) == !e.text[0]);
}

static void check_head(const struct repo_keys *k, const struct pack_head *h, const uint8_t *rest,
		       size_t len)
{
	uint32_t nr_runs = h->header.nr_runs;

	PROMISE(h->first[nr_runs] == h->header.nr_pages && h->header.nr_pages <= BK_PACK_PAGES);
	PROMISE(h->offsets[nr_runs] - h->offsets[0] == h->header.body_bytes);
	for (uint32_t i = 0; i < nr_runs; i++) {
		PROMISE(h->first[i] < h->first[i + 1] && h->offsets[i] < h->offsets[i + 1]);
		PROMISE(pack_run_of(h, h->first[i]) == i);
	}
	for (uint32_t i = 0; i < nr_runs && i < 4; i++)
		open_run(k, h, i, rest, len);
}

/* Header, table in the clear, bytes of runs. */
static void pack(const struct repo_keys *k, const uint8_t *data, size_t len)
{
	size_t tag = k->sealed ? BK_TAG_BYTES : 0, want, table;
	_cleanup_free_ uint8_t *bytes = NULL;
	struct pack_head head;
	struct bk_header h = {0};
	struct bk_name name;
	struct err e = {0};
	int rc;

	memcpy(&h, data, len < sizeof(h) ? len : sizeof(h));
	forge_header(k, &h, BK_PACK);
	h.table_bytes = h.plain_bytes + tag;
	rc = pack_head_bytes(k, &h, sizeof(h), &want, &e);
	PROMISE(!rc || rc == -E_CORRUPT);
	PROMISE((rc == 0) == !e.text[0]);
	if (rc)
		return;
	PROMISE(want == sizeof(h) + h.table_bytes);
	bytes = calloc(1, want);
	PROMISE(bytes);
	memcpy(bytes, &h, sizeof(h));
	table = len < sizeof(h) ? 0 : MIN(len - sizeof(h), (size_t)h.plain_bytes);
	if (table)
		memcpy(bytes + sizeof(h), data + sizeof(h), table);
	if (k->sealed)
		keys_seal(k, &h, 0, bytes + sizeof(h), h.plain_bytes);
	keys_object_name(k, bytes, want, NULL, 0, &name);
	rc = pack_head_decode(k, &name, bytes, want, &head, &e);
	PROMISE(!rc || rc == -E_CORRUPT || rc == -ENOMEM);
	PROMISE((rc == 0) == !e.text[0]);
	if (rc)
		return;
	table = MIN(len, sizeof(h) + table);
	check_head(k, &head, data + table, len - table);
	pack_head_deinit(&head);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
	const struct repo_keys *k;
	enum bk_type type;

	if (len < 2)
		return 0;
	k = data[1] & 1 ? &sealed_keys : &open_keys;
	type = (enum bk_type)(BK_MAP + (data[1] >> 1) % 5);
	switch ((enum what)(data[0] % NR_WHATS)) {
	case CONFIG:
		config(data + 2, len - 2);
		break;
	case OBJECT:
		decode_object(k, type, data + 2, len - 2);
		break;
	case FORGED_OBJECT:
		forged_object(k, type, data + 2, len - 2);
		round_trip(k, type, data + 2, len - 2);
		break;
	case MAP:
		map(data + 2, len - 2);
		break;
	case MANIFEST:
		manifest(data + 2, len - 2);
		break;
	case PACK:
		pack(k, data + 2, len - 2);
		break;
	case NR_WHATS:
		break;
	}
	return 0;
}
