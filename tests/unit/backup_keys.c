/* SPDX-License-Identifier: MIT */
/*
 * Goal: a backup repository's config and names are what they were made: cut off anywhere, with
 * any bit flipped, of another version, or opened with another key, a config is refused with a
 * reason. Method: configs, open and sealed: there and back, every truncation, every single bit;
 * then with a hash that agrees, as anyone could make it.
 */
#include <errno.h>
#include <sodium.h>

#include "tests/lib/damage.h"

static char key_path[] = "/tmp/backup-keys-XXXXXX", other_path[] = "/tmp/backup-keys-XXXXXX";

static int open_config(const struct bk_config *c, size_t len, const char *key)
{
	struct repo_keys keys = {0};
	struct err e = {0};
	int rc = keys_open(c, len, key, &keys, &e);

	CHECK((rc == 0) == !e.text[0]);
	return rc;
}

/* With a hash that agrees, as anyone could make it. */
#define FORGED(field, value)                                                           \
	({                                                                             \
		struct bk_config forged_ = good;                                       \
		forged_.field = (value);                                               \
		crypto_generichash_blake2b(forged_.hash, sizeof(forged_.hash),         \
					   (const void *)&forged_,                     \
					   offsetof(struct bk_config, hash), NULL, 0); \
		open_config(&forged_, sizeof(forged_), sealed ? key_path : NULL);      \
	})

static void test_config(bool sealed)
{
	const char *key = sealed ? key_path : NULL;
	struct bk_config good, bad;
	struct repo_keys keys = make_keys(key, &good), again = {0};
	struct err e = {0};

	CHECK(!keys_open(&good, sizeof(good), key, &again, &e));
	CHECK(!memcmp(keys.repo, again.repo, sizeof(keys.repo)) && again.sealed == sealed &&
	      again.grace_s == keys.grace_s && !memcmp(keys.names, again.names, 32) &&
	      !memcmp(keys.pages, again.pages, 32) && !memcmp(keys.bodies, again.bodies, 32) &&
	      !memcmp(keys.runs, again.runs, 32));
	for (size_t len = 0; len < sizeof(good); len++)
		CHECK(open_config(&good, len, key) == -E_CORRUPT);
	CHECK(open_config(&good, sizeof(good) + 1, key) == -E_CORRUPT);
	for (size_t bit = 0; bit < 8 * sizeof(good); bit++) {
		bad = good;
		flip(&bad, bit);
		CHECK(open_config(&bad, sizeof(bad), key) == -E_CORRUPT);
	}
	CHECK(FORGED(created_ns, good.created_ns) == 0);
	CHECK(FORGED(major, BK_MAJOR + 1) == -EPROTO);
	CHECK(FORGED(features, good.features | 2) == -EPROTO);
	CHECK(FORGED(grace_s, BK_GRACE_MIN_S - 1) == -E_CORRUPT);
	CHECK(FORGED(grace_s, BK_GRACE_MAX_S + 1) == -E_CORRUPT);
	if (!sealed) {
		CHECK(open_config(&good, sizeof(good), key_path) == -EPROTO);
		CHECK(FORGED(features, BK_FEATURE_SEALED) == -ENOKEY);
		return;
	}
	CHECK(open_config(&good, sizeof(good), NULL) == -ENOKEY);
	CHECK(open_config(&good, sizeof(good), other_path) == -EKEYREJECTED);
	CHECK(open_config(&good, sizeof(good), "/nowhere") == -ENOENT);
	CHECK(FORGED(features, 0) == -EPROTO); /* a key is set: it is not to be used in the clear */
	CHECK(FORGED(grace_s, good.grace_s + 1) == -EKEYREJECTED);
	CHECK(FORGED(repo[0], good.repo[0] ^ 1) == -EKEYREJECTED);
	CHECK(FORGED(salt[0], good.salt[0] ^ 1) == -EKEYREJECTED);
	CHECK(FORGED(nonce[23], good.nonce[23] ^ 1) == -EKEYREJECTED);
	CHECK(FORGED(wrapped[31], good.wrapped[31] ^ 1) == -EKEYREJECTED);
	CHECK(FORGED(tag[0], good.tag[0] ^ 1) == -EKEYREJECTED);
}

static void test_names(void)
{
	struct bk_name name, again;
	char hex[BK_HEX_BYTES + 1] = {0};

	randombytes_buf(&name, sizeof(name));
	name_hex(&name, hex);
	CHECK(!name_parse(hex, &again) && !memcmp(&name, &again, sizeof(name)));
	strcat(hex, "0");
	CHECK(name_parse(hex, &again) == -EINVAL);
	hex[BK_HEX_BYTES - 2] = '\0';
	CHECK(name_parse(hex, &again) == -EINVAL);
	strcat(hex, "A");
	CHECK(name_parse(hex, &again) == -EINVAL);
}

int main(void)
{
	make_key_file(key_path, 1);
	make_key_file(other_path, 2);
	test_config(false);
	test_config(true);
	test_names();
	CHECK(!unlink(key_path) && !unlink(other_path));
	printf("configs, names: there and back; damaged, foreign: refused\n");
	return 0;
}
