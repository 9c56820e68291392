/* SPDX-License-Identifier: MIT */
/*
 * cut_world: the workloads of cut.c, and what there has to be after each mark.
 */
#pragma once

#include "tests/lib/store_model.h"

#define FRAMES	   40u
#define PAGE	   4096u
#define LINES	   6u
#define SNAPS_MAX  512u
#define EVENTS_MAX 2048u

enum event_kind { COMMIT_BEGINS, COMMITTED, DELETE_BEGINS, DELETED };

struct snap {
	uint64_t values[FRAMES];
	uint64_t id;
	struct snapd_point point;
};

/* A timeline that the workload writes to. */
struct line {
	uint64_t timeline;
	struct pagemap *live;
	uint64_t values[FRAMES], next[FRAMES];
	struct epoch *ep;
};

extern struct world {
	char *dir; /* of everything */
	struct store *s;
	uint8_t vm[16];
	struct rand rand;
	struct line lines[LINES];
	struct snap snaps[SNAPS_MAX];
	uint32_t nr_snaps;
	struct {
		enum event_kind kind;
		uint32_t snap;
	} events[EVENTS_MAX];
	uint32_t nr_events;
} w;

/* Set, the store's clock is ahead by so much. */
extern time_t clock_ahead_s;

uint64_t gfn_of(uint32_t i);
/* New, seen before, zero, or gone. */
uint64_t choose_value(struct rand *r);
void put_frame(struct store *s, struct epoch *ep, uint32_t i, uint64_t value);

/* Each from an empty directory to a closed store. */
void small_workload(const char *dir);
void failing_workload(const char *dir);
void rewriting_workload(const char *dir);
void failing_gc_workload(const char *dir);
void random_workload(const char *dir);
void forget_world(void);
