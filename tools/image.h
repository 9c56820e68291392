/* SPDX-License-Identifier: MIT */
/*
 * image: the two files of an exported snapshot.
 *
 *   FILE       memory, raw and sparse: the page at address GPA lies at offset GPA,
 *              except for memory whose address is beyond what files can hold; zero
 *              pages are holes
 *   FILE.json  the service's description (GET …/state) and
 *              "memory": {"file", "bytes", "map": [[gpa, len, offset], …]}, the map
 *              with one row for each run of memory, ascending by gpa
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <jansson.h>

#include "snapd/state.h"

struct image_run {
	uint64_t gpa, len, offset; /* bytes */
};

struct image_map {
	struct image_run *runs; /* owned */
	size_t nr;
	uint64_t file_bytes;
	uint64_t page_size;
};

/* All fail() and return an exit code. */

/* Lay out a file for the pieces in a description; adds "memory" to it. */
int image_map_make(json_t *state, const char *file, struct image_map *ret);
/* From "memory" of a FILE.json, checked. */
int image_map_read(json_t *state, const char *json_path, struct image_map *ret);
void image_map_deinit(struct image_map *m);
/* Where the page at gpa lies; *len: bytes that follow it in the run.  -1: nowhere. */
int64_t image_offset(const struct image_map *m, uint64_t gpa, uint64_t *len);

/* The payload of the record of that name, decoded from base64; malloc()ed; NULL when
 * there is none or it is malformed. */
void *image_payload(json_t *record, size_t *len);
json_t *image_record(json_t *state, const char *name);

/* The head of an import's stream (snapd/transfer/transfer.h): the state's blob, built anew from
 * the records, in w (*ret borrows); and the line in front of it, malloc()ed. */
int image_blob(json_t *state, const char *json_path, struct snapd_state_writer *w, const void **ret,
	       size_t *len);
int image_header(json_t *state, const char *json_path, const char *vm, const char *name,
		 const char *note, const char *tags, size_t state_bytes, char **ret);
