/* SPDX-License-Identifier: MIT */
/*
 * Goal: what is put into a blob comes out of it, and nothing else does: cut off anywhere, with any
 * bit flipped, of another type, repository or key, it is refused with a reason.
 * Method: blobs of every type, open and sealed: there and back, every truncation, every single
 * bit.  Where encryption is to notice it, the object's name is made to agree first, as one who had
 * that key would.
 */
#include <errno.h>
#include <malloc.h>
#include <sodium.h>

#include "snapd/backup/blob.h"
#include "tests/lib/damage.h"

static int decode_blob(const struct repo_keys *k, enum bk_type type, const struct bk_name *name,
		       const void *bytes, size_t len)
{
	_cleanup_free_ uint8_t *copy = copy_of(bytes, len), *payload = NULL;
	struct err e = {0};
	size_t n;
	int rc = blob_decode(k, type, name, copy, len, &payload, &n, &e);

	CHECK((rc == 0) == !e.text[0] && (rc == 0) == (payload != NULL));
	return rc;
}

/* Its name made to agree. */
static int decode_renamed(const struct repo_keys *k, enum bk_type type, const void *bytes,
			  size_t len)
{
	struct bk_name name;

	keys_object_name(k, bytes, len, NULL, 0, &name);
	return decode_blob(k, type, &name, bytes, len);
}

static void damage_blob(const struct repo_keys *k, enum bk_type type, struct blob *b)
{
	struct bk_header good, h;

	memcpy(&good, b->bytes, sizeof(good));
	h = good;
	for (size_t len = 0; len < b->len; len++) {
		CHECK(refused(decode_blob(k, type, &b->name, b->bytes, len)));
		CHECK(refused(decode_renamed(k, type, b->bytes, len)));
		if (len >= sizeof(h)) { /* and says so */
			h.body_bytes = len - sizeof(h);
			memcpy(b->bytes, &h, sizeof(h));
			CHECK(refused(decode_renamed(k, type, b->bytes, len)));
			memcpy(b->bytes, &good, sizeof(good));
		}
	}
	for (size_t bit = 0; bit < 8 * b->len; bit++) {
		flip(b->bytes, bit);
		CHECK(refused(decode_blob(k, type, &b->name, b->bytes, b->len)));
		/* No bytes are no bytes under either codec. */
		if (k->sealed || (has_meaning(bit / 8) && b->len > sizeof(struct bk_header)))
			CHECK(refused(decode_renamed(k, type, b->bytes, b->len)));
		flip(b->bytes, bit);
	}
}

static void wrong_blob(const struct repo_keys *k, enum bk_type type, const struct blob *b)
{
	struct repo_keys other = *k;

	for (int t = BK_PACK; t <= BK_TOMB; t++)
		CHECK((decode_blob(k, (enum bk_type)t, &b->name, b->bytes, b->len) == 0) ==
		      (t == (int)type));
	other.repo[5]++;
	CHECK(decode_blob(&other, type, &b->name, b->bytes, b->len) == -E_CORRUPT);
	other = *k;
	other.names[5]++;
	CHECK(decode_blob(&other, type, &b->name, b->bytes, b->len) == -E_CORRUPT);
	other = *k;
	other.bodies[5]++;
	CHECK((decode_blob(&other, type, &b->name, b->bytes, b->len) == 0) == !k->sealed);
	other = *k;
	other.sealed = !k->sealed;
	CHECK(decode_renamed(&other, type, b->bytes, b->len) == -E_CORRUPT);
}

static void test_blob(const struct repo_keys *k, enum bk_type type, size_t len, bool noise)
{
	uint8_t payload[512], *got;
	struct blob b, again;
	struct err e = {0};
	size_t got_len;

	memset(payload, 7, sizeof(payload));
	if (noise)
		randombytes_buf(payload, sizeof(payload));
	CHECK(!blob_encode(k, type, payload, len, &b, &e));
	CHECK(!blob_decode(k, type, &b.name, b.bytes, b.len, &got, &got_len, &e));
	CHECK(got_len == len && !memcmp(got, payload, len));
	free(got);
	CHECK((memmem(b.bytes, b.len, payload, 16) != NULL) == (noise && !k->sealed && len >= 16));
	/* The same once more has another name: one that was deleted does not come back. */
	CHECK(!blob_encode(k, type, payload, len, &again, &e));
	CHECK(memcmp(&b.name, &again.name, sizeof(b.name)) != 0);
	blob_deinit(&again);
	damage_blob(k, type, &b);
	wrong_blob(k, type, &b);
	blob_deinit(&b);
}

static void test_blobs(const struct repo_keys *k)
{
	for (int type = BK_MAP; type <= BK_TOMB; type++) {
		test_blob(k, (enum bk_type)type, 400, false);
		test_blob(k, (enum bk_type)type, 32, true);
	}
	test_blob(k, BK_STATE, 0, false);
	test_blob(k, BK_STATE, 300, true);
}

int main(void)
{
	char key_path[] = "/tmp/backup-blob-XXXXXX";

	/* A header may claim 256 MiB: they are allocated, and not to be filled by MALLOC_PERTURB_.
	 */
	mallopt(M_PERTURB, 0);
	make_key_file(key_path, 1);
	for (int sealed = 0; sealed < 2; sealed++) {
		struct bk_config config;
		struct repo_keys keys = make_keys(sealed ? key_path : NULL, &config);

		test_blobs(&keys);
	}
	CHECK(!unlink(key_path));
	printf("blobs: there and back; damaged, foreign: refused\n");
	return 0;
}
