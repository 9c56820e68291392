/* SPDX-License-Identifier: MIT */
/* Keys, and XChaCha20-Poly1305 over the parts of a batch; see seal.h. */
#include "snapd/store/seal.h"

#include <assert.h>
#include <fcntl.h>
#include <sodium.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "snapd/util/cleanup.h"
#include "snapd/util/secretfile.h"

#define USER_KEY_MIN 32u
#define USER_KEY_MAX 4096u
#define KDF_CONTEXT  "snapd-st" /* crypto_kdf_CONTEXTBYTES */

static_assert(crypto_kdf_KEYBYTES == 32 && crypto_kdf_CONTEXTBYTES == 8, "disk format");
static_assert(crypto_aead_xchacha20poly1305_ietf_KEYBYTES == 32 &&
		      crypto_aead_xchacha20poly1305_ietf_ABYTES == SEAL_TAG_BYTES &&
		      crypto_aead_xchacha20poly1305_ietf_NPUBBYTES == SEAL_NONCE_BYTES + 4,
	      "disk format");

/* Numbers of the keys derived from the store key. */
enum purpose { FOR_RECORDS = 1, FOR_PAGES = 2, FOR_BLOBS = 3, FOR_INDEX = 4, FOR_HASHES = 16 };

struct seal {
	uint8_t uuid[16];
	uint8_t store_key[crypto_kdf_KEYBYTES];
	uint8_t records[32], pages[32], blobs[32], index[SEAL_INDEX_KEY_BYTES];
	struct page_secret hashes;
};

/* ---- the user's key ---- */

struct user_key {
	uint8_t bytes[USER_KEY_MAX + 1];
	size_t len;
};

static void user_key_free(struct user_key **k)
{
	sodium_free(*k); /* wipes */
}

static int user_key_read(const char *path, struct user_key *k, struct err *e)
{
	int r = secret_file_read(path, "key", k->bytes, sizeof(k->bytes), &k->len, NULL, e);

	if (r)
		return r;
	if (k->len < USER_KEY_MIN || k->len > USER_KEY_MAX)
		return err_set(e, EINVAL, "key %s has %s than %u bytes", path,
			       k->len < USER_KEY_MIN ? "fewer" : "more",
			       k->len < USER_KEY_MIN ? USER_KEY_MIN : USER_KEY_MAX);
	return 0;
}

int seal_wrapping_key(const char *path, const uint8_t salt[16], uint8_t ret[32], struct err *e)
{
	static const uint8_t personal[crypto_generichash_blake2b_PERSONALBYTES] = "snapd-wrap";
	_cleanup_(user_key_free) struct user_key *k = sodium_malloc(sizeof(*k));
	int r = k ? user_key_read(path, k, e) : err_errno(e, ENOMEM, "key %s", path);

	if (!r)
		crypto_generichash_blake2b_salt_personal(ret, 32, k->bytes, k->len, NULL, 0, salt,
							 personal);
	return r;
}

/* ---- STORE/key ---- */

static uint64_t key_file_hash(const struct key_file *f)
{
	return XXH3_64bits(f, offsetof(struct key_file, hash));
}

static int key_file_wrap(const struct seal *s, const char *path, struct key_file *f, struct err *e)
{
	uint8_t wrap[32];
	int r;

	*f = (struct key_file){.major = FMT_MAJOR};
	memcpy(f->magic, KEY_MAGIC, sizeof(f->magic));
	memcpy(f->store, s->uuid, sizeof(f->store));
	randombytes_buf(f->salt, sizeof(f->salt));
	randombytes_buf(f->nonce, sizeof(f->nonce));
	r = seal_wrapping_key(path, f->salt, wrap, e);
	if (r)
		return r;
	crypto_aead_xchacha20poly1305_ietf_encrypt_detached(f->wrapped, f->tag, NULL, s->store_key,
							    sizeof(f->wrapped), (const void *)f,
							    offsetof(struct key_file, nonce), NULL,
							    f->nonce, wrap);
	sodium_memzero(wrap, sizeof(wrap));
	f->hash = key_file_hash(f);
	return 0;
}

static int key_file_unwrap(struct seal *s, const char *path, const char *dir,
			   const struct key_file *f, struct err *e)
{
	uint8_t wrap[32];
	int r;

	if (memcmp(f->magic, KEY_MAGIC, sizeof(f->magic)) != 0 || f->hash != key_file_hash(f))
		return err_set(e, E_CORRUPT, "%s/key is damaged", dir);
	if (f->major != FMT_MAJOR)
		return err_set(e, EPROTO, "%s/key has format %u; this snapd knows %u", dir,
			       f->major, FMT_MAJOR);
	r = seal_wrapping_key(path, f->salt, wrap, e);
	if (r)
		return r;
	r = crypto_aead_xchacha20poly1305_ietf_decrypt_detached(
		s->store_key, NULL, f->wrapped, sizeof(f->wrapped), f->tag, (const void *)f,
		offsetof(struct key_file, nonce), f->nonce, wrap);
	sodium_memzero(wrap, sizeof(wrap));
	memcpy(s->uuid, f->store, sizeof(s->uuid));
	return r ? err_set(e, EKEYREJECTED, "%s is not the key of store %s", path, dir) : 0;
}

