/* SPDX-License-Identifier: MIT */
/*
 * props: values of QEMU's options: "memfd,id=a,size=1G" or {"qom-type": …}, as JSON objects of
 * texts, and changed in place of one value.  Pure; out of memory ends the program.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>

#include <jansson.h>

/* `implied`: the key of a first piece without '='; of a later one the value is "on" ("off" and
 * the key without "no" in front, where it begins so, is QEMU's old way and not looked for).
 * NULL: neither.  JSON values that are no texts become such, nested ones stay.  The caller's. */
json_t *props_parse(const char *text, const char *implied);

/* "" when there is none. */
const char *props_get(const json_t *props, const char *key);
/* "on", "yes", "true", "y", as QEMU has it. */
bool props_on(const json_t *props, const char *key);

/* `text` with the value `from` of any key in `keys` (NULL-terminated) replaced; *nr counts.  JSON
 * is searched at every depth.  The caller's. */
char *props_replace(const char *text, const char *const *keys, const char *from, const char *to,
		    size_t *nr);

/* "1.5G" in bytes; without a suffix in `unit` bytes.  0: not a size. */
unsigned long long props_size(const char *text, unsigned long long unit);
