/* SPDX-License-Identifier: MIT */
/* A repository's identity, keys and names; see keys.h. */
#include "snapd/backup/keys.h"

#include <errno.h>
#include <sodium.h>
#include <stdio.h>
#include <string.h>

#include "snapd/store/seal.h"
#include "snapd/util/cleanup.h"

#define KDF_CONTEXT "snapd-bk"

static_assert(crypto_aead_xchacha20poly1305_ietf_ABYTES == BK_TAG_BYTES &&
		      crypto_aead_xchacha20poly1305_ietf_NPUBBYTES == 24 &&
		      crypto_kdf_KEYBYTES == 32,
	      "format");

enum purpose { FOR_NAMES = 1, FOR_PAGES = 2, FOR_BODIES = 3, FOR_RUNS = 4 };

static void derive(struct repo_keys *k, const uint8_t key[32])
{
	crypto_kdf_derive_from_key(k->names, 32, FOR_NAMES, KDF_CONTEXT, key);
	crypto_kdf_derive_from_key(k->pages, 32, FOR_PAGES, KDF_CONTEXT, key);
	crypto_kdf_derive_from_key(k->bodies, 32, FOR_BODIES, KDF_CONTEXT, key);
	crypto_kdf_derive_from_key(k->runs, 32, FOR_RUNS, KDF_CONTEXT, key);
}

static void from_config(struct repo_keys *k, const struct bk_config *c)
{
	memcpy(k->repo, c->repo, sizeof(k->repo));
	k->sealed = c->features & BK_FEATURE_SEALED;
	k->grace_s = c->grace_s;
}

/* Of an open repository: known to everyone who can read it. */
static void open_key(const struct bk_config *c, uint8_t ret[32])
{
	crypto_generichash_blake2b(ret, 32, c->repo, sizeof(c->repo), NULL, 0);
}

static void config_hash(const struct bk_config *c, uint8_t ret[16])
{
	crypto_generichash_blake2b(ret, 16, (const void *)c, offsetof(struct bk_config, hash), NULL,
				   0);
}

int keys_make(const char *key_file, uint64_t grace_s, uint64_t now_ns, struct bk_config *ret,
	      struct repo_keys *keys, struct err *e)
{
	uint8_t key[32], wrap[32];
	int rc;

	if (sodium_init() < 0)
		return err_set(e, EIO, "libsodium does not start");
	*ret = (struct bk_config){.major = BK_MAJOR, .grace_s = grace_s, .created_ns = now_ns};
	memcpy(ret->magic, BK_CONFIG_MAGIC, sizeof(ret->magic));
	randombytes_buf(ret->repo, sizeof(ret->repo));
	open_key(ret, key);
	if (key_file) {
		ret->features |= BK_FEATURE_SEALED;
		randombytes_buf(key, sizeof(key));
		randombytes_buf(ret->salt, sizeof(ret->salt));
		randombytes_buf(ret->nonce, sizeof(ret->nonce));
		rc = seal_wrapping_key(key_file, ret->salt, wrap, e);
		if (rc)
			return rc;
		crypto_aead_xchacha20poly1305_ietf_encrypt_detached(
			ret->wrapped, ret->tag, NULL, key, sizeof(key), (const void *)ret,
			offsetof(struct bk_config, nonce), NULL, ret->nonce, wrap);
		sodium_memzero(wrap, sizeof(wrap));
	}
	config_hash(ret, ret->hash);
	from_config(keys, ret);
	derive(keys, key);
	sodium_memzero(key, sizeof(key));
	return 0;
}

static int check_config(const struct bk_config *c, size_t len, struct err *e)
{
	uint8_t hash[16];

	if (len != sizeof(*c) || memcmp(c->magic, BK_CONFIG_MAGIC, sizeof(c->magic)) != 0)
		return err_set(e, E_CORRUPT, "config: not of a backup repository");
	config_hash(c, hash);
	if (memcmp(hash, c->hash, sizeof(hash)) != 0)
		return err_set(e, E_CORRUPT, "config: damaged");
	if (c->major != BK_MAJOR || c->features & ~BK_FEATURES_KNOWN)
		return err_set(e, EPROTO,
			       "config: format %u, features %llx; this snapd knows %u and %llx",
			       c->major, (unsigned long long)c->features, BK_MAJOR,
			       (unsigned long long)BK_FEATURES_KNOWN);
	if (c->grace_s < BK_GRACE_MIN_S || c->grace_s > BK_GRACE_MAX_S)
		return err_set(e, E_CORRUPT, "config: a grace time of %llu s",
			       (unsigned long long)c->grace_s);
	return 0;
}

static int unwrap(const struct bk_config *c, const char *key_file, uint8_t key[32], struct err *e)
{
	uint8_t wrap[32];
	int rc = seal_wrapping_key(key_file, c->salt, wrap, e);

	if (rc)
		return rc;
	rc = crypto_aead_xchacha20poly1305_ietf_decrypt_detached(
		key, NULL, c->wrapped, sizeof(c->wrapped), c->tag, (const void *)c,
		offsetof(struct bk_config, nonce), c->nonce, wrap);
	sodium_memzero(wrap, sizeof(wrap));
	return rc ? err_set(e, EKEYREJECTED, "config: %s is not the key of this repository",
			    key_file)
		  : 0;
}

