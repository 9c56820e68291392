/* SPDX-License-Identifier: MIT */
/* out: small helpers on JSON answers. */
#pragma once

#include <stdio.h>
#include <stdint.h>

#include <jansson.h>

static inline void cleanup_json(json_t **o)
{
	json_decref(*o);
}

static inline const char *get_text(json_t *o, const char *key)
{
	const char *s = json_string_value(json_object_get(o, key));

	return s ? s : "";
}

static inline uint64_t get_u64(json_t *o, const char *key)
{
	return (uint64_t)json_integer_value(json_object_get(o, key));
}

static inline char *text_u64(char *buf, size_t len, uint64_t v)
{
	snprintf(buf, len, "%llu", (unsigned long long)v);
	return buf;
}

static inline int print_json(json_t *o)
{
	json_dumpf(o, stdout, JSON_INDENT(2));
	putchar('\n');
	return 0;
}