/* 1: there is none. */
static int key_file_read(int dir_fd, const char *dir, struct key_file *f, struct err *e)
{
	_cleanup_fd_ int fd = openat(dir_fd, "key", O_RDONLY | O_CLOEXEC);
	ssize_t n;

	if (fd < 0)
		return errno == ENOENT ? 1 : err_errno(e, errno, "%s/key", dir);
	n = read(fd, f, sizeof(*f));
	if (n < 0)
		return err_errno(e, errno, "%s/key", dir);
	return n == sizeof(*f) ? 0 : err_set(e, E_CORRUPT, "%s/key is cut off", dir);
}

static int key_file_write(int dir_fd, const char *dir, const struct key_file *f, struct err *e)
{
	_cleanup_fd_ int fd =
		openat(dir_fd, "key.new", O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	ssize_t n = fd < 0 ? -1 : write(fd, f, sizeof(*f));

	if (n >= 0 && n != sizeof(*f)) {
		n = -1;
		errno = ENOSPC;
	}
	if (n < 0 || fsync(fd) || renameat(dir_fd, "key.new", dir_fd, "key") || fsync(dir_fd))
		return err_errno(e, errno, "writing %s/key", dir);
	return 0;
}

/* ---- open and close ---- */

static void derive(struct seal *s)
{
	const uint8_t *k = s->store_key;

	crypto_kdf_derive_from_key(s->records, sizeof(s->records), FOR_RECORDS, KDF_CONTEXT, k);
	crypto_kdf_derive_from_key(s->pages, sizeof(s->pages), FOR_PAGES, KDF_CONTEXT, k);
	crypto_kdf_derive_from_key(s->blobs, sizeof(s->blobs), FOR_BLOBS, KDF_CONTEXT, k);
	crypto_kdf_derive_from_key(s->index, sizeof(s->index), FOR_INDEX, KDF_CONTEXT, k);
	static_assert(sizeof(s->hashes.b) == 3 * 64, "three parts");
	for (uint64_t i = 0; i < 3; i++)
		crypto_kdf_derive_from_key(s->hashes.b + 64 * i, 64, FOR_HASHES + i, KDF_CONTEXT,
					   k);
}

static int make_key(struct seal *s, int dir_fd, const char *dir, const char *path, struct err *e)
{
	struct key_file f;
	int r;

	randombytes_buf(s->store_key, sizeof(s->store_key));
	randombytes_buf(s->uuid, sizeof(s->uuid));
	s->uuid[6] = (s->uuid[6] & 0x0f) | 0x40;
	s->uuid[8] = (s->uuid[8] & 0x3f) | 0x80;
	r = key_file_wrap(s, path, &f, e);
	return r ? r : key_file_write(dir_fd, dir, &f, e);
}

static int get_key(struct seal *s, int dir_fd, const char *dir, const char *path, bool create,
		   struct err *e)
{
	struct key_file f;
	int r = key_file_read(dir_fd, dir, &f, e);

	if (r < 0)
		return r;
	if (r && create)
		return make_key(s, dir_fd, dir, path, e);
	if (r)
		return err_set(e, EPROTO, "store %s is not encrypted, but a key is given", dir);
	return key_file_unwrap(s, path, dir, &f, e);
}

int seal_open(int dir_fd, const char *dir, const char *path, bool create, struct seal **ret,
	      struct err *e)
{
	struct seal *s;
	int r;

	*ret = NULL;
	if (!path) {
		if (!faccessat(dir_fd, "key", F_OK, 0))
			return err_set(e, ENOKEY, "store %s is encrypted: its key is needed", dir);
		return errno == ENOENT ? 0 : err_errno(e, errno, "%s/key", dir);
	}
	if (sodium_init() < 0)
		return err_set(e, EIO, "libsodium cannot start");
	s = sodium_malloc(ALIGN_UP(sizeof(*s), 64));
	if (!s)
		return err_errno(e, ENOMEM, "key of store %s", dir);
	r = get_key(s, dir_fd, dir, path, create, e);
	if (r) {
		seal_close(s);
		return r;
	}
	derive(s);
	sodium_mprotect_readonly(s);
	*ret = s;
	return 0;
}

void seal_close(struct seal *s)
{
	sodium_free(s); /* wipes */
}

int seal_rekey(const struct seal *s, int dir_fd, const char *dir, const char *path, struct err *e)
{
	struct key_file f;
	int r = key_file_wrap(s, path, &f, e);

	return r ? r : key_file_write(dir_fd, dir, &f, e);
}

const uint8_t *seal_uuid(const struct seal *s)
{
	return s->uuid;
}

const uint8_t *seal_index_key(const struct seal *s)
{
	return s->index;
}

void seal_page_secret(const struct seal *s, struct page_secret *ret)
{
	*ret = s->hashes;
}

/* ---- batches ---- */

/* The whole header but its checksum, which is made last. */
static void header_data(const struct batch_header *h, struct batch_header *ret)
{
	*ret = *h;
	ret->hash = 0;
}

/* What of the header a page is bound to: place, life, order, store, VM. */
#define PLACE_AT    offsetof(struct batch_header, segment)
#define PLACE_BYTES (offsetof(struct batch_header, point) - PLACE_AT)
static_assert(PLACE_AT == 24 && PLACE_BYTES == 56, "disk format");

static void part_nonce(const struct batch_header *h, uint32_t part, uint8_t ret[24])
{
	memcpy(ret, batch_sealed(h)->nonce, SEAL_NONCE_BYTES);
	memcpy(ret + SEAL_NONCE_BYTES, &part, sizeof(part));
}

void seal_begin(struct batch_header *h)
{
	struct batch_sealed *x = (struct batch_sealed *)(h + 1);

	*x = (struct batch_sealed){0};
	randombytes_buf(x->nonce, sizeof(x->nonce));
}

void seal_page(const struct seal *s, struct batch_header *h, uint32_t i, void *bytes, size_t len)
{
	uint8_t nonce[24];

	part_nonce(h, i, nonce);
	crypto_aead_xchacha20poly1305_ietf_encrypt_detached(bytes, (uint8_t *)batch_page_tag(h, i),
							    NULL, bytes, len,
							    (const uint8_t *)h + PLACE_AT,
							    PLACE_BYTES, NULL, nonce, s->pages);
}

bool unseal_page(const struct seal *s, const struct batch_header *h, uint32_t i, void *dst,
		 const void *src, size_t len)
{
	uint8_t nonce[24];

	part_nonce(h, i, nonce);
	return !crypto_aead_xchacha20poly1305_ietf_decrypt_detached(dst, NULL, src, len,
								    batch_page_tag(h, i),
								    (const uint8_t *)h + PLACE_AT,
								    PLACE_BYTES, nonce, s->pages);
}

static size_t records_bytes(const struct batch_header *h)
{
	return (size_t)h->nr_entries * (sizeof(struct batch_page) + SEAL_TAG_BYTES);
}

void seal_records(const struct seal *s, struct batch_header *h)
{
	struct batch_sealed *x = (struct batch_sealed *)(h + 1);
	struct batch_header data;
	uint8_t nonce[24];

	header_data(h, &data);
	part_nonce(h, 0, nonce);
	crypto_aead_xchacha20poly1305_ietf_encrypt_detached((uint8_t *)(x + 1), x->tag, NULL,
							    (const uint8_t *)(x + 1),
							    records_bytes(h), (const void *)&data,
							    sizeof(data), NULL, nonce, s->records);
}

bool unseal_records(const struct seal *s, struct batch_header *h)
{
	struct batch_sealed *x = (struct batch_sealed *)(h + 1);
	struct batch_header data;
	uint8_t nonce[24];

	header_data(h, &data);
	part_nonce(h, 0, nonce);
	return !crypto_aead_xchacha20poly1305_ietf_decrypt_detached(
		(uint8_t *)(x + 1), NULL, (const uint8_t *)(x + 1), records_bytes(h), x->tag,
		(const void *)&data, sizeof(data), nonce, s->records);
}

void seal_blob(const struct seal *s, struct batch_header *h, void *payload)
{
	struct batch_sealed *x = (struct batch_sealed *)(h + 1);
	struct batch_header data;
	uint8_t nonce[24];

	header_data(h, &data);
	part_nonce(h, 0, nonce);
	crypto_aead_xchacha20poly1305_ietf_encrypt_detached(payload, x->tag, NULL, payload,
							    h->payload_bytes, (const void *)&data,
							    sizeof(data), NULL, nonce, s->blobs);
}

bool unseal_blob(const struct seal *s, const struct batch_header *h, void *payload)
{
	struct batch_header data;
	uint8_t nonce[24];

	header_data(h, &data);
	part_nonce(h, 0, nonce);
	return !crypto_aead_xchacha20poly1305_ietf_decrypt_detached(
		payload, NULL, payload, h->payload_bytes, batch_sealed(h)->tag, (const void *)&data,
		sizeof(data), nonce, s->blobs);
}
