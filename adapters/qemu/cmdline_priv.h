/* SPDX-License-Identifier: MIT */
/*
 * A command line in pieces: between cmdline.c, options.c, backends.c and replacements.c.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>

#include <jansson.h>

#include "adapters/qemu/cmdline.h"

struct option {
	const char *text;  /* as it stands; borrowed */
	const char *name;  /* without dashes; "" for a disk image without an option */
	const char *given; /* its value; borrowed; NULL: it takes none */
	char *changed;	   /* instead; owned */
	json_t *props;	   /* of the value; owned */
	bool gone;
};

struct parsed {
	struct option *o; /* owned */
	size_t n;
	struct cmdline *out;
	/* what was found */
	const char *accel; /* the first; borrowed from props */
	unsigned long long ram_bytes;
	bool has_backend; /* main memory, or all of a NUMA machine's, is an object */
};

/* ---- options.c ---- */
void *must(void *p); /* out of memory ends the program */
bool begins(const char *s, const char *with);
bool option_is(const struct option *o, const char *name);
int options_split(struct parsed *p, char *const *argv, struct err *e);
/* All options that stay, to p->out. */
void options_join(struct parsed *p);
void parsed_deinit(struct parsed *p);
void parsed_note(struct parsed *p, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* ---- backends.c ---- */
int backends_fix(struct parsed *p, struct err *e);

/* ---- replacements.c ---- */
int replacements_apply(struct parsed *p, const struct cmdline_request *req, struct err *e);
/* A recorded line that names descriptors is refused. */
int replacements_no_descriptors(const struct parsed *p, struct err *e);
