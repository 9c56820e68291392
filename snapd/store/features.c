/* SPDX-License-Identifier: MIT */
/*
 * What a reader of this store must understand beside the format's first version: a
 * list of names in the index.  A name that this program does not know is a reason
 * to refuse the store.  A feature is recorded, durably, before the first byte that
 * needs it is written, and stays.  The same record holds how new pages are stored.
 *
 * Threads: while the store is opened, one; features_need() and features_add() any.
 */
#include "snapd/store/internal.h"

#include <string.h>

#include "snapd/store/reclog.h"

static const char *const feature_names[] = {
	[FEATURE_LZ4] = "lz4",	       [FEATURE_ZSTD] = "zstd",	  [FEATURE_SEALED] = "sealed",
	[FEATURE_JOURNAL] = "journal", [FEATURE_HOLES] = "holes",
};
static_assert(ARRAY_SIZE(feature_names) == NR_FEATURES, "a name for each feature");

#define NAMES_MAX 64u /* bytes: all names, each with its NUL */

static const struct ix_key key_features = {.b = "features", .len = 8};

static int feature_of(const char *name)
{
	for (int i = 0; i < NR_FEATURES; i++)
		if (!strcmp(name, feature_names[i]))
			return i;
	return -1;
}

static int parse_names(struct store *s, const char *names, size_t len, struct err *e)
{
	if (len && names[len - 1])
		return err_set(e, E_CORRUPT, "store %s: its list of features is cut off", s->dir);
	for (size_t at = 0; at < len; at += strlen(names + at) + 1) {
		int feature = feature_of(names + at);

		if (feature < 0)
			return err_set(e, EPROTO,
				       "store %s uses \"%.40s\", which this snapd does not know",
				       s->dir, names + at);
		s->features |= 1u << feature;
	}
	return 0;
}

static bool valid_policy(const struct rec_features *rec)
{
	if (rec->codec == CODEC_ZSTD)
		return rec->level >= CODEC_ZSTD_LEVEL_MIN && rec->level <= CODEC_ZSTD_LEVEL_MAX;
	return rec->codec <= CODEC_ZSTD && !rec->level;
}

int features_load(struct store *s, struct err *e)
{
	struct rec_features rec;
	const void *names;
	struct ix_txn t;
	size_t len;
	int r;

	r = index_begin(s->index, &t, e);
	if (r)
		return r;
	r = index_get(&t, IX_META, &key_features, &rec, sizeof(rec), &names, &len, e);
	if (!r)
		r = parse_names(s, names, len, e);
	index_end(&t);
	if (r)
		return r == -ENOENT ? 0 : r; /* a store of the first version: none */
	if (!valid_policy(&rec))
		return err_set(e, E_CORRUPT, "store %s: compression %u, level %d are impossible",
			       s->dir, rec.codec, rec.level);
	s->policy = (struct codec_policy){(enum page_codec)rec.codec, rec.level};
	return 0;
}

static size_t list_names(uint32_t features, char names[NAMES_MAX])
{
	size_t len = 0;

	for (int i = 0; i < NR_FEATURES; i++) {
		size_t n = strlen(feature_names[i]) + 1;

		if (!(features & 1u << i))
			continue;
		assert(len + n <= NAMES_MAX);
		memcpy(names + len, feature_names[i], n);
		len += n;
	}
	return len;
}

int features_put(struct ix_txn *t, void *arg, struct err *e)
{
	const struct store *s = arg;
	struct rec_features rec = {.codec = s->policy.codec, .level = s->policy.level};
	char names[NAMES_MAX];
	size_t len = list_names(s->features, names);

	return index_put(t, IX_META, &key_features, &rec, sizeof(rec), names, len, e);
}

int features_log(const struct store *s, struct reclog *log)
{
	struct rec_features rec = {.codec = s->policy.codec, .level = s->policy.level};
	char names[NAMES_MAX];
	size_t len = list_names(s->features, names);

	index_seal(s->index, IX_META, &key_features, &rec, sizeof(rec), names, len);
	return reclog_add(log, IX_META, key_features.b, key_features.len, &rec, sizeof(rec), names,
			  len);
}

static uint32_t features_of(struct codec_policy policy)
{
	if (policy.codec == CODEC_RAW)
		return 0;
	return 1u << (policy.codec == CODEC_LZ4 ? FEATURE_LZ4 : FEATURE_ZSTD);
}

int features_choose(struct store *s, const char *compression, struct err *e)
{
	int r = codec_parse(compression, &s->policy, e);

	s->features |= s->seal ? 1u << FEATURE_SEALED : 0;
	s->features |= r ? 0 : features_of(s->policy);
	return r;
}

int features_switch(struct store *s, const char *compression, struct err *e)
{
	struct codec_policy old = s->policy;
	int r = features_choose(s, compression, e);

	if (r || (s->policy.codec == old.codec && s->policy.level == old.level))
		return r;
	return index_update(s->index, features_put, s, e);
}

/* A feature more, of one snapshot's pages; how new pages are stored stays as it is. */
struct need {
	const struct store *s;
	uint32_t features;
};

static int need_put(struct ix_txn *t, void *arg, struct err *e)
{
	const struct need *n = arg;
	struct rec_features rec = {.codec = n->s->policy.codec, .level = n->s->policy.level};
	char names[NAMES_MAX];
	size_t len = list_names(n->features, names);

	return index_put(t, IX_META, &key_features, &rec, sizeof(rec), names, len, e);
}

int features_add(struct store *s, uint32_t more, struct err *e)
{
	static pthread_mutex_t adding = PTHREAD_MUTEX_INITIALIZER;
	struct need n = {.s = s};
	int r = 0;

	scoped_lock(&adding);
	n.features = s->features | more;
	if (n.features != s->features)
		r = index_update(s->index, need_put, &n, e);
	if (!r)
		s->features |= more;
	return r;
}

int features_need(struct store *s, struct codec_policy policy, struct err *e)
{
	return features_add(s, features_of(policy), e);
}
