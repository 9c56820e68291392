/* SPDX-License-Identifier: MIT */
/*
 * A store for rebuild_rules.c: made with the store's own functions, looked into and damaged
 * by the batches in its files, and its index made again.  One store at a time, one thread.
 */
#pragma once

#include "snapd/store/internal.h"
#include "snapd/store/rebuild.h"
#include "snapd/store/reclog.h"
#include "tests/lib/store_model.h"

#define PAGE	    4096u
#define BATCHES_MAX 128u
#define SEGMENTS    40u
#define FILLS	    700u /* pages that do not fit into one segment */
#define NAMED_MAX   8u

extern char *dir;
extern struct store *s; /* open, but for between close_store() and rebuild_closed() */

/* ---- the store ---- */

/* A timeline of a VM that is begun. */
struct line {
	uint8_t vm[16];
	uint64_t timeline;
	struct pagemap *live;
};
void begin_line(struct line *l, const char *name);
void end_line(struct line *l);
void put_page(struct epoch *ep, uint64_t gfn, uint64_t value);
/* In an epoch that is not committed; they do not compress, so each takes its block. */
struct epoch *write_pages(struct line *l, uint64_t first, uint64_t nr, uint64_t value);
uint64_t commit(struct epoch *ep, const char *name);
uint64_t take(struct line *l, uint64_t first, uint64_t nr, uint64_t value, const char *name);
void set_note(uint64_t id, const char *note);
void delete (uint64_t id);
/* All records to the journal. */
void image(void);
/* No timeline lives. */
void gc(void);
/* Called in the next transaction's place, and then forgotten. */
extern void (*before_commit)(void);

/* ---- batches on disk ---- */

struct spot {
	uint32_t segment, block, blocks;
	uint64_t seq, generation;
};
/* Those of a type, in all segments, free ones too, in the order of seq. */
uint32_t list_batches(enum batch_type type, struct spot *ret);
struct spot newest(enum batch_type type);
/* As if gc had taken it out. */
void wipe(struct spot x);
void spoil_payload(struct spot x);
/* What becomes of a record when its batch is written anew. */
enum fate { STAYS, GOES, SPOILED };
/* A batch with other records, all else right. */
void change_records(struct spot x, enum fate (*fate)(const struct reclog_record *));
/* The segments as a snapd before there was a journal would have left them. */
void take_journal_away(void);

/* ---- the rebuild ---- */

/* Of the last one: what it says, how many lines, and snapshots named in them. */
extern struct rebuild_result result;
extern uint32_t nr_lines;
extern uint64_t named[NAMED_MAX];
extern uint32_t nr_named;

void close_store(void);
/* The index goes, and comes back. */
void rebuild_closed(void);
void rebuild(void);
bool is_there(uint64_t id);
bool has_note(uint64_t id, const char *note);
bool has_name(uint64_t id, const char *name);
/* Every byte of it. */
void check_is_clean(void);