int keys_open(const struct bk_config *config, size_t len, const char *key_file,
	      struct repo_keys *keys, struct err *e)
{
	uint8_t key[32];
	int rc = sodium_init() < 0 ? err_set(e, EIO, "libsodium does not start") : 0;

	if (!rc)
		rc = check_config(config, len, e);
	if (rc)
		return rc;
	from_config(keys, config);
	if (keys->sealed && !key_file)
		return err_set(e, ENOKEY,
			       "config: the repository is encrypted: backup_key names its key");
	if (!keys->sealed && key_file)
		return err_set(e, EPROTO,
			       "config: a backup_key is set, but this repository is not encrypted");
	if (keys->sealed)
		rc = unwrap(config, key_file, key, e);
	else
		open_key(config, key);
	if (!rc)
		derive(keys, key);
	sodium_memzero(key, sizeof(key));
	return rc;
}

void keys_wipe(struct repo_keys *keys)
{
	sodium_memzero(keys, sizeof(*keys));
}

void keys_page_name(const struct repo_keys *k, const void *page, size_t len, struct bk_name *ret)
{
	crypto_generichash_blake2b(ret->b, sizeof(ret->b), page, len, k->pages, sizeof(k->pages));
}

void keys_object_name(const struct repo_keys *k, const void *a, size_t a_len, const void *b,
		      size_t b_len, struct bk_name *ret)
{
	crypto_generichash_blake2b_state s;

	crypto_generichash_blake2b_init(&s, k->names, sizeof(k->names), sizeof(ret->b));
	crypto_generichash_blake2b_update(&s, a, a_len);
	if (b_len)
		crypto_generichash_blake2b_update(&s, b, b_len);
	crypto_generichash_blake2b_final(&s, ret->b, sizeof(ret->b));
}

void keys_header(const struct repo_keys *k, enum bk_type type, struct bk_header *ret)
{
	*ret = (struct bk_header){.major = BK_MAJOR,
				  .type = (uint8_t)type,
				  .flags = k->sealed ? BK_OBJECT_SEALED : 0};
	memcpy(ret->magic, BK_OBJECT_MAGIC, sizeof(ret->magic));
	memcpy(ret->repo, k->repo, sizeof(ret->repo));
	randombytes_buf(ret->nonce, sizeof(ret->nonce));
}

int keys_check_header(const struct repo_keys *k, const struct bk_header *h, enum bk_type type,
		      struct err *e)
{
	if (memcmp(h->magic, BK_OBJECT_MAGIC, sizeof(h->magic)) != 0)
		return err_set(e, E_CORRUPT, "not an object of a backup repository");
	if (h->major != BK_MAJOR)
		return err_set(e, EPROTO, "format %u; this snapd knows %u", h->major, BK_MAJOR);
	if (memcmp(h->repo, k->repo, sizeof(h->repo)) != 0)
		return err_set(e, E_CORRUPT, "of another repository");
	if (h->type != type)
		return err_set(e, E_CORRUPT, "of type %u, not %u", h->type, type);
	if (h->flags != (k->sealed ? BK_OBJECT_SEALED : 0))
		return err_set(e, E_CORRUPT, "flags %x do not fit this repository", h->flags);
	return 0;
}

static void part_nonce(const struct bk_header *h, uint32_t part, uint8_t ret[24])
{
	memcpy(ret, h->nonce, sizeof(h->nonce));
	memcpy(ret + sizeof(h->nonce), &part, sizeof(part));
}

/* Runs are sealed before the header is complete: their key and nonce say all. */
static size_t part_data(uint32_t part)
{
	return part ? 0 : sizeof(struct bk_header);
}

void keys_seal(const struct repo_keys *k, const struct bk_header *h, uint32_t part, uint8_t *bytes,
	       size_t len)
{
	uint8_t nonce[24];

	part_nonce(h, part, nonce);
	crypto_aead_xchacha20poly1305_ietf_encrypt_detached(bytes, bytes + len, NULL, bytes, len,
							    (const void *)h, part_data(part), NULL,
							    nonce, part ? k->runs : k->bodies);
}

bool keys_unseal(const struct repo_keys *k, const struct bk_header *h, uint32_t part,
		 uint8_t *bytes, size_t len)
{
	uint8_t nonce[24];

	part_nonce(h, part, nonce);
	return !crypto_aead_xchacha20poly1305_ietf_decrypt_detached(bytes, NULL, bytes, len,
								    bytes + len, (const void *)h,
								    part_data(part), nonce,
								    part ? k->runs : k->bodies);
}

const char *name_hex(const struct bk_name *n, char ret[BK_HEX_BYTES])
{
	return sodium_bin2hex(ret, BK_HEX_BYTES, n->b, sizeof(n->b));
}

int name_parse(const char *hex, struct bk_name *ret)
{
	size_t len;

	if (strlen(hex) != BK_HEX_BYTES - 1 || strspn(hex, "0123456789abcdef") != BK_HEX_BYTES - 1)
		return -EINVAL;
	return sodium_hex2bin(ret->b, sizeof(ret->b), hex, BK_HEX_BYTES - 1, NULL, &len, NULL)
		       ? -EINVAL
		       : 0;
}
