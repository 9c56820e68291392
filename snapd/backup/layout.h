/* SPDX-License-Identifier: MIT */
/*
 * layout: the bytes of a backup repository; docs/backup-format.md says what they mean and
 * when they are valid.  All integers little-endian, no implicit padding.
 *
 *   config                what the repository is; made once, never changed
 *   packs/NAME            pages
 *   blobs/NAME            maps, states of VMs
 *   snapshots/NAME        manifests: a snapshot is in the repository if and only if its is
 *   forgotten/NAME        of a manifest: it goes when this is old enough
 *   marks/NAME            what a prune found in no manifest: it goes when this is old enough
 *
 * NAME is 64 hex digits: of `forgotten/` the manifest's, of all others a keyed hash of what
 * the object holds.  An object is put once, and every one has 20 random bytes: a name that was
 * deleted never comes back.
 */
#pragma once

#include <assert.h>
#include <stdint.h>

#define BK_NAME_BYTES	 32u
#define BK_TAG_BYTES	 16u
#define BK_MAJOR	 1u
#define BK_CONFIG_MAGIC	 "SNPBKCFG"
#define BK_OBJECT_MAGIC	 "SNPBKOBJ"
#define BK_BLOB_MAX	 (256u << 20) /* of a payload */
#define BK_RUN_BYTES	 (64u << 10)  /* of pages compressed together, at most */
#define BK_PACK_PAGES	 16384u	      /* of a pack, at most */
#define BK_PACK_DATA	 (24u << 20)  /* stored bytes of its runs, at most */
#define BK_LAYERS_MAX	 64u
#define BK_GRACE_MIN_S	 2u
#define BK_GRACE_DEFAULT (24u * 3600)
#define BK_GRACE_MAX_S	 (3650u * 24 * 3600)

/* What a reader must know; it refuses a repository with a bit that it does not. */
#define BK_FEATURE_SEALED 1ull /* encrypted on the client */
#define BK_FEATURES_KNOWN BK_FEATURE_SEALED

struct bk_name {
	uint8_t b[BK_NAME_BYTES];
};

struct bk_config {
	char magic[8];
	uint16_t major;
	uint8_t reserved[6];
	uint64_t features;
	uint8_t repo[16];
	uint64_t grace_s;
	uint64_t created_ns;
	uint8_t salt[16]; /* SEALED, else 0: */
	uint8_t nonce[24];
	uint8_t wrapped[32]; /* the repository key, encrypted */
	uint8_t tag[BK_TAG_BYTES];
	uint8_t hash[16]; /* BLAKE2b-128 of the bytes before it */
};
static_assert(sizeof(struct bk_config) == 160, "format");

enum bk_type { BK_PACK = 1, BK_MAP = 2, BK_STATE = 3, BK_MANIFEST = 4, BK_MARK = 5, BK_TOMB = 6 };
enum bk_codec { BK_RAW = 0, BK_ZSTD = 2 };
#define BK_OBJECT_SEALED 1u

struct bk_header {
	char magic[8];
	uint16_t major;
	uint8_t type;	    /* enum bk_type */
	uint8_t flags;	    /* BK_OBJECT_SEALED */
	uint8_t page_shift; /* PACK: 12, 14, 16; else 0 */
	uint8_t codec;	    /* of the payload; PACK: 0 */
	uint8_t reserved[2];
	uint8_t repo[16];
	uint8_t nonce[20]; /* random */
	uint8_t reserved2[4];
	uint64_t table_bytes;	    /* PACK: as stored; else 0 */
	uint64_t body_bytes;	    /* as stored */
	uint64_t plain_bytes;	    /* of the payload; PACK: of the table */
	uint32_t nr_runs, nr_pages; /* PACK */
	uint8_t reserved3[8];
};
static_assert(sizeof(struct bk_header) == 96, "format");

/* A pack's table: nr_runs of these, then nr_pages names of pages. */
struct bk_run {
	uint32_t stored_bytes; /* with the tag */
	uint16_t nr_pages;
	uint8_t codec;
	uint8_t reserved;
};
static_assert(sizeof(struct bk_run) == 8, "format");

/* A map's payload: this, nr_packs names, then runs of frames (layer.h). */
struct bk_map {
	uint32_t nr_packs;
	uint32_t reserved;
	uint64_t nr_frames;
};
static_assert(sizeof(struct bk_map) == 16, "format");

#define BK_SNAPSHOT_PINNED     1u
#define BK_SNAPSHOT_POSTMORTEM 2u

/* A manifest's payload: this, then nr_layers struct bk_layer, nr_maps names, the command line. */
struct bk_manifest {
	uint8_t store[16]; /* where it was taken: the store, */
	uint64_t snapshot; /* its number there, */
	uint64_t timeline, epoch;
	uint64_t taken_ns, pause_ns, pushed_ns;
	uint64_t state_bytes;
	uint8_t state[BK_NAME_BYTES];
	uint64_t nr_pages;   /* of the memory */
	uint64_t bytes_sent; /* by the push that made it */
	uint32_t page_size;
	uint32_t flags; /* BK_SNAPSHOT_… */
	uint32_t uid;
	uint32_t nr_layers, nr_maps; /* oldest first */
	uint32_t cmdline_bytes;
	char vm[64], arch[16], host[64], name[64];
	char note[256], tags[256];
};
static_assert(sizeof(struct bk_manifest) == 864, "format");

struct bk_layer {
	uint32_t nr_maps;
	uint32_t reserved;
	uint64_t nr_frames;
};
static_assert(sizeof(struct bk_layer) == 16, "format");

/* A mark's payload: so many of these. */
struct bk_marked {
	uint8_t name[BK_NAME_BYTES];
	uint8_t is_pack;
	uint8_t reserved[7];
};
static_assert(sizeof(struct bk_marked) == 40, "format");
