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
