/* SPDX-License-Identifier: MIT */
/* AWS Signature Version 4 (docs.aws.amazon.com, "Signature Version 4 signing process"). */
#include "snapd/backup/s3_sign.h"

#include <sodium.h>
#include <stdio.h>
#include <string.h>

struct key {
	uint8_t b[crypto_auth_hmacsha256_BYTES];
};

size_t s3_encode(char *dst, const char *src, bool keep_slash)
{
	static const char plain[] =
		"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~";
	static const char hex[] = "0123456789ABCDEF";
	char *p = dst;

	for (; *src; src++) {
		const unsigned char c = (unsigned char)*src;

		if (strchr(plain, c) || (keep_slash && c == '/')) {
			*p++ = (char)c;
		} else {
			*p++ = '%';
			*p++ = hex[c >> 4];
			*p++ = hex[c & 15];
		}
	}
	*p = '\0';
	return (size_t)(p - dst);
}

static void hash_str(crypto_hash_sha256_state *h, const char *s)
{
	crypto_hash_sha256_update(h, (const unsigned char *)s, strlen(s));
}

static void hash_line(crypto_hash_sha256_state *h, const char *a, const char *b)
{
	hash_str(h, a);
	hash_str(h, b);
	hash_str(h, "\n");
}

static const char *signed_headers(const struct s3_to_sign *w, const struct s3_creds *c)
{
	if (*c->token)
		return w->range ? "host;range;x-amz-content-sha256;x-amz-date;x-amz-security-token"
				: "host;x-amz-content-sha256;x-amz-date;x-amz-security-token";
	return w->range ? "host;range;x-amz-content-sha256;x-amz-date"
			: "host;x-amz-content-sha256;x-amz-date";
}

/* Hash of the canonical request. */
static void hash_request(const struct s3_to_sign *w, const struct s3_creds *c,
			 char ret[static S3_SHA256_HEX])
{
	uint8_t sum[crypto_hash_sha256_BYTES];
	crypto_hash_sha256_state h;

	crypto_hash_sha256_init(&h);
	hash_line(&h, w->method, "");
	hash_line(&h, w->path, "");
	hash_line(&h, w->query, "");
	hash_line(&h, "host:", w->host);
	if (w->range)
		hash_line(&h, "range:", w->range);
	hash_line(&h, "x-amz-content-sha256:", w->payload_sha256);
	hash_line(&h, "x-amz-date:", w->date);
	if (*c->token)
		hash_line(&h, "x-amz-security-token:", c->token);
	hash_line(&h, "\n", signed_headers(w, c));
	hash_str(&h, w->payload_sha256);
	crypto_hash_sha256_final(&h, sum);
	sodium_bin2hex(ret, S3_SHA256_HEX, sum, sizeof(sum));
	sodium_memzero(&h, sizeof(h));
}

static void hmac(struct key *ret, const void *key, size_t key_len, const char *a, const char *b)
{
	crypto_auth_hmacsha256_state h;

	crypto_auth_hmacsha256_init(&h, key, key_len);
	crypto_auth_hmacsha256_update(&h, (const unsigned char *)a, strlen(a));
	crypto_auth_hmacsha256_update(&h, (const unsigned char *)b, strlen(b));
	crypto_auth_hmacsha256_final(&h, ret->b);
	sodium_memzero(&h, sizeof(h));
}

static void signing_key(const struct s3_to_sign *w, const struct s3_creds *c, struct key *k)
{
	char begin[4 + sizeof(c->secret_key)], day[9];

	snprintf(day, sizeof(day), "%.8s", w->date);
	snprintf(begin, sizeof(begin), "AWS4%s", c->secret_key);
	hmac(k, begin, strlen(begin), day, "");
	hmac(k, k->b, sizeof(k->b), w->region, "");
	hmac(k, k->b, sizeof(k->b), "s3", "");
	hmac(k, k->b, sizeof(k->b), "aws4_request", "");
	sodium_memzero(begin, sizeof(begin));
}

void s3_sign(const struct s3_to_sign *w, const struct s3_creds *c, char ret[static S3_AUTH_BYTES])
{
	char scope[96], text[192], request[S3_SHA256_HEX], signature[S3_SHA256_HEX];
	struct key k;

	hash_request(w, c, request);
	snprintf(scope, sizeof(scope), "%.8s/%.40s/s3/aws4_request", w->date, w->region);
	snprintf(text, sizeof(text), "AWS4-HMAC-SHA256\n%s\n%s\n", w->date, scope);
	signing_key(w, c, &k);
	hmac(&k, k.b, sizeof(k.b), text, request);
	sodium_bin2hex(signature, sizeof(signature), k.b, sizeof(k.b));
	sodium_memzero(&k, sizeof(k));
	snprintf(ret, S3_AUTH_BYTES,
		 "AWS4-HMAC-SHA256 Credential=%s/%s,SignedHeaders=%s,Signature=%s", c->access_key,
		 scope, signed_headers(w, c), signature);
}
