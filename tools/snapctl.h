/* SPDX-License-Identifier: MIT */
/*
 * snapctl: what its files share.  One thread; a verb is a function that gets its
 * parsed arguments and returns an exit code.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include <jansson.h>

/* Exit codes, as documented in snapctl(1). */
enum {
	EXIT_DONE = 0,
	EXIT_FAILED = 1,
	EXIT_USAGE = 2,
	EXIT_NOT_FOUND = 3,
	EXIT_CONFLICT = 4,
	EXIT_CORRUPT = 5,
};

struct opt {
	const char *name; /* without the dashes */
	const char *arg;  /* what --help calls its value; NULL: a switch; "[X]": may be left out */
	const char *help; /* NULL: told elsewhere */
};

#define OPTS_MAX 18

struct args {
	const struct verb *verb;
	const char *values[OPTS_MAX]; /* of verb->opts; "" for a switch; NULL: absent */
	char **pos;		      /* positional; NULL-terminated */
	int nr_pos;
	char **rest; /* after "--"; NULL-terminated, NULL when there is none */
	/* global */
	bool json;
	bool no_progress;
	const char *socket;
};

struct verb {
	const char *name;
	const char *usage; /* positional arguments */
	const char *summary;
	int (*fn)(const struct args *a);
	int min_pos, max_pos;
	struct opt opts[OPTS_MAX]; /* ends with name NULL */
	bool takes_rest;	   /* "-- CMD…" */
	const char *more;	   /* a paragraph for --help, or NULL */
	const char *brief;	   /* for the list of verbs, at most 27 characters */
};

/* Value of an option of the verb: "" for a switch that is there, NULL when absent. */
const char *opt(const struct args *a, const char *name);

/* "snapctl: …" on stderr, one line; returns `code`. */
int fail(int code, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* From now on fail() writes its text there; NULL: to stderr again. */
void fail_into(char *buf, size_t size);

/* verbs */
int verb_vms(const struct args *a);
int verb_tag(const struct args *a);
int verb_snapshot(const struct args *a);
int verb_self_check(const struct args *a);
int verb_rollback(const struct args *a);
int verb_restore(const struct args *a);
int verb_list(const struct args *a);
int verb_show(const struct args *a);
int verb_diff(const struct args *a);
int verb_set(const struct args *a);
int verb_delete(const struct args *a);
int verb_prune(const struct args *a);
int verb_verify(const struct args *a);
int verb_export(const struct args *a);
int verb_import(const struct args *a);
int verb_doctor(const struct args *a);
int verb_policy(const struct args *a);
int verb_store(const struct args *a);
int verb_top(const struct args *a);
int verb_backup(const struct args *a);
int store_rebuild(const struct args *a);
int store_change_key(const struct args *a);
int verb_jobs(const struct args *a);
int verb_cancel(const struct args *a);
int verb_version(const struct args *a);

/* verbs_keep.c: what --keep-… options say, as the API has it. */
void keep_rules(const struct args *a, json_t *keep);
